"""examples/evaluate.py and examples/predict.py on a run that was really trained, for two steps."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("albumentations")
pytest.importorskip("tensorboard")

import cv2
from PIL import Image

from fcnseg import data, training
from fcnseg import evaluate as official
from fcnseg.data.synthetic import write_cityscapes
from fcnseg.inference import Inference, load_run
from fcnseg.training import CheckpointError, checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
Outcome = tuple[int, str, str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the run."""
    folder = tmp_path_factory.mktemp("run")
    scenes = write_cityscapes(folder / "scenes", train=4, val=3, size=(64, 128))
    for path in (scenes / "gtFine/val").rglob("*_labelIds.png"):
        # What the official scores need beside the labels; no instances, so crowds.
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.uint16)
        instances = path.with_name(path.name.replace("labelIds", "instanceIds"))
        assert cv2.imwrite(str(instances), labels)
    config = training.TrainConfig(
        data_root=scenes, output=folder / "run", backbone="resnet18", output_stride=32,
        upsample="bilinear", crop=(64, 64), epochs=1, batch_size=2, val_batch_size=2, workers=0,
        lr=0.05, device="cpu",
    )  # fmt: skip
    with contextlib.redirect_stdout(None):
        training.train(config)
    return folder


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run an example in this process: its exit code, stdout and stderr."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run_example(name: str, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module = importlib.import_module(name)
        capsys.readouterr()
        try:
            code = module.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run_example


@pytest.mark.long(7)
def test_commands_after_the_demonstration_work(
    run: Path, call: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "run" / "data").symlink_to(run / "scenes")
    monkeypatch.setattr(sys, "argv", ["examples/train_cityscapes.py"])
    text = importlib.import_module("train_cityscapes").what_next(run / "run")
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("    ")]
    for script, *arguments in commands[:2]:
        assert call(Path(script).stem, *arguments)[0] == 0
    assert (run / "run" / "matrix.png").exists()
    assert len(list((run / "run" / "labelled").rglob("*_overlay.png"))) == 3
    for picture in ("predictions.png", "curves.png"):
        assert str(run / "run" / picture) in text and (run / "run" / picture).exists()


# -- evaluate.py -----------------------------------------------------------------------------------


def test_scores_are_those_of_the_run(run: Path, call: Callable[..., Outcome]) -> None:
    best = checkpoint.load(run / "run/best.pt")
    wanted = best["scores"]
    outputs = {"--json": run / "scores.json", "--matrix": run / "matrix.png"}
    options = [x for pair in outputs.items() for x in pair]
    code, out, err = call("evaluate", run / "run", "--workers", 0, "--quiet", *options)
    assert (code, err) == (0, "")
    assert "class" in out and "sidewalk" in out and f"mIoU {wanted['mean_iou']:.4f}" in out
    content = json.loads(outputs["--json"].read_text())
    assert content["meanIoU"] == wanted["mean_iou"]  # to the last bit: the same counts
    assert content["pixelAccuracy"] == wanted["pixel_accuracy"]
    ious = [float("nan") if v is None else v for v in content["classScores"].values()]
    assert torch.equal(torch.tensor(ious).nan_to_num(-1), wanted["iou"].float().nan_to_num(-1))
    assert (content["epoch"], content["images"], content["split"]) == (1, 3, "val")
    assert cv2.imread(str(outputs["--matrix"])).shape[0] > 300


@pytest.mark.parametrize(
    "options", [[], ["--multi-scale", "0.5", "1", "--flip", "--window", "48", "64"]]
)
def test_submission_has_the_same_official_scores(
    run: Path, call: Callable[..., Outcome], tmp_path: Path, options: list[str]
) -> None:
    results = tmp_path / "results"
    arguments = [run / "run/best.pt", "--workers", 0, "--quiet", *options]
    code, *_ = call("evaluate", *arguments, "--submission", results, "--json", tmp_path / "a.json")
    assert code == 0
    assert call("evaluate", *arguments, "--json", tmp_path / "b.json")[0] == 0
    ours = json.loads((tmp_path / "a.json").read_text())
    assert ours["confMatrix"] == json.loads((tmp_path / "b.json").read_text())["confMatrix"]
    assert len(list(results.iterdir())) == 3
    found = official.evaluate_cityscapes(results, run / "scenes", workers=1)
    assert not found.failures and not found.unmatched
    scored = {name: found.result["classScores"][name] for name in ours["classScores"]}
    for name, value in ours["classScores"].items():
        assert scored[name] == pytest.approx(float("nan") if value is None else value, nan_ok=True)
    assert found.result["averageScoreClasses"] == pytest.approx(ours["meanIoU"])
    assert sum(value is not None for value in ours["classScores"].values()) > 5


