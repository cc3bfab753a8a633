"""Small classifiers of words: recurrent ones, and a linear one on counts of words."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from vestige.core.texts import PAIR, as_pair, to_texts
from vestige.errors import ShapeError
from vestige.models.sizes import take_sizes

# Numbers of what fills up and of words that nobody learned; learned words follow.
PAD, UNKNOWN = 0, 1
_SPECIAL = 2
# Letters, digits and what joins them are one word; every other mark is one of its own.
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; marks are words of their own, an apostrophe inside is not.

    The paper's code splits at white space alone; then "game." and "game" are two words.
    """
    return _WORD.findall(text.lower())


class Vocabulary(nn.Module):
    """Terms and their numbers, kept as a buffer: UTF-8, one line each.

    Args:
        most: terms that are kept at most, the most frequent ones.
        least: times that a term must be seen.
    """

    terms: Tensor
    sized_by_state = ("terms",)

    def __init__(self, most: int, least: int = 1) -> None:
        super().__init__()
        self._most, self._least = most, least
        self.register_buffer("terms", torch.zeros(0, dtype=torch.uint8))
        self._known: tuple[Tensor, dict[str, int]] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def numbers(self) -> dict[str, int]:
        """Each term's number, from 0."""
        if self._known is None or self._known[0] is not self.terms:
            text = bytes(self.terms.cpu().numpy()).decode("utf8")
            found = {term: number for number, term in enumerate(text.split("\n") if text else ())}
            self._known = self.terms, found
        return self._known[1]

    def learn(self, lists: Iterable[Sequence[str]]) -> None:
        """Take the most frequent terms, equally frequent ones in the order of the alphabet."""
        counts = Counter(term for terms in lists for term in terms)
        frequent = sorted(
            (term for term, count in counts.items() if count >= self._least),
            key=lambda term: (-counts[term], term),
        )
        content = bytearray("\n".join(frequent[: self._most]).encode("utf8", errors="replace"))
        empty = torch.zeros(0, dtype=torch.uint8)
        made = torch.frombuffer(content, dtype=torch.uint8) if content else empty
        self.terms = made.to(self.terms.device)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        take_sizes(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)
        self._known = None


