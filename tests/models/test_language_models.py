"""A language model that writes and judges: against slow versions, one text at a time."""

import math

import pytest
import torch
from torch.nn import functional as F

from vestige.core.texts import to_bytes
from vestige.core.writing import Sampling
from vestige.errors import RecipeError, TeacherError
from vestige.models.decoding import draw_token, nucleus, self_debiased
from vestige.models.language_models import LanguageModel, SmallLanguageModel
from vestige.teachers.files import load_weights

pytest.importorskip("transformers", reason="needs transformers: pip install 'vestige[text]'")

TEXTS = [
    "Rebels sign a treaty.",
    "The striker won the game in the last minute, and nobody could believe it at all.",
    "Shares fell.",
    "A satellite",
]
GREEDY = Sampling(new_tokens=12, temperature=0)


def small(**given) -> SmallLanguageModel:
    torch.manual_seed(0)
    settings = {"layers": 2, "width": 32, "heads": 2, "context": 64, "vocabulary": 400}
    made = SmallLanguageModel(4, **{"prompts": "ag-news", **settings, **given})
    made.learn_vocabulary(to_bytes(TEXTS * 5, 128))
    # Weights at their start make every token about as likely: nothing could go wrong.
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    return made.eval()


@pytest.fixture(scope="module")
def lm() -> SmallLanguageModel:
    return small()


def prompts_of(lm: LanguageModel) -> list[str]:
    return [lm.prompts.prompt_of(name) for name in lm.prompts.names]


def slow_greedy(lm: LanguageModel, prompt: str, steps: int) -> tuple[str, float]:
    """One prompt, no padding, no cache."""
    stops = lm.tokens().marks('"', lm.network.config.vocab_size)
    tokens = lm.tokens().encode([prompt])[0]
    start, total = len(tokens), 0.0
    for _ in range(steps):
        logits = lm.network(input_ids=torch.tensor([tokens])).logits[0, -1]
        best = int(logits.argmax())
        total += float(logits.log_softmax(0)[best])
        tokens.append(best)
        if stops[best]:
            break
    text = lm.tokens().decode([tokens[start:]])[0]
    return text, total / (len(tokens) - start)


@torch.no_grad()
def test_many_padded_prompts_are_continued_as_each_alone(lm):
    prompts = [*prompts_of(lm), "A much longer prompt about the game in the last minute: ", "x"]
    found = lm.generate(prompts, 2, GREEDY, torch.Generator())
    for prompt, texts in zip(prompts, found, strict=True):
        text, logprob = slow_greedy(lm, prompt, GREEDY.new_tokens)
        assert {one.text for one in texts} == {text.partition('"')[0] + '"' * ('"' in text)}
        assert texts[0].logprob == pytest.approx(logprob, abs=1e-4)


def test_the_size_of_a_batch_changes_no_greedy_text(lm):
    prompts = prompts_of(lm)
    before, texts = lm.rows, []
    for rows in (1, 2, 64):
        lm.rows = rows
        texts.append(
            [[o.text for o in r] for r in lm.generate(prompts, 3, GREEDY, torch.Generator())]
        )
    lm.rows = before
    assert texts[0] == texts[1] == texts[2]


