import pytest
import torch

from vestige.errors import RecipeError
from vestige.sources.embeddings import EmbeddingPrior

TABLE = torch.arange(20.0)[:, None] + torch.tensor([0.0, 0.25, 0.5])
SPECIAL = torch.tensor([2, 3, 0, 4])  # begin, end, fill, mask


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def prior(special=SPECIAL, **args):
    return EmbeddingPrior(TABLE, special, **{"length": 8, **args})


def numbers(words):
    """Which token each place holds, -1 where it holds none."""
    hit = (words[..., None, :] == TABLE).all(-1)
    return torch.where(hit.any(-1), hit.int().argmax(-1), -1)


@pytest.mark.parametrize("kind", ["normal", "tokens"])
def test_texts_begin_end_and_are_filled_up_with_their_tokens(kind):
    crafted = prior(prior=kind, shortest=3).draw(200, rng())
    found = numbers(crafted.words)
    lengths = crafted.mask.sum(1)
    places = torch.arange(8).expand(200, 8)
    assert (found[:, 0] == 2).all()
    assert (found.gather(1, lengths[:, None] - 1) == 3).all()
    assert (found[places >= lengths[:, None]] == 0).all()
    assert torch.equal(crafted.mask.bool(), places < lengths[:, None])
    assert torch.equal(crafted.free, (places > 0) & (places < lengths[:, None] - 1))
    assert set(lengths.tolist()) == {3, 4, 5, 6, 7, 8}
    assert (crafted.free.sum(1) >= 1).all()


def test_random_tokens_are_ordinary_ones_and_all_of_them():
    crafted = prior(prior="tokens").draw(300, rng())
    assert set(numbers(crafted.words)[crafted.free].tolist()) == {1, *range(5, 20)}
    assert (crafted.mask == 1).all(), "without a shortest all are as long as the longest"


def test_noise_has_the_mean_and_deviation_of_the_table_unless_told():
    words = prior().draw(2000, rng())
    free = words.words[words.free]
    # 36,000 values: the mean is known to 5.8 / 190 = 0.03, taken four times.
    assert float(free.mean()) == pytest.approx(float(TABLE.mean()), abs=0.12)
    assert float(free.std()) == pytest.approx(float(TABLE.std()), rel=0.02)
    told = prior(mean=1.0, std=0.0).draw(2, rng())
    assert (told.words[told.free] == 1).all()


def test_the_same_generator_gives_the_same_texts():
    for kind in ("normal", "tokens"):
        one, other, third = (prior(prior=kind, shortest=3).draw(4, rng(s)) for s in (5, 5, 6))
        assert torch.equal(one.words, other.words) and torch.equal(one.mask, other.mask)
        assert not torch.equal(one.words, third.words)


def test_a_tokenizer_without_special_tokens_leaves_their_places_to_words():
    crafted = prior(torch.tensor([-1, -1, -1, -1]), shortest=3, prior="tokens").draw(50, rng())
    inside = crafted.mask.bool()
    assert torch.equal(crafted.free, inside)
    assert (crafted.words[~inside] == 0).all()
    assert (numbers(crafted.words)[inside] >= 0).all()
    without_end = prior(torch.tensor([2, -1, 0, -1])).draw(5, rng())
    assert without_end.free[:, -1].all() and not without_end.free[:, 0].any()


def test_the_table_is_not_held_by_gradient_nor_changed():
    table = TABLE.clone().requires_grad_()
    crafted = EmbeddingPrior(table, SPECIAL, length=5).draw(3, rng())
    assert not crafted.words.requires_grad
    crafted.words.zero_()
    assert torch.equal(table.detach(), TABLE)


def test_one_word_of_each_text_is_masked_or_each_with_its_chance():
    source = prior(shortest=3)
    crafted = source.draw(3000, rng())
    one = source.choose_masked(crafted, 0.0, rng(1))
    assert (one.sum(1) == 1).all() and not (one & ~crafted.free).any()
    assert all(one[:, place].any() for place in range(1, 7))
    many = source.choose_masked(crafted, 0.5, rng(1))
    assert (many.sum(1) >= 1).all() and not (many & ~crafted.free).any()
    long = crafted.free.sum(1) == 6
    # One of six at least: 6 * 0.5 and 0.5 ** 6 of the texts one more; 500 texts know it to 0.06.
    assert float(many[long].sum(1).float().mean()) == pytest.approx(3 + 0.5**6, abs=0.25)
    every = source.choose_masked(crafted, 1.0, rng(1))
    assert torch.equal(every, crafted.free)


def test_the_longest_norm_is_a_quantile_of_the_tokens():
    norms = TABLE.norm(dim=1)
    assert prior().longest_norm(1.0) == pytest.approx(float(norms.max()))
    assert prior().longest_norm(0.5) == pytest.approx(float(norms.median()), rel=0.1)


@pytest.mark.parametrize("sizes", [{"length": 2}, {"length": 5, "shortest": 2}, {"shortest": 9}])
def test_lengths_without_a_word_are_refused(sizes):
    with pytest.raises(RecipeError, match="expected at least 3"):
        prior(**sizes)
