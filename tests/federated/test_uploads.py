"""What leaves a client of single examples: clipped, blurred, halved."""

import torch

from vestige.federated.uploads import Disclosure, disclosed


def features() -> torch.Tensor:
    values = torch.randn(50, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    return values * torch.linspace(0.01, 5, 50).view(-1, 1, 1, 1)


def drawn(**settings: object) -> torch.Tensor:
    cfg = Disclosure(**{"half_precision": False, **settings})
    return disclosed(features(), cfg, rng=torch.Generator().manual_seed(1))


def test_without_options_nothing_changes_but_the_bytes():
    assert torch.equal(drawn(), features())
    half = drawn(half_precision=True)
    assert half.dtype == torch.float16
    assert torch.equal(half, features().half())


def test_clipping_bounds_the_norm_and_leaves_directions_and_small_rows():
    plain, clipped = features().flatten(1), drawn(feature_clip=2.0).flatten(1)
    norms = plain.norm(dim=1)
    assert (norms < 2).any() and (norms > 2).any()
    torch.testing.assert_close(clipped.norm(dim=1), norms.clamp_max(2.0))
    assert torch.equal(clipped[norms < 2], plain[norms < 2])
    cosine = torch.nn.functional.cosine_similarity(clipped, plain)
    torch.testing.assert_close(cosine, torch.ones(50))
    zeros = disclosed(torch.zeros(2, 3), Disclosure(feature_clip=1.0), rng=torch.Generator())
    assert not zeros.any()


def test_noise_is_a_multiple_of_the_clip():
    for clip, noise in ((2.0, 0.5), (0.5, 0.1)):
        gap = drawn(feature_clip=clip, feature_noise=noise) - drawn(feature_clip=clip)
        # 1,200 draws: the standard deviation of their spread is 2 % of it.
        assert abs(float(gap.std()) / (clip * noise) - 1) < 0.1
        assert abs(float(gap.mean())) < 0.15 * clip * noise