def test_submission_values_are_the_data_sets_own() -> None:
    assert data.Cityscapes.file_values().tolist() == list(data.cityscapes.TRAIN_ID_TO_LABEL_ID)
    assert data.ADE20K.file_values().tolist() == list(range(1, 151))
    assert data.CamVid.file_values().tolist() == list(range(11))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data-root", "absent"], "error: absent: no such folder, expected the root of City"),
        (["--split", "tset"], "error: split: Cityscapes has train, val, test; got 'tset'"),
        (["--window", "0", "5"], "error: window must be at least 1, got"),
        (["--multi-scale", "-1"], r"error: scales must lie in (0, inf), got -1.0"),
        (["--precision", "fp16"], "error: --precision fp16 needs a CUDA device"),
        (["--device", "abacus"], "error: --device must be auto, cpu, cuda or cuda:N, got abacus"),
        (["--device", "meta"], "error: --device must be auto, cpu, cuda or cuda:N, got meta"),
        (["--device", "cuda:01"], "error: --device must be auto, cpu, cuda or cuda:N, got cuda:01"),
        (["--device", "cuda:99"], "error: --device cuda:99: PyTorch sees "),
    ],
)
def test_bad_options(
    run: Path, call: Callable[..., Outcome], options: list[str], expected: str
) -> None:
    code, _, err = call("evaluate", run / "run", "--device", "cpu", "--quiet", *options)
    assert code == 1 and err.startswith(expected), err


