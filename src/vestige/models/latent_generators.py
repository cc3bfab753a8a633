"""Networks that turn noise and a label into features."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class LatentGenerator(nn.Module):
    """Noise and label to what enters a classifier's last layer (FedGen, arXiv 2105.10056).

    The label as one-hot, or as a learned embedding of the noise's width, is joined to the noise;
    then linear, BN, ReLU, linear. Default torch initialisation. With 10 classes and the sizes of
    MNIST (32, 256, 32) 19,744 parameters, with embedding 25,696.

    Attributes:
        latent_dim: Z, number of noise values per feature vector.
        num_classes: C.
    """

    def __init__(
        self,
        latent_dim: int,
        num_classes: int,
        feature_dim: int,
        *,
        hidden_dim: int = 256,
        embedding: bool = False,
    ) -> None:
        """Builds the layers.

        Args:
            latent_dim: Z, 32 in FedGen.
            num_classes: C.
            feature_dim: D, width of the features.
            hidden_dim: of the hidden layer; 256 for MNIST, 128 for CelebA.
            embedding: learn a code of Z values for each label instead of the one-hot of C.
        """
        super().__init__()
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.embedding = nn.Embedding(num_classes, latent_dim) if embedding else None
        code = latent_dim if embedding else num_classes
        self.layers = nn.Sequential(
            nn.Linear(latent_dim + code, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, feature_dim),
        )

    def forward(
        self, latent: Float[Tensor, "batch latent"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch features"]:
        """Noise (B, Z) and labels (B,) to features (B, D) of either sign; gradient flows."""
        if self.embedding is None:
            code = F.one_hot(labels, self.num_classes).to(latent.dtype)
        else:
            code = self.embedding(labels)
        features: Tensor = self.layers(torch.cat([latent, code], 1))
        return features
