"""Rules by which a written text is kept, each drop with its reason.

The rules are not idempotent: a text that was cut at its closing quote has lost the mark that said
that it is whole. So a text is cleaned exactly once, as it was written.
"""

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vestige.core.texts import PAIR
from vestige.core.writing import QUOTE

Reason = Literal[
    "",
    "no-question-mark",
    "no-end",
    "too-short",
    "same-as-context",
    "holds-answer",
    "duplicate",
    "not-text",
]

# What helps where most texts are dropped for a reason.
_ADVICE: Mapping[str, str] = {
    "no-question-mark": "ask for more new_tokens, or take a model that writes questions",
    "no-end": "the model neither closes its quote nor ends a sentence: ask for more new_tokens in "
    "the prompts, or take a model that was trained on whole texts",
    "too-short": "lower min_words in the prompts, or look at what the prompt makes it write",
    "same-as-context": "the model repeats what it is given: word the prompt otherwise",
    "holds-answer": "the questions give their answers away: word the prompt otherwise",
    "duplicate": "raise temperature or top_p, or give contexts to write about",
    "not-text": "look at what the callable returns",
}


@dataclass(frozen=True)
class Cleaned:
    """What became of a text: `text` as it is kept, or why it is not."""

    text: str
    reason: Reason = ""


def clean(
    raw: str,
    *,
    min_words: int,
    context: str = "",
    answer: str = "",
    ends_with: Literal["", "?"] = "",
) -> Cleaned:
    """Cut a continuation where its text ends, and say whether it is kept; the first rule counts.

    With `ends_with` "?": up to and with the first one, else it is dropped. Otherwise what stands
    before the first double quote; else before the first newline; else up to and with the last full
    stop; else it is dropped.

    Args:
        raw: as it was written behind the prompt's opening quote.
        min_words: words at white space that must be left.
        context: a text that only repeats it is dropped.
        answer: a text that holds it, whatever the case, is dropped.
        ends_with: see above.
    """
    if not isinstance(raw, str):
        return Cleaned("", "not-text")
    raw, text = _plain(raw), ""
    if ends_with == "?":
        if "?" not in raw:
            return Cleaned("", "no-question-mark")
        text = raw[: raw.index("?") + 1]
    elif QUOTE in raw:
        text = raw[: raw.index(QUOTE)]
    elif "\n" in raw:
        text = raw[: raw.index("\n")]
    elif "." in raw:
        text = raw[: raw.rindex(".") + 1]
    else:
        return Cleaned("", "no-end")
    text = text.strip()
    if len(text.split()) < min_words:
        return Cleaned("", "too-short")
    if context and text == context.strip():
        return Cleaned("", "same-as-context")
    if answer and answer.casefold() in text.casefold():
        return Cleaned("", "holds-answer")
    return Cleaned(text)


def cut_only(raw: str) -> Cleaned:
    """What stands before the closing quote, or all of it: for an arm without rules."""
    if not isinstance(raw, str):
        return Cleaned("", "not-text")
    text = _plain(raw).partition(QUOTE)[0].strip()
    # Nothing can be learned from nothing.
    return Cleaned(text) if text else Cleaned("", "too-short")


def advice(dropped: Mapping[str, int]) -> str:
    """What to do where texts were dropped for these reasons, by the most frequent one."""
    if not dropped:
        return "ask for some: raise rounds or samples"
    return _ADVICE.get(max(dropped, key=lambda reason: dropped[reason]), "look at the prompts")


def _plain(raw: str) -> str:
    """Without what would end a row of bytes or part a pair, and what UTF-8 cannot hold."""
    return raw.replace("\0", " ").replace(PAIR, " ").encode("utf8", errors="replace").decode("utf8")


def duplicate_key(text: str, *about: str) -> bytes:
    """Equal for texts that differ in case, white space and forms of characters alone.

    Args:
        text: that was kept.
        *about: what else must be equal, such as the first text of a pair.
    """
    plain = (
        " ".join(unicodedata.normalize("NFKC", one).casefold().split()) for one in (text, *about)
    )
    return hashlib.sha256("\0".join(plain).encode("utf8", errors="replace")).digest()[:16]
