"""The ResNet trunk: torchvision's names, shapes and initialisation, at output stride 8, 16 or 32.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; the stride of a
bottleneck lies on its 3x3 convolution, and dilation replaces stride, as in
torchvision.models.resnet.
"""

from __future__ import annotations

from torch import Tensor, nn

DEPTHS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
OUTPUT_STRIDES = (8, 16, 32)


def _conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False
    )


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions: the block of ResNet-18 and -34.

    `first_dilation` is that of the convolution that carries the stride (or carried it before
    dilation replaced it), `dilation` that of what follows. A dilated network, read at every second
    pixel, then equals the strided one exactly.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        downsample: nn.Module | None,
        first_dilation: int,
        dilation: int,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride, first_dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(channels, channels, 1, dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions: the block of ResNet-50 and -101. Its only 3x3 carries the
    stride."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        downsample: nn.Module | None,
        first_dilation: int,
        dilation: int,
    ) -> None:
        del dilation  # nothing with an extent follows the 3x3 within this block
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, stride, first_dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class ResNet(nn.Module):
    """ResNet without its classifier, dense enough for segmentation.

    Args:
        depth: 18, 34, 50 or 101.
        output_stride: 8, 16 or 32, pixels of the input per pixel of the last feature map. Below 32
            the last one or two strides become dilation.

    `forward` takes [N, 3, H, W] and returns the features of layers 2, 3 and 4, `channels` wide. A
    layer of stride s has ceil(H / s) rows and ceil(W / s) columns; without dilation the strides are
    8, 16 and 32, with it they end at output_stride.

    Raises:
        ValueError: depth or output_stride is none of those.
    """

    def __init__(self, depth: int, *, output_stride: int = 8) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {tuple(DEPTHS)}, got {depth!r}")
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(
                f"output_stride must be one of {OUTPUT_STRIDES}, got {output_stride!r}"
            )
        block = _BasicBlock if depth < 50 else _Bottleneck
        blocks = DEPTHS[depth]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        self._channels, self._dilation = 64, 1  # of what the next layer receives
        self.layer1 = self._layer(block, 64, blocks[0], stride=1, dilate=False)
        self.layer2 = self._layer(block, 128, blocks[1], stride=2, dilate=False)
        self.layer3 = self._layer(block, 256, blocks[2], stride=2, dilate=output_stride < 16)
        self.layer4 = self._layer(block, 512, blocks[3], stride=2, dilate=output_stride < 32)
        self.channels = (128 * block.expansion, 256 * block.expansion, 512 * block.expansion)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _layer(
        self,
        block: type[_BasicBlock] | type[_Bottleneck],
        channels: int,
        blocks: int,
        *,
        stride: int,
        dilate: bool,
    ) -> nn.Sequential:
        first_dilation = self._dilation
        if dilate:
            self._dilation *= stride
            stride = 1
        out_channels = channels * block.expansion
        downsample = None
        if stride != 1 or self._channels != out_channels:
            downsample = nn.Sequential(
                nn.Conv2d(self._channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        layers: list[nn.Module] = [
            block(self._channels, channels, stride, downsample, first_dilation, self._dilation)
        ]
        self._channels = out_channels
        layers += [
            block(out_channels, channels, 1, None, self._dilation, self._dilation)
            for _ in range(1, blocks)
        ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        layer2 = self.layer2(self.layer1(x))
        layer3 = self.layer3(layer2)
        return layer2, layer3, self.layer4(layer3)
