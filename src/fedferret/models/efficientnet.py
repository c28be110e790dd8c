"""EfficientNet-Lite0: a convolutional network for 224×224 images, written from the published description.

EfficientNet-B0 is Table 1 of Tan & Le (ICML 2019, arXiv 1905.11946): a stem, sixteen mobile inverted bottlenecks
(MBConv) in seven stages, and a 1×1 convolution to 1,280 maps. An MBConv expands the maps by 1×1 convolution, filters
each map alone, projects by 1×1 convolution, and adds the input where shape allows. The Lite variant
(github.com/tensorflow/tpu, models/official/efficientnet/lite) has ReLU6 for swish, no squeeze-and-excite, and stem and
head widths that do not scale. Convolutions pad as TensorFlow's "SAME": the odd pixel right and below. BatchNorm has
ε = 0.001 and uses its stored statistics, in training too.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_STEM, _HEAD = 32, 1280
# expansion, kernel, stride, maps, blocks: the stages of Table 1
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_EPSILON = 1e-3


class EfficientNetLite0(nn.Module):
    """Images of 224×224 pixels to 1,280 features: the mean of each map over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConvolution(3, _STEM, 3, stride=2)
        self.bn0 = FixedBatchNorm(_STEM)
        blocks, maps = [], _STEM
        for expansion, kernel, stride, wider, count in _STAGES:
            for number in range(count):
                blocks.append(InvertedBottleneck(maps, wider, expansion, kernel, stride if number == 0 else 1))
                maps = wider
        self.blocks = nn.ModuleList(blocks)
        self.conv_head = SameConvolution(maps, _HEAD, 1)
        self.bn1 = FixedBatchNorm(_HEAD)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Features, shape (N, 1280), of normalised pixels, shape (N, 3, 224, 224)."""
        # the values of a pixel beside each other: a third less time on a CPU
        maps_NCHW = pixels_NCHW.contiguous(memory_format=torch.channels_last)
        maps_NCHW = functional.relu6(self.bn0(self.conv_stem(maps_NCHW)))
        for block in self.blocks:
            maps_NCHW = block(maps_NCHW)
        return functional.relu6(self.bn1(self.conv_head(maps_NCHW))).mean(dim=(2, 3))


class InvertedBottleneck(nn.Module):
    """MBConv without squeeze-and-excite."""

    def __init__(self, maps: int, wider: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = maps * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and maps == wider
        if self.expands:
            self.expand_conv = SameConvolution(maps, inner, 1)
            self.bn0 = FixedBatchNorm(inner)
        self.depthwise_conv = SameConvolution(inner, inner, kernel, stride=stride, groups=inner)
        self.bn1 = FixedBatchNorm(inner)
        self.project_conv = SameConvolution(inner, wider, 1)
        self.bn2 = FixedBatchNorm(wider)

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        """The next maps."""
        inner_NCHW = maps_NCHW
        if self.expands:
            inner_NCHW = functional.relu6(self.bn0(self.expand_conv(inner_NCHW)))
        inner_NCHW = functional.relu6(self.bn1(self.depthwise_conv(inner_NCHW)))
        projected_NCHW = cast(Tensor, self.bn2(self.project_conv(inner_NCHW)))
        return projected_NCHW + maps_NCHW if self.adds else projected_NCHW


class SameConvolution(nn.Conv2d):
    """A convolution without bias; the output has 1 / stride of the size of the input, rounded up."""

    def __init__(self, maps: int, wider: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        even = kernel // 2 if stride == 1 else 0  # the same on all sides
        super().__init__(maps, wider, kernel, stride=stride, padding=even, groups=groups, bias=False)

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        """The maps, padded and convolved."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            sides = []
            for length in (maps_NCHW.shape[3], maps_NCHW.shape[2]):  # the last dimension first
                padding = max((-(-length // stride) - 1) * stride + kernel - length, 0)
                sides += [padding // 2, padding - padding // 2]
            maps_NCHW = functional.pad(maps_NCHW, sides)
        return super().forward(maps_NCHW)


class FixedBatchNorm(nn.Module):
    """BatchNorm by stored statistics; a batch never changes them."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(maps))
        self.bias = nn.Parameter(torch.zeros(maps))
        self.register_buffer("running_mean", torch.zeros(maps))
        self.register_buffer("running_var", torch.ones(maps))

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        """The normalised maps."""
        return functional.batch_norm(
            maps_NCHW, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=_EPSILON
        )
