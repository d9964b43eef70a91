"""Labels images, folders of images, or the frames of videos with a trained network.

    python examples/predict.py runs/mine street.png --output out
    python examples/predict.py runs/mine photos/ drive.mp4 --every 10 --output out

Writes for each image NAME_overlay.png, the image under its classes' colours, and NAME_labels.png,
whose pixel values are train ids, with the data set's palette. A frame's NAME is VIDEO_FRAME. What
cannot be read is named and counted, the rest goes on, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from evaluate import Network, add_network_options, message, open_network
from PIL import Image

from fcnseg import _command_line, data
from fcnseg.data.dataset import read_image
from fcnseg.training import CheckpointError

IMAGES = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
# A header that claims more frames than there are, by no more than this, is one that estimates.
MISSING_FRAMES, MISSING_SHARE = 2, 0.01


def find_files(path: Path) -> list[tuple[Path, Path]]:
    """(file, name of its results without an ending) of an argument.

    Raises:
        DataError: there is nothing to read.
    """
    if not path.exists():
        raise data.DataError(f"{path}: no such file or folder")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES + VIDEOS)
        if not files:
            raise data.DataError(f"{path}: no images or videos ({', '.join(IMAGES + VIDEOS)})")
        return [(file, file.relative_to(path).with_suffix("")) for file in files]
    if path.suffix.lower() not in IMAGES + VIDEOS:
        raise data.DataError(f"{path}: expected one of {', '.join(IMAGES + VIDEOS)}")
    return [(path, Path(path.stem))]


def read_frames(path: Path, every: int) -> Iterator[tuple[int, np.ndarray]]:
    """Every so many frames of a video: their numbers from 0, and uint8 [H, W, 3] RGB.

    Where the file's header claims clearly more frames than there are, a warning says so: the file
    is cut off, or its header wrong (many hold an estimate, some none).

    Raises:
        DataError: the file cannot be opened, or frames of it cannot be decoded; those that can be
            come first.
    """
    if path.stat().st_size == 0:
        raise data.DataError(f"{path}: the file is empty")
    video = cv2.VideoCapture(str(path))
    number, damaged = 0, []
    try:
        while video.grab():
            if number % every == 0:
                decoded, frame = video.retrieve()
                if decoded:
                    yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                else:
                    damaged.append(number)
            number += 1
        claimed = video.get(cv2.CAP_PROP_FRAME_COUNT)  # a float, at times of no sense
    finally:
        video.release()
    if number == 0:
        raise data.DataError(f"{path}: not a video that OpenCV can decode")
    if claimed - number > max(MISSING_FRAMES, MISSING_SHARE * claimed):
        print(
            f"warning: {path}: ends after {number} frames, its header claims {claimed:.0f}",
            file=sys.stderr,
        )
    if damaged:
        raise data.DataError(
            f"{path}: {len(damaged)} frames cannot be decoded, the first is {damaged[0]}"
        )


def read_pictures(path: Path, name: Path, every: int) -> Iterator[tuple[Path, np.ndarray]]:
    """The pictures of a file, with the names of their results."""
    if path.suffix.lower() in IMAGES:
        yield name, read_image(path, allow_greyscale=True)
    else:
        for number, frame in read_frames(path, every):
            yield name.with_name(f"{name.name}_{number:06d}"), frame


def predict(network: Network, image: np.ndarray) -> np.ndarray:
    """Train ids, uint8 [H, W]."""
    x = network.images(torch.from_numpy(image).permute(2, 0, 1)[None])
    with torch.no_grad(), network.autocast():
        return network.inference.predict(network.run.model, x)[0].to(torch.uint8).cpu().numpy()


def write(
    output: Path,
    name: Path,
    image: np.ndarray,
    labels: np.ndarray,
    palette: np.ndarray,
    alpha: float,
) -> None:
    stem = output / name
    stem.parent.mkdir(parents=True, exist_ok=True)
    overlay = cv2.addWeighted(image, 1 - alpha, palette[labels], alpha, 0)
    Image.fromarray(overlay).save(stem.with_name(f"{stem.name}_overlay.png"), compress_level=1)
    indexed = Image.fromarray(labels)
    indexed.putpalette(palette.tobytes())
    indexed.save(stem.with_name(f"{stem.name}_labels.png"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_network_options(parser)
    parser.add_argument("inputs", type=Path, nargs="+", help="images, folders of them, or videos")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="opacity of the colours, 0 to 1 (default: 0.5)"
    )
    parser.add_argument(
        "--every", type=int, default=1, help="take one of so many frames of a video (default: 1)"
    )
    return parser


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    if not 0 <= args.alpha <= 1:
        parser.error(f"--alpha must lie in [0, 1], got {args.alpha}")
    if args.every < 1:
        parser.error(f"--every must be at least 1, got {args.every}")
    try:
        network = open_network(args)
    except (ValueError, TypeError, CheckpointError) as error:
        print(f"error: {message(error)}", file=sys.stderr)
        return 1
    palette = network.run.dataset.palette
    failures, pictures = 0, 0
    origin: dict[Path, Path] = {}  # of each name of results
    files: list[tuple[Path, Path]] = []
    for path in args.inputs:
        try:
            files += find_files(path)
        except data.DataError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
    for path, name in files:
        try:
            for picture, image in read_pictures(path, name, args.every):
                if origin.setdefault(picture, path) != path:
                    raise data.DataError(
                        f"{path}: its results would replace those of {origin[picture]}"
                    )
                write(args.output, picture, image, predict(network, image), palette, args.alpha)
                pictures += 1
        except data.DataError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
        except OSError as error:  # of the output: it would not be the last
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(f"{pictures} pictures labelled in {args.output}")
    if failures:
        print(f"error: {failures} inputs could not be read whole", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    _command_line.run(main)
