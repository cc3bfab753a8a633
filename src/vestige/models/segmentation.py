"""Networks that answer at every pixel.

Each maps inputs (B, C, H, W) of any size to logits (B, K, H, W) and has `features(inputs)`, the
maps that enter `classifier`, the 1x1 convolution to the logits.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.errors import RecipeError, ShapeError

# Per stage: channels inside a bottleneck, blocks, stride of the first.
_RESNET50 = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
# Per stage: expansion, channels, blocks, stride of the first (arXiv 1801.04381, table 2).
_MOBILENETV2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class EncoderDecoder(nn.Module):
    """A small U-shaped network with BatchNorm: the teacher and student of tests and first runs.

    Encoder: 3x3 convolution, then per further width one 3x3 convolution of stride 2 and one of
    stride 1. Decoder, back up the same widths: 1x1 convolution, nearest-neighbour upsampling to the
    size on the way down, the map of the way down added, 3x3 convolution. Each convolution has no
    bias and a BN; all but the 1x1 ones a ReLU. With 3 channels and 5 classes 84,325 parameters, and
    21,365 with widths (8, 16, 32). Any image size; sides of 2^(number of widths) or more keep every
    stage useful.
    """

    def __init__(
        self, channels: int, num_classes: int, *, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        """Builds the layers, default torch initialisation.

        Args:
            channels: C of the input.
            num_classes: K.
            widths: channels per resolution, from full to lowest; each further entry halves the map
                once more. Cost grows with their squares.

        Raises:
            RecipeError: there are no widths, or one is below 1.
        """
        super().__init__()
        widths = tuple(widths)
        if not widths or min(widths) < 1:
            raise RecipeError(
                f"got widths {list(widths)} for an encoder-decoder, expected at least one number "
                "of channels, each at least 1; leave them out to take 16, 32, 64"
            )
        self.stem = _convolution(channels, widths[0])
        self.downs = nn.ModuleList(
            nn.Sequential(_convolution(before, after, stride=2), _convolution(after, after))
            for before, after in pairwise(widths)
        )
        # Added and not side by side as in U-Net: a third of the multiplications at full size.
        self.narrows = nn.ModuleList(
            _convolution(before, after, 1, activation=None)
            for after, before in reversed(list(pairwise(widths)))
        )
        self.merges = nn.ModuleList(_convolution(after, after) for after in widths[-2::-1])
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    def features(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch f h w"]:
        """Maps (B, widths[0], H, W) at full size, at least 0."""
        kept: list[Tensor] = [self.stem(inputs)]
        for down in self.downs:
            kept.append(down(kept[-1]))
        values = kept.pop()
        for narrow, merge in zip(self.narrows, self.merges, strict=True):
            beside = kept.pop()
            # The size and no factor: an odd side was rounded up on the way down.
            values = merge(F.interpolate(narrow(values), size=beside.shape[2:]) + beside)
        return values

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes h w"]:
        """Normalised inputs (B, C, H, W) to logits (B, K, H, W)."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


class ResNet50Features(nn.Module):
    """ResNet-50 with the ImageNet stem and without its classifier, some strides as dilation.

    Where the map is already `output_stride` times smaller than the input, a stride of 2 becomes 1
    and every later 3x3 convolution samples twice as far apart (Chen et al. 2017, arXiv 1706.05587,
    section 3.1). So the maps of output stride 8, read at every fourth position, are those of the
    same weights at output stride 32. 23,508,032 parameters with 3 channels and width 64. The layout
    is torchvision's, with the stride on the 3x3 convolution.

    Attributes:
        out_channels: of the maps, 32 * width.
    """

    def __init__(self, channels: int = 3, *, width: int = 64, output_stride: int = 8) -> None:
        """Builds the layers, default torch initialisation.

        Args:
            channels: C of the input.
            width: channels of the stem, to which all others are in proportion; 64 is ResNet-50.
                Cost grows with its square.
            output_stride: 8 or 16; 32 dilates nothing. Below, finer maps at 4 times the cost of
                the stages that are dilated.

        Raises:
            RecipeError: another output stride, or a width below 1.
        """
        super().__init__()
        _check_backbone("ResNet-50", width, output_stride)
        self.stem = nn.Sequential(
            _convolution(channels, width, 7, stride=2), nn.MaxPool2d(3, stride=2, padding=1)
        )
        blocks: list[nn.Module] = []
        before = width
        strides = [(count, stride) for _, count, stride in _RESNET50]
        steps = _strides_and_dilations(strides, 4, output_stride)
        for inner, count, _ in _RESNET50:
            middle = _scaled(inner, width, 64)
            for _ in range(count):
                blocks.append(_Bottleneck(before, middle, *next(steps)))
                before = 4 * middle
        self.blocks = nn.Sequential(*blocks)
        self.out_channels = before

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch f h2 w2"]:
        """Normalised inputs (B, C, H, W) to maps of their size / output_stride, rounded up."""
        maps: Tensor = self.blocks(self.stem(inputs))
        return maps


