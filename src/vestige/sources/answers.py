"""Candidates for answers in a passage, found without a model: names and numbers."""

import re

_SMALL = "(?:of|the|and|de|la|von|van)"
# Several words with a capital letter, joined by small ones; or a number with its unit or month.
_NAME = rf"[A-Z][\w'’&.-]*\w(?: (?:{_SMALL} )*[A-Z][\w'’&.-]*\w)*"
_NUMBER = r"[$€£]?\d[\d,.]*\d(?:%| (?:percent|million|billion|thousand|years?|people))?|\d+%?"
_SPAN = re.compile(rf"{_NAME}|{_NUMBER}")
_STARTS = re.compile(r"(?:^|[.!?]['\"”)]? )$")
# What often begins a sentence with a capital letter and names nothing.
_COMMON = frozenset(
    [
        "a",
        "an",
        "and",
        "as",
        "at",
        "but",
        "by",
        "for",
        "from",
        "he",
        "her",
        "his",
        "how",
        "i",
        "if",
        "in",
        "it",
        "its",
        "my",
        "no",
        "not",
        "of",
        "on",
        "or",
        "our",
        "she",
        "so",
        "some",
        "such",
        "that",
        "the",
        "their",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "to",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "why",
        "with",
        "you",
        "your",
        "after",
        "before",
        "during",
        "since",
        "until",
        "although",
        "because",
        "however",
        "many",
        "most",
        "several",
        "one",
        "two",
        "three",
        "first",
    ]
)


def candidates(passage: str, most: int = 8) -> list[tuple[str, int]]:
    """Spans of a passage that may be answers, each with the character at which it begins.

    Capitalised spans and numbers, in place of the paper's named entities, whose model would have to
    be fetched. A single common word at the start of a sentence is none. Each text once, in order;
    `passage[start : start + len(answer)] == answer`.

    Args:
        passage: to look at.
        most: of them.
    """
    found: dict[str, int] = {}
    for match in _SPAN.finditer(passage):
        text, start = match[0], match.start()
        first, _, rest = text.partition(" ")
        if first.lower() in _COMMON:
            # "The Eiffel Tower" at the start of a sentence is "Eiffel Tower".
            if not rest or not rest[:1].isupper():
                continue
            text, start = rest, start + len(first) + 1
        elif not rest and text[0].isalpha() and _STARTS.search(passage[:start]) and text.islower():
            continue
        found.setdefault(text, start)
    return list(found.items())[:most]
