"""fcnseg.upsample_cross_entropy against F.interpolate + F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_as_good_as_eager, eager_loss, evaluate, labels, normal

import fcnseg
from fcnseg import _labels, _ops

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
LABELS = [torch.uint8, torch.int32, torch.int64]
# [N, C, h, w], (H, W), scale_factor
GEOMETRIES = {
    "ragged": ((2, 5, 4, 6), (13, 17), None),
    "size 1": ((1, 3, 1, 1), (1, 1), None),
    "one wide cell": ((1, 4, 1, 1), (5, 64), None),
    "one row": ((2, 3, 1, 5), (7, 9), None),
    "to size 1": ((1, 3, 4, 5), (1, 1), None),
    "identity": ((1, 3, 5, 4), (5, 4), None),
    "times 8": ((1, 19, 3, 2), (24, 16), None),
    "down": ((2, 3, 9, 11), (4, 5), None),
    "up and down": ((1, 3, 3, 12), (8, 5), None),
    "scale": ((1, 3, 5, 7), (11, 16), 2.3),
    "scale pair": ((2, 3, 5, 7), (12, 12), (2.5, 1.75)),
    "scale down": ((1, 3, 9, 11), (5, 6), 0.6),
}


def check(logits, target, **options):
    assert_as_good_as_eager(
        lambda x: fcnseg.upsample_cross_entropy(x, target, **options),
        lambda x: eager_loss(x, target, **options),
        [logits],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_matches_eager(geometry, align_corners, dtype):
    shape, size, scale_factor = GEOMETRIES[geometry]
    target = labels((shape[0], *size), shape[1])
    for reduction in REDUCTIONS:
        check(
            4 * normal(shape, dtype), target, reduction=reduction,
            align_corners=align_corners, scale_factor=scale_factor,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
def test_options_match_eager(ignore_index, weighted, label_smoothing, reduction, dtype):
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])  # float32, whatever the logits are
    check(
        normal((2, 5, 4, 6), dtype), labels((2, 13, 17), 5, ignore=ignore_index),
        weight=weight if weighted else None, ignore_index=ignore_index,
        reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip


def test_weight_in_the_logits_dtype():
    for dtype in DTYPES:
        weight = torch.tensor([0.5, 2.0, 0.25], dtype=dtype)
        check(normal((1, 3, 4, 4), dtype), labels((1, 9, 9), 3), weight=weight)


@pytest.mark.parametrize("label_dtype", LABELS)
def test_label_dtypes(label_dtype):
    target = labels((2, 9, 11), 4, label_dtype, ignore=255)
    check(normal((2, 4, 3, 4)), target, ignore_index=255)


def test_uint8_targets_never_equal_a_negative_ignore_index():
    logits, target = normal((1, 200, 2, 2)), torch.full((1, 4, 4), 156, dtype=torch.uint8)
    check(logits, target, ignore_index=-100)  # 156 is -100 in 8 bits


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strides_do_not_matter(reduction):
    shape = (2, 5, 4, 6)
    base = labels((2, 13, 17), 5)
    targets = [
        base,
        base.repeat_interleave(2, dim=2)[:, :, ::2],
        base.transpose(1, 2).contiguous().transpose(1, 2),
        base[:1].expand(2, -1, -1),
    ]
    x = normal(shape)
    inputs = [
        x.to(memory_format=torch.channels_last),
        x.repeat_interleave(2, dim=3)[..., ::2],
        x.transpose(0, 3).contiguous().transpose(0, 3),
        x[:1].expand(shape),
        F.pad(x, (1, 1, 2, 2))[..., 2:-2, 1:-1],
    ]
    for logits in inputs:
        for target in targets:
            check(logits, target, reduction=reduction)
            plain = fcnseg.upsample_cross_entropy(
                logits.contiguous(), target.contiguous(), reduction=reduction
            )
            strided = fcnseg.upsample_cross_entropy(logits, target, reduction=reduction)
            torch.testing.assert_close(strided, plain)


def test_gradient_keeps_channels_last():
    logits = normal((2, 5, 4, 6)).to(memory_format=torch.channels_last)
    for reduction in REDUCTIONS:
        _, gradient = evaluate(
            lambda x, r=reduction: fcnseg.upsample_cross_entropy(
                x, labels((2, 8, 8), 5), reduction=r
            ),
            [logits],
        )
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_dtype(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction in REDUCTIONS:
        loss = fcnseg.upsample_cross_entropy(
            normal((1, 3, 2, 2), dtype), labels((1, 4, 4), 3), reduction=reduction
        )
        assert loss.dtype == expected and loss.shape == ((1, 4, 4) if reduction == "none" else ())


def test_half_sums_do_not_overflow():
    logits = torch.zeros(1, 19, 8, 8, dtype=torch.float16)
    loss = fcnseg.upsample_cross_entropy(logits, labels((1, 256, 256), 19), reduction="sum")
    assert loss.item() == pytest.approx(65536 * torch.tensor(19.0).log().item(), rel=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(reduction):
    logits = torch.zeros(0, 3, 2, 2, requires_grad=True)
    target = torch.zeros(0, 5, 7, dtype=torch.uint8)
    loss = fcnseg.upsample_cross_entropy(logits, target, reduction=reduction)
    assert loss.shape == ((0, 5, 7) if reduction == "none" else ())
    assert loss.isnan() if reduction == "mean" else loss.sum() == 0
    loss.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored(reduction, label_smoothing):
    logits = normal((2, 3, 2, 2)).requires_grad_()
    target = torch.full((2, 5, 7), 255, dtype=torch.uint8)
    options = {
        "ignore_index": 255, "reduction": reduction, "label_smoothing": label_smoothing,
    }  # fmt: skip
    loss = fcnseg.upsample_cross_entropy(logits, target, **options)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    (expected,) = torch.autograd.grad(eager_loss(logits, target, **options).sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(logits))
    assert torch.equal(expected, gradient)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_mean_of_pixels_that_weigh_nothing(scale, label_smoothing):
    target = labels((2, 9, 14), 2)
    target[:, 4, 5] = 255
    options = {
        "weight": torch.tensor([0.0, 0.0, 1.0]), "ignore_index": 255,
        "label_smoothing": label_smoothing,
    }  # fmt: skip
    for function in (fcnseg.upsample_cross_entropy, eager_loss):
        for value in evaluate(
            lambda x, f=function: f(x, target, **options), [scale * normal((2, 3, 3, 4))]
        ):
            assert value.isnan().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_is_exactly_zero(reduction):
    logits = (100 * normal((2, 1, 3, 4))).requires_grad_()
    target = torch.zeros(2, 7, 9, dtype=torch.int32)
    for label_smoothing in (0.0, 0.3):
        loss = fcnseg.upsample_cross_entropy(
            logits, target, reduction=reduction, label_smoothing=label_smoothing
        )
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert (loss == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    target = labels((2, 5, 4), 3, ignore=255)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

    def loss(logits):
        return fcnseg.upsample_cross_entropy(
            logits, target, weight=weight, ignore_index=255, reduction=reduction,
            label_smoothing=0.1, scale_factor=(1.7, 2.2),
        )  # fmt: skip

    assert torch.autograd.gradcheck(
        loss, normal((2, 3, 3, 2), torch.float64).requires_grad_(), nondet_tol=0.0
    )


def test_frozen_logits_need_no_gradient():
    logits, target = normal((1, 3, 2, 2)), labels((1, 4, 4), 3)
    assert not fcnseg.upsample_cross_entropy(logits, target).requires_grad
    with torch.no_grad():
        assert not fcnseg.upsample_cross_entropy(logits.requires_grad_(), target).requires_grad
    frozen = torch.ops.fcnseg.upsample_cross_entropy(
        logits, target, None, -100, "mean", 0.0, False, None, None, False
    )
    assert frozen[1].numel() == 0  # no gradient is made that nobody asked for
    with pytest.raises(RuntimeError, match="compute_grad=False"):
        frozen[0].backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_agrees(reduction):
    logits = normal((2, 3, 4, 4), torch.float16).requires_grad_()
    loss = fcnseg.upsample_cross_entropy(logits, labels((2, 9, 9), 3), reduction=reduction)
    first, second, third = (
        torch.autograd.grad(loss.sum() * scale, logits, retain_graph=True)[0]
        for scale in (1.0, 1024.0, 1.0)
    )
    assert torch.equal(first, third)
    torch.testing.assert_close(second / 1024, first)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_says_why_not(reduction):
    logits = normal((1, 3, 4, 4)).requires_grad_()
    loss = fcnseg.upsample_cross_entropy(logits, labels((1, 9, 9), 3), reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        gradient.pow(2).sum().backward()


def test_large_upstream_scale_saves_half_gradients_from_underflow():
    # 1 / (number of pixels) of the mean is far below the smallest fp16 number, times 65536 is not.
    logits = normal((2, 19, 8, 8), torch.float16).requires_grad_()
    target = labels((2, 512, 512), 19)
    loss = fcnseg.upsample_cross_entropy(logits, target)
    (ours,) = torch.autograd.grad(loss * 65536, logits)
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(eager_loss(exact, target) * 65536, exact)
    assert (ours != 0).all()
    torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=1e-3)


def test_bitwise_reproducible_for_any_number_of_threads():
    logits, target = normal((2, 19, 9, 9)), labels((2, 70, 70), 19, ignore=255)
    torch.use_deterministic_algorithms(True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            results.append(
                [
                    tensor
                    for reduction in REDUCTIONS
                    for tensor in evaluate(
                        lambda x, r=reduction: fcnseg.upsample_cross_entropy(
                            x, target, ignore_index=255, reduction=r
                        ),
                        [logits],
                    )
                ]
            )
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_takes_logits_as_they_come():
    logits, target = normal((1, 3, 4, 4)), labels((1, 9, 9), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(lambda x: fcnseg.upsample_cross_entropy(x, target), [logits])
    outside = evaluate(lambda x: fcnseg.upsample_cross_entropy(x, target), [logits])
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.tuples(*[st.integers(1, high) for high in (2, 5, 6, 6, 14, 14)]),
    st.booleans(),
    st.sampled_from(REDUCTIONS),
    st.sampled_from([0.0, 0.2]),
    st.integers(0, 99),
)
def test_any_geometry_matches_eager(sizes, align_corners, reduction, label_smoothing, seed):
    batch, classes, h, w, height, width = sizes
    check(
        normal((batch, classes, h, w), seed=seed),
        labels((batch, height, width), classes, ignore=255, seed=seed),
        ignore_index=255, reduction=reduction, align_corners=align_corners,
        label_smoothing=label_smoothing,
    )  # fmt: skip


# -- NaN and infinity --------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_give_nan_where_eager_does(value, classes, label_smoothing):
    logits = normal((2, classes, 4, 5))
    logits[0, 0, 1, 2] = value
    target = labels((2, 9, 13), classes, ignore=255)
    for reduction in REDUCTIONS:
        options = {
            "ignore_index": 255, "reduction": reduction, "label_smoothing": label_smoothing,
        }  # fmt: skip
        ours = evaluate(
            lambda x, o=options: fcnseg.upsample_cross_entropy(x, target, **o), [logits]
        )
        eager = evaluate(lambda x, o=options: eager_loss(x, target, **o), [logits])
        for our, their in zip(ours, eager, strict=True):
            assert our.isnan()[their.isnan()].all(), reduction
        if reduction == "none":  # the other image is not touched
            for our, their in zip(ours, eager, strict=True):
                torch.testing.assert_close(our[1], their[1])


def test_nan_at_ignored_pixels_reaches_the_gradient_alone():
    logits = normal((1, 3, 4, 4))
    logits[0, 1, 0, 0] = torch.nan
    target = labels((1, 16, 16), 3)
    target[:, :8, :8] = 255  # all that the NaN touches
    for function in (fcnseg.upsample_cross_entropy, eager_loss):
        loss, gradient = evaluate(lambda x, f=function: f(x, target, ignore_index=255), [logits])
        assert loss.isfinite()
        assert gradient[:, :, 0, 0].isnan().all()
        assert gradient[:, :, 2:, 2:].isfinite().all()


# -- bad labels --------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_labels_raise(reduction):
    target = labels((2, 6, 7), 5)
    target[1, 2, 3] = 9
    target[1, 5, 0] = -1
    expected = (
        r"target holds 2 values outside \[0, 5\) and different from ignore_index; "
        r"the first is 9 at position \(1, 2, 3\)"
    )
    for logits in (normal((2, 5, 3, 3)), normal((2, 5, 3, 3)).requires_grad_()):
        with pytest.raises(IndexError, match=expected):
            fcnseg.upsample_cross_entropy(logits, target, reduction=reduction)
    target[1, 5, 0] = 0
    with pytest.raises(IndexError, match="target holds 1 value outside"):
        fcnseg.upsample_cross_entropy(normal((2, 5, 3, 3)), target, reduction=reduction)


def test_bad_label_of_a_strided_target():
    target = labels((2, 6, 7), 5)
    target[1, 2, 3] = 9
    for strided in (
        target.transpose(1, 2).contiguous().transpose(1, 2),
        target.repeat_interleave(2, dim=2)[:, :, ::2],
    ):
        with pytest.raises(IndexError, match=r"first is 9 at position \(1, 2, 3\)"):
            fcnseg.upsample_cross_entropy(normal((2, 5, 3, 3)), strided)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.int64, 2**32 + 3),  # 3 in 32 bits
        (torch.int64, -(2**32) + 3),
        (torch.int32, 5),
        (torch.int32, -1),
        (torch.uint8, 255),
        (torch.uint8, 156),  # -100, the default ignore_index, in 8 bits
    ],
)
def test_labels_are_compared_in_64_bits(dtype, value):
    target = torch.zeros(1, 4, 4, dtype=dtype)
    target[0, 3, 1] = value
    with pytest.raises(IndexError, match=rf"first is {value} at position \(0, 3, 1\)"):
        fcnseg.upsample_cross_entropy(normal((1, 5, 2, 2)), target)


# -- what the CUDA implementation does with bad labels: its Python part runs on the CPU as well ----


@pytest.fixture
def no_records(monkeypatch):
    monkeypatch.setattr(_labels, "_records", {})


def cuda_loss(logits, target, reduction):
    loss, gradient, _ = _ops._upsample_cross_entropy_cuda(
        logits, target, None, 255, reduction, 0.1, False, None, None, True
    )
    return loss, gradient


def test_cuda_policy_turns_the_loss_to_nan_and_keeps_a_record(no_records):
    # float64: what runs on any device
    logits = normal((2, 5, 3, 3), torch.float64)
    target = labels((2, 12, 12), 5, torch.uint8, ignore=255)
    loss, gradient = cuda_loss(logits, target, "mean")
    assert loss.isfinite() and gradient.isfinite().all()
    fcnseg.check_labels()
    target[1, 2, 3], target[1, 7, 0] = 9, 8
    for reduction in ("mean", "sum"):
        loss, gradient = cuda_loss(logits, target, reduction)
        assert loss.isnan() and gradient.isnan().all() and gradient.shape == logits.shape
    with pytest.raises(
        IndexError, match=r"prediction holds 4 values .* first is 9 at position \(1, 2, 3\)"
    ):
        fcnseg.check_labels()
    fcnseg.check_labels()  # the record starts anew


def test_cuda_policy_without_reduction(no_records):
    logits, target = normal((2, 5, 3, 3), torch.float64), labels((2, 12, 12), 5)
    target[1, 0, 11] = 7
    loss, _ = cuda_loss(logits, target, "none")
    assert loss.isnan().nonzero().tolist() == [[1, 0, 11]]
    gradient = _ops._upsample_cross_entropy_backward(
        torch.ones_like(loss), logits, target, None, 255, 0.1, False, None, None
    )
    assert gradient[0].isfinite().all() and gradient[1, :, 0, 2].isnan().all()
    assert gradient[1, :, 2, :1].isfinite().all()


def test_record_keeps_the_first_of_many_calls():
    record = torch.zeros(5, dtype=torch.int64)
    bad = torch.tensor([[[9, 0], [0, -4]]])
    _labels.add_to_record(record, torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))
    assert record.tolist() == [0] * 5
    _labels.add_to_record(record, bad.flip(2), _labels.bad_mask(bad.flip(2), 5, None))
    _labels.add_to_record(record, bad, _labels.bad_mask(bad, 5, -4))
    _labels.add_to_record(record, bad[:0], bad[:0] > 0)
    assert record.tolist() == [3, 9, 0, 0, 1]


def test_environment_asks_for_a_check_at_every_call(no_records, monkeypatch):
    target = torch.full((1, 4, 4), 7)
    monkeypatch.setenv("FCNSEG_CHECK_LABELS", "1")
    with pytest.raises(IndexError, match="prediction holds 16 values outside the allowed classes"):
        cuda_loss(normal((1, 5, 2, 2), torch.float64), target, "mean")
    monkeypatch.setenv("FCNSEG_CHECK_LABELS", "0")
    cuda_loss(normal((1, 5, 2, 2), torch.float64), target, "mean")


# -- the module --------------------------------------------------------------------------------


def test_module_equals_the_function():
    logits, target = normal((2, 3, 5, 7)), labels((2, 12, 12), 3, ignore=255)
    options = {
        "weight": torch.tensor([1.0, 2.0, 0.5]), "ignore_index": 255, "reduction": "sum",
        "label_smoothing": 0.1, "scale_factor": (2.5, 1.75),
    }  # fmt: skip
    module = fcnseg.UpsampleCrossEntropyLoss(**options)
    ours = evaluate(lambda x: module(x, target), [logits])
    expected = evaluate(lambda x: fcnseg.upsample_cross_entropy(x, target, **options), [logits])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    corners = fcnseg.UpsampleCrossEntropyLoss(ignore_index=255, align_corners=True)
    assert corners(logits, target) == fcnseg.upsample_cross_entropy(
        logits, target, ignore_index=255, align_corners=True
    )


def test_module_state_holds_the_class_weights():
    module = fcnseg.UpsampleCrossEntropyLoss(torch.tensor([1.0, 2.0]))
    other = fcnseg.UpsampleCrossEntropyLoss(torch.zeros(2))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)
    assert list(module.state_dict()) == ["weight"] and not list(module.parameters())
    assert list(fcnseg.UpsampleCrossEntropyLoss().state_dict()) == []
