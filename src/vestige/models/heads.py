"""Small networks on top of features, and the head that a network has already."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import modes
from vestige.core.types import predict
from vestige.errors import RecipeError
from vestige.models.probes import LinearProbe


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


def find_head(
    network: nn.Module, shape: tuple[int, ...], num_classes: int
) -> tuple[str, nn.Linear]:
    """The linear layer of a network that makes its logits of features.

    It is the last one by definition that has as many outputs; one forward of a zero input, in eval
    mode and without gradient, tells whether the logits are its own.

    Args:
        network: left as it is.
        shape: of one input.
        num_classes: C.

    Returns:
        Its qualified name, and itself.

    Raises:
        RecipeError: there is no such layer, or it is not of single precision.
    """
    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == num_classes
    ]
    what = f"got a {type(network).__name__}"
    advice = "take a network that ends in a linear layer, with nothing behind it"
    if not layers:
        raise RecipeError(
            f"{what} without a linear layer of {num_classes} outputs, expected one that makes its "
            f"logits; {advice}"
        )
    name, head = layers[-1]
    if head.weight.dtype != torch.float32:
        raise RecipeError(
            f"{what} whose last linear layer, {name!r}, is {head.weight.dtype}, expected "
            "torch.float32 as what is generated for it; call .float() on the network"
        )
    probe = LinearProbe(network, name)
    with torch.no_grad(), modes.evaluating(network), probe:
        logits = predict(network, next(network.parameters()).new_zeros(1, *shape)).logits
    made = F.linear(*probe.read()).to(logits)
    if made.shape != logits.shape or not torch.allclose(made, logits, rtol=1e-3, atol=1e-4):
        raise RecipeError(
            f"{what} whose last linear layer of {num_classes} outputs, {name!r}, does not make its "
            f"logits; {advice}"
        )
    return name, head


def stacked_linear(
    inputs: Float[Tensor, "batch width"],
    weights: Float[Tensor, "networks classes width"],
    biases: Float[Tensor, "networks classes"] | None = None,
) -> Float[Tensor, "networks batch classes"]:
    """Several linear layers of one size on the same inputs, at once.

    Args:
        inputs: (B, D); gradient flows.
        weights: of K layers, (K, C, D); gradient flows, if they have one.
        biases: (K, C), likewise; None for layers without.

    Returns:
        (K, B, C).
    """
    outputs = torch.einsum("bd,kcd->kbc", inputs, weights)
    return outputs if biases is None else outputs + biases[:, None]
