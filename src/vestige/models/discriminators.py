"""Networks that tell made from given images, patch by patch."""

from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from vestige.errors import ShapeError

PatchName = Literal["patch", "deep", "deeper"]
# Strided convolutions, channels of the first, whether the first and the last have biases.
_SHAPES: dict[PatchName, tuple[int, int, bool]] = {
    "patch": (2, 128, True),
    "deep": (3, 64, False),
    "deeper": (4, 64, False),
}


class PatchDiscriminator(nn.Module):
    """One logit for each patch of an image (MosaicKD, arXiv 2110.15094).

    `depth` times a 4x4 convolution of stride 2 and LeakyReLU, with BatchNorm after all but the
    first, channels doubled each time up to eightfold; then a 1x1 convolution to the logit. No
    padding reaches into a patch that lies inside the image.

    Attributes:
        stride: pixels between neighbouring patches, 2^depth.
        receptive_field: side of a patch in pixels, 3 * 2^depth - 2: 10, 22 and 46.
    """

    def __init__(
        self, channels: int, *, width: int = 128, depth: int = 2, first_bias: bool = True
    ) -> None:
        """Builds the layers, default torch initialisation.

        Args:
            channels: C of the image.
            width: channels of the first convolution. Cost grows with its square.
            depth: strided convolutions, at least 1; each doubles stride and about the patch.
            first_bias: whether the first convolution has biases; the others have none.
        """
        super().__init__()
        self.stride: int = 2**depth
        self.receptive_field = 3 * self.stride - 2
        widths = [width * min(8, 2**level) for level in range(depth)]
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 4, stride=2, padding=1, bias=first_bias),
            nn.LeakyReLU(0.2),
        ]
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1, bias=False))

    def forward(self, inputs: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch 1 gh gw"]:
        """Inputs (B, C, H, W) to logits (B, 1, H / stride, W / stride); above 0 means given."""
        logits: Tensor = self.body(inputs)
        return logits

    def patches(self, size: tuple[int, int]) -> int:
        """Number of patches in an image of `size` (H, W).

        Raises:
            ShapeError: the image is smaller than the stride.
        """
        count = (size[0] // self.stride) * (size[1] // self.stride)
        if not count:
            raise ShapeError(
                f"got images of {size[0]}x{size[1]} for a discriminator of stride {self.stride}, "
                f"expected sides of at least {self.stride}; take discriminator: patch or larger "
                "images"
            )
        return count


def patch_discriminator(
    name: PatchName, channels: int, width: int | None = None
) -> PatchDiscriminator:
    """One of the reference code's, freshly initialised.

    Args:
        name: "patch" (patches of 10 pixels, for 32-pixel images), "deep" (22) or "deeper" (46).
        channels: C of the image.
        width: channels of the first convolution; None takes the reference code's, 128 or 64.
    """
    depth, usual, first_bias = _SHAPES[name]
    return PatchDiscriminator(channels, width=width or usual, depth=depth, first_bias=first_bias)
