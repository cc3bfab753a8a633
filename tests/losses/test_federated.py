import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vestige.errors import RecipeError, ShapeError
from vestige.losses.federated import latent_diversity_loss, pooled_logits, weighted_ensemble_ce


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def shares(clients: int, classes: int) -> Tensor:
    return torch.softmax(draw(clients, classes, seed=5), 0)


LABELS = torch.tensor([0, 1, 2, 1, 0, 0])


def test_diversity_of_two_rows_is_the_formula():
    latent = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    outputs = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]])
    # Mean squared distance 5, mean absolute distance 2, two of four pairs.
    expected = math.exp(-5 * 2 / 2)
    assert latent_diversity_loss(latent, outputs).item() == pytest.approx(expected, rel=1e-6)
    other = latent_diversity_loss(latent, outputs, latent_distance="l1")
    assert other.item() == pytest.approx(math.exp(-2 * 2 / 2), rel=1e-6)


def test_diversity_of_images_is_a_loop_over_pairs():
    latent, images = draw(7, 4), draw(7, 2, 3, 3, seed=1)
    total = 0.0
    for i in range(7):
        for j in range(7):
            apart = float((images[i] - images[j]).abs().mean())
            total += apart * float((latent[i] - latent[j]).square().mean())
    found = latent_diversity_loss(latent, images).item()
    assert found == pytest.approx(math.exp(-total / 49), rel=1e-12)


def test_diversity_is_1_for_equal_outputs_and_lower_otherwise():
    latent, outputs = draw(6, 4), draw(6, 3, seed=1)
    assert latent_diversity_loss(latent, outputs[:1].expand(6, 3)).item() == 1
    assert 0 < latent_diversity_loss(latent, outputs).item() < 1


def test_diversity_knows_neither_order_nor_a_common_shift():
    latent, outputs = draw(6, 4), draw(6, 3, seed=1)
    plain = latent_diversity_loss(latent, outputs)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(latent_diversity_loss(latent[order], outputs[order]), plain)
    torch.testing.assert_close(latent_diversity_loss(latent, outputs + 7), plain)
    # Only the pairing of noise and output counts.
    assert not torch.isclose(latent_diversity_loss(latent, outputs[order]), plain)


def test_the_gradient_of_diversity_is_right_and_finite_for_equal_rows():
    latent, outputs = draw(5, 3), draw(5, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: latent_diversity_loss(latent, x), outputs)
    same = torch.zeros(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(latent_diversity_loss(draw(4, 3).float(), same), same)
    assert torch.isfinite(grad).all()


def test_diversity_refuses_what_it_cannot_mean():
    with pytest.raises(RecipeError, match="cosine"):
        latent_diversity_loss(draw(4, 2), draw(4, 2), latent_distance="cosine")


def test_diversity_refuses_other_rows():
    with pytest.raises((ShapeError, TypeError)):
        latent_diversity_loss(draw(4, 2), draw(5, 2))


def test_the_ensembles_loss_is_a_loop_over_clients_and_samples():
    logits, weights = draw(3, 6, 4), shares(3, 4)
    per_sample, of_batch = 0.0, 0.0
    for k in range(3):
        losses = [float(F.cross_entropy(logits[k, b], y)) for b, y in enumerate(LABELS)]
        own = [float(weights[k, y]) for y in LABELS]
        per_sample += sum(a * c for a, c in zip(own, losses, strict=True)) / 6
        of_batch += sum(own) / 6 * sum(losses) / 6
    found = weighted_ensemble_ce(logits, LABELS, weights)
    assert found.item() == pytest.approx(per_sample, rel=1e-12)
    other = weighted_ensemble_ce(logits, LABELS, weights, weighting="batch_mean")
    assert other.item() == pytest.approx(of_batch, rel=1e-12)
    assert abs(per_sample - of_batch) > 1e-3


def test_both_weightings_agree_where_all_labels_are_equal():
    logits, weights = draw(3, 6, 4), shares(3, 4)
    labels = torch.full((6,), 2)
    one, other = (
        weighted_ensemble_ce(logits, labels, weights, weighting=how)
        for how in ("per_sample", "batch_mean")
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_a_client_without_a_class_has_no_influence_on_its_samples():
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]).double()
    logits = draw(2, 6, 3).requires_grad_()
    (grad,) = torch.autograd.grad(weighted_ensemble_ce(logits, LABELS, weights), logits)
    assert not grad[0, LABELS == 2].any() and not grad[1, LABELS == 0].any()
    assert grad[0, LABELS == 0].any() and grad[1, LABELS == 1].any()
    # What the public code computes asks a client about classes that it never saw.
    mean = weighted_ensemble_ce(logits, LABELS, weights, weighting="batch_mean")
    (grad,) = torch.autograd.grad(mean, logits)
    assert grad[0, LABELS == 2].any()


def test_pooled_logits_lose_less_than_the_clients_one_by_one():
    logits, weights = draw(3, 6, 4), shares(3, 4)
    for row, label in enumerate(LABELS.tolist()):
        picked, own = logits[:, row : row + 1], torch.tensor([label])
        pooled = F.cross_entropy(pooled_logits(picked, own, weights), own)
        single = weighted_ensemble_ce(picked, own, weights)
        assert pooled < single - 1e-6
    # Equality: one client, or answers that differ by a constant.
    shifted = logits[:1] + torch.tensor([0.0, 2.0, -3.0]).double().view(3, 1, 1)
    for same, a in ((shifted, weights), (logits[:1], torch.ones(1, 4).double())):
        pooled = F.cross_entropy(pooled_logits(same, LABELS, a), LABELS)
        torch.testing.assert_close(pooled, weighted_ensemble_ce(same, LABELS, a))


def test_an_unknown_weighting_is_refused():
    with pytest.raises(RecipeError, match="per_batch"):
        weighted_ensemble_ce(draw(2, 6, 3), LABELS, shares(2, 3), weighting="per_batch")
