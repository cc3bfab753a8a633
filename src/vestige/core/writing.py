"""Texts that a teacher writes when it is prompted, and what it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from vestige.errors import RecipeError

# Prompts open it last, so that the next one ends the text.
QUOTE = '"'


@dataclass(frozen=True)
class Sampling:
    """How a continuation is drawn.

    Attributes:
        new_tokens: at most so many.
        top_p: in (0, 1], draw from the smallest set of tokens with at least this mass; 1 is all.
            Lower repeats itself more and errs less.
        top_k: draw from so many tokens at most; 0 is all.
        temperature: logits are divided by it; below 1 sharpens. 0 always takes the likeliest token.
        debias_decay: of self-debiasing, where the other labels' prompts are known; 0 is none.
        debias_floor: of self-debiasing, in (0, 1]: the least factor of a token.
    """

    new_tokens: int = 40
    top_p: float = 0.9
    top_k: int = 0
    temperature: float = 1.0
    debias_decay: float = 0.0
    debias_floor: float = 0.01

    def __post_init__(self) -> None:
        sound = self.new_tokens >= 1 and 0 < self.top_p <= 1 and self.top_k >= 0
        if not sound or self.temperature < 0 or self.debias_decay < 0:
            raise RecipeError(
                f"got {self}, expected new_tokens of at least 1, top_p in (0, 1], and top_k, "
                "temperature and debias_decay of at least 0; correct them"
            )
        if not 0 < self.debias_floor <= 1:
            raise RecipeError(f"got debias_floor={self.debias_floor}, expected above 0, at most 1")


@dataclass(frozen=True)
class Written:
    """One continuation of a prompt.

    Attributes:
        text: as it was written, up to and with the first closing quote where there is one.
        logprob: mean log-probability of its tokens in nats, before anything was filtered; None
            where the writer does not tell.
    """

    text: str
    logprob: float | None = None


@runtime_checkable
class WritesTexts(Protocol):
    """A teacher that continues prompts.

    Attributes:
        prompts: the task's templates, see `models.prompts`.
    """

    prompts: Any

    def generate(
        self,
        prompts: Sequence[str],
        count: int,
        sampling: Sampling,
        rng: torch.Generator,
        *,
        others: Sequence[Sequence[str]] = (),
    ) -> list[list[Written]]:
        """`count` continuations of each of N prompts.

        Args:
            prompts: N of them.
            count: continuations of each.
            sampling: how.
            rng: all that is drawn here is drawn from it.
            others: for self-debiasing, for each prompt those of the other labels.
        """
        ...
