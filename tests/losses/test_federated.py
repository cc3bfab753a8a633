import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vestige.errors import RecipeError, ShapeError
from vestige.losses.distill import kl_divergence
from vestige.losses.federated import (
    ensemble_discrepancy,
    ensemble_probabilities,
    latent_diversity_loss,
    pooled_logits,
    soft_cross_entropy,
    weighted_ensemble_ce,
)


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


# Ensembles that teach


def drawn_ensemble(members: int = 3, rows: int = 5, classes: int = 4) -> tuple[Tensor, ...]:
    """Student (B, C), members (K, B, C), labels (B,), shares (K, C) with columns that sum to 1."""
    rng = torch.Generator().manual_seed(3)
    shares = torch.rand(members, classes, generator=rng)
    return (
        2 * torch.randn(rows, classes, generator=rng),
        2 * torch.randn(members, rows, classes, generator=rng),
        torch.arange(rows) % classes,
        shares / shares.sum(0),
    )


@pytest.mark.parametrize("kind", ["kl", "l1_logits"])
def test_a_discrepancy_is_a_slow_sum_over_members(kind):
    student, members, labels, shares = drawn_ensemble()
    found = ensemble_discrepancy(student, members, shares[:, labels], kind=kind)
    for b, row in enumerate(student.double().numpy()):
        expected = 0.0
        for k, member in enumerate(members[:, b].double().numpy()):
            p, q = np.exp(row) / np.exp(row).sum(), np.exp(member) / np.exp(member).sum()
            each = (p * np.log(p / q)).sum() if kind == "kl" else np.abs(row - member).mean()
            expected += float(shares[k, labels[b]]) * each
        assert found[b].item() == pytest.approx(expected, abs=1e-5)


def test_a_discrepancy_is_zero_where_every_member_agrees():
    student, members, labels, shares = drawn_ensemble()
    for kind in ("kl", "l1_logits"):
        found = ensemble_discrepancy(
            student, student.expand_as(members), shares[:, labels], kind=kind
        )
        assert found.abs().max() < 1e-6


def test_a_member_without_weight_gets_no_gradient():
    student, members, labels, shares = drawn_ensemble()
    members.requires_grad_(True)
    shares[1, 2] = 0
    weights = shares[:, labels]
    slope = torch.autograd.grad(ensemble_discrepancy(student, members, weights).sum(), members)[0]
    assert not slope[1, labels == 2].any()
    assert slope[0, labels == 2].all()
    found = ensemble_discrepancy(student.requires_grad_(True), members, weights, kind="l1_logits")
    assert torch.autograd.grad(found.sum(), members, allow_unused=True)[0] is None


def test_soft_cross_entropy_is_the_divergence_and_the_entropy_of_the_target():
    student, members, labels, shares = drawn_ensemble()
    target = ensemble_probabilities(members, shares[:, labels])
    torch.testing.assert_close(target.sum(1), torch.ones(5))
    entropy = -(target * target.log()).sum(1)
    divergence = kl_divergence(student, target.log())
    found = soft_cross_entropy(student, target)
    torch.testing.assert_close(found, divergence + entropy, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, F.cross_entropy(student, target, reduction="none"))
    torch.testing.assert_close(soft_cross_entropy(student, target, reduction="mean") * 4, found)


def test_an_ensemble_of_equals_is_its_member():
    student, members, labels, shares = drawn_ensemble()
    equal = student.expand_as(members)
    found = ensemble_probabilities(equal, shares[:, labels])
    torch.testing.assert_close(found, student.softmax(1))


def test_words_that_mean_nothing_here_are_refused():
    student, members, labels, shares = drawn_ensemble()
    with pytest.raises(RecipeError, match="'kl' or 'l1_logits'"):
        ensemble_discrepancy(student, members, shares[:, labels], kind="js")
    with pytest.raises(RecipeError, match="'batchmean' or 'mean'"):
        soft_cross_entropy(student, student.softmax(1), reduction="sum")
