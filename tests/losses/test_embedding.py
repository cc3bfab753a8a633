import inspect

import numpy as np
import pytest
import torch

from vestige.errors import ShapeError
from vestige.losses.embedding import masked_embedding_loss


def slow(guessed, words, masked):
    """From the paper: mean over a text's masked places of the squared distance."""
    rows = []
    for guess, word, places in zip(guessed, words, masked, strict=True):
        found = [float(((guess[i] - word[i]) ** 2).sum()) for i in np.flatnonzero(places)]
        rows.append(sum(found) / len(found) if found else 0.0)
    return rows


def test_it_is_the_mean_squared_distance_of_the_masked_places():
    guessed, words = torch.randn(5, 7, 3), torch.randn(5, 7, 3)
    masked = torch.rand(5, 7) < 0.4
    masked[0] = False
    masked[1] = True
    found = masked_embedding_loss(guessed, words, masked)
    expected = slow(guessed.numpy(), words.numpy(), masked.numpy())
    # Sums of 21 float32 products.
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert found[0] == 0


def test_gradient_reaches_masked_places_only_and_both_sides():
    guessed = torch.randn(2, 4, 3, requires_grad=True)
    words = torch.randn(2, 4, 3, requires_grad=True)
    masked = torch.tensor([[True, False, True, False], [False, False, False, False]])
    masked_embedding_loss(guessed, words, masked).sum().backward()
    for side, sign in ((guessed, 1), (words, -1)):
        assert torch.equal(side.grad.abs().sum(2) > 0, masked)
        expected = sign * 2 * (guessed - words).detach() * masked[..., None] / 2
        torch.testing.assert_close(side.grad, expected)


def test_a_row_without_masked_places_gives_no_nan():
    guessed = torch.randn(1, 3, 2, requires_grad=True)
    masked = torch.zeros(1, 3, dtype=torch.bool)
    masked_embedding_loss(guessed, torch.zeros(1, 3, 2), masked).sum().backward()
    assert torch.equal(guessed.grad, torch.zeros(1, 3, 2))


@pytest.mark.parametrize(
    ("guessed", "masked"), [((2, 3, 4), (2, 3)), ((2, 3, 5), (2, 4)), ((1, 3, 5), (2, 3))]
)
def test_shapes_must_fit(guessed, masked):
    # Unwrapped, because the run-time type check of the test run would speak first.
    with pytest.raises(ShapeError, match=r"expected \(B, l, d\) twice and \(B, l\)"):
        inspect.unwrap(masked_embedding_loss)(
            torch.zeros(guessed), torch.zeros(2, 3, 5), torch.zeros(masked, dtype=torch.bool)
        )
