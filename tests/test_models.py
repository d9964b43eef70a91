"""The networks against torchvision's; their fused loss, labels and counts against plain PyTorch."""

from __future__ import annotations

import copy
import doctest
import inspect

import pytest
import torch
from oracles import import_torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fcnseg import models
from fcnseg.models import FCN, ResNet, load_pretrained

DEPTHS = (18, 34, 50, 101)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(model: nn.Module) -> nn.Module:
    """Give every batch norm its own statistics and affine map, where a fresh one does nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.25)
            nn.init.uniform_(module.weight, 0.8, 1.25)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(2, 3, 45, 70, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def target() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(0, 5, (2, 45, 70), generator=generator, dtype=torch.uint8)
    target[:, 10:20, 30:] = 255
    return target


def make(depth: int = 18, **options: object) -> FCN:
    """A network with 5 classes whose deconvolutions are no longer bilinear, nor its skips zero."""
    model = randomise(FCN(depth, 5, **{"output_stride": 16, **options}))
    assert isinstance(model, FCN)
    learnt = [*model.skips.parameters(), *(model.deconv.parameters() if model.deconv else ())]
    with torch.no_grad():
        for parameter in learnt:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


VARIANTS = [
    pytest.param({"aux_loss": True}, id="bilinear"),
    pytest.param({"head": "plain", "upsample": "deconv"}, id="plain-deconv"),
    pytest.param(
        {"upsample": "deconv", "deconv_groups": "full", "aux_loss": True}, id="deconv-full"
    ),
    pytest.param({"upsample": "deconv", "skips": "8s", "output_stride": 32}, id="deconv-8s"),
]


# --- torchvision -----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [50, 101])
def test_equals_torchvision(depth: int) -> None:
    segmentation = import_torchvision().models.segmentation
    name = f"fcn_resnet{depth}"
    theirs = randomise(
        getattr(segmentation, name)(
            weights=None, weights_backbone=None, num_classes=21, aux_loss=True
        )
    )
    ours = getattr(models, name)(21, aux_loss=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    report = load_pretrained(ours, theirs.state_dict())
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})

    x = torch.randn(2, 3, 64, 64)
    target = torch.randint(0, 21, (2, 64, 64))
    ours.eval(), theirs.eval()
    with torch.no_grad():
        expected = theirs(x)
        output = ours(x)
    assert list(output) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(output[key], value, rtol=1e-5, atol=1e-5)

    for model in (ours, theirs):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
    with torch.no_grad():
        expected = theirs(x)
        loss = ours.loss(x, target)
    expected_loss = F.cross_entropy(expected["out"], target) + 0.4 * F.cross_entropy(
        expected["aux"], target
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for key, value in theirs.named_buffers():  # the running statistics moved alike
        torch.testing.assert_close(ours.get_buffer(key), value, rtol=1e-4, atol=1e-5)


def test_settings_and_initialisation_are_torchvisions() -> None:
    segmentation = import_torchvision().models.segmentation
    theirs = segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    )
    ours = models.fcn_resnet50(21, aux_loss=True)
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Dropout | nn.ReLU | nn.MaxPool2d):
            assert repr(module) == repr(modules[name])
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if a.dim() == 4:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.05), name
        elif not name.endswith("classifier.4.bias"):  # a random vector in both
            assert torch.equal(a, b), name


@pytest.mark.parametrize("depth", DEPTHS)
def test_trunk_has_an_imagenet_resnets_names_and_shapes(depth: int) -> None:
    classification = import_torchvision().models
    with torch.device("meta"):
        theirs = getattr(classification, f"resnet{depth}")(weights=None).state_dict()
        ours = ResNet(depth).state_dict()
    shapes = {name: value.shape for name, value in theirs.items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in ours.items()} == shapes


def test_parameter_counts() -> None:
    with torch.device("meta"):
        full = models.fcn_resnet101(21, aux_loss=True)
        plain = models.fcn_resnet101(19, head="plain", upsample="deconv")
    assert sum(p.numel() for p in full.parameters()) == 54_314_346
    trunk = sum(p.numel() for p in plain.backbone.parameters())
    assert trunk == 42_500_160
    assert sum(p.numel() for p in plain.parameters()) == (
        trunk + (2048 * 9 + 1) * 19 + 19 * 16 * 16
    )


# --- trunk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("depth", DEPTHS)
def test_feature_sizes(depth: int, output_stride: int) -> None:
    with torch.device("meta"):
        trunk = ResNet(depth, output_stride=output_stride)
        for height, width in ((64, 96), (65, 33), (1, 31)):
            features = trunk(torch.empty(2, 3, height, width))
            for layer, channels, stride in zip(features, trunk.channels, (8, 16, 32), strict=True):
                s = min(stride, output_stride)
                assert layer.shape == (2, channels, -(-height // s), -(-width // s))


@pytest.mark.parametrize("depth", [18, 50])
def test_dilation_keeps_what_the_strided_network_computes(depth: int) -> None:
    strided = randomise(ResNet(depth, output_stride=32)).eval().double()
    x = torch.randn(1, 3, 75, 97, dtype=torch.float64)
    with torch.no_grad():
        expected = strided(x)[-1]
        for output_stride in (8, 16):
            dense = ResNet(depth, output_stride=output_stride).eval().double()
            dense.load_state_dict(strided.state_dict())
            step = 32 // output_stride
            torch.testing.assert_close(dense(x)[-1][..., ::step, ::step], expected)


# --- upsampling ------------------------------------------------------------------------------


@pytest.mark.parametrize("deconv_groups", ["grouped", "full"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_deconvolution_starts_as_bilinear_upsampling(
    output_stride: int, deconv_groups: str
) -> None:
    model = models.fcn_resnet18(
        3, output_stride=output_stride, upsample="deconv", deconv_groups=deconv_groups
    )
    assert model.deconv is not None
    shape = (3, 3 if deconv_groups == "full" else 1, 2 * output_stride, 2 * output_stride)
    assert model.deconv.weight.shape == shape
    assert model.deconv.weight.requires_grad
    z = torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        upsampled = model.deconv(z)
    expected = F.interpolate(z, scale_factor=output_stride, mode="bilinear", align_corners=False)
    assert upsampled.shape == expected.shape
    inner = slice(output_stride // 2, -(output_stride // 2))  # beyond, bilinear repeats the border
    torch.testing.assert_close(upsampled[..., inner, inner], expected[..., inner, inner])


@pytest.mark.parametrize("height", [1, 15, 16, 17, 31, 33])
def test_deconvolution_covers_every_size(height: int) -> None:
    model = make(upsample="deconv").eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, height, 40))["out"].shape == (1, 5, height, 40)


@pytest.mark.parametrize("options", VARIANTS)
def test_output_is_the_upsampled_low_resolution_logits(
    options: dict[str, object], image: Tensor
) -> None:
    model = make(**options).eval()
    with torch.no_grad():
        low, output = model.low_resolution(image), model(image)
        assert set(model.low_resolution(image, aux=False)) == {"out"}
    names = ["out", "aux"] if "aux_loss" in options else ["out"]
    assert list(low) == list(output) == names
    assert low["out"].shape == ((2, 5, 6, 9) if "skips" in options else (2, 5, 3, 5))
    for name in names:
        if name == "out" and model.deconv is not None:
            expected = model.deconv(low[name])[:, :, :45, :70]
        else:
            expected = F.interpolate(low[name], size=(45, 70), mode="bilinear")
        torch.testing.assert_close(output[name], expected)


# --- skips -----------------------------------------------------------------------------------

SKIPS = {None: 0, "32s": 0, "16s": 1, "8s": 2}


def plain_output(model: FCN, x: Tensor, skips: str | None) -> dict[str, Tensor]:
    """FCN-32s, 16s or 8s in plain PyTorch, from the model's parameters."""
    parameters, size = dict(model.named_parameters()), x.shape[-2:]
    trunk = model.backbone
    stem = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
    layer2 = trunk.layer2(trunk.layer1(stem))
    layer3 = trunk.layer3(layer2)
    z = model.classifier(trunk.layer4(layer3))
    for i, features in enumerate([layer3, layer2][: SKIPS[skips]]):
        up, score, bias = (
            parameters[f"skips.{i}.{name}"] for name in ("up.weight", "score.weight", "score.bias")
        )
        z = F.conv_transpose2d(z, up, stride=2, padding=1, groups=5 // up.shape[1])
        z = z[:, :, : features.shape[2], : features.shape[3]] + F.conv2d(features, score, bias)
    stride = 32 >> SKIPS[skips]
    assert z.shape == (len(x), 5, -(-size[0] // stride), -(-size[1] // stride))
    if "deconv.weight" in parameters:
        deconv = parameters["deconv.weight"]
        assert deconv.shape[2:] == (2 * stride, 2 * stride)
        z = F.conv_transpose2d(
            z, deconv, stride=stride, padding=stride // 2, groups=5 // deconv.shape[1]
        )
        output = {"out": z[:, :, : size[0], : size[1]]}
    else:
        output = {"out": F.interpolate(z, size, mode="bilinear", align_corners=False)}
    if model.aux_classifier is not None:
        output["aux"] = F.interpolate(
            model.aux_classifier(layer3), size, mode="bilinear", align_corners=False
        )
    return output


def assert_is_plain(model: FCN, skips: str | None, size: tuple[int, int]) -> None:
    """Output, loss, every gradient, labels and counts, in float64."""
    model = model.double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    target = torch.randint(0, 5, (2, *size), dtype=torch.uint8)
    target[0, : size[0] // 3] = 255
    expected = plain_output(model, x, skips)
    output = model(x)
    assert list(output) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value)

    losses = {
        name: F.cross_entropy(z, target.long(), ignore_index=255) for name, z in expected.items()
    }
    expected_loss = losses["out"] + 0.4 * losses["aux"] if "aux" in losses else losses["out"]
    expected_loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    loss = model.loss(x, target)
    torch.testing.assert_close(loss, expected_loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)

    labels = expected["out"].argmax(1)
    assert torch.equal(model.predict(x), labels)
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    model.update_confusion_matrix(matrix, x, target)
    valid = target != 255
    cells = target[valid].long() * 5 + labels[valid]
    assert torch.equal(matrix, torch.bincount(cells, minlength=25).view(5, 5))


@pytest.mark.parametrize("size", [(32, 64), (45, 71)], ids=str)
@pytest.mark.parametrize("deconv_groups", [None, "grouped", "full"])
@pytest.mark.parametrize("skips", ["32s", "16s", "8s"])
def test_skips_equal_plain_pytorch(
    skips: str, deconv_groups: str | None, size: tuple[int, int]
) -> None:
    upsample = {} if deconv_groups is None else {"upsample": "deconv"}
    head = {"head": "plain" if deconv_groups == "grouped" else "fcn"}
    groups = {"deconv_groups": deconv_groups or "grouped"}
    aux = {"aux_loss": deconv_groups == "full"}
    model = make(skips=skips, output_stride=32, **head, **aux, **groups, **upsample)
    assert_is_plain(model, skips, size)


@pytest.mark.parametrize("size", [(1, 31), (33, 17)], ids=str)
def test_skips_equal_plain_pytorch_at_small_sizes(size: tuple[int, int]) -> None:
    model = make(skips="8s", output_stride=32, upsample="deconv", aux_loss=True)
    assert_is_plain(model, "8s", size)


@pytest.mark.parametrize(
    "depth",
    [pytest.param(34, marks=pytest.mark.slow), 50, pytest.param(101, marks=pytest.mark.slow)],
)
def test_skips_equal_plain_pytorch_on_deeper_trunks(depth: int) -> None:
    model = make(depth, skips="8s", output_stride=32, head="plain", upsample="deconv")
    assert_is_plain(model, "8s", (45, 40))


def test_network_with_skips_starts_as_one_without(image: Tensor) -> None:
    with_skips = models.fcn_resnet18(5, output_stride=32, skips="8s").eval()
    without = models.fcn_resnet18(5, output_stride=32).eval()
    report = load_pretrained(without, with_skips.state_dict())
    assert report.missing == () and all(name.startswith("skips.") for name in report.unexpected)
    with torch.no_grad():
        z = without.low_resolution(image)["out"]
        for height, width in ((3, 5), (6, 9)):  # of layer 3 and of layer 2
            z = F.interpolate(z, scale_factor=2, mode="bilinear")[..., :height, :width]
        fine = with_skips.low_resolution(image)["out"]
    # Beyond the interior a deconvolution sees zeros where bilinear repeats the border.
    torch.testing.assert_close(fine[..., 3:-3, 3:-3], z[..., 3:-3, 3:-3])
    assert z.std() > 0


def test_loading_weights_into_a_network_with_skips() -> None:
    options = {"output_stride": 32, "skips": "8s", "upsample": "deconv"}
    source, model = make(**options), make(**options)
    skips = [name for name in source.state_dict() if name.startswith("skips.")]
    assert skips == [
        f"skips.{i}.{name}" for i in (0, 1) for name in ("up.weight", "score.weight", "score.bias")
    ]
    model.load_state_dict(source.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])

    before = copy.deepcopy(model.state_dict())
    report = load_pretrained(model, make(output_stride=32).state_dict())
    assert report.missing == (*skips, "deconv.weight")
    assert report.unexpected == () and report.mismatched == {}
    for name in report.missing:
        assert torch.equal(model.state_dict()[name], before[name])
    report = load_pretrained(models.fcn_resnet18(4, **options), source.state_dict())
    assert report.missing == () and report.unexpected == ()
    assert {*skips, "deconv.weight"} < set(report.mismatched)


# --- loss, labels, counts --------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS)
def test_loss_and_gradient_match_plain_pytorch(
    options: dict[str, object], image: Tensor, target: Tensor
) -> None:
    model = make(**options).eval().double()
    image = image.double()
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0], dtype=torch.float64)

    def plain(**arguments: object) -> Tensor:
        losses = {
            name: F.cross_entropy(z, target.long(), ignore_index=255, **arguments)
            for name, z in model(image).items()
        }
        return losses["out"] + 0.4 * losses["aux"] if "aux" in losses else losses["out"]

    for arguments in (
        {},
        {"weight": weight, "label_smoothing": 0.1},
        {"reduction": "none"},
        {"reduction": "sum"},
    ):
        with torch.no_grad():
            torch.testing.assert_close(model.loss(image, target, **arguments), plain(**arguments))

    plain().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.loss(image, target).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_auxiliary_weight(image: Tensor, target: Tensor) -> None:
    model = make(aux_loss=True).eval()
    with torch.no_grad():
        losses = [model.loss(image, target, aux_weight=w).item() for w in (0.0, 1.0, 2.0)]
    assert losses[1] > losses[0]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


