"""The training step as a function of device tensors, and what runs where no graph can be made."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcnseg import graphs
from fcnseg.graphs import CaptureError, GraphedTrainStep, Prefetcher, TrainStep

CPU = torch.device("cpu")
FACTORS = [0.5, 1.0, 0.7, 0.2, 0.1]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    first, rest = [model[0].weight], [p for p in model.parameters() if p is not model[0].weight]  # type: ignore[index]
    groups = [{"params": first}, {"params": rest, "lr": 1.0, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        groups, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True, **options
    )
    for parameter in model.parameters():
        # A first step that a GradScaler skips leaves it uninitialised otherwise.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def batches(count: int = 5, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        target = torch.randint(0, 4, (size, 6, 8), generator=generator)
        target[0, :, :4] = 255
        target[1] = 255  # parts of a batch differ in their valid pixels, one has none
        made.append((torch.randn(size, 3, 6, 8, generator=generator), target))
    return made


def loss_of(model: nn.Module) -> Any:
    return lambda x, y: F.cross_entropy(model(x), y, ignore_index=255)


def count(target: Tensor) -> Tensor:
    return (target != 255).sum()


def plain(model: nn.Module, *, max_norm: float = 0.0) -> list[float]:
    """The same training as anyone would write it."""
    optimizer, losses = sgd(model), []
    base = [group["lr"] for group in optimizer.param_groups]
    for factor, (x, y) in zip(FACTORS, batches(), strict=True):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad()
        loss = loss_of(model)(x, y)
        loss.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for own, given in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(own, given)


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
@pytest.mark.parametrize("graphed", [False, True])
def test_step_equals_a_plain_loop(max_norm: float, graphed: bool) -> None:
    model, other = network(), network()
    step = TrainStep(
        loss_of(model), sgd(model), FACTORS, CPU, max_norm=max_norm, count=count, history=3
    )
    run = GraphedTrainStep(step, reason="this is the eager one") if graphed else step
    losses = [run(*batch).item() for batch in batches()]
    expected = plain(other, max_norm=max_norm)
    torch.testing.assert_close(losses, expected)
    assert_same_weights(model, other)
    assert step.number.item() == 5
    # The last three losses are there, each in its place.
    assert [step.losses[i % 3].item() for i in (2, 3, 4)] == pytest.approx(losses[2:])


def test_clipping_clips() -> None:
    model, other = network(), network()
    assert plain(model)[1:] != plain(other, max_norm=0.05)[1:]


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_count_by_their_valid_pixels(parts: int) -> None:
    # Batch normalisation sees other batches in parts; with fixed statistics all is equal.
    model, other = network().double(), network().double()
    data = [(x.double(), y) for x, y in batches()]
    for m in (model, other):
        m[1].eval()
    together = TrainStep(loss_of(other), sgd(other), FACTORS, CPU)
    apart = TrainStep(loss_of(model), sgd(model), FACTORS, CPU, parts=parts, count=count)
    for batch in data:
        torch.testing.assert_close(apart(*batch), together(*batch), rtol=1e-12, atol=0)
    for own, given in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, given, rtol=1e-11, atol=1e-13)


def test_parts_without_a_count_weigh_alike() -> None:
    model = network().eval()
    x, y = batches(1)[0]
    y = y.where(y != 255, 3)
    y[0, 0] = 255
    step = TrainStep(loss_of(model), sgd(model), [0.0], CPU, parts=2)
    halves = [loss_of(model)(x[i : i + 2], y[i : i + 2]).item() for i in (0, 2)]
    assert step(x, y).item() == pytest.approx(sum(halves) / 2, rel=1e-6)


def test_learning_rates_are_tensors_that_stay() -> None:
    model = network()
    optimizer = sgd(model)
    step = TrainStep(loss_of(model), optimizer, FACTORS, CPU)
    lrs = [group["lr"] for group in optimizer.param_groups]
    seen = []
    for batch in [*batches(), *batches(2)]:
        step(*batch)
        seen.append([lr.item() for lr in lrs])
    expected = [[0.1 * f, 1.0 * f] for f in [*FACTORS, FACTORS[-1], FACTORS[-1]]]
    torch.testing.assert_close(seen, expected)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] is not lrs[0]
    step.attach()
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))
    step.skip(2)
    assert step.number.item() == 9


def test_state_survives_a_checkpoint() -> None:
    model = network()
    optimizer = sgd(model)
    step = TrainStep(loss_of(model), optimizer, FACTORS, CPU)
    data = batches()
    for batch in data[:2]:
        step(*batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), step.number))
    expected = [step(*batch).item() for batch in data[2:]]
    model = network()
    optimizer = sgd(model)
    step = TrainStep(loss_of(model), optimizer, FACTORS, CPU)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    step.attach()
    step.number.copy_(saved[2])
    assert [step(*batch).item() for batch in data[2:]] == expected


def test_scaler_skips_what_overflows() -> None:
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    step = TrainStep(loss_of(model), sgd(model), FACTORS, CPU, scaler=scaler, max_norm=1.0)
    data = batches()
    before = copy.deepcopy(model[0].weight)
    assert not step(data[0][0] * torch.inf, data[0][1]).isfinite()
    assert torch.equal(model[0].weight, before) and scaler.get_scale() == 2.0
    model[1].reset_running_stats()
    assert step(*data[1]).isfinite() and step(*data[2]).isfinite()
    assert not torch.equal(model[0].weight, before) and scaler.get_scale() == 4.0


def test_scale_does_not_show_in_the_result() -> None:
    model, other = network(), network()
    scaler = torch.amp.GradScaler("cpu")
    step = TrainStep(loss_of(model), sgd(model), FACTORS, CPU, scaler=scaler, max_norm=0.05)
    losses = [step(*batch).item() for batch in batches()]
    torch.testing.assert_close(losses, plain(other, max_norm=0.05))
    assert_same_weights(model, other)


def test_reset_lets_a_failed_step_be_taken_again() -> None:
    model = network()
    scaler = torch.amp.GradScaler("cpu")
    step = TrainStep(loss_of(model), sgd(model), FACTORS, CPU, scaler=scaler, max_norm=1.0)
    x, y = batches(1)[0]
    scaler.scale(loss_of(model)(x, y)).backward()
    scaler.unscale_(step.optimizer)  # as if the step had failed here
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        step(x, y)
    step.reset()
    assert step(x, y).isfinite()
    assert scaler.get_scale() == 65536.0


def test_bf16_autocast() -> None:
    model = network()
    seen = []
    step = TrainStep(
        lambda x, y: (seen.append(model(x).dtype), loss_of(model)(x, y))[1],
        sgd(model), FACTORS, CPU, autocast=torch.bfloat16, prepare=lambda x: x * 2,
    )  # fmt: skip
    assert step(*batches(1)[0]).dtype == torch.float32
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"factors": []}, "factors: expected one factor per step, got none"),
        ({"parts": 0}, "parts: expected a number >= 1, got 0"),
        ({"history": 0}, "history: expected a number >= 1, got 0"),
    ],
)
def test_bad_arguments_of_a_step(options: dict[str, Any], message: str) -> None:
    model = network()
    arguments: dict[str, Any] = {"factors": FACTORS} | options
    with pytest.raises(ValueError, match=message):
        TrainStep(loss_of(model), sgd(model), arguments.pop("factors"), CPU, **arguments)


@pytest.mark.parametrize("name", ["warmup", "shapes"])
def test_bad_arguments_of_a_graph(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number >= 1, got 0"):
        GraphedTrainStep(lambda x: x, **{name: 0})  # type: ignore[arg-type]


def test_without_cuda_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    graphed = GraphedTrainStep(lambda x: x + 1)
    assert graphed.reason == "PyTorch sees no CUDA device"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graphed(torch.zeros(())).item() == 1
    assert graphed.captures == 0


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert graphs.why_not() is None
    monkeypatch.setenv("FCNSEG_CHECK_LABELS", "1")
    assert "FCNSEG_CHECK_LABELS=1" in str(graphs.why_not())
    monkeypatch.delenv("FCNSEG_CHECK_LABELS")
    monkeypatch.setattr(graphs, "_distributed", lambda: True)
    for config, fits in (("cpu:gloo,cuda:nccl", True), ("cpu:gloo,cuda:gloo", False)):
        monkeypatch.setattr(graphs.dist, "get_backend_config", lambda config=config: config)
        assert (graphs.why_not() is None) == fits


def test_a_batch_on_the_cpu_is_said_and_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = GraphedTrainStep(lambda x: x + 1)
    graphed.reason = None  # as if there were a device
    with pytest.warns(UserWarning, match="the batch is on cpu, expected cuda"):
        assert graphed(torch.zeros(())).item() == 1
    assert graphed.reason == "the batch is on cpu, expected cuda"


class Capture:
    """In place of ``torch.cuda.CUDAGraph`` and ``torch.cuda.graph``: a capture without a device."""

    def __init__(self, valid: bool) -> None:
        self.valid, self.ended, self.resets = valid, False, 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if not self.valid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.ended = True

    def pool(self) -> tuple[int, int]:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return (0, 1)

    def reset(self) -> None:
        self.resets += 1


def capturing(
    monkeypatch: pytest.MonkeyPatch, step: Any, *, valid: bool
) -> tuple[GraphedTrainStep, Capture]:
    """A step that is about to be captured, and the capture to come."""
    capture = Capture(valid)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: capture)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graphed = GraphedTrainStep(step, reason="no device")
    graphed.reason, graphed._stream, graphed._pool = None, None, None  # type: ignore[assignment]
    graphed._warm["shape"] = graphed.warmup
    return graphed, capture


class Once:
    """A step that fails the first time."""

    def __init__(self) -> None:
        self.calls, self.resets = 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("this kernel cannot be captured\nat some line")
        return x + 1

    def reset(self) -> None:
        self.resets += 1


def test_error_within_a_capture_is_the_reason_to_go_on_eagerly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Once()
    graphed, capture = capturing(monkeypatch, step, valid=True)
    with pytest.warns(UserWarning, match="the capture failed: this kernel cannot be captured$"):
        assert graphed._run("shape", (torch.zeros(()),)).item() == 1
    assert graphed.reason == "the capture failed: this kernel cannot be captured"
    assert (step.calls, step.resets, capture.resets, graphed.captures) == (2, 1, 1, 0)


def test_capture_that_is_invalid_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Once()
    graphed, _ = capturing(monkeypatch, step, valid=False)
    said = "cannot be undone: this kernel cannot be captured; start again .*--no-cuda-graphs"
    with pytest.raises(CaptureError, match=said):
        graphed._run("shape", (torch.zeros(()),))
    assert step.calls == 1 and graphed.reason is None
    # Of several processes one must not go on without a graph that the others have.
    graphed, _ = capturing(monkeypatch, Once(), valid=True)
    with monkeypatch.context() as several:
        several.setattr(graphs, "_distributed", lambda: True)
        with pytest.raises(CaptureError, match=said):
            graphed._run("shape", (torch.zeros(()),))
    # The step raises nothing itself, as one that waits for the device in a library.
    graphed, _ = capturing(monkeypatch, lambda x: x, valid=False)
    with pytest.raises(CaptureError, match="undone: operation failed due to a previous error"):
        graphed._run("shape", (torch.zeros(()),))


@pytest.mark.parametrize("waits", [False, True])
def test_step_that_waits_for_the_device_is_never_captured(
    monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    modes: list[Any] = ["default"]

    def step(x: Tensor) -> Tensor:
        if modes[-1] == "warn":  # what PyTorch does then
            warnings.warn("something else", UserWarning, stacklevel=1)
            if waits:
                warnings.warn("called a synchronizing CUDA operation (..)", stacklevel=1)
        return x + 1

    graphed, capture = capturing(monkeypatch, step, valid=True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    capture.replay = lambda: None  # type: ignore[attr-defined]
    graphed._warm.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(graphed.warmup + 1):
            if graphed.reason is None:  # as __call__ does
                assert graphed._run("shape", (torch.zeros(()),)).item() == 1
    assert modes == ["default", "warn", "default"]
    said = [str(each.message) for each in caught]
    assert said[-1] == "something else"
    if waits:
        assert graphed.reason is not None and graphed.captures == 0
        where = rf"the step waits for the device \({re.escape(__file__)}:\d+\)"
        assert re.fullmatch(where, graphed.reason) and graphed.reason in said[0]
    else:
        assert graphed.reason is None and graphed.captures == 1 and len(said) == 1


def test_prefetcher_passes_batches_on() -> None:
    data = batches(3)
    seen = list(Prefetcher(data, CPU))
    assert len(seen) == 3
    for (host, device), batch in zip(seen, data, strict=True):
        assert host is batch and all(map(torch.equal, device, batch))


def test_prefetcher_asks_for_a_batch_only_when_it_is_wanted() -> None:
    asked = []

    def source() -> Any:
        for batch in batches(3):
            asked.append(len(asked))
            yield batch

    for number, _ in enumerate(Prefetcher(source(), CPU)):
        assert len(asked) == number + 1  # a run that stops here has loaded nothing in vain
