"""A trigram model of each label's texts behind the protocol of a teacher that writes: fast, and
small enough to be read. For tests only."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from vestige.core.types import Access
from vestige.core.writing import Sampling, Written
from vestige.models.prompts import Prompts, load_prompts

# Topics of made-up news: words of a label, and words that all of them share.
TOPICS = {
    "world": "minister border treaty embassy rebels election president troops",
    "sports": "striker goal coach season playoff referee stadium championship",
    "business": "shares profit investors merger dividend quarter retailer bank",
    "science and technology": "software satellite chip laboratory browser genome robot orbit",
}
COMMON = ["the", "a", "said", "on", "in", "with", "its", "new", "late", "big", "and", "report"]


def made_up(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """`count` texts of 14 words with their labels: every other word is of the topic."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        label = number % len(TOPICS)
        words = list(TOPICS.values())[label].split()
        picks = torch.randint(8, (7,), generator=rng).tolist()
        fills = torch.randint(len(COMMON), (7,), generator=rng).tolist()
        pairs = [(COMMON[fill], words[pick]) for pick, fill in zip(picks, fills, strict=True)]
        rows.append((" ".join(word for pair in pairs for word in pair) + ".", label))
    return rows


class NGram:
    """Continues a prompt with words that followed the last two in the texts of its label.

    Args:
        rows: texts with class numbers.
        prompts: whose labels are the classes.
        closes: whether a text ends with a quote; else with nothing.
    """

    access = Access.LABELS

    def __init__(
        self,
        rows: Sequence[tuple[str, int]],
        prompts: Prompts | None = None,
        *,
        closes: bool = True,
    ) -> None:
        self.prompts = prompts or load_prompts("ag-news")
        self.closes = closes
        self.queries = 0
        self.asked: list[str] = []
        self.table: dict[tuple[int, str, str], list[str]] = defaultdict(list)
        for text, label in rows:
            words = ["", "", *text.split(), ""]
            for one, two, three in zip(words, words[1:], words[2:], strict=False):
                for of in (label, -1):
                    self.table[of, one, two].append(three)

    def name_classes(self, names: Sequence[str]) -> None:
        self.prompts = self.prompts.for_classes(names)

    def fingerprint(self) -> str:
        return "ngram"

    def __call__(self, *inputs: Any) -> Any:
        raise AssertionError("nobody asks for its scores")

    def generate(
        self,
        prompts: Sequence[str],
        count: int,
        sampling: Sampling,
        rng: torch.Generator,
        *,
        others: Sequence[Sequence[str]] = (),
    ) -> list[list[Written]]:
        self.asked += prompts
        return [[self._text(prompt, sampling, rng) for _ in range(count)] for prompt in prompts]

    def _text(self, prompt: str, sampling: Sampling, rng: torch.Generator) -> Written:
        known = [self.prompts.prompt_of(name) for name in self.prompts.names]
        label = known.index(prompt) if prompt in known else -1
        words = ["", ""]
        for _ in range(sampling.new_tokens):
            follow = self.table[label, words[-2], words[-1]]
            word = follow[int(torch.randint(len(follow), (), generator=rng))] if follow else ""
            if not word:
                break
            words.append(word)
        return Written(" ".join(words[2:]) + ('"' if self.closes else ""), -1.0)