def test_the_same_seed_writes_the_same(lm):
    draws = [
        lm.generate(prompts_of(lm), 6, Sampling(), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len({one.text for one in draws[0][0]}) > 1


def test_a_text_stops_at_its_first_quote(lm):
    texts = [
        one.text
        for row in lm.generate(prompts_of(lm), 40, Sampling(new_tokens=30), torch.Generator())
        for one in row
    ]
    closed = [text for text in texts if '"' in text]
    assert closed and all(text.index('"') == len(text) - 1 for text in closed)


def test_prompts_and_texts_that_do_not_fit_are_cut(lm):
    long = "word " * 200 + ': "'
    found = lm.generate([long, 'b: "'], 2, Sampling(new_tokens=100), torch.Generator())
    assert [len(row) for row in found] == [2, 2]


@torch.no_grad()
def test_the_prompting_baseline_is_brute_force(lm):
    answer = lm(to_bytes(TEXTS, 128)).logits
    for row, text in enumerate(TEXTS):
        for column, name in enumerate(lm.prompts.names):
            before, after = lm.prompts.sentence(name)
            parts = lm.tokens().encode([before, text, after])
            room = lm.context - len(parts[0]) - len(parts[2])
            tokens = torch.tensor([parts[0] + parts[1][:room] + parts[2]])
            logits = lm.network(input_ids=tokens).logits[0, :-1]
            slow = F.cross_entropy(logits, tokens[0, 1:])
            assert answer[row, column] == pytest.approx(-slow.item(), abs=1e-4)


@torch.no_grad()
def test_calibrated_and_without_a_text_all_labels_tie():
    lm = small(calibrated=True)
    empty = lm(to_bytes([""], 32)).logits
    assert torch.allclose(empty, torch.zeros_like(empty), atol=1e-5)
    assert lm(to_bytes(TEXTS, 128)).logits.std(1).min() > 0


def test_what_is_known_is_forgotten_when_weights_or_labels_move():
    lm = small()
    rows = to_bytes(TEXTS, 128)
    with torch.no_grad():
        first = lm(rows).logits
        assert torch.equal(lm(rows).logits, first)
        next(lm.parameters()).mul_(1.5)
        assert not torch.equal(lm(rows).logits, first)
        before = lm(rows).logits
        lm.name_classes([*lm.prompts.names][::-1])
        assert torch.allclose(lm(rows).logits, before.flip(1))


def test_training_counts_the_text_and_its_closing_quote_alone():
    lm = small()
    rows = to_bytes(['He said "go" and left.'], 64)
    losses = []
    prompt = lm.prompts.prompt_of("sports")
    head, body, tail = lm.tokens().encode([prompt, "He said 'go' and left.", '"'])
    tokens = torch.tensor([head + body + tail])
    logits = lm.network(input_ids=tokens).logits[0, :-1]
    losses = F.cross_entropy(logits, tokens[0, 1:], reduction="none")[len(head) - 1 :]
    got = lm.training_loss(rows, torch.tensor([1]))
    assert got.item() == pytest.approx(losses.mean().item(), abs=1e-5)
    got.backward()
    assert all(weight.grad is not None for weight in lm.network.parameters())


def test_the_quote_is_inside_the_context_however_long_the_text():
    lm = small()
    found = lm._sentences(["word " * 300], ["world"], whole=False)
    tokens, _ = found[0]
    assert len(tokens) == lm.context and lm.tokens().marks('"', 400)[tokens[-1]]


def test_contrast_compares_with_another_label():
    lm = small(contrast=2.0)
    rows, labels = to_bytes(TEXTS, 128), torch.tensor([0, 1, 2, 3])
    plain = small().training_loss(rows, labels)
    torch.manual_seed(0)
    assert lm.training_loss(rows, labels) > plain


def test_it_learns_which_label_a_text_has():
    lm = small()
    rows, labels = to_bytes(TEXTS, 128), torch.tensor([0, 1, 2, 3])
    moves = torch.optim.AdamW(lm.parameters(), 3e-3)
    for _ in range(150):
        loss = lm.training_loss(rows, labels)
        moves.zero_grad()
        loss.backward()
        moves.step()
    with torch.no_grad():
        assert lm.eval()(rows).logits.argmax(1).tolist() == [0, 1, 2, 3]
    texts = lm.generate(prompts_of(lm), 1, GREEDY, torch.Generator())
    assert [row[0].text.strip().split()[0] for row in texts] == ["Rebels", "The", "Shares", "A"]


def test_weights_bring_their_tokenizer():
    lm = small()
    other = SmallLanguageModel(
        4, prompts="ag-news", layers=2, width=32, heads=2, context=64, vocabulary=400
    ).eval()
    with pytest.raises(TeacherError, match="seen no texts"):
        other.tokens()
    load_weights(other, lm.state_dict(), where="here")
    rows = to_bytes(TEXTS, 128)
    with torch.no_grad():
        assert torch.equal(other(rows).logits, lm(rows).logits)


@pytest.mark.parametrize(
    ("given", "told"),
    [({"prompts": "sst2"}, "num_classes=4"), ({"width": 30}, "multiple"), ({"context": 8}, "16")],
)
def test_what_does_not_fit_is_told(given, told):
    settings = {"prompts": "ag-news", "width": 32, "heads": 4, **given}
    with pytest.raises(RecipeError, match=told):
        SmallLanguageModel(4, **settings)


def some(rows: int = 5, size: int = 40, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(rows, size, generator=rng), 1)


def test_debiasing_without_decay_or_with_equal_prompts_changes_nothing():
    own, others = some(), torch.stack([some(seed=1), some(seed=2)], 1)
    assert torch.allclose(self_debiased(own, others, decay=0.0, floor=0.01), own, atol=1e-7)
    same = torch.stack([own, own], 1)
    assert torch.allclose(self_debiased(own, same, decay=200.0, floor=0.01), own, atol=1e-7)


def test_debiasing_of_two_tokens_is_as_computed_by_hand():
    own, other = torch.tensor([[0.6, 0.4]]), torch.tensor([[[0.5, 0.5]]])
    factor = math.exp(-20 * 0.1)
    expected = torch.tensor([[0.6, 0.4 * factor]]) / (0.6 + 0.4 * factor)
    assert torch.allclose(self_debiased(own, other, decay=20.0, floor=0.01), expected)
    # From ln(1 / floor) / decay on, the factor is the floor exactly.
    far = self_debiased(own, other, decay=math.log(100) / 0.1 + 50, floor=0.01)
    assert far[0, 1] / far[0, 0] == pytest.approx(0.4 * 0.01 / 0.6)


def test_debiased_probabilities_add_up_and_the_strongest_other_label_counts():
    own, others = some(), torch.stack([some(seed=1), some(seed=2)], 1)
    found = self_debiased(own, others, decay=200.0, floor=0.01)
    assert torch.allclose(found.sum(1), torch.ones(5))
    assert torch.allclose(
        found, self_debiased(own, others.amax(1, keepdim=True), decay=200.0, floor=0.01)
    )


@pytest.mark.parametrize("size", [40, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_a_nucleus_is_the_smallest_set_with_enough_mass(size, top_p):
    probs = some(size=size)
    shares, tokens = nucleus(probs, top_p=top_p, top_k=0)
    for row in range(len(probs)):
        kept = tokens[row][shares[row] > 0]
        mass = probs[row][kept].sort(descending=True).values
        assert mass.sum() >= top_p - 1e-6 and mass[:-1].sum() < top_p
        assert mass[-1] >= probs[row].sort(descending=True).values[len(mass) - 1] - 1e-9
    assert torch.allclose(shares.sum(1), torch.ones(len(probs)))


def test_tokens_are_drawn_from_the_nucleus_by_their_shares():
    probs = some(rows=1, size=12).expand(20_000, -1)
    shares, tokens = nucleus(probs[:1], top_p=0.8, top_k=0)
    drawn = draw_token(probs, Sampling(top_p=0.8), torch.Generator().manual_seed(0))
    expected = torch.zeros(12).index_put((tokens[0],), shares[0])
    found = torch.bincount(drawn, minlength=12) / len(drawn)
    assert not found[expected == 0].any() and (expected == 0).any()
    # Five deviations of a share of 20,000 draws.
    assert (found - expected).abs().max() < 5 * 0.5 / 20_000**0.5


def test_all_tokens_is_plain_sampling():
    probs = some()
    plain = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(3))[:, 0]
    rng = torch.Generator().manual_seed(3)
    assert torch.equal(draw_token(probs, Sampling(top_p=1.0), rng), plain)
    assert set(nucleus(probs, top_p=1.0, top_k=3)[1].shape) == {5, 3}


def test_copies_for_debiasing_get_the_token_that_was_drawn(lm):
    first, *others = prompts_of(lm)
    # With the same prompts behind it nothing is pushed away, and each text is the plain one.
    plain = lm.generate([first], 3, GREEDY, torch.Generator())
    sampling = Sampling(new_tokens=12, temperature=0, debias_decay=200.0)
    same = lm.generate([first], 3, sampling, torch.Generator(), others=[[first, first]])
    assert [one.text for one in same[0]] == [one.text for one in plain[0]]
    pushed = lm.generate([first], 3, sampling, torch.Generator(), others=[others])
    assert [one.text for one in pushed[0]] != [one.text for one in plain[0]]


@pytest.mark.parametrize("given", [{"top_p": 0.0}, {"new_tokens": 0}, {"temperature": -1.0}])
def test_sampling_out_of_range_is_told(given):
    with pytest.raises(RecipeError):
        Sampling(**given)