class MobileNetV2Features(nn.Module):
    """MobileNetV2 up to its last inverted residual, some strides as dilation.

    The rule of dilation is that of `ResNet50Features`. DFAD's code gives all blocks of a stage the
    dilation of its first one; there the last stages see half as far. 1,811,712 parameters with 3
    channels and width 32.

    Attributes:
        out_channels: of the maps, 10 * width: 320.
    """

    def __init__(self, channels: int = 3, *, width: int = 32, output_stride: int = 8) -> None:
        """Builds the layers, default torch initialisation.

        Args:
            channels: C of the input.
            width: channels of the stem, to which all others are in proportion; 32 is MobileNetV2.
                Cost grows with its square.
            output_stride: 8 or 16; 32 dilates nothing. Below, finer maps at 4 times the cost of
                the stages that are dilated.

        Raises:
            RecipeError: another output stride, or a width below 1.
        """
        super().__init__()
        _check_backbone("MobileNetV2", width, output_stride)
        self.stem = _convolution(channels, width, stride=2, activation=nn.ReLU6)
        blocks: list[nn.Module] = []
        before = width
        strides = [(count, stride) for _, _, count, stride in _MOBILENETV2]
        steps = _strides_and_dilations(strides, 2, output_stride)
        for expansion, channels_at_32, count, _ in _MOBILENETV2:
            after = _scaled(channels_at_32, width, 32)
            for _ in range(count):
                blocks.append(_InvertedResidual(before, after, expansion, *next(steps)))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.out_channels = before

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch f h2 w2"]:
        """Normalised inputs (B, C, H, W) to maps of their size / output_stride, rounded up."""
        maps: Tensor = self.blocks(self.stem(inputs))
        return maps


