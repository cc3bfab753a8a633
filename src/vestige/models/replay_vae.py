"""The two networks of generative replay: an encoder, and a generator that remembers images."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from vestige.core.types import InputSpec, at_least_float32
from vestige.models.factory import build_generator

_BOUND = 0.08


class ReplayEncoder(nn.Module):
    """Images to the mean and log-variance of their codes (PRE-DFKD, arXiv 2201.03019).

    3x3 convolution to w, BN, LeakyReLU; 3x3 convolution to 2w, BN, LeakyReLU; half the size; 3x3
    convolution with stride 2, BN; half the size; one linear layer each for mean and log-variance.
    Every pixel column of a channel is made a unit vector first, as the reference code does.

    The reference code counts the linear layers' inputs in a way that is right for sides divisible
    by 8 alone; here they are counted from the map, so any size works.

    Attributes:
        latent_dim: Z, length of a code.
    """

    def __init__(
        self,
        latent_dim: int,
        channels: int,
        size: int | tuple[int, int],
        *,
        width: int = 64,
        slope: float = 0.2,
        inner_eps: float = 0.8,
    ) -> None:
        """Builds the layers.

        Args:
            latent_dim: Z.
            channels: C of the image.
            size: side or (H, W), any.
            width: w, 64 in PRE-DFKD. Cost grows with w^2.
            slope: of the LeakyReLUs for negative values.
            inner_eps: eps of the first two BNs. The reference code has 0.8 there, meant as a
                momentum.
        """
        super().__init__()
        self.latent_dim = latent_dim
        height, breadth = (size, size) if isinstance(size, int) else size
        halved = [(height, breadth)]
        for rest in (0, 1, 0):  # nearest rounds down, the strided convolution up
            height, breadth = max(1, (height + rest) // 2), max(1, (breadth + rest) // 2)
            halved.append((height, breadth))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width, eps=inner_eps),
            nn.LeakyReLU(slope),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width, eps=inner_eps),
            nn.LeakyReLU(slope),
            nn.Upsample(size=halved[1]),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.Upsample(size=halved[3]),
            nn.Flatten(),
        )
        features = 2 * width * height * breadth
        self.mean = nn.Linear(features, latent_dim)
        self.log_variance = nn.Linear(features, latent_dim)

    def forward(
        self, images: Float[Tensor, "batch c h w"]
    ) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Images (B, C, H, W) of any range to (mean, log-variance), each (B, Z), with gradient."""
        seen = self.layers(F.normalize(images, p=2.0, dim=2))
        return at_least_float32(self.mean(seen)), at_least_float32(self.log_variance(seen))


def sample_code(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Codes (B, Z) of these moments, from standard normal noise (B, Z); gradient to the moments."""
    return mean + noise * (log_variance / 2).exp()


def replay_networks(
    spec: InputSpec,
    *,
    latent_dim: int,
    width: int,
    generator: str = "upsample",
    head: str = "tanh_bn",
    inner_eps: float = 0.8,
) -> tuple[ReplayEncoder, nn.Module]:
    """Encoder and memory generator, freshly drawn from torch's global random state.

    Args:
        spec: of one image.
        latent_dim: Z, 1000 in PRE-DFKD.
        width: of both, 64 in PRE-DFKD.
        generator: name of the memory generator, see `build_generator`.
        head: of the generator; what it makes are inputs of the teacher unless it is "sigmoid".
        inner_eps: eps of the inner BNs of both, 0.8 in PRE-DFKD.

    Raises:
        ShapeError: the input is no image, or its size does not fit the generator.
        RecipeError: unknown generator or head.
    """
    maker = build_generator(
        generator, spec, latent_dim=latent_dim, width=width, head=head, inner_eps=inner_eps
    )
    channels, height, breadth = spec.shape
    encoder = ReplayEncoder(
        latent_dim, channels, (height, breadth), width=width, inner_eps=inner_eps
    )
    for network in (encoder, maker):
        initialize_uniform(network)
    return encoder, maker


@torch.no_grad()
def initialize_uniform(module: nn.Module, bound: float = _BOUND) -> None:
    """Weights of convolutions and linear layers uniform in [-bound, bound], biases 0, in place.

    Draws from torch's global random state. Of a layer with spectral norm the weight before it is
    divided is drawn.

    Args:
        module: the network.
        bound: above 0; 0.08 in PRE-DFKD and Retain.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            named: dict[str, Tensor] = dict(layer.named_parameters())
            divided = is_parametrized(layer, "weight")
            name = "parametrizations.weight.original" if divided else "weight"
            named[name].uniform_(-bound, bound)
            if layer.bias is not None:
                layer.bias.zero_()