def test_bad_checkpoints(run: Path, call: Callable[..., Outcome], tmp_path: Path) -> None:
    code, _, err = call("evaluate", tmp_path)
    assert code == 1 and err == f"error: no checkpoint at {tmp_path / 'best.pt'}\n"
    torn = tmp_path / "torn.pt"
    torn.write_bytes((run / "run/best.pt").read_bytes()[:1000])
    assert "error: cannot read the checkpoint" in call("evaluate", torn)[2]
    state = checkpoint.load(run / "run/best.pt")
    for part, reason in (("model", "it lacks 'model'"), ("config", "it lacks 'config'")):
        checkpoint.save(torn, {key: value for key, value in state.items() if key != part})
        with pytest.raises(CheckpointError, match=f"is not of a training run: {reason}"):
            load_run(torn)
    checkpoint.save(torn, state | {"model": {"a": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match=r"not of a training run: .*Missing key.{200}"):
        load_run(torn)


def test_damaged_image_is_named(run: Path, call: Callable[..., Outcome], tmp_path: Path) -> None:
    for path in (run / "scenes").rglob("*/val/*/*.png"):
        copy = tmp_path / path.relative_to(run / "scenes")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    damaged = sorted(tmp_path.rglob("*_leftImg8bit.png"))[1]
    damaged.write_bytes(damaged.read_bytes()[:500])
    for workers in (0, 1):
        options = ["--data-root", tmp_path, "--quiet", "--workers", workers]
        code, _, err = call("evaluate", run / "run", *options)
        assert code == 1 and err.count("\n") == 1 and f"{damaged}: corrupt or truncated" in err


# -- predict.py ------------------------------------------------------------------------------------


def scene(run: Path, index: int) -> Path:
    return sorted((run / "scenes/leftImg8bit/val").rglob("*.png"))[index]


def expected_labels(run: Path, path: Path) -> np.ndarray:
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    x = data.normalise(torch.from_numpy(image).permute(2, 0, 1)[None])
    model = load_run(run / "run").model.to(memory_format=torch.channels_last)
    return Inference().predict(model, x)[0].numpy()


def test_predicts_images_and_folders(
    run: Path, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    (photos / "deeper").mkdir(parents=True)
    image = cv2.imread(str(scene(run, 1)))
    cv2.imwrite(str(photos / "deeper/a.jpg"), image)
    cv2.imwrite(str(photos / "grey.png"), image[:50, :70, 0])
    (photos / "notes.txt").write_text("not an image")
    output = tmp_path / "out"
    code, out, err = call(
        "predict", run / "run", scene(run, 0), photos, "--output", output, "--alpha", "0.25"
    )
    assert (code, err) == (0, "") and "3 pictures labelled" in out
    stem = scene(run, 0).stem
    names = {str(path.relative_to(output)) for path in output.rglob("*.png")}
    stems = (stem, "deeper/a", "grey")
    assert names == {f"{s}_{kind}.png" for s in stems for kind in ("labels", "overlay")}
    with Image.open(output / f"{stem}_labels.png") as file:
        labels, mode, palette = np.asarray(file), file.mode, file.getpalette()
    np.testing.assert_array_equal(labels, expected_labels(run, scene(run, 0)))
    colours = data.Cityscapes.palette
    assert mode == "P" and palette[: colours.size] == colours.ravel().tolist()
    picture = cv2.cvtColor(cv2.imread(str(scene(run, 0))), cv2.COLOR_BGR2RGB)
    with Image.open(output / f"{stem}_overlay.png") as file:
        overlay = np.asarray(file).astype(float)
    assert np.abs(overlay - (0.75 * picture + 0.25 * colours[labels])).max() <= 1
    assert cv2.imread(str(output / "grey_overlay.png")).shape == (50, 70, 3)


def write_video(path: Path, frames: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    if not writer.isOpened():
        pytest.skip("OpenCV writes no video here")
    for i in range(frames):
        writer.write(np.full((48, 64, 3), 8 * i, np.uint8))
    writer.release()


def test_predicts_frames_of_a_video(
    run: Path, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_video(tmp_path / "drive.avi", 7)
    options = ["--output", tmp_path / "out", "--every", 3, "--alpha", 0]
    code, _, err = call("predict", run / "run", tmp_path / "drive.avi", *options)
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    numbers = (0, 3, 6)
    assert names == [f"drive_{n:06d}_{k}.png" for n in numbers for k in ("labels", "overlay")]
    for n in numbers:
        assert abs(cv2.imread(str(tmp_path / f"out/drive_{n:06d}_overlay.png")).mean() - 8 * n) < 4


def test_unreadable_files_are_named_and_the_rest_goes_on(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (tmp_path / "empty").mkdir()
    folder.mkdir()
    (folder / "a_torn.png").write_bytes(scene(run, 0).read_bytes()[:300])
    (folder / "b_none.jpg").write_bytes(b"")
    (folder / "c_text.mp4").write_text("no video")
    (folder / "d_fine.png").write_bytes(scene(run, 0).read_bytes())
    (folder / "d_fine.jpg").write_bytes(cv2.imencode(".jpg", np.zeros((9, 9, 3)))[1].tobytes())
    write_video(folder / "e_fine.avi", 2)
    inputs = [folder, tmp_path / "absent.png", tmp_path / "empty", EXAMPLES / "predict.py"]
    command = [sys.executable, EXAMPLES / "predict.py", run / "run", *inputs]
    command += ["--output", tmp_path / "out", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for part in (
        "a_torn.png: corrupt or truncated",
        "b_none.jpg: the file is empty",
        "c_text.mp4: not a video that OpenCV can decode",
        "d_fine.png: its results would replace those of",
        "absent.png: no such file or folder",
        "empty: no images or videos",
        "predict.py: expected one of .png",
    ):
        assert sum(part in line for line in errors) == 1, (part, done.stderr)
    assert errors[-1] == "error: 7 inputs could not be read whole"
    assert "3 pictures labelled" in done.stdout
    assert (tmp_path / "out/d_fine_labels.png").exists()


def test_video_that_ends_early_is_labelled_with_a_warning(
    run: Path, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_video(tmp_path / "cut.avi", 30)
    content = (tmp_path / "cut.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) * 3 // 4])
    options = ["--output", tmp_path / "out", "--every", 10]
    code, out, err = call("predict", run / "run", tmp_path / "cut.avi", *options)
    said = re.fullmatch(
        f"warning: {tmp_path}/cut.avi: ends after ([0-9]+) frames, its header claims 30\n", err
    )
    assert code == 0 and said is not None and 10 < int(said[1]) < 28
    written = len(list((tmp_path / "out").glob("*_labels.png")))
    assert written == -(-int(said[1]) // 10) and f"{written} pictures labelled" in out


class Video:
    """In place of ``cv2.VideoCapture``: frames of a file whose header claims something else."""

    frames, damaged, claimed = 5, (), 5.0

    def __init__(self, path: str) -> None:
        self.next = 0

    def grab(self) -> bool:
        self.next += 1
        return self.next <= self.frames

    def retrieve(self) -> tuple[bool, np.ndarray | None]:
        damaged = self.next - 1 in self.damaged
        return not damaged, None if damaged else np.zeros((4, 6, 3), np.uint8)

    def get(self, what: int) -> float:
        assert what == cv2.CAP_PROP_FRAME_COUNT
        return self.claimed

    def release(self) -> None:
        pass


@pytest.mark.parametrize(
    ("claimed", "warned"),
    [(-9.2e18, False), (float("nan"), False), (7.0, False), (8.0, True)],
)  # fmt: skip
def test_frame_count_of_the_header_is_no_promise(
    run: Path, call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    claimed: float, warned: bool,
) -> None:  # fmt: skip
    (tmp_path / "a.mp4").write_text("read by another class")
    monkeypatch.setattr(cv2, "VideoCapture", Video)
    monkeypatch.setattr(Video, "claimed", claimed)
    code, out, err = call("predict", run / "run", tmp_path / "a.mp4", "--output", tmp_path / "out")
    assert code == 0 and "5 pictures labelled" in out
    assert ("warning: " in err) == warned


def test_damaged_frames_are_named_after_the_others(
    run: Path, call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").write_text("read by another class")
    monkeypatch.setattr(cv2, "VideoCapture", Video)
    monkeypatch.setattr(Video, "damaged", (1, 3))
    code, out, err = call("predict", run / "run", tmp_path / "a.mp4", "--output", tmp_path / "out")
    assert code == 1 and "3 pictures labelled" in out
    assert f"error: {tmp_path / 'a.mp4'}: 2 frames cannot be decoded, the first is 1\n" in err
    assert (tmp_path / "out/a_000004_labels.png").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--alpha", "1.5"], "--alpha must lie in [0, 1], got 1.5"),
        (["--every", "0"], "--every must be at least 1, got 0"),
    ],
)
def test_bad_predict_options(
    call: Callable[..., Outcome], tmp_path: Path, options: list[str], expected: str
) -> None:
    code, _, err = call("predict", tmp_path, "a.png", "--output", tmp_path, *options)
    assert code == 2 and expected in err
