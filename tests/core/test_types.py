import pytest
import torch
from torch import nn

from vestige.core.types import (
    Access,
    Batch,
    InputSpec,
    Loss,
    Prediction,
    count_parameters,
    predict,
)
from vestige.errors import ContractError, ShapeError

# Access


def test_access_levels_are_ordered():
    white, scores, labels = Access.WHITE_BOX, Access.SCORES, Access.LABELS
    covered = {(have, need) for have in Access for need in Access if have.covers(need)}
    assert covered == {
        (white, white),
        (white, scores),
        (white, labels),
        (scores, scores),
        (scores, labels),
        (labels, labels),
    }


# InputSpec


def test_normalize_and_denormalize_are_inverse_and_per_channel():
    spec = InputSpec.image(2, 3, 4, mean=(0.2, 0.5), std=(0.1, 2.0))
    images = torch.rand(5, 2, 3, 4)
    inputs = spec.normalize(images)
    torch.testing.assert_close(inputs[:, 0], (images[:, 0] - 0.2) / 0.1)
    torch.testing.assert_close(inputs[:, 1], (images[:, 1] - 0.5) / 2)
    torch.testing.assert_close(spec.denormalize(inputs), images)
    assert float(spec.denormalize(torch.full((1, 2, 3, 4), 99.0)).max()) == 1
    assert float(spec.denormalize(torch.full((1, 2, 3, 4), -99.0)).min()) == 0


def test_normalize_is_differentiable_and_without_statistics_the_identity():
    images = torch.rand(1, 1, 2, 2, requires_grad=True)
    InputSpec.image(1, 2, 2, mean=(0.5,), std=(0.25,)).normalize(images).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 4))
    assert InputSpec.image(1, 2, 2).normalize(images) is images


@pytest.mark.parametrize(
    ("shape", "mean", "std", "message"),
    [
        ((), (), (), "positive sizes"),
        ((3, 0, 8), (), (), "positive sizes"),
        ((3, 8, 8), (0.5,), (), "1 means and 0 stds"),
        ((3, 8, 8), (0.5,), (0.5,), "for 1 channels, expected 3"),
        ((1, 8, 8), (0.5,), (0.0,), "above 0"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(shape, mean, std, message):
    with pytest.raises(ShapeError, match=message):
        InputSpec("image", shape, mean, std)


# Batch


def full() -> Batch:
    return Batch(
        torch.arange(12.0).view(4, 3),
        torch.arange(4),
        torch.arange(8.0).view(4, 2),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        {"logits": torch.arange(4.0).view(4, 1)},
    )


@pytest.mark.parametrize(
    ("index", "kept"),
    [
        (torch.tensor([True, False, True, False]), [0, 2]),
        (torch.tensor([3, 0, 3]), [3, 0, 3]),
        (slice(1, 3), [1, 2]),
    ],
    ids=["mask", "indices", "slice"],
)
def test_rows_picks_from_every_tensor(index, kept):
    batch, picked = full(), full().rows(index)
    assert len(picked) == len(kept)
    for name in ("inputs", "labels", "latent", "weights"):
        assert torch.equal(getattr(picked, name), getattr(batch, name)[kept]), name
    assert torch.equal(picked.extra["logits"], batch.extra["logits"][kept])


@pytest.mark.parametrize("field", ["inputs", "labels", "latent"])
def test_the_length_is_that_of_whatever_is_there(field):
    assert len(Batch(**{field: torch.zeros(3)})) == 3
    assert len(Batch(extra={"more": torch.zeros(5, 2)})) == 5
    assert len(Batch()) == 0


def test_weights_multiply_and_the_mean_divides_by_the_rows():
    batch = Batch(inputs=torch.zeros(4, 1))
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(batch.mean(losses)) == 2.5
    once = batch.weighted(torch.tensor([1.0, 0.0, 0.0, -1.0]))
    assert float(once.mean(losses)) == (1 - 4) / 4
    twice = once.weighted(torch.tensor([2.0, 5.0, 5.0, 3.0]))
    assert float(twice.mean(losses)) == (2 - 12) / 4
    assert batch.weights is None, "the batch itself was written to"
    assert float(once.mean(losses)) == -0.75


def test_the_gradient_of_a_weighted_mean_is_the_weight_over_the_rows():
    losses = torch.ones(3, requires_grad=True)
    weights = torch.tensor([0.0, 1.0, -2.0])
    Batch(inputs=torch.zeros(3, 1)).weighted(weights).mean(losses).backward()
    torch.testing.assert_close(losses.grad, weights / 3)


def test_wrong_lengths_are_refused():
    batch = Batch(inputs=torch.zeros(4, 2))
    with pytest.raises(ShapeError, match=r"weights of shape \(3,\), expected \(4,\)"):
        batch.weighted(torch.ones(3))
    for wrong in (torch.ones(()), torch.ones(3), torch.ones(4, 2)):
        with pytest.raises(ShapeError, match="reduce over everything but the batch first"):
            batch.mean(wrong)


def test_a_batch_knows_whether_its_weights_had_an_effect():
    batch = Batch(inputs=torch.zeros(2, 1))
    weighted = batch.weighted(torch.ones(2))
    assert not weighted.weights_were_used
    weighted.mean(torch.ones(2))
    assert weighted.weights_were_used
    # Means that were taken before the weights were set say nothing about them.
    assert not weighted.weighted(torch.ones(2)).weights_were_used
    assert not weighted.rows(slice(0, 1)).weights_were_used


# Prediction


class WithLogits:
    logits = torch.ones(2, 3)


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), torch.zeros(1)),
        [torch.ones(2, 3)],
        {"logits": torch.ones(2, 3), "out": torch.zeros(2, 3)},
        {"out": torch.ones(2, 3), "aux": torch.zeros(2, 3)},
        WithLogits(),
        Prediction(torch.ones(2, 3)),
    ],
    ids=["tensor", "tuple", "list", "logits", "out", "attribute", "prediction"],
)
def test_logits_are_found_in_any_usual_output(output):
    assert torch.equal(Prediction.of(output).logits, torch.ones(2, 3))
    assert torch.equal(predict(lambda inputs: output, None).logits, torch.ones(2, 3))


