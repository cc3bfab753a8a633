"""Small networks on top of features."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Module):
    """Features to points on a sphere, where inputs are told apart (CMI, arXiv 2105.08584).

    Linear, ReLU, Linear, then each row is divided by its Euclidean length.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None) -> None:
        """Builds the layers.

        Args:
            in_dim: D, width of the features.
            out_dim: d, 256 in CMI.
            hidden_dim: of the hidden layer; None is D, as in CMI's code. Cost grows with its
                product with D.
        """
        super().__init__()
        hidden = in_dim if hidden_dim is None else hidden_dim
        self.layers = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, out_dim)
        )

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch width"]:
        """Features (B, D) to (B, d) of length 1, with gradient."""
        return F.normalize(self.layers(features), dim=1)