@pytest.mark.parametrize("options", VARIANTS)
def test_labels_and_counts_match_plain_pytorch(
    options: dict[str, object], image: Tensor, target: Tensor
) -> None:
    model = make(**options).eval().double()
    image = image.double()
    with torch.no_grad():
        expected = model(image)["out"].argmax(1)
    labels = model.predict(image)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, expected)

    matrix = torch.ones(5, 5, dtype=torch.int64)
    assert model.update_confusion_matrix(matrix, image, target) is matrix
    valid = target != 255
    cells = target[valid].long() * 5 + expected[valid]
    assert torch.equal(matrix - 1, torch.bincount(cells, minlength=25).view(5, 5))


def test_bilinear_labels_and_loss_at_another_size(image: Tensor) -> None:
    model = make().eval().double()
    image = image.double()
    target = torch.randint(0, 5, (2, 90, 141))
    with torch.no_grad():
        z = model.low_resolution(image)["out"]
        full = F.interpolate(z, size=(90, 141), mode="bilinear")
        torch.testing.assert_close(model.loss(image, target), F.cross_entropy(full, target))
    assert torch.equal(model.predict(image, (90, 141)), full.argmax(1))
    assert model.predict(image, 32).shape == (2, 32, 32)


def test_deconvolution_refuses_another_size(image: Tensor, target: Tensor) -> None:
    model = make(upsample="deconv").eval()
    assert model.predict(image[..., :45], 45).shape == (2, 45, 45)
    with pytest.raises(ValueError, match=r"size must have the size of x, \(45, 70\).*\(90, 140\)"):
        model.predict(image, (90, 140))
    with pytest.raises(ValueError, match=r"target must have the size of x.*\(40, 70\)"):
        model.loss(image, target[:, :40])
    with pytest.raises(ValueError, match=r"target must have the size of x.*\(40, 70\)"):
        matrix = torch.zeros(5, 5, dtype=torch.int64)
        model.update_confusion_matrix(matrix, image, target[:, :40])


