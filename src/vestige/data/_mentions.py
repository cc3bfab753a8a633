"""Texts labelled anew by which of some words they mention."""

import hashlib
import re
from collections.abc import Sequence

from vestige.errors import DataError

OPTION = "mentions="
NONE = "none of these"


def words_of(option: str) -> tuple[str, ...]:
    """The words of "mentions=one|another|a third".

    Raises:
        DataError: fewer than two, or one twice.
    """
    words = tuple(one.strip().lower() for one in option.removeprefix(OPTION).split("|"))
    if len(words) < 2 or not all(words) or len(set(words)) < len(words):
        raise DataError(
            f"got '{option}', expected mentions=WORD|WORD|... with at least two words, each once"
        )
    return words


def mentioning(texts: Sequence[str], words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Texts that mention one of `words`, and as many that mention none.

    A mention is a whole word, in capitals or not; texts that mention several are left out. Of those
    that mention none the ones with the lowest sha256 are taken, whatever their order.

    Returns:
        Numbers of the texts in order, and for each the number of its word, or len(words) for none.
    """
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    found: dict[int, int] = {}
    silent: list[int] = []
    for row, text in enumerate(texts):
        said = {one.lower() for one in pattern.findall(text)}
        if len(said) == 1:
            found[row] = list(words).index(said.pop())
        elif not said:
            silent.append(row)
    silent.sort(key=lambda row: hashlib.sha256(texts[row].encode()).digest())
    found |= dict.fromkeys(silent[: len(found)], len(words))
    rows = sorted(found)
    return rows, [found[row] for row in rows]
