"""Networks that turn noise, or noise and a class, into images."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.types import at_least_float32
from vestige.errors import RecipeError, ShapeError


class UpsampleGenerator(nn.Module):
    """Noise to images by two nearest-neighbour upsamplings (DFAD's generator A; also DAFL, ZSKT).

    Linear to 2w x H/4 x W/4, BN; twice: upsample, 3x3 convolution, BN, LeakyReLU; 3x3 convolution
    to C; head. Convolutions and the linear layer have biases; default torch initialisation.

    Attributes:
        latent_dim: Z, number of noise values per image.
    """

    def __init__(
        self,
        latent_dim: int,
        channels: int,
        size: int | tuple[int, int],
        *,
        width: int = 64,
        head: str = "tanh_bn",
        slope: float = 0.2,
        inner_eps: float = 1e-5,
        spectral: bool = False,
    ) -> None:
        """Builds the layers.

        Args:
            latent_dim: Z. 100 (MNIST) or 256 (CIFAR) in DFAD, 1000 in DAFL.
            channels: C of the image.
            size: side or (H, W), both divisible by 4.
            width: w, channels of the last hidden map; the first ones have 2w. Cost grows with w^2.
            head: "tanh_bn" ends in Tanh and an affine-free BN, so each channel of a training batch
                has mean 0 and variance 1: inputs of the teacher, do not normalise them again.
                "sigmoid" gives images in [0, 1], to be normalised. "bn" is an affine BN on the
                unbounded convolution (ZSKT), also inputs of the teacher.
            slope: of the LeakyReLUs for negative values.
            inner_eps: eps of the two BNs after convolutions. DAFL's code has 0.8 there, meant as a
                momentum; it damps the normalisation of channels with little variance.
            spectral: divide the weights of all convolutions by their largest singular value
                (PRE-DFKD), which keeps the generator from moving in leaps.

        Raises:
            RecipeError: unknown head.
            ShapeError: a side is not a positive multiple of 4.
        """
        super().__init__()
        self.latent_dim = latent_dim
        start = (2 * width, *_quarter(size))
        self.project = nn.Sequential(
            nn.Linear(latent_dim, start[0] * start[1] * start[2]),
            nn.Unflatten(1, start),
            nn.BatchNorm2d(2 * width),
        )
        self.blocks = _doublings(width, slope, inner_eps)
        self.head = _head(head, width, channels)
        if spectral:
            _spectral(self)

    def forward(self, latent: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch c h w"]:
        """Noise (B, Z) to (B, C, H, W), range as the head says; gradient flows to the noise.

        In training mode BN ties the images of one batch together: two batches of B are not one
        batch of 2B.
        """
        images: Tensor = self.head(self.blocks(self.project(latent)))
        return at_least_float32(images)


class ConditionalGenerator(nn.Module):
    """Noise and a class to images: `UpsampleGenerator` with half of its first maps from the class.

    Linear from the noise to w x H/4 x W/4, Linear from the one-hot class to as much, both maps
    side by side, BN; from there on as `UpsampleGenerator`. Default torch initialisation. 682,499
    parameters for 3x32x32, 10 classes and Z = 100.

    Attributes:
        latent_dim: Z, number of noise values per image.
        num_classes: K.
    """

    def __init__(
        self,
        latent_dim: int,
        num_classes: int,
        channels: int,
        size: int | tuple[int, int],
        *,
        width: int = 64,
        head: str = "tanh_bn",
        slope: float = 0.2,
    ) -> None:
        """Builds the layers.

        Args:
            latent_dim: Z.
            num_classes: K.
            channels: C of the image.
            size: side or (H, W), both divisible by 4.
            width: w, channels of the last hidden map; the first ones have 2w. Cost grows with w^2.
            head: as for `UpsampleGenerator`.
            slope: of the LeakyReLUs for negative values.

        Raises:
            RecipeError: unknown head.
            ShapeError: a side is not a positive multiple of 4.
        """
        super().__init__()
        self.latent_dim, self.num_classes = latent_dim, num_classes
        height, breadth = _quarter(size)
        self.from_latent = nn.Linear(latent_dim, width * height * breadth)
        self.from_label = nn.Linear(num_classes, width * height * breadth)
        self.start = nn.Sequential(
            nn.Unflatten(1, (2 * width, height, breadth)), nn.BatchNorm2d(2 * width)
        )
        self.blocks = _doublings(width, slope)
        self.head = _head(head, width, channels)

    def forward(
        self, latent: Float[Tensor, "batch latent"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch c h w"]:
        """Noise (B, Z) and classes (B,) in [0, K) to (B, C, H, W), range as the head says.

        Gradient flows to the noise. In training mode BN ties the images of a batch together.
        """
        code = F.one_hot(labels, self.num_classes).to(latent.dtype)
        start = torch.cat([self.from_latent(latent), self.from_label(code)], 1)
        images: Tensor = self.head(self.blocks(self.start(start)))
        return at_least_float32(images)


class LargeGenerator(nn.Module):
    """Noise to images by two upsamplings from a wider map (DataFree's generator for DFQ).

    Linear to 4w x H/4 x W/4, BN; upsample, 3x3 convolution to 2w, BN, LeakyReLU; the same to w; 3x3
    convolution to C; head. Default torch initialisation.

    Attributes:
        latent_dim: Z, number of noise values per image.
    """

    def __init__(
        self,
        latent_dim: int,
        channels: int,
        size: int | tuple[int, int],
        *,
        width: int = 64,
        head: str = "sigmoid",
        slope: float = 0.2,
    ) -> None:
        """Builds the layers.

        Args:
            latent_dim: Z, 256 in DFQ.
            channels: C of the image.
            size: side or (H, W), both divisible by 4.
            width: w, channels of the last hidden map; the first have 4w. Cost grows with w^2.
            head: as for `UpsampleGenerator`.
            slope: of the LeakyReLUs for negative values.

        Raises:
            RecipeError: unknown head.
            ShapeError: a side is not a positive multiple of 4.
        """
        super().__init__()
        start = (4 * width, *_quarter(size))
        self.latent_dim = latent_dim
        self.project = nn.Sequential(
            nn.Linear(latent_dim, start[0] * start[1] * start[2]),
            nn.Unflatten(1, start),
            nn.BatchNorm2d(4 * width),
        )
        blocks: list[nn.Module] = []
        for before, after in ((4, 2), (2, 1)):
            blocks += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(before * width, after * width, 3, padding=1, bias=False),
                nn.BatchNorm2d(after * width),
                nn.LeakyReLU(slope),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.head = _head(head, width, channels)

    def forward(self, latent: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch c h w"]:
        """Noise (B, Z) to (B, C, H, W), range as the head says; gradient flows to the noise."""
        images: Tensor = self.head(self.blocks(self.project(latent)))
        return at_least_float32(images)


class PyramidGenerator(nn.Module):
    """Noise to images of any size: generator A with as many upsamplings as the size needs.

    Each side is halved, rounding up, until the longer one is at most 8, at least twice. Linear to
    that map, BN; then once per level: nearest-neighbour upsampling to the level's size, 3x3
    convolution, BN, LeakyReLU; 3x3 convolution to C; head. Counted from the image, levels have w,
    2w and from then on 4w channels. With two levels and sides divisible by 4 it is
    `UpsampleGenerator`.

    Attributes:
        latent_dim: Z, number of noise values per image.
    """

    def __init__(
        self,
        latent_dim: int,
        channels: int,
        size: int | tuple[int, int],
        *,
        width: int = 64,
        head: str = "tanh_bn",
        slope: float = 0.2,
        inner_eps: float = 1e-5,
        spectral: bool = False,
    ) -> None:
        """Builds the layers.

        Args:
            latent_dim: Z.
            channels: C of the image.
            size: side or (H, W), any.
            width: w, channels of the last hidden map. Cost grows with w^2.
            head: as for `UpsampleGenerator`.
            slope: of the LeakyReLUs for negative values.
            inner_eps: eps of the BNs after convolutions, as for `UpsampleGenerator`.
            spectral: as for `UpsampleGenerator`.

        Raises:
            RecipeError: unknown head.
        """
        super().__init__()
        height, breadth = (size, size) if isinstance(size, int) else size
        sizes = [(height, breadth)]
        while len(sizes) < 3 or max(sizes[-1]) > 8:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        levels = len(sizes) - 1
        widths = [width * min(4, 2**level) for level in reversed(range(levels))]
        start = (widths[0], *sizes[-1])
        self.latent_dim = latent_dim
        self.project = nn.Sequential(
            nn.Linear(latent_dim, start[0] * start[1] * start[2]),
            nn.Unflatten(1, start),
            nn.BatchNorm2d(start[0]),
        )
        blocks: list[nn.Module] = []
        for before, after, shape in zip(
            [widths[0], *widths], widths, reversed(sizes[:-1]), strict=False
        ):
            blocks += [
                nn.Upsample(size=shape),
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after, eps=inner_eps),
                nn.LeakyReLU(slope),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.head = _head(head, width, channels)
        if spectral:
            _spectral(self)

    def forward(self, latent: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch c h w"]:
        """Noise (B, Z) to (B, C, H, W), range as the head says; gradient flows to the noise."""
        images: Tensor = self.head(self.blocks(self.project(latent)))
        return at_least_float32(images)


class DCGANGenerator(nn.Module):
    """Noise to images by transposed convolutions (DFAD's generator B).

    Linear to a map whose shorter side is 8, BN; then n times ConvTranspose 4/2/1 (no bias), BN,
    LeakyReLU; 3x3 convolution to C, Tanh. n is the number of doublings from 8 to the shorter side.
    Counted from the image, the inputs of the transposed convolutions have w, 2w, 4w and from then
    on 8w channels, so 128 pixels give the paper's 8w, 4w, 2w, w, w and 32 pixels 2w, w, w.

    Attributes:
        latent_dim: Z, number of noise values per image.
    """

    def __init__(
        self,
        latent_dim: int,
        channels: int,
        size: int | tuple[int, int],
        *,
        width: int = 64,
        slope: float = 0.2,
    ) -> None:
        """Builds and initialises: weights N(0, 0.02), BN weights N(1, 0.02), biases 0.

        Args:
            latent_dim: Z, 256 in DFAD.
            channels: C of the image.
            size: side or (H, W); the shorter side is 8 * 2^n with n >= 1 (16, 32, 64, 128, ...) and
                2^n divides the longer one.
            width: w, channels of the last hidden map. Cost grows with w^2.
            slope: of the LeakyReLUs for negative values.

        Raises:
            ShapeError: the size does not fit the rule above.
        """
        super().__init__()
        height, breadth = (size, size) if isinstance(size, int) else size
        doublings = max(min(height, breadth) // 8, 1).bit_length() - 1
        scale = 2**doublings
        if not doublings or min(height, breadth) != 8 * scale or max(height, breadth) % scale:
            raise ShapeError(
                f"got image size {height}x{breadth}, expected a shorter side of 16, 32, 64, 128, "
                "... and a longer side that halves as often; resize, or take the generator "
                "'pyramid', which makes any size"
            )
        self.latent_dim = latent_dim
        inputs = [width * min(8, 2**step) for step in reversed(range(doublings))]
        start = (inputs[0], height // scale, breadth // scale)
        self.project = nn.Sequential(
            nn.Linear(latent_dim, start[0] * start[1] * start[2]),
            nn.Unflatten(1, start),
            nn.BatchNorm2d(start[0]),
        )
        blocks: list[nn.Module] = []
        for before, after in zip(inputs, [*inputs[1:], width], strict=True):
            blocks += [
                nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(slope),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Conv2d(width, channels, 3, padding=1), nn.Tanh())
        reinitialize(self)

    def forward(self, latent: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch c h w"]:
        """Noise (B, Z) to (B, C, H, W) in [-1, 1]; gradient flows to the noise.

        The range equals data normalised with mean 0.5 and std 0.5; a teacher with other statistics
        needs (images + 1) / 2 normalised with its own.
        """
        images: Tensor = self.head(self.blocks(self.project(latent)))
        return at_least_float32(images)


def reinitialize(module: nn.Module, rng: torch.Generator | None = None) -> None:
    """New weights: convolutions and linear layers N(0, 0.02), BN weights N(1, 0.02), biases 0.

    Running statistics stay, since a generator in training mode does not use them.
    CMI does so before each batch that it inverts, in DCGAN's manner.

    Args:
        module: changed in place.
        rng: draws; None takes torch's global generator.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            mean = 0.0
        elif isinstance(layer, nn.BatchNorm2d) and layer.affine:
            mean = 1.0
        else:
            continue
        with torch.no_grad():
            where = layer.weight.device if rng is None else rng.device
            drawn = torch.empty(layer.weight.shape, device=where).normal_(mean, 0.02, generator=rng)
            weight = layer.weight
            if nn.utils.parametrize.is_parametrized(layer, "weight"):
                # What is read there is computed from this one.
                weight = layer.get_parameter("parametrizations.weight.original")
            weight.copy_(drawn)
            if layer.bias is not None:
                layer.bias.zero_()


def _spectral(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.utils.parametrizations.spectral_norm(layer)


def _quarter(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of the map that two doublings make an image of `size` from."""
    height, breadth = (size, size) if isinstance(size, int) else size
    if height < 4 or breadth < 4 or height % 4 or breadth % 4:
        raise ShapeError(
            f"got image size {height}x{breadth}, expected multiples of 4; resize to "
            f"{max(4, height // 4 * 4)}x{max(4, breadth // 4 * 4)}, or take the generator "
            "'pyramid', which makes any size"
        )
    return height // 4, breadth // 4


def _doublings(width: int, slope: float, inner_eps: float = 1e-5) -> nn.Sequential:
    """From 2w channels to w on a map of four times the sides."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width, eps=inner_eps),
        nn.LeakyReLU(slope),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, width, 3, padding=1),
        nn.BatchNorm2d(width, eps=inner_eps),
        nn.LeakyReLU(slope),
    )


def _head(name: str, width: int, channels: int) -> nn.Sequential:
    heads: dict[str, list[nn.Module]] = {
        "tanh_bn": [nn.Tanh(), nn.BatchNorm2d(channels, affine=False)],
        "sigmoid": [nn.Sigmoid()],
        "bn": [nn.BatchNorm2d(channels)],
    }
    if name not in heads:
        raise RecipeError(
            f"got generator head {name!r}, expected one of {', '.join(heads)}; "
            "'tanh_bn' is the default"
        )
    return nn.Sequential(nn.Conv2d(width, channels, 3, padding=1), *heads[name])