@pytest.mark.parametrize("options", VARIANTS)
def test_autocast_takes_the_logits_as_they_come(
    options: dict[str, object], image: Tensor, target: Tensor
) -> None:
    model = make(**options).eval()
    with torch.no_grad():
        exact = model.loss(image, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.low_resolution(image)["out"].dtype == torch.bfloat16
        loss = model.loss(image, target)
        labels = model.predict(image)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (labels == model.predict(image)).float().mean() > 0.8


@pytest.mark.parametrize("options", VARIANTS)
def test_channels_last_gives_the_same_output(options: dict[str, object], image: Tensor) -> None:
    model = make(**options).eval()
    with torch.no_grad():
        expected = model(image)
        output = model.to(memory_format=torch.channels_last)(
            image.contiguous(memory_format=torch.channels_last)
        )
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"upsample": "deconv"}, {"upsample": "deconv", "skips": "8s", "output_stride": 32}],
    ids=["bilinear", "deconv", "deconv-8s"],
)
def test_compiles_to_one_graph(options: dict[str, object], image: Tensor, target: Tensor) -> None:
    model = make(**options).eval()

    def compiled(function: object) -> object:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(image), model(image))
        torch.testing.assert_close(compiled(model.loss)(image, target), model.loss(image, target))
        assert torch.equal(compiled(model.predict)(image), model.predict(image))


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got float"),
        ({"num_classes": True}, TypeError, "num_classes must be an int, got bool"),
        ({"output_stride": 4}, ValueError, r"output_stride must be one of \(8, 16, 32\), got 4"),
        ({"head": "fc"}, ValueError, r"head must be one of \('fcn', 'plain'\), got 'fc'"),
        ({"upsample": "nearest"}, ValueError, "upsample must be one of .* got 'nearest'"),
        ({"deconv_groups": 1}, ValueError, "deconv_groups must be one of .* got 1"),
        (
            {"skips": "4s"},
            ValueError,
            r"skips must be one of \('32s', '16s', '8s'\), got '4s'",
        ),
        ({"skips": "32s"}, ValueError, "skips='32s' needs output_stride=32, got 8"),
        (
            {"skips": "8s", "output_stride": 16},
            ValueError,
            "skips='8s' needs output_stride=32, got 16",
        ),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        models.fcn_resnet18(**{"num_classes": 3, **options})


