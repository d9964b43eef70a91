"""The captured training step on a CUDA device."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fcnseg.graphs import GraphedTrainStep, Prefetcher, TrainStep
from fcnseg.models import FCN, fcn_resnet18

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLASSES, STEPS = 5, 12


def network() -> FCN:
    torch.manual_seed(0)
    # The plain head has no dropout, whose draws a graph may place elsewhere.
    model = fcn_resnet18(CLASSES, output_stride=16, head="plain", aux_loss=True)
    return model.cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def batches(count: int = STEPS, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        x = torch.randn(4, 3, size, size, generator=generator)
        target = torch.randint(0, CLASSES, (4, size, size), generator=generator)
        target[torch.rand(target.shape, generator=generator) < 0.1] = 255
        made.append((x.contiguous(memory_format=torch.channels_last).cuda(), target.cuda()))
    return made


def make(model: FCN, **options: Any) -> TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    factors = torch.linspace(1.0, 0.1, STEPS)
    device = torch.device("cuda", torch.cuda.current_device())
    return TrainStep(model.loss, optimizer, factors, device, history=STEPS, **options)


@pytest.fixture(autouse=True)
def reproducible() -> Any:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_equal_losses_with_and_without(dtype: torch.dtype | None, parts: int) -> None:
    results = []
    for graphed in (False, True):
        model = network()
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        step = make(
            model, autocast=dtype, scaler=scaler, max_norm=1.0, parts=parts,
            count=lambda y: (y != 255).sum(),
        )  # fmt: skip
        run: Callable[..., Tensor] = GraphedTrainStep(step) if graphed else step
        for batch in batches():
            run(*batch)
        if isinstance(run, GraphedTrainStep):
            assert run.reason is None and run.captures == 1
        results.append((step.losses.tolist(), step.number.item(), model.state_dict()))
    (eager, steps, weights), (captured, captured_steps, captured_weights) = results
    assert steps == captured_steps == STEPS
    assert captured == pytest.approx(eager, rel=1e-4 if dtype is None else 2e-2)
    assert eager[-1] < eager[0]
    if dtype is None:
        for name, value in weights.items():
            torch.testing.assert_close(captured_weights[name], value, rtol=1e-3, atol=1e-4)


def test_no_step_waits_for_the_device() -> None:
    step = make(network(), autocast=torch.bfloat16, max_norm=1.0)
    graphed = GraphedTrainStep(step)
    data = batches()
    for batch in data[:6]:  # warm-up and capture
        graphed(*batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed(*data[6])
        step(*data[7])  # the eager one neither
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_new_shape_is_captured_anew() -> None:
    step = make(network())
    graphed = GraphedTrainStep(step, warmup=1, shapes=2)
    other = make(network())
    plan = [64, 64, 64, 96, 96, 96, 64, 128, 128, 128, 64, 64]
    data = {size: batches(len(plan), size) for size in set(plan)}
    for i, size in enumerate(plan):
        loss = graphed(*data[size][i])
        torch.testing.assert_close(loss, other(*data[size][i]), rtol=1e-3, atol=0)
    assert graphed.reason is None and graphed.captures >= 3


def test_overflow_skips_the_step_in_a_graph() -> None:
    model = network()
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    graphed = GraphedTrainStep(make(model, autocast=torch.float16, scaler=scaler))
    data = batches()
    for batch in data[:5]:
        graphed(*batch)
    assert graphed.captures == 1
    before = copy.deepcopy(model.classifier.weight)
    x, y = data[5]
    graphed(x, torch.full_like(y, 77))  # bad labels: loss and gradient are NaN
    assert torch.equal(model.classifier.weight, before)
    assert scaler.get_scale() == 512.0
    graphed(*data[6])
    assert not torch.equal(model.classifier.weight, before)
    from fcnseg import check_labels

    with pytest.raises(IndexError, match="77"):
        check_labels()


def test_an_error_within_a_capture_runs_eagerly_with_a_reason() -> None:
    step = make(network())
    loss = step.loss

    def refuses(x: Tensor, y: Tensor) -> Tensor:
        value = loss(x, y)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")
        return value

    step.loss = refuses
    graphed = GraphedTrainStep(step)
    with pytest.warns(UserWarning, match="the capture failed: not in a graph"):
        losses = [graphed(*batch).item() for batch in batches()]
    assert graphed.reason == "the capture failed: not in a graph" and graphed.captures == 0
    other = make(network())
    assert losses == pytest.approx([other(*batch).item() for batch in batches()], rel=1e-4)


def waiting(step: TrainStep) -> TrainStep:
    loss = step.loss

    def waits(x: Tensor, y: Tensor) -> Tensor:
        value = loss(x, y)
        return value if value.item() > 0 else value * 0

    step.loss = waits
    return step


def test_a_loss_that_waits_runs_eagerly_with_a_reason() -> None:
    graphed = GraphedTrainStep(waiting(make(network())))
    with pytest.warns(UserWarning, match=r"the step waits for the device .*test_graphs_gpu\.py:"):
        losses = [graphed(*batch).item() for batch in batches()]
    assert graphed.reason is not None and graphed.captures == 0
    other = make(network())
    assert losses == pytest.approx([other(*batch).item() for batch in batches()], rel=1e-4)


def capture_a_loss_that_waits() -> None:
    graphed = GraphedTrainStep(waiting(make(network())), warmup=1)  # which nobody watches
    for batch in batches():
        graphed(*batch)


def test_a_capture_that_is_spoiled_ends_the_run() -> None:
    # In a process of its own, which it leaves as it says.
    call = "import test_graphs_gpu; test_graphs_gpu.capture_a_loss_that_waits()"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "CaptureError: the capture of a CUDA graph broke off" in done.stderr
    assert "--no-cuda-graphs" in done.stderr


def test_the_step_holds_scores_and_averages(tmp_path: Any) -> None:
    from fcnseg.losses import SegmentationLoss
    from fcnseg.training import optimizer
    from fcnseg.training.criterion import Objective

    results = []
    for graphed in (False, True):
        model = network()
        average, update = optimizer.averaging(model, 0.9)
        matrix = torch.zeros(CLASSES, CLASSES, dtype=torch.int64, device="cuda")
        step = make(model, after=update)
        step.loss = Objective(model, SegmentationLoss(ignore_index=255), matrix=matrix)
        run: Callable[..., Tensor] = GraphedTrainStep(step) if graphed else step
        data = batches()
        for batch in data:
            run(*batch)
        assert not isinstance(run, GraphedTrainStep) or run.captures == 1
        assert matrix.sum().item() == sum((y != 255).sum().item() for _, y in data)
        results.append((matrix, average.state_dict()))
    assert (results[0][0] - results[1][0]).abs().sum() < 0.01 * results[0][0].sum()
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-3, atol=1e-4)


def test_state_survives_a_checkpoint() -> None:
    data = batches()
    model = network()
    step = make(model)
    graphed = GraphedTrainStep(step)
    for batch in data[:6]:
        graphed(*batch)
    saved = copy.deepcopy((model.state_dict(), step.optimizer.state_dict(), step.number))
    expected = [graphed(*batch).item() for batch in data[6:]]
    model = network()
    step = make(model)
    model.load_state_dict(saved[0])
    step.optimizer.load_state_dict(saved[1])
    step.attach()
    step.number.copy_(saved[2])
    graphed = GraphedTrainStep(step)
    assert [graphed(*batch).item() for batch in data[6:]] == pytest.approx(expected, rel=1e-4)


def test_prefetcher_copies_every_batch() -> None:
    host = [(torch.full((64, 1024), i).pin_memory(), torch.tensor([i])) for i in range(20)]
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    for _, (plane, number) in Prefetcher(host, torch.device("cuda")):
        total += (plane == number).sum()
    assert total.item() == 20 * 64 * 1024