@pytest.mark.parametrize("output", ["logits", None, (), {"scores": torch.ones(1)}, (1, 2)])
def test_other_outputs_are_refused_with_what_to_return(output):
    with pytest.raises(ShapeError, match="wrap the network"):
        Prediction.of(output)


def test_logits_stay_attached_until_detached():
    prediction = predict(nn.Linear(2, 3), torch.ones(1, 2))
    assert prediction.logits.requires_grad
    assert not prediction.detach().logits.requires_grad


# Loss


def test_plus_adds_terms_to_the_total_and_refuses_a_name_twice():
    value = torch.tensor(2.0, requires_grad=True)
    loss = Loss({"first": value}, 3 * value)
    longer = loss.plus({"second": value * 5, "third": value})
    assert float(longer.total.detach()) == 6 + 10 + 2
    assert set(longer.terms) == {"first", "second", "third"}
    assert set(loss.terms) == {"first"}
    longer.total.backward()
    assert float(value.grad) == 3 + 5 + 1
    with pytest.raises(ContractError, match=r"\['first'\] exist already"):
        loss.plus({"first": value})


def test_a_detached_loss_has_the_values_and_no_graph():
    value = torch.ones(2, 3, requires_grad=True)
    loss = Loss(
        {"term": value.sum()}, value.mean(), value * 2, Prediction(value * 3), Prediction(value * 4)
    )
    detached = loss.detach()
    tensors = [
        (loss.total, detached.total),
        (loss.terms["term"], detached.terms["term"]),
        (loss.inputs, detached.inputs),
        (loss.teacher.logits, detached.teacher.logits),
        (loss.student.logits, detached.student.logits),
    ]
    for before, after in tensors:
        assert before.requires_grad
        assert not after.requires_grad
        assert torch.equal(before, after)
    empty = Loss({}, value.mean()).detach()
    assert (empty.inputs, empty.teacher, empty.student) == (None, None, None)


def test_parameters_are_counted_without_buffers():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    assert count_parameters(network) == 3 * 4 + 4 + 4 + 4