class DeepLabV3(nn.Module):
    """DeepLabV3: atrous spatial pyramid pooling on the maps of a backbone (arXiv 1706.05587).

    Side by side on the maps: 1x1 convolution, one 3x3 convolution per rate, and a 1x1 convolution
    of the mean over positions; all of them to a 1x1 convolution, dropout, a 3x3 convolution and the
    1x1 classifier, whose logits are upsampled bilinearly to the input's size. Each convolution but
    the classifier has no bias, a BN and a ReLU. With ResNet-50 and 21 classes 39,638,869
    parameters, as torchvision's without the auxiliary classifier.
    """

    def __init__(
        self,
        backbone: ResNet50Features | MobileNetV2Features,
        num_classes: int,
        *,
        head_width: int = 256,
        rates: Sequence[int] = (12, 24, 36),
        dropout: float = 0.5,
    ) -> None:
        """Builds the head, default torch initialisation.

        Args:
            backbone: makes the maps, and says in `out_channels` how many.
            num_classes: K.
            head_width: channels of every convolution of the head.
            rates: dilations of the 3x3 convolutions beside one another, in positions of the map.
                12, 24, 36 at output stride 8 and half of that at 16 in the paper; 12, 24, 32 in
                DFAD's code. A rate beyond the map leaves the middle weight alone at work.
            dropout: probability at which a value behind the pyramid is dropped while training; 0.5
                in DFAD's students and while its teachers are trained.

        Raises:
            RecipeError: no rates, a rate below 1, or a probability that is none.
        """
        super().__init__()
        if not rates or min(rates) < 1:
            raise RecipeError(
                f"got rates {list(rates)} for DeepLabV3, expected at least one dilation, each at "
                "least 1; leave them out to take 12, 24, 36"
            )
        if not 0 <= dropout <= 1:
            raise RecipeError(
                f"got dropout {dropout} for DeepLabV3, expected a probability from 0 to 1; leave "
                "it out to take 0.5"
            )
        self.backbone = backbone
        self.branches = nn.ModuleList([_convolution(backbone.out_channels, head_width, 1)])
        for rate in rates:
            branch = _convolution(backbone.out_channels, head_width, dilation=rate)
            self.branches.append(branch)
        self.pooling = _ImagePooling(backbone.out_channels, head_width)
        self.project = nn.Sequential(
            _convolution((len(rates) + 2) * head_width, head_width, 1),
            nn.Dropout(dropout),
            _convolution(head_width, head_width),
        )
        self.classifier = nn.Conv2d(head_width, num_classes, 1)

    def features(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch f h2 w2"]:
        """Maps (B, head_width, h, w) at the backbone's size, at least 0.

        Raises:
            ShapeError: one input alone while training, see `forward`.
        """
        maps = self.backbone(inputs)
        seen = [branch(maps) for branch in self.branches]
        features: Tensor = self.project(torch.cat([*seen, self.pooling(maps)], dim=1))
        return features

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes h w"]:
        """Normalised inputs (B, C, H, W) to logits (B, K, H, W).

        Raises:
            ShapeError: one input alone while training: the pooled branch has one value per channel
                then, of which BatchNorm cannot take a variance.
        """
        logits: Tensor = self.classifier(self.features(inputs))
        return F.interpolate(logits, size=inputs.shape[2:], mode="bilinear", align_corners=False)


def deeplabv3_resnet50(
    *,
    channels: int = 3,
    num_classes: int = 21,
    width: int = 64,
    output_stride: int = 8,
    rates: Sequence[int] = (12, 24, 36),
    dropout: float = 0.5,
) -> DeepLabV3:
    """DeepLabV3 on ResNet-50, DFAD's teacher; its head has 4 * width channels.

    39,638,869 parameters with the defaults; see `ResNet50Features` and `DeepLabV3`.
    """
    backbone = ResNet50Features(channels, width=width, output_stride=output_stride)
    return DeepLabV3(backbone, num_classes, head_width=4 * width, rates=rates, dropout=dropout)


def deeplabv3_mobilenetv2(
    *,
    channels: int = 3,
    num_classes: int = 21,
    width: int = 32,
    output_stride: int = 8,
    rates: Sequence[int] = (12, 24, 36),
    dropout: float = 0.5,
) -> DeepLabV3:
    """DeepLabV3 on MobileNetV2, DFAD's student; its head has 8 * width channels.

    5,113,877 parameters with the defaults; see `MobileNetV2Features` and `DeepLabV3`.
    """
    backbone = MobileNetV2Features(channels, width=width, output_stride=output_stride)
    return DeepLabV3(backbone, num_classes, head_width=8 * width, rates=rates, dropout=dropout)


class _Bottleneck(nn.Module):
    def __init__(self, before: int, middle: int, stride: int, dilation: int) -> None:
        super().__init__()
        after = 4 * middle
        self.body = nn.Sequential(
            _convolution(before, middle, 1),
            _convolution(middle, middle, stride=stride, dilation=dilation),
            _convolution(middle, after, 1, activation=None),
        )
        # By channels alone, as the first block of a stage may have lost its stride.
        self.shortcut = (
            nn.Identity()
            if before == after
            else _convolution(before, after, 1, stride=stride, activation=None)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.body(inputs) + self.shortcut(inputs))


class _InvertedResidual(nn.Module):
    def __init__(self, before: int, after: int, expansion: int, stride: int, dilation: int) -> None:
        super().__init__()
        middle = before * expansion
        relu = nn.ReLU6
        self.body = nn.Sequential(
            *([_convolution(before, middle, 1, activation=relu)] if expansion > 1 else []),
            _convolution(
                middle, middle, stride=stride, dilation=dilation, groups=middle, activation=relu
            ),
            _convolution(middle, after, 1, activation=None),
        )
        self.adds = before == after and stride == 1

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.body(inputs)
        return inputs + outputs if self.adds else outputs


class _ImagePooling(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.body = _convolution(before, after, 1)

    def forward(self, maps: Tensor) -> Tensor:
        # SyncBatchNorm counts the other processes' inputs too.
        counts = any(isinstance(layer, nn.BatchNorm2d) and layer.training for layer in self.body)
        if counts and len(maps) == 1:
            raise ShapeError(
                "got one input in training mode, expected at least 2: DeepLabV3 pools each to one "
                "position, and BatchNorm takes no variance of one value; raise the batch size, or "
                "call eval()"
            )
        pooled: Tensor = self.body(maps.mean((2, 3), keepdim=True))
        # What bilinear upsampling makes of a single position.
        return pooled.expand(-1, -1, *maps.shape[2:])


def _convolution(
    before: int,
    after: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution without bias that keeps the size but for its stride, BN and activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(
            before,
            after,
            kernel,
            stride=stride,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(after),
    ]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


def _strides_and_dilations(
    stages: Sequence[tuple[int, int]], stem_stride: int, output_stride: int
) -> Iterator[tuple[int, int]]:
    """Stride and dilation of every block, from (blocks, stride of the first) of every stage."""
    reached, dilation = stem_stride, 1
    for count, stage_stride in stages:
        for index in range(count):
            stride = 1 if index else stage_stride
            if stride > 1 and reached >= output_stride:
                # The convolution that loses its stride still reads neighbours at the old distance.
                yield 1, dilation
                dilation *= stride
            else:
                yield stride, dilation
                reached *= stride


def _scaled(channels: int, width: int, published: int) -> int:
    return max(1, round(channels * width / published))


def _check_backbone(name: str, width: int, output_stride: int) -> None:
    if output_stride not in (8, 16, 32):
        raise RecipeError(
            f"got output_stride {output_stride} for {name}, expected 8, 16 or 32; take 8 for the "
            "finest maps"
        )
    if width < 1:
        raise RecipeError(
            f"got width {width} for {name}, expected at least 1 channel; leave it out to take the "
            "published one"
        )
