"""Classifiers of words: what they see, how they start, and that weights bring their words."""

import math

import pytest
import torch
from torch import nn

from vestige.core.protocols import LearnsVocabulary
from vestige.core.texts import to_bytes
from vestige.core.types import InputSpec
from vestige.errors import ShapeError
from vestige.models.factory import build_model
from vestige.models.word_models import BiLSTM, PairBiLSTM, words_of
from vestige.teachers.files import load_weights

TEXTS = ["The game was won.", "Shares fell on the market!", "A game of shares", "won won lost"]
ROWS = to_bytes(TEXTS, 64)
PAIRS = to_bytes([f"{one}\x1fAnd {one}" for one in TEXTS], 96)
NAMES = ["bilstm", "pair-bilstm", "tfidf-linear"]


def made(name: str, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    network = build_model(name, InputSpec.text(64), classes)
    network.learn_vocabulary(PAIRS if "pair" in name else ROWS)
    return network.eval()


def rows_of(name: str) -> torch.Tensor:
    return PAIRS if "pair" in name else ROWS


def test_words_are_in_lower_case_and_marks_are_words():
    assert words_of("The GAME's  won, 3-1!") == ["the", "game's", "won", ",", "3", "-", "1", "!"]


@pytest.mark.parametrize("name", NAMES)
def test_each_learns_words_and_answers_for_any_text(name):
    network = made(name)
    assert isinstance(network, LearnsVocabulary)
    strange = to_bytes(["", "\x1f", "zzz qqq", "won \x1f", "é 漢字 🎉", "w " * 300], 700)
    logits = network(strange)
    assert logits.shape == (6, 3) and torch.isfinite(logits).all()
    with pytest.raises(ShapeError):
        network.learn_vocabulary(ROWS[:0])


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_answered_alone_as_among_others(name):
    network = made(name)
    if name == "tfidf-linear":
        nn.init.normal_(network.weight)
    together = network(rows_of(name))
    alone = torch.cat([network(row[None]) for row in rows_of(name)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert together.std(0).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_weights_bring_their_words(name):
    network, other = made(name), build_model(name, InputSpec.text(64), 3).eval()
    if name == "tfidf-linear":
        nn.init.normal_(network.weight)
    load_weights(other, network.state_dict(), where="here")
    assert torch.equal(other(rows_of(name)), network(rows_of(name)))
    assert all(isinstance(weight, nn.Parameter) for weight in other.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_learn_the_labels(name):
    network, labels = made(name, 4), torch.arange(4)
    moves = torch.optim.Adam(network.parameters(), 2e-2 if name == "tfidf-linear" else 3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(rows_of(name)), labels)
        moves.zero_grad()
        loss.backward()
        moves.step()
    assert network(rows_of(name)).argmax(1).tolist() == [0, 1, 2, 3]


def test_bilstm_is_the_papers():
    network = BiLSTM(2)
    network.learn_vocabulary(ROWS)
    assert network.words.embedding.embedding_dim == 100
    assert network.words.embedding.weight.abs().max() <= math.sqrt(3 / 100)
    assert not network.words.embedding.weight[0].any()
    lstm = network.lstm
    assert (lstm.hidden_size, lstm.num_layers, lstm.bidirectional) == (150, 1, True)
    # Both biases are added: the forget gate's is 1, all others are 0.
    bias = lstm.bias_ih_l0 + lstm.bias_hh_l0
    expected = torch.zeros(600)
    expected[150:300] = 1
    assert torch.equal(bias, expected)
    assert network.classifier.in_features == 300 and network.dropout.p == 0.5


def test_bilstm_classifies_the_last_state_of_each_direction():
    network = BiLSTM(2).eval()
    network.learn_vocabulary(ROWS)
    vectors, lengths = network.words(TEXTS)
    for row, text in enumerate(TEXTS):
        states, _ = network.lstm(vectors[row : row + 1, : lengths[row]])
        last = torch.cat([states[0, -1, :150], states[0, 0, 150:]])
        slow = network.classifier(last)
        assert torch.allclose(network(to_bytes([text], 64))[0], slow, atol=1e-6)


def test_pair_bilstm_compares_means_over_time():
    network = PairBiLSTM(3).eval()
    network.learn_vocabulary(PAIRS)
    assert network.classifier[1].in_features == 2400 and network.lstm.num_layers == 2
    means = []
    for text in ("the game", "shares fell on the market"):
        vectors, _ = network.words([text])
        means.append(network.lstm(vectors)[0].mean(1))
    u, v = means
    slow = network.classifier(torch.cat([u, v, (u - v).abs(), u * v], 1))
    pair = to_bytes(["the game\x1fshares fell on the market"], 96)
    assert torch.allclose(network(pair), slow, atol=1e-5)


def test_tfidf_is_scikit_learns():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    network = made("tfidf-linear")
    judge = text.TfidfVectorizer(tokenizer=words_of, token_pattern=None, ngram_range=(1, 2))
    expected = torch.from_numpy(judge.fit_transform(TEXTS).toarray()).float()
    numbers = network.vocabulary.numbers
    assert set(numbers) == set(judge.vocabulary_)
    # With the identity as weights the logits are the features.
    network.weight = nn.Parameter(torch.eye(len(numbers)))
    network.bias = nn.Parameter(torch.zeros(len(numbers)))
    network.num_classes = len(numbers)
    order = [numbers[term] for term in sorted(judge.vocabulary_, key=judge.vocabulary_.get)]
    assert torch.allclose(network(ROWS)[:, order], expected, atol=1e-6)


def test_the_most_frequent_words_are_kept():
    network = BiLSTM(2, vocabulary=2)
    network.learn_vocabulary(to_bytes(["b a a", "c a b"], 16))
    assert network.words.vocabulary.numbers == {"a": 0, "b": 1}
    assert network.words.embedding.num_embeddings == 4
