import pytest
import torch

from vestige.core.types import count_parameters
from vestige.models.latent_generators import LatentGenerator


@pytest.mark.parametrize(
    ("num_classes", "hidden", "embedding", "count"),
    [
        # MNIST, MNIST with embedding, EMNIST letters, CelebA.
        (10, 256, False, 19_744),
        (10, 256, True, 25_696),
        (26, 256, False, 23_840),
        (2, 128, False, 8_864),
    ],
)
def test_the_number_of_weights_is_the_published_one(num_classes, hidden, embedding, count):
    made = LatentGenerator(32, num_classes, 32, hidden_dim=hidden, embedding=embedding)
    assert count_parameters(made) == count


@pytest.mark.parametrize("embedding", [False, True])
def test_both_noise_and_label_decide_the_features(embedding):
    torch.manual_seed(0)
    made = LatentGenerator(4, 3, 5, hidden_dim=16, embedding=embedding).eval()
    latent, labels = torch.rand(3, 4), torch.arange(3)
    features = made(latent, labels)
    assert features.shape == (3, 5) and features.min() < 0
    assert not torch.allclose(features, made(latent.flip(0), labels))
    assert not torch.allclose(features, made(latent, labels.flip(0)))
    # In eval mode rows do not mix.
    torch.testing.assert_close(made(latent[:1], labels[:1]), features[:1])
