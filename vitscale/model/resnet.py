"""The ResNet of hybrid Vision Transformers: what stands between the image and the patch embedding.

A bottleneck ResNet (He et al. 2016, v1 order with the activation after the addition) with weight-standardised
convolutions (Qiao et al. 2019, arXiv 1903.10520) and GroupNorm (Wu and He 2018), as in BiT and the ViT paper.
Parameter names, epsilons and the SAME padding of TensorFlow are timm's, so that its weights load.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.model.initialisation import lecun_normal_

ROOT_CHANS = 64
_EXPANSION = 4
_GROUPS = 32
_STANDARD_EPS = 1e-8


class StdConv(nn.Conv2d):
    """Convolution without bias whose kernels have mean 0 and variance 1, padded to ceil(size / stride) outputs."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_chans, out_chans, kernel_size=kernel, stride=stride, bias=False)
        lecun_normal_(self.weight)

    def reset_parameters(self) -> None:
        """Draw nothing: `__init__` does."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [B, C, H, W] with the standardised kernels."""
        # Fused, and bit for bit timm's: through tens of GroupNorms another order of rounding grows to 1e-4.
        kernels = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(kernels, None, None, training=True, eps=_STANDARD_EPS).reshape_as(self.weight)
        x = _pad_same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, weight, stride=self.stride)


class Norm(nn.GroupNorm):
    """GroupNorm over [B, C, H, W]; its scale starts at `first`."""

    def __init__(self, channels: int, first: float = 1.0) -> None:
        super().__init__(_GROUPS, channels)
        nn.init.constant_(self.weight, first)


class Shortcut(nn.Module):
    """Projection of a unit's input to its output's shape."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.conv = StdConv(in_chans, out_chans, 1, stride)
        self.norm = Norm(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, out_chans, H / stride, W / stride]."""
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Unit(nn.Module):
    """Bottleneck of convolutions 1x1, 3x3, 1x1; the last norm's scale starts at 0, so that it adds nothing at first."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        middle = out_chans // _EXPANSION
        projects = stride != 1 or in_chans != out_chans
        self.downsample = Shortcut(in_chans, out_chans, stride) if projects else nn.Identity()
        self.conv1 = StdConv(in_chans, middle, 1)
        self.norm1 = Norm(middle)
        self.conv2 = StdConv(middle, middle, 3, stride)
        self.norm2 = Norm(middle)
        self.conv3 = StdConv(middle, out_chans, 1)
        self.norm3 = Norm(out_chans, first=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, out_chans, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + self.downsample(x))


class Root(nn.Module):
    """7x7 convolution and max pooling: [B, C, H, W] -> [B, 64, H / 4, W / 4]."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.conv = StdConv(in_chans, ROOT_CHANS, 7, 2)
        self.norm = Norm(ROOT_CHANS)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve, normalise, rectify, pool."""
        x = _pad_same(F.relu(self.norm(self.conv(images))), 3, 2, fill=float("-inf"))
        return F.max_pool2d(x, kernel_size=3, stride=2)


class Stage(nn.Module):
    """Units of one resolution; the first changes channels and resolution."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, units: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Unit(in_chans if i == 0 else out_chans, out_chans, stride if i == 0 else 1) for i in range(units))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, out_chans, H / stride, W / stride]."""
        return self.blocks(x)  # type: ignore[no-any-return]


class ResNetStem(nn.Module):
    """Root and stages: [B, C, H, W] -> [B, out_chans, H / stride, W / stride] (stride: `Variant.stem_stride`).

    Args:
        in_chans: channels of the image.
        stages: units of each stage, at least one.
    """

    def __init__(self, in_chans: int, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = Root(in_chans)
        self.stages = nn.Sequential(
            *(
                Stage(ROOT_CHANS if i == 0 else stage_chans(i - 1), stage_chans(i), 1 if i == 0 else 2, units)
                for i, units in enumerate(stages)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """The feature map that the patch embedding reads."""
        return self.stages(self.stem(images))  # type: ignore[no-any-return]


def build_stem(in_chans: int, stages: tuple[int, ...]) -> nn.Module:
    """The stem with these stages; without any it is the root alone, whose parameters timm names without a prefix."""
    return ResNetStem(in_chans, stages) if stages else Root(in_chans)


def stem_chans(stages: tuple[int, ...]) -> int:
    """Channels that the patch embedding reads."""
    return stage_chans(len(stages) - 1) if stages else ROOT_CHANS


def stage_chans(stage: int) -> int:
    """Output channels of a stage, counted from 0."""
    return ROOT_CHANS * _EXPANSION << stage


def stem_flops(in_chans: int, stages: tuple[int, ...], image_px: tuple[int, int]) -> int:
    """Floating-point operations of the stem's convolutions on one image, a multiply-add counted as two."""
    height, width = image_px
    convolutions = _convolutions(in_chans, stages)
    return sum(2 * (height // stride) * (width // stride) * weights for weights, _, stride in convolutions)


def stem_parameters(in_chans: int, stages: tuple[int, ...]) -> int:
    """Parameters of the stem: each convolution's kernel, and the scale and bias of the norm behind it."""
    return sum(weights + 2 * out_chans for weights, out_chans, _ in _convolutions(in_chans, stages))


def _convolutions(in_chans: int, stages: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Of every convolution its weights, its output channels, and the pixels of the image along a side of a cell."""
    yield in_chans * ROOT_CHANS * 7**2, ROOT_CHANS, 2
    chans, stride = ROOT_CHANS, 4
    for stage, units in enumerate(stages):
        out = stage_chans(stage)
        middle = out // _EXPANSION
        for unit in range(units):
            before, stride = stride, stride * 2 if unit == 0 and stage > 0 else stride
            yield chans * middle, middle, before
            yield 9 * middle**2, middle, stride
            yield middle * out, out, stride
            if unit == 0:
                yield chans * out, out, stride  # the projection
            chans = out


def _pad_same(x: Tensor, kernel: int, stride: int, fill: float = 0.0) -> Tensor:
    """Pad so that a window of `kernel` gives ceil(size / stride) outputs, the odd pixel at the end."""
    missing = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
    if not any(missing):
        return x
    (across, down) = missing
    return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2), value=fill)
