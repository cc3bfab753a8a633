"""Teachers of which only the texts are seen that they write: any callable, or what is far away."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vestige.core import parallel, seeding
from vestige.core.types import Access, Prediction
from vestige.core.writing import Sampling, Written
from vestige.errors import AccessError, QueryBudgetExceeded, TeacherError, VestigeError
from vestige.models.prompts import Prompts
from vestige.teachers.text_journal import Spent, TextJournal

logger = logging.getLogger(__name__)

# A text that is longer ignored the limit of tokens; its end is of no use.
MOST_CHARACTERS = 16_384
# Characters of a token, where nobody tells how many there were.
_CHARACTERS = 4


class NoAnswer(VestigeError):
    """A request that may be sent again.

    Attributes:
        wait_s: how long the other side asked to wait; None where it did not say.
        cost: what it may have been charged.
    """

    def __init__(
        self, message: str, *, wait_s: float | None = None, cost: Spent | None = None
    ) -> None:
        super().__init__(message)
        self.wait_s = wait_s
        self.cost = cost or Spent()


Ask = Callable[[str, int, Sampling, int], tuple[list[Written], Spent]]


class BlackBoxWriter:
    """Continues prompts by asking something that may fail, be slow and cost money.

    Every answer is noted before it is used. A request that was answered is never sent again in a
    resumed run, which draws the same seeds. What gives too few texts is asked for the rest; what
    gives none is asked again after a pause that doubles, with jitter, or as long as it said itself.

    Attributes:
        queries: texts that were taken.

    Args:
        ask: sends a prompt, a count, the sampling and a seed; raises `NoAnswer` to be asked again.
        prompts: of the task.
        identity: what makes it the one it is, without secrets.
        rows: texts of one request.
        retries: how often in a row a request without any text is sent again.
        backoff_s: first pause.
        most_wait_s: longest pause, also where the other side asks for more.
        token_budget: tokens in all, of prompts and texts; None sets no limit.
        money_budget: likewise of money; needs prices.
        price_in: of a million tokens of prompts.
        price_out: of a million tokens of texts.
        sleep: waits so many seconds; None is `time.sleep`.
    """

    access = Access.LABELS

    def __init__(
        self,
        ask: Ask,
        prompts: Prompts,
        *,
        identity: Mapping[str, Any],
        rows: int = 32,
        retries: int = 6,
        backoff_s: float = 1.0,
        most_wait_s: float = 60.0,
        token_budget: int | None = None,
        money_budget: float | None = None,
        price_in: float = 0.0,
        price_out: float = 0.0,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        wrong = rows < 1 or retries < 0 or min(backoff_s, most_wait_s, price_in, price_out) < 0
        if wrong or (money_budget is not None and not price_in + price_out):
            raise TeacherError(
                f"got rows={rows}, retries={retries}, backoff_s={backoff_s}, most_wait_s="
                f"{most_wait_s}, price_in={price_in}, price_out={price_out}, expected at least 1, "
                "and 0 for the others, and prices where there is a money_budget; correct them"
            )
        self.prompts = prompts
        self.identity = dict(identity)
        self.queries = 0
        self._ask, self._rows, self._retries = ask, rows, retries
        self._backoff, self._most_wait, self._sleep = backoff_s, most_wait_s, sleep or time.sleep
        self._tokens, self._money = token_budget, money_budget
        self._prices = price_in / 1e6, price_out / 1e6
        self._journal = TextJournal()
        self._jitter = seeding.generator(0, "pauses between requests")

    def __call__(self, *inputs: Any, **named: Any) -> Prediction:
        """Not to be had.

        Raises:
            AccessError: always.
        """
        raise AccessError(
            "got a request for the scores of a teacher that only writes texts, expected one that "
            "classifies; use a method that learns from texts alone, and no setting that asks for "
            "its judgement"
        )

    @property
    def spent(self) -> Spent:
        """What it cost so far, an earlier part of the run included."""
        return self._journal.spent

    def fingerprint(self) -> str:
        """sha256 in hex of what it is; what a server answers with may change all the same."""
        content = {**self.identity, "prompts": self.prompts.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def name_classes(self, names: Sequence[str]) -> None:
        """Call and order the labels as the classes of a data set.

        Raises:
            RecipeError: they do not fit the labels.
        """
        self.prompts = self.prompts.for_classes(names)

    def keep_answers(self, path: Path, *, resume: bool) -> None:
        """Keep answers in a file, so that what a kill makes be repeated is not paid for twice."""
        if parallel.rank() > 0:
            return
        self._journal.close()
        self._journal = TextJournal(path, resume=resume)

    def checkpointed(self) -> None:
        """All answers are kept to the end: they are small, and were paid for."""

    def generate(
        self,
        prompts: Sequence[str],
        count: int,
        sampling: Sampling,
        rng: torch.Generator,
        *,
        others: Sequence[Sequence[str]] = (),
    ) -> list[list[Written]]:
        """`count` continuations of each prompt, see `core.writing.WritesTexts`.

        Raises:
            AccessError: self-debiasing is asked for, which needs probabilities.
            QueryBudgetExceeded: the next request may cost more than is left.
            TeacherError: a request failed too often, or in a way that no repetition mends.
        """
        if others and sampling.debias_decay:
            raise AccessError(
                "got self-debiasing for a teacher that shows no probabilities, expected none; set "
                "debias_decay: 0, or take a local language model"
            )
        found: list[list[Written]] = []
        for prompt in prompts:
            texts: list[Written] = []
            while len(texts) < count:
                texts += self._some(prompt, min(self._rows, count - len(texts)), sampling, rng)
            found.append(texts)
        return found

    def _some(
        self, prompt: str, count: int, sampling: Sampling, rng: torch.Generator
    ) -> list[Written]:
        """At least one text of `count`."""
        seed = int(torch.randint(2**31, (), generator=rng, device=rng.device))
        key = self._key(prompt, count, sampling, seed)
        # One process asks, and all of them use what it got.
        return parallel.once(lambda: self._answer(key, prompt, count, sampling, seed))

    def _answer(
        self, key: str, prompt: str, count: int, sampling: Sampling, seed: int
    ) -> list[Written]:
        known = self._journal.find(key)
        if known:
            return known
        self._check_budget(prompt, count, sampling)
        for attempt in range(self._retries + 1):
            try:
                texts, cost = self._ask(prompt, count, sampling, seed)
            except NoAnswer as error:
                if error.cost.requests:
                    self._journal.note(key, [], self._priced(error.cost))
                if attempt == self._retries:
                    raise TeacherError(
                        f"{error}; that was attempt {attempt + 1} of {attempt + 1}, expected an "
                        "answer. What was answered before is kept: --resume goes on once the "
                        "teacher answers again"
                    ) from error
                pause = self._pause(attempt, error.wait_s)
                logger.info("%s; asked again in %.1f s", error, pause)
                self._sleep(pause)
                self._check_budget(prompt, count, sampling)
                continue
            kept = [_bounded(one) for one in texts[:count]]
            self._journal.note(key, kept, self._priced(cost))
            return kept
        raise TeacherError("got no attempt at all, expected at least one")

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Seconds until the next attempt: between half and all of what doubles each time."""
        share = 0.5 + 0.5 * float(torch.rand((), generator=self._jitter))
        doubled = self._backoff * 2.0 ** min(attempt, 30)
        pause = share * doubled if asked is None else max(asked, share * self._backoff)
        return min(self._most_wait, pause)

    def _check_budget(self, prompt: str, count: int, sampling: Sampling) -> None:
        most = Spent(1, tokens_of(prompt), count * sampling.new_tokens)
        after = self.spent.plus(self._priced(most))
        for what, limit, used, needed in (
            ("tokens", self._tokens, self.spent.tokens, after.tokens),
            ("money", self._money, self.spent.money, after.money),
        ):
            if limit is not None and needed > limit:
                raise QueryBudgetExceeded(
                    f"got a request for {count} texts that may bring the {what} spent from "
                    f"{used:,.6g} to {needed:,.6g}, expected at most {limit:,.6g}; raise "
                    f"{'token' if what == 'tokens' else what}_budget and --resume, or ask for less"
                )

    def _priced(self, cost: Spent) -> Spent:
        money = cost.tokens_in * self._prices[0] + cost.tokens_out * self._prices[1]
        return Spent(cost.requests, cost.tokens_in, cost.tokens_out, money)

    def _key(self, prompt: str, count: int, sampling: Sampling, seed: int) -> str:
        content = [self.identity, prompt, count, str(sampling), seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def writer_of_callable(
    write: Callable[[list[str]], Sequence[str]], prompts: Prompts, *, name: str, **given: Any
) -> BlackBoxWriter:
    """A teacher from a callable that takes prompts and returns a text for each.

    Args:
        write: gets up to `rows` prompts, returns as many continuations in their order. An OSError
            of its own, such as a lost connection, is tried again; anything else is raised.
        prompts: of the task.
        name: for records.
        **given: see `BlackBoxWriter`.
    """

    def ask(prompt: str, count: int, sampling: Sampling, seed: int) -> tuple[list[Written], Spent]:
        cost = Spent(1, count * tokens_of(prompt), 0)
        try:
            answer = write([prompt] * count)
        except OSError as error:
            raise NoAnswer(f"{name!r} raised {type(error).__name__}: {error}", cost=cost) from error
        if isinstance(answer, str) or not isinstance(answer, Sequence) or len(answer) != count:
            size = f" of {len(answer)}" if isinstance(answer, Sequence) else ""
            raise TeacherError(
                f"got {type(answer).__name__}{size} from the writer {name!r} for {count} prompts, "
                "expected a list with a text for each; return that"
            )
        wrong = next((one for one in answer if not isinstance(one, str)), None)
        if wrong is not None:
            raise TeacherError(
                f"got {type(wrong).__name__} among the texts of the writer {name!r}, expected str"
            )
        return [Written(one) for one in answer], Spent(
            1, cost.tokens_in, sum(map(tokens_of, answer))
        )

    return BlackBoxWriter(ask, prompts, identity={"writer": name}, **given)


def tokens_of(text: str) -> int:
    """About how many tokens a text is, where nobody tells."""
    return math.ceil(len(text) / _CHARACTERS)


def _bounded(one: Written) -> Written:
    return Written(one.text[:MOST_CHARACTERS], one.logprob)
