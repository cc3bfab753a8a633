"""Labelled texts from a teacher that writes: contexts first, then texts of each label."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vestige.core.protocols import Source, Task
from vestige.core.texts import as_pair, to_texts
from vestige.core.writing import Sampling, WritesTexts, Written
from vestige.errors import ContractError, RecipeError, ShapeError
from vestige.models.prompts import Prompts
from vestige.sources.answers import candidates
from vestige.sources.cleaning import Cleaned, clean, cut_only, duplicate_key
from vestige.sources.text_pool import Record, TextPool


@dataclass(frozen=True)
class Wish:
    """Texts to be written: of one label, about a context, for an answer in it."""

    label: str
    context: str = ""
    answer: str = ""
    answer_start: int | None = None


class TextWriter:
    """Asks a teacher for texts, cleans what it writes and keeps it.

    Args:
        teacher: shown as far as it can be; what writes is it or the network in it.
        sampling: of texts, but for the number of tokens, which the prompts give.
        given: contexts of the user's own; None where the teacher writes them, or there are none.
        names_label: False asks with the prompt that names no label.
        cleans: False keeps all that is written, duplicates too.
        seed: for the records.

    Raises:
        RecipeError: the prompts need contexts that nobody gives, or something else is missing.
    """

    def __init__(
        self,
        teacher: Any,
        sampling: Sampling,
        *,
        given: Source | None = None,
        names_label: bool = True,
        cleans: bool = True,
        seed: int = 0,
    ) -> None:
        self.teacher = teacher
        self.given = given
        self.cleans, self.names_label, self.seed = cleans, names_label, seed
        self.writes = writer_of(teacher)
        prompts = self.prompts
        if prompts.kind != "text" and given is None:
            raise RecipeError(
                f"got the prompts {prompts.name!r} without a source 'contexts', expected the given "
                "texts that others are written about; name them as sources.contexts"
            )
        if prompts.needs_context and prompts.context is None and given is None:
            raise RecipeError(
                f"got the prompts {prompts.name!r}, which speak of a context, without a prompt "
                "for contexts and without a source 'contexts'; give one of the two"
            )
        if not names_label:
            prompts.without_label()
        self.sampling = replace(
            sampling,
            new_tokens=prompts.new_tokens,
            debias_decay=sampling.debias_decay if prompts.debias else 0.0,
        )
        self.context_sampling = replace(
            sampling, new_tokens=prompts.context_new_tokens, debias_decay=0.0
        )

    def check(self, task: Task, student: Any, samples: int) -> None:
        """Refuse what does not fit together before anything is written.

        Args:
            task: of the student.
            student: None where nothing learns from the texts.
            samples: that it is to learn from.

        Raises:
            RecipeError: labels and classes are not as many, or there is no student, or one too
                many.
        """
        names = self.prompts.names
        if self.prompts.kind == "qa":
            if student is not None:
                raise RecipeError(
                    "got a student for prompts that ask for questions, whose result is the data "
                    "set; leave the student out"
                )
            return
        if student is None:
            raise RecipeError("got no student, expected one that learns from texts; name one")
        if len(names) != task.num_classes or samples < len(names):
            raise RecipeError(
                f"got {len(names)} labels ({', '.join(names)}) for {task.num_classes} classes and "
                f"samples: {samples}, expected as many labels as classes and a text of each; take "
                "other prompts, or correct num_classes or samples"
            )

    @property
    def prompts(self) -> Prompts:
        """The templates that the teacher goes by."""
        found: Prompts = self.writes.prompts
        return found

    @property
    def writes_contexts(self) -> bool:
        """Whether contexts are written first."""
        return self.prompts.needs_context and self.given is None

    def write_contexts(self, pool: TextPool, count: int, rng: torch.Generator) -> None:
        """Ask once for `count` contexts and add the new ones to `pool`."""
        prompts = self.prompts
        written = self._ask([prompts.context or ""], count, self.context_sampling, rng)[0]
        self._keep(
            pool,
            [(Wish(""), one) for one in written],
            lambda one, wish: clean(one.text, min_words=prompts.context_min_words),
        )

    def write(
        self, pool: TextPool, contexts: TextPool, wanted: Sequence[str], count: int,
        rng: torch.Generator,
    ) -> None:  # fmt: skip
        """Ask once for about `count` texts of the labels `wanted`, and add those that are kept.

        Args:
            pool: gets the texts. How much it was asked for says which contexts come next.
            contexts: of `write_contexts`; unused where contexts are given or not needed.
            wanted: labels.
            count: texts over all of these labels, at least one each.
            rng: all that is drawn is drawn from it.
        """
        prompts = self.prompts
        about = prompts.needs_context
        each = prompts.per_context if about else math.ceil(count / len(wanted))
        wishes = [
            replace(wish, label=label)
            for wish in self._wishes(pool, contexts, max(1, count // (each * len(wanted))), rng)
            for label in wanted
        ]
        if not wishes:
            return
        asked = [self._prompt(wish) for wish in wishes]
        others = [
            [prompts.prompt_of(name, wish.context) for name in prompts.names if name != wish.label]
            for wish in wishes
        ]
        debias = self.sampling.debias_decay > 0 and self.names_label
        written = self._ask(asked, each, self.sampling, rng, others if debias else ())
        pairs = [(wish, one) for wish, texts in zip(wishes, written, strict=True) for one in texts]
        self._keep(pool, pairs, self._cleaned)

    def _wishes(
        self, pool: TextPool, contexts: TextPool, count: int, rng: torch.Generator
    ) -> list[Wish]:
        """What the next texts are about."""
        prompts = self.prompts
        if not prompts.needs_context:
            return [Wish("")]
        if self.given is None:
            if not len(contexts):
                raise ContractError("texts were asked for before there was a context")
            # As many as were used: each was good for so many texts of each label.
            used = max(pool.asked(name) for name in prompts.names) // prompts.per_context
            chosen = [contexts.records[(used + i) % len(contexts)] for i in range(count)]
            return [Wish("", record.text) for record in chosen]
        rows = self.given.draw(count, rng)
        if not isinstance(rows, torch.Tensor):
            raise ShapeError("got contexts as several tensors, expected rows of bytes (N, L)")
        texts = [as_pair(text)[0] for text in to_texts(rows)]
        if prompts.kind != "qa":
            return [Wish("", text) for text in texts]
        return [
            Wish("", text, answer, start) for text in texts for answer, start in candidates(text)
        ]

    def _prompt(self, wish: Wish) -> str:
        if not self.names_label:
            return self.prompts.without_label(wish.context, wish.answer)
        return self.prompts.prompt_of(wish.label, wish.context, wish.answer)

    def _ask(
        self,
        prompts: Sequence[str],
        count: int,
        sampling: Sampling,
        rng: torch.Generator,
        others: Sequence[Sequence[str]] = (),
    ) -> list[list[Written]]:
        given = {"others": others} if others else {}
        written = self.writes.generate(prompts, count, sampling, rng, **given)
        if hasattr(self.teacher, "queries"):
            self.teacher.queries += sum(map(len, written))
        return written

    def _cleaned(self, one: Written, wish: Wish) -> Cleaned:
        if not self.cleans:
            return cut_only(one.text)
        prompts = self.prompts
        return clean(
            one.text,
            min_words=prompts.min_words,
            context=wish.context,
            answer=wish.answer,
            ends_with=prompts.ends_with,
        )

    def _keep(
        self,
        pool: TextPool,
        written: Sequence[tuple[Wish, Written]],
        judge: Callable[[Written, Wish], Cleaned],
    ) -> None:
        records, keys = [], []
        dropped: dict[str, Counter[str]] = {}
        fresh: set[bytes] = set()
        names = self.prompts.names
        # The same question about another passage, and the same sentence behind another first one,
        # is another example.
        paired = self.prompts.kind != "text"
        for wish, one in written:
            found = judge(one, wish)
            reason: str = found.reason
            key = duplicate_key(found.text, *((wish.context, wish.answer) if paired else ()))
            if not reason and self.cleans and (key in fresh or pool.seen(key)):
                reason = "duplicate"
            if reason:
                dropped.setdefault(wish.label, Counter())[reason] += 1
                continue
            fresh.add(key)
            keys.append(key)
            records.append(
                Record(
                    text=found.text,
                    label=wish.label,
                    context=wish.context or None,
                    prompt=names.index(wish.label) if self.names_label and wish.label else -1,
                    seed=self.seed,
                    logprob=one.logprob,
                    answer=wish.answer or None,
                    answer_start=wish.answer_start,
                )
            )
        pool.add(records, keys, dropped)


def writer_of(teacher: Any) -> WritesTexts:
    """What writes: the teacher itself, or the network that it shows.

    Raises:
        RecipeError: neither continues prompts.
    """
    shown = getattr(teacher, "module", None) if isinstance(teacher, torch.nn.Module) else None
    for one in (teacher, shown):
        if isinstance(one, WritesTexts):
            return one
    raise RecipeError(
        f"got a teacher {type(shown or teacher).__name__} that writes no texts, expected a "
        "language model or an endpoint; name one as {'lm': FOLDER, 'prompts': NAME}, {'endpoint': "
        "URL, 'prompts': NAME} or {'factory': 'package.module:callable', 'prompts': NAME}, with "
        "access: white_box"
    )


def counted(pool: TextPool, names: Sequence[str]) -> Mapping[str, Any]:
    """How many texts of each label were asked for, kept and dropped, and why."""
    return {
        name: {
            "asked": pool.asked(name),
            "kept": pool.count(name),
            "dropped": dict(sorted(pool.dropped.get(name, Counter()).items())),
        }
        for name in names
    }
