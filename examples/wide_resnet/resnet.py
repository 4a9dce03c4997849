"""Wide ResNet of bottleneck blocks.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), with the
wider 3 x 3 convolutions of Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016
(arXiv 1605.07146), and with the stride in the 3 x 3 convolution of a block ("version 1.5"), as most
published networks of this name have it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

EXPANSION = 4  # channels of a block's result, over those of the ResNet's own 3 x 3 convolution


@dataclass(frozen=True)
class Shape:
    """Sizes of a ResNet."""

    blocks: tuple[int, ...]  # in each stage; a stage after the first halves the image
    classes: int
    width: int = 64  # channels of the first stage's 3 x 3 convolutions in a ResNet that is not wide
    widening: int = 1  # how many times more the 3 x 3 convolutions have here
    channels: int = 3  # of an image
    # A 7 x 7 convolution and a maximum, which make images of 224 pixels 56 wide; or a 3 x 3
    # convolution that leaves small images as they are.
    large_images: bool = True


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image's size, over the stride. The norm after it has a bias."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(inputs, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            convolution(inner, inner, 3, stride),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            convolution(inner, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        return (self.layers(images) + self.shortcut(images)).relu()


class WideResNet(nn.Module):
    """images (N, channels, height, width) float32 -> logits (N, classes)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        stem: list[nn.Module]
        if shape.large_images:
            stem = [convolution(shape.channels, width, 7, 2), nn.BatchNorm2d(width)]
            stem += [nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
        else:
            stem = [convolution(shape.channels, width, 3), nn.BatchNorm2d(width)]
            stem += [nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*stem)
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(shape.blocks):
            inner, outputs = shape.widening * width, EXPANSION * width
            stride = 1 if stage == 0 else 2
            blocks = [Bottleneck(inputs, inner, outputs, stride)]
            blocks += [Bottleneck(outputs, inner, outputs, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs, width = outputs, 2 * width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, shape.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))


# Wide-ResNet-101-2 with the 1000 classes of ImageNet: 126,886,696 parameters, the count of the
# Global-QSGD paper (arXiv 2305.18627).
WIDE_RESNET_101_2 = Shape(blocks=(3, 4, 23, 3), classes=1000, widening=2)