class _Words(nn.Module):
    """Embeddings of words that were learned from texts, and texts as rows of them.

    Args:
        width: of an embedding; values start uniformly within sqrt(3 / width), as in the paper.
        vocabulary: most words.
        most_words: of a text; what follows is not looked at.
    """

    sized_by_state = ("embedding.weight",)

    def __init__(self, width: int, vocabulary: int, most_words: int) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(vocabulary)
        self.width, self.most_words = width, most_words
        self.embedding = self._fresh(_SPECIAL)

    def _fresh(self, count: int) -> nn.Embedding:
        made = nn.Embedding(count, self.width, padding_idx=PAD)
        bound = math.sqrt(3 / self.width)
        nn.init.uniform_(made.weight, -bound, bound)
        with torch.no_grad():
            made.weight[PAD].zero_()
        return made

    def learn(self, texts: Sequence[str]) -> None:
        """Learn the words, and draw embeddings for them from torch's global random state."""
        self.vocabulary.learn(words_of(text) for text in texts)
        weight = self.embedding.weight
        self.embedding = self._fresh(len(self.vocabulary) + _SPECIAL).to(weight.device)

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, l, width), and on the CPU the number of words of each text, at least 1."""
        numbers = self.vocabulary.numbers
        rows = [
            [numbers.get(word, UNKNOWN - _SPECIAL) + _SPECIAL for word in words] or [UNKNOWN]
            for words in (words_of(text)[: self.most_words] for text in texts)
        ]
        lengths = torch.tensor([len(row) for row in rows])
        filled = torch.full((len(rows), int(lengths.max())), PAD)
        for place, row in zip(filled, rows, strict=True):
            place[: len(row)] = torch.tensor(row)
        return self.embedding(filled.to(self.embedding.weight.device)), lengths

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        saved = state.get(f"{prefix}embedding.weight")
        if isinstance(saved, Tensor) and saved.shape != self.embedding.weight.shape:
            self.embedding = self._fresh(len(saved)).to(self.embedding.weight.device)
        super()._load_from_state_dict(state, prefix, *rest)


class BiLSTM(nn.Module):
    """ZeroGen's small model of single texts; of a pair it sees one text with a mark in between.

    An LSTM in both directions, whose last states are classified.

    Args:
        num_classes: K.
        embedding: width of the word embeddings.
        hidden: states in each direction.
        dropout: of what is classified.
        vocabulary: most words that are learned.
        most_words: of a text; what follows is not looked at.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        embedding: int = 100,
        hidden: int = 150,
        dropout: float = 0.5,
        vocabulary: int = 50_000,
        most_words: int = 256,
    ) -> None:
        super().__init__()
        self.words = _Words(embedding, vocabulary, most_words)
        self.lstm = _lstm(embedding, hidden, layers=1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = _linear(2 * hidden, num_classes)

    def learn_vocabulary(self, texts: UInt8[Tensor, "texts bytes"]) -> None:
        """Learn the words of texts; embeddings are drawn from torch's global random state."""
        self.words.learn(_read(texts))

    def forward(self, rows: UInt8[Tensor, "batch bytes"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        vectors, lengths = self.words(to_texts(rows))
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        logits: Tensor = self.classifier(self.dropout(torch.cat([last[0], last[1]], 1)))
        return logits


class PairBiLSTM(nn.Module):
    """ZeroGen's small model of pairs: both texts by one network, then what they have in common.

    u and v are means over time; [u; v; |u - v|; u * v] is classified by three layers. The second
    text of what is no pair is empty.

    Args:
        num_classes: K.
        embedding: width of the word embeddings.
        hidden: states in each direction of each of two layers.
        width: of the hidden layers of the classifier.
        dropout: between the layers.
        vocabulary: most words that are learned.
        most_words: of a text.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        embedding: int = 100,
        hidden: int = 300,
        width: int = 300,
        dropout: float = 0.5,
        vocabulary: int = 50_000,
        most_words: int = 128,
    ) -> None:
        super().__init__()
        self.words = _Words(embedding, vocabulary, most_words)
        self.lstm = _lstm(embedding, hidden, layers=2)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            _linear(8 * hidden, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            _linear(width, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            _linear(width, num_classes),
        )

    def learn_vocabulary(self, texts: UInt8[Tensor, "texts bytes"]) -> None:
        """Learn the words of texts; embeddings are drawn from torch's global random state."""
        self.words.learn(_read(texts))

    def forward(self, rows: UInt8[Tensor, "batch bytes"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        pairs = [as_pair(text) for text in to_texts(rows)]
        u = self._mean([first for first, _ in pairs])
        v = self._mean([second or "" for _, second in pairs])
        logits: Tensor = self.classifier(torch.cat([u, v, (u - v).abs(), u * v], 1))
        return logits

    def _mean(self, texts: Sequence[str]) -> Tensor:
        vectors, lengths = self.words(texts)
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        mean: Tensor = states.sum(1) / lengths[:, None].to(states)
        return mean


class TfidfLinear(nn.Module):
    """A linear layer on TF-IDF of words and pairs of neighbours, each text of length 1.

    idf = ln((1 + N) / (1 + n)) + 1, as scikit-learn has it. Terms of the second text of a pair are
    others than those of the first.

    Args:
        num_classes: K.
        terms: most terms that are learned.
        least: times that a term must be seen.
    """

    idf: Tensor
    sized_by_state = ("idf", "weight")

    def __init__(self, num_classes: int, *, terms: int = 50_000, least: int = 1) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(terms, least)
        self.num_classes = num_classes
        self.register_buffer("idf", torch.zeros(0))
        self.weight = nn.Parameter(torch.zeros(1, num_classes))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def learn_vocabulary(self, texts: UInt8[Tensor, "texts bytes"]) -> None:
        """Learn terms and how rare they are; weights start at zero."""
        lists = [_terms(text) for text in _read(texts)]
        self.vocabulary.learn(lists)
        numbers, device = self.vocabulary.numbers, self.bias.device
        found = torch.zeros(len(numbers))
        for terms in lists:
            seen = [numbers[term] for term in set(terms) if term in numbers]
            found[torch.tensor(seen, dtype=torch.long)] += 1
        self.idf = (((1 + len(lists)) / (1 + found)).log() + 1).to(device)
        self.weight = nn.Parameter(torch.zeros(max(1, len(numbers)), self.num_classes).to(device))

    def forward(self, rows: UInt8[Tensor, "batch bytes"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        numbers = self.vocabulary.numbers
        index: list[int] = []
        counts: list[int] = []
        of_text: list[int] = []
        for row, text in enumerate(_read(rows)):
            found = Counter(numbers[term] for term in _terms(text) if term in numbers)
            index += found.keys()
            counts += found.values()
            of_text += [row] * len(found)
        device = self.bias.device
        columns = torch.tensor(index, dtype=torch.long, device=device)
        owners = torch.tensor(of_text, dtype=torch.long, device=device)
        values = torch.tensor(counts, dtype=torch.float32, device=device) * self.idf[columns]
        norms = values.new_zeros(len(rows)).index_add(0, owners, values**2).sqrt()
        shares = values / norms[owners]
        summed = self.weight.new_zeros(len(rows), self.num_classes)
        return summed.index_add(0, owners, self.weight[columns] * shares[:, None]) + self.bias

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        weight = state.get(f"{prefix}weight")
        if isinstance(idf := state.get(f"{prefix}idf"), Tensor):
            self.idf = self.idf.new_zeros(idf.shape)
        if isinstance(weight, Tensor) and weight.shape != self.weight.shape:
            self.weight = nn.Parameter(torch.zeros_like(weight, device=self.weight.device))
        super()._load_from_state_dict(state, prefix, *rest)


def _read(rows: Tensor) -> list[str]:
    if rows.dim() != 2 or not len(rows):
        raise ShapeError(f"got texts of shape {tuple(rows.shape)}, expected (N, bytes), N > 0")
    return to_texts(rows)


def _terms(text: str) -> list[str]:
    first, second = as_pair(text)
    found = _grams(first)
    return found if second is None else [*found, *(f"{PAIR}{term}" for term in _grams(second))]


def _grams(text: str) -> list[str]:
    words = words_of(text)
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))]


def _lstm(width: int, hidden: int, *, layers: int) -> nn.LSTM:
    """An LSTM in both directions that forgets nothing at first."""
    made = nn.LSTM(width, hidden, layers, batch_first=True, bidirectional=True)
    for name, weight in made.named_parameters():
        if "weight" in name:
            nn.init.xavier_normal_(weight)
            continue
        nn.init.zeros_(weight)
        # torch adds two biases; one of them alone makes the gate's bias 1.
        if "bias_ih" in name:
            with torch.no_grad():
                weight[hidden : 2 * hidden] = 1.0
    return made


def _linear(inputs: int, outputs: int) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    nn.init.xavier_normal_(made.weight)
    nn.init.zeros_(made.bias)
    return made
