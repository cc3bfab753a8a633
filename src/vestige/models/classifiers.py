"""Image classifiers of the field, in their variants for small images.

Each has `features(inputs)`, the penultimate features (B, F), and `classifier`, the linear layer
from there to the logits. Those with global average pooling take any image size; the smallest at
which every stage still halves something is given per class.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.errors import RecipeError, ShapeError


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max pooling, as in DAFL and DFAD.

    61,706 parameters with 10 classes, 1 channel and 32x32 pixels, 15,738 as half.
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 1,
        *,
        size: int | tuple[int, int] = 32,
        half: bool = False,
    ) -> None:
        """Builds the layers.

        Args:
            num_classes: K.
            channels: C of the input.
            size: side or (H, W), at least 16. The last kernel is what two rounds of convolution and
                pooling leave of the map: 5x5 at 32 pixels, the original, and 1x1 at 16.
            half: widths 3, 8, 60, 42 instead of 6, 16, 120, 84 (LeNet-5-half, DFAD's student).

        Raises:
            ShapeError: a side is below 16.
        """
        super().__init__()
        height, breadth = (size, size) if isinstance(size, int) else size
        if min(height, breadth) < 16:
            raise ShapeError(
                f"got image size {height}x{breadth}, expected at least 16x16 for LeNet-5; resize "
                "the images or take 'convnet'"
            )
        first, second, third, fourth = (3, 8, 60, 42) if half else (6, 16, 120, 84)
        rest = tuple(((side - 4) // 2 - 4) // 2 for side in (height, breadth))
        self.body = nn.Sequential(
            nn.Conv2d(channels, first, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(second, third, (rest[0], rest[1])),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(third, fourth),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(fourth, num_classes)

    def features(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch features"]:
        """Penultimate features (B, 84), as half (B, 42), at least 0."""
        features: Tensor = self.body(inputs)
        return features

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Normalised inputs (B, C, H, W) of the declared size to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


class ConvNet(nn.Module):
    """Three convolutions of stride 2 with BatchNorm: the small teacher of tests and probes.

    Per width: 3x3 convolution (stride 2, no bias), norm, ReLU; then global average pooling. With 1
    channel and 10 classes 24,058 parameters, and 3,628 with widths (6, 12, 24). Any image size;
    8x8 or more keeps every stage useful.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        widths: Sequence[int] = (16, 32, 64),
        norm: str = "batch",
    ) -> None:
        """Builds the layers.

        Args:
            channels: C of the input.
            num_classes: K.
            widths: channels of each convolution; each further entry halves the map once more.
            norm: "batch", or "group": GroupNorm in 2 groups, which keeps no statistics and so is
                not thrown off by averaging networks that saw different classes.

        Raises:
            RecipeError: unknown norm.
        """
        super().__init__()
        if norm not in ("batch", "group"):
            raise RecipeError(f"got norm {norm!r}, expected 'batch' or 'group'")
        layers: list[nn.Module] = []
        for before, after in zip((channels, *widths), widths, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(2, after),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def features(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch features"]:
        """Penultimate features (B, widths[-1]), at least 0; mean over positions."""
        features: Tensor = self.body(inputs)
        return features.mean((2, 3))

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Normalised inputs (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


class StrideCNN(nn.Module):
    """Convolutions of stride 2, then two linear layers: FedGen's client (arXiv 2105.10056).

    Per width: 3x3 convolution (stride 2, padding 1, bias), BN, ReLU, and max pooling if asked; then
    flatten, linear to D, linear to K, with nothing between the two. With 1 channel, 28x28 pixels
    and 10 classes 26,434 parameters.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        size: int | tuple[int, int],
        widths: Sequence[int] = (6, 16),
        hidden_dim: int = 32,
        pool: bool = False,
    ) -> None:
        """Builds the layers, default torch initialisation.

        Args:
            channels: C of the input.
            num_classes: K.
            size: side or (H, W) of the input.
            widths: channels of each convolution; 6, 16 for MNIST and 16, 32, 64 for CelebA.
            hidden_dim: D, width of the penultimate features.
            pool: 2x2 max pooling after each ReLU, as for CelebA; halves the map once more.

        Raises:
            ShapeError: pooling leaves nothing of the map.
        """
        super().__init__()
        height, breadth = (size, size) if isinstance(size, int) else size
        layers: list[nn.Module] = []
        for before, after in zip((channels, *widths), widths, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
            height, breadth = -(-height // 2), -(-breadth // 2)
            if pool:
                layers.append(nn.MaxPool2d(2))
                height, breadth = height // 2, breadth // 2
        if not height * breadth:
            raise ShapeError(
                f"got image size {size} for {len(widths)} convolutions with pooling, which leave "
                "nothing of the map; resize the images, or take fewer widths or pool: false"
            )
        hidden = nn.Linear(widths[-1] * height * breadth, hidden_dim)
        self.body = nn.Sequential(*layers, nn.Flatten(), hidden)
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def features(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch features"]:
        """Penultimate features (B, D), of either sign."""
        features: Tensor = self.body(inputs)
        return features

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Normalised inputs (B, C, H, W) of the declared size to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


class BlockCNN(nn.Sequential):
    """Three convolutions and two linear layers, in five blocks that run one after another.

    conv 3x3, GroupNorm, ReLU, pool | the same | conv 3x3, GroupNorm, ReLU | linear, ReLU | linear.
    No BatchNorm, so that no statistics of one client reach another. 582,346 parameters with 3
    channels, 10 classes and 32x32 pixels. Images of 4x4 or more.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        size: tuple[int, int] = (32, 32),
        widths: Sequence[int] = (32, 64, 64),
        hidden: int = 128,
        groups: int = 8,
    ) -> None:
        """Builds the layers, default torch initialisation.

        Args:
            channels: C of the input.
            num_classes: K.
            size: (H, W).
            widths: channels of the three convolutions.
            hidden: features before the last layer.
            groups: of GroupNorm; divides each width.
        """
        first, second, third = widths

        def convolution(before: int, after: int) -> list[nn.Module]:
            return [
                nn.Conv2d(before, after, 3, padding=1),
                nn.GroupNorm(groups, after),
                nn.ReLU(),
            ]

        flat = third * (size[0] // 4) * (size[1] // 4)
        blocks = {
            "block1": nn.Sequential(*convolution(channels, first), nn.MaxPool2d(2)),
            "block2": nn.Sequential(*convolution(first, second), nn.MaxPool2d(2)),
            "block3": nn.Sequential(*convolution(second, third)),
            "block4": nn.Sequential(nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU()),
            "classifier": nn.Linear(hidden, num_classes),
        }
        super().__init__(OrderedDict(blocks))

    def features(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch features"]:
        """Penultimate features (B, hidden), at least 0."""
        for block in list(self)[:-1]:
            inputs = block(inputs)
        return inputs


class ResNet(nn.Module):
    """ResNet of basic blocks with the 32x32 stem: 3x3 convolution of stride 1, no max pooling.

    Where shape changes the shortcut is a 1x1 convolution with BN. Any image size; 8x8 or more keeps
    every stage useful. Not interchangeable with torchvision's ImageNet stem.
    """

    def __init__(
        self, blocks: Sequence[int], *, channels: int = 3, num_classes: int = 10, width: int = 64
    ) -> None:
        """Builds the layers, default torch initialisation.

        Args:
            blocks: number of blocks per stage; each stage but the first halves the map.
            channels: C of the input.
            num_classes: K.
            width: channels of the first stage, doubled from stage to stage. Cost grows with its
                square.
        """
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages: list[nn.Module] = []
        before = width
        for stage, count in enumerate(blocks):
            after = width * 2**stage
            for index in range(count):
                stride = 2 if stage and not index else 1
                stages.append(_BasicBlock(before, after, stride))
                before = after
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(before, num_classes)

    def features(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch features"]:
        """Penultimate features (B, 8 * width for four stages), at least 0; mean over positions."""
        features: Tensor = self.stages(self.stem(inputs))
        return features.mean((2, 3))

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Normalised inputs (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


class WideResNet(nn.Module):
    """Pre-activation wide ResNet WRN-depth-widen_factor without dropout (arXiv 1605.07146).

    A 1x1 convolution replaces the shortcut only where shape changes, and reads the block's
    activated input; so with widen factor 1 the first group has none. Any image size; 4x4 or more
    keeps every group useful.
    """

    def __init__(
        self, depth: int, widen_factor: int, *, channels: int = 3, num_classes: int = 10
    ) -> None:
        """Builds the layers; convolutions Kaiming-normal (fan-out), bias of the classifier 0.

        Args:
            depth: 6n + 4, at least 10; n blocks per group.
            widen_factor: k; the three groups have 16k, 32k, 64k channels.
            channels: C of the input.
            num_classes: K.

        Raises:
            RecipeError: the depth is not 6n + 4, or the widen factor is below 1.
        """
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen_factor < 1:
            raise RecipeError(
                f"got a wide ResNet of depth {depth} and widen factor {widen_factor}, expected a "
                "depth of 10, 16, 22, 28, 34, 40, ... and a factor of at least 1; take wrn-16-1 or "
                "wrn-40-2"
            )
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        groups: list[nn.Module] = []
        before = 16
        for group in range(3):
            after = 16 * widen_factor * 2**group
            for index in range((depth - 4) // 6):
                groups.append(_PreActivationBlock(before, after, 2 if group and not index else 1))
                before = after
        self.groups = nn.Sequential(*groups, nn.BatchNorm2d(before), nn.ReLU())
        self.classifier = nn.Linear(before, num_classes)
        _kaiming_init(self)

    def features(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch features"]:
        """Penultimate features (B, 64 * widen_factor), at least 0; mean over positions."""
        features: Tensor = self.groups(self.stem(inputs))
        return features.mean((2, 3))

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Normalised inputs (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


class VGG(nn.Module):
    """VGG for small images: convolutions with biases, and one linear layer after average pooling.

    The map is halved after each stage but the last, which is averaged. Images of 16x16 or more for
    five stages; below, nothing is left to halve.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        bn: bool = True,
        channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        """Builds the layers; convolutions Kaiming-normal (fan-out), biases 0.

        Args:
            stages: channels of the convolutions of each stage.
            bn: whether a BN follows each convolution; without, no method that reads BN statistics
                can use the network as a teacher.
            channels: C of the input.
            num_classes: K.
        """
        super().__init__()
        layers: list[nn.Module] = []
        before = channels
        for index, stage in enumerate(stages):
            if index:
                layers.append(nn.MaxPool2d(2))
            for after in stage:
                layers.append(nn.Conv2d(before, after, 3, padding=1))
                if bn:
                    layers.append(nn.BatchNorm2d(after))
                layers.append(nn.ReLU())
                before = after
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, num_classes)
        _kaiming_init(self)

    def features(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch features"]:
        """Penultimate features (B, channels of the last stage), at least 0; mean over positions."""
        features: Tensor = self.body(inputs)
        return features.mean((2, 3))

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Normalised inputs (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


def resnet18(*, channels: int = 3, num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-18 with the 32x32 stem; 11,173,962 parameters with the defaults (see `ResNet`)."""
    return ResNet((2, 2, 2, 2), channels=channels, num_classes=num_classes, width=width)


def resnet34(*, channels: int = 3, num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-34 with the 32x32 stem; 21,282,122 parameters with the defaults (see `ResNet`)."""
    return ResNet((3, 4, 6, 3), channels=channels, num_classes=num_classes, width=width)


def wide_resnet(
    depth: int, widen_factor: int, *, channels: int = 3, num_classes: int = 10
) -> WideResNet:
    """WRN-depth-widen_factor; 2,243,546 parameters for 40-2, 175,066 for 16-1 (see its class)."""
    return WideResNet(depth, widen_factor, channels=channels, num_classes=num_classes)


def vgg11(*, bn: bool = True, channels: int = 3, num_classes: int = 10) -> VGG:
    """VGG-11 for 32x32 images; 9,231,114 parameters with the defaults (see `VGG`)."""
    stages = ((64,), (128,), (256, 256), (512, 512), (512, 512))
    return VGG(stages, bn=bn, channels=channels, num_classes=num_classes)


class _BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and before == after
            else nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.body(inputs) + self.shortcut(inputs))


class _PreActivationBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
        )
        self.shortcut = (
            None
            if stride == 1 and before == after
            else nn.Conv2d(before, after, 1, stride=stride, bias=False)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        activated = self.activate(inputs)
        # The usual PyTorch port: only a projecting shortcut reads the activated input.
        kept = inputs if self.shortcut is None else self.shortcut(activated)
        outputs: Tensor = self.body(activated) + kept
        return outputs


def _kaiming_init(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