@pytest.mark.parametrize("depth", DEPTHS)
def test_constructors_show_the_networks_arguments(depth: int) -> None:
    construct = getattr(models, f"fcn_resnet{depth}")
    signature = inspect.signature(construct)
    own = dict(inspect.signature(FCN).parameters)
    del own["depth"]
    assert dict(signature.parameters) == own and signature.return_annotation is FCN
    assert construct.__name__ == f"fcn_resnet{depth}" and f"ResNet-{depth}" in construct.__doc__
    with torch.device("meta"):
        model = construct(3, output_stride=16)
        expected = FCN(depth, 3, output_stride=16)
    assert list(model.state_dict()) == list(expected.state_dict())


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(models.fcn)
    assert result.attempted > 3 and not result.failed


def test_bad_depth() -> None:
    with pytest.raises(ValueError, match=r"depth must be one of \(18, 34, 50, 101\), got 20"):
        FCN(20, 3)


def test_bad_images() -> None:
    model = make()
    for shape in ((3, 32, 32), (1, 4, 32, 32), (5,)):
        with pytest.raises(ValueError, match=r"x must have shape \[N, 3, H, W\], got \["):
            model(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"x must be floating-point .* got torch\.uint8"):
        model.predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# --- pretrained weights ----------------------------------------------------------------------


