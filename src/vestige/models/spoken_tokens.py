"""Tokens of a speech recogniser: words or letters it learned itself, or a published tokenizer."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vestige.errors import DataError, MissingExtraError

Unit = Literal["words", "characters"]
PAD, START, END, UNKNOWN = range(4)
SPECIAL = 4


class SpokenTokens(Protocol):
    """Between texts and numbers of tokens, without prompt and end."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class OwnTokens:
    """Tokens 0 to 3 fill up, start, end and stand for what is unknown; then come the units.

    Args:
        unit: "words" between spaces, or "characters".
        units: each with its number, 4 and up.
    """

    def __init__(self, unit: Unit, units: Sequence[str]) -> None:
        self.unit, self.units = unit, tuple(units)
        self._numbers = {one: SPECIAL + index for index, one in enumerate(self.units)}

    @classmethod
    def learned(cls, texts: Sequence[str], unit: Unit, vocab_size: int) -> "OwnTokens":
        """The most frequent units of `texts`, equals in alphabetical order, as many as fit."""
        counts = Counter(one for text in texts for one in _pieces(text, unit))
        if not counts:
            raise DataError(
                f"got {len(texts)} texts without {unit}, expected transcripts to learn tokens "
                "from; name audio with a text for each file in metadata.jsonl"
            )
        ranked = sorted(counts, key=lambda one: (-counts[one], one))
        return cls(unit, sorted(ranked[: vocab_size - SPECIAL]))

    def encode(self, text: str) -> list[int]:
        """One number per unit; 3 for what is unknown."""
        return [self._numbers.get(one, UNKNOWN) for one in _pieces(text, self.unit)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; special tokens, and numbers without a unit, are left out."""
        known = [
            self.units[token - SPECIAL]
            for token in tokens
            if 0 <= token - SPECIAL < len(self.units)
        ]
        return " ".join(known) if self.unit == "words" else "".join(known).strip()

    def to_json(self) -> str:
        """What `read_tokens` reads again."""
        return json.dumps({"unit": self.unit, "units": self.units}, ensure_ascii=False)


class PublishedTokens:
    """A tokenizer of the package tokenizers.

    Args:
        text: its tokenizer.json.

    Raises:
        MissingExtraError: tokenizers is not installed.
    """

    def __init__(self, text: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtraError(
                "this recogniser's tokenizer needs the package tokenizers, which is not installed; "
                "pip install 'vestige[speech]'"
            ) from error
        self._tokenizer: Any = Tokenizer.from_str(text)

    def encode(self, text: str) -> list[int]:
        """Numbers without special tokens."""
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text without special tokens."""
        return str(self._tokenizer.decode([*tokens], skip_special_tokens=True)).strip()


def read_tokens(stored: Tensor) -> SpokenTokens | None:
    """The tokens that a buffer of UTF-8 bytes (n,) describes; None for one without bytes."""
    if not stored.numel():
        return None
    text = bytes(stored.cpu().numpy()).decode("utf8")
    found = json.loads(text)
    if "units" in found:
        return OwnTokens(found["unit"], found["units"])
    return PublishedTokens(text)


def stored_bytes(text: str) -> Tensor:
    """UTF-8 bytes (n,) uint8 of a text, as a buffer holds it."""
    return torch.frombuffer(bytearray(text.encode("utf8")), dtype=torch.uint8).clone()


def _pieces(text: str, unit: Unit) -> list[str]:
    return text.split() if unit == "words" else [*" ".join(text.split())]
