"""Byte-level BPE learned from texts, kept as a buffer of whoever owns it."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vestige.errors import MissingExtraError, TeacherError

END = "<end>"


class BytePairs:
    """Splits texts into at most `size` kinds of tokens; token 0 ends a text.

    Args:
        content: (n,) uint8 of `learn`; empty where nothing was learned yet.
    """

    def __init__(self, content: Tensor) -> None:
        _need_tokenizers()
        from tokenizers import Tokenizer

        if not len(content):
            raise TeacherError(
                "got a language model that has seen no texts, expected one with a vocabulary; "
                "load its weights, or call learn_vocabulary with texts before the first step"
            )
        self._tokens: Any = Tokenizer.from_str(bytes(content.cpu().numpy()).decode("utf8"))

    @staticmethod
    def learn(texts: Iterable[str], size: int) -> Tensor:
        """The tokenizer for texts, (n,) uint8; `size` counts all of its tokens, the ends too."""
        _need_tokenizers()
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        made: Any = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(texts, trainer)
        return torch.frombuffer(bytearray(made.to_str().encode("utf8")), dtype=torch.uint8)

    def __len__(self) -> int:
        return int(self._tokens.get_vocab_size())

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text."""
        return [one.ids for one in self._tokens.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        """The texts of tokens."""
        return list(self._tokens.decode_batch(tokens, skip_special_tokens=True))

    def marks(self, mark: str, size: int) -> Tensor:
        """Which of `size` tokens end a text or hold `mark`, a character of ASCII, (size,) bool."""
        found = torch.zeros(size, dtype=torch.bool)
        for token, number in self._tokens.get_vocab(with_added_tokens=True).items():
            found[number] = token == END or mark in token
        return found


def _need_tokenizers() -> None:
    if find_spec("tokenizers") is None:
        raise MissingExtraError(
            "got a language model, but tokenizers is not installed; pip install 'vestige[text]'"
        )