def imagenet_weights(depth: int = 18) -> dict[str, Tensor]:
    weights = randomise(ResNet(depth)).state_dict()
    weights["fc.weight"] = torch.zeros(1000, 512)
    weights["fc.bias"] = torch.zeros(1000)
    return weights


def test_loading_imagenet_weights(tmp_path) -> None:
    weights = imagenet_weights()
    # Old weights are complete without the batch norms' counters.
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "resnet18.pth"
    torch.save(weights, path)
    model = models.fcn_resnet18(4)
    head = copy.deepcopy(model.classifier.state_dict())
    report = load_pretrained(model, path)
    assert report.missing == tuple(f"classifier.{k}" for k in head if "num_batches" not in k)
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert report.mismatched == {}
    for name, value in model.backbone.state_dict().items():
        if name in weights:
            assert torch.equal(value, weights[name])
    for name, value in model.classifier.state_dict().items():
        assert torch.equal(value, head[name])
    assert str(report).startswith("missing: classifier.0.weight, ")
    assert str(report).endswith("unexpected: fc.weight, fc.bias; mismatched: none")


def test_fine_tuning_on_another_number_of_classes() -> None:
    source = randomise(models.fcn_resnet18(21, aux_loss=True))
    model = models.fcn_resnet18(5)
    bias = model.classifier[4].bias.clone()
    report = load_pretrained(model, {"model": source.state_dict(), "epoch": 3})
    assert report.missing == ()
    assert report.unexpected == tuple(k for k in source.state_dict() if k.startswith("aux_"))
    assert report.mismatched == {
        "classifier.4.weight": ((21, 128, 1, 1), (5, 128, 1, 1)),
        "classifier.4.bias": ((21,), (5,)),
    }
    assert "classifier.4.bias (21,) -> (5,)" in str(report)
    assert torch.equal(model.classifier[4].bias, bias)
    assert torch.equal(model.classifier[1].running_mean, source.classifier[1].running_mean)


def test_unusable_weights_change_nothing_and_say_why(tmp_path) -> None:
    model = models.fcn_resnet18(4)
    before = copy.deepcopy(model.state_dict())
    missing = tmp_path / "absent.pth"
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_pretrained(model, missing)
    corrupt = tmp_path / "corrupt.pth"
    for content in (b"", b"no weights", b"PK\x03\x04 cut short"):
        corrupt.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read pretrained weights from .*corrupt\.pth"):
            load_pretrained(model, str(corrupt))
    module = tmp_path / "module.pth"
    torch.save(nn.Conv2d(1, 1, 1), module)  # a pickled object, which weights_only refuses
    with pytest.raises(ValueError, match=r"cannot read pretrained weights from .*module\.pth"):
        load_pretrained(model, module)
    tensor = tmp_path / "tensor.pth"
    torch.save(torch.zeros(3), tensor)
    with pytest.raises(TypeError, match=r"tensor\.pth must hold a mapping .* got Tensor"):
        load_pretrained(model, tensor)
    with pytest.raises(TypeError, match="got int under 'epoch'"):
        load_pretrained(model, {"epoch": 3})
    with pytest.raises(ValueError, match=r"no entry that fits the model.*encoder\.weight"):
        load_pretrained(model, {"encoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"another backbone: backbone\.layer1\.0\.conv1\.weight"):
        load_pretrained(model, ResNet(50).state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
