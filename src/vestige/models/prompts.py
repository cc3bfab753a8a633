"""Prompts as data: templates for each label of a task, in files that anybody can write."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vestige.core.writing import QUOTE
from vestige.errors import RecipeError

FOLDER = Path(__file__).with_name("prompt_files")
_SLOT = re.compile(r"<([A-Z])>")


class LabelPrompt(BaseModel):
    """What is said to get texts of one label.

    Attributes:
        word: what stands for `<L>` in the task's templates; null is the label's name.
        prompt: of this label alone, in place of the task's.
        zero_shot: likewise.
        aliases: other names of the label, so that classes of other data sets are found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    word: str | None = None
    prompt: str | None = None
    zero_shot: str | None = None
    aliases: tuple[str, ...] = ()


class Prompts(BaseModel):
    """The templates of a task. `<L>` is the label's word, `<C>` the context, `<X>` the text.

    Attributes:
        name: of the file.
        kind: "text", "pair" (a given first text, the second is written) or "qa" (`<Y>` is an answer
            in a given passage `<C>`, its question is written).
        context: prompt for the contexts that texts are written about; null where there are none or
            where they are given.
        prompt: for a text; ends with an opening quote, so that a closing one marks the end.
        zero_shot: a whole text in its sentence, for the teacher's own judgement; null closes the
            quote of `prompt` behind `<X>`.
        unlabelled: a prompt that names no label.
        labels: by name, in the order of class numbers.
        min_words: a shorter text is dropped.
        new_tokens: of a text.
        context_min_words: a shorter context is dropped.
        context_new_tokens: of a context.
        per_context: texts of each label for one context.
        debias: whether the other labels' prompts push a text away from them.
        ends_with: "?" keeps a text up to its first one and drops it if there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    kind: Literal["text", "pair", "qa"] = "text"
    context: str | None = None
    prompt: str | None = None
    zero_shot: str | None = None
    unlabelled: str | None = None
    labels: dict[str, LabelPrompt] = Field(min_length=1)
    min_words: int = Field(10, ge=1)
    new_tokens: int = Field(40, ge=1)
    context_min_words: int = Field(1, ge=1)
    context_new_tokens: int = Field(10, ge=1)
    per_context: int = Field(32, ge=1)
    debias: bool = False
    ends_with: Literal["", "?"] = ""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if self.kind != "qa" and len(self.labels) < 2:
            yield f"labels: got {len(self.labels)}, expected at least 2"
        if self.context is not None:
            yield from _slots("context", self.context, set(), set())
            yield from _opened("context", self.context)
        given = self.context is not None or self.kind != "text"
        needed = {"text": set(), "pair": {"C"}, "qa": {"C", "Y"}}[self.kind]
        known = {"L"} | ({"C"} if given else set()) | needed
        for name, label in self.labels.items():
            where = f"labels.{name}" if label.prompt is not None else "prompt"
            prompt = label.prompt or self.prompt
            if prompt is None:
                yield f"labels.{name}: got no prompt, and there is none for all labels"
                continue
            yield from _slots(where, prompt, known, needed)
            yield from _opened(where, prompt)
            whole = label.zero_shot or self.zero_shot
            where = f"labels.{name}.zero_shot" if label.zero_shot is not None else "zero_shot"
            if whole is not None:
                yield from _slots(where, whole, {"L", "X"} | needed, {"X"})
            elif self.kind == "text" and "<C>" in prompt:
                yield f"{where}: needed, because the prompt speaks of a context <C>"
        if self.unlabelled is not None:
            yield from _slots("unlabelled", self.unlabelled, known - {"L"}, needed)
            yield from _opened("unlabelled", self.unlabelled)
        words = [self.prompt_of(name) for name in self.labels if self._has(name)]
        if len(words) != len(set(words)):
            yield "labels: two of them have the same prompt, so that nothing tells them apart"
        owner: dict[str, str] = {}
        for name, label in self.labels.items():
            for alias in (name, *label.aliases):
                other = owner.setdefault(_plain(alias), name)
                if other != name:
                    yield f"labels.{name}: {alias!r} is a name of {other!r}, too"

    def _has(self, name: str) -> bool:
        return (self.labels[name].prompt or self.prompt) is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The labels, in the order of class numbers."""
        return tuple(self.labels)

    @property
    def needs_context(self) -> bool:
        """Whether texts are written about something."""
        return any("<C>" in (one.prompt or self.prompt or "") for one in self.labels.values())

    def prompt_of(self, name: str, context: str = "", answer: str = "") -> str:
        """The prompt for a text of the label `name`."""
        label = self.labels[name]
        return _filled(label.prompt or self.prompt or "", self._word(name), context, answer)

    def without_label(self, context: str = "", answer: str = "") -> str:
        """The prompt that names no label.

        Raises:
            RecipeError: the file has none.
        """
        if self.unlabelled is None:
            raise RecipeError(
                f"got no 'unlabelled' in the prompts {self.name!r}, expected a prompt that names "
                "no label; add it to the file"
            )
        return _filled(self.unlabelled, "", context, answer)

    def sentence(self, name: str, context: str = "", answer: str = "") -> tuple[str, str]:
        """What stands before and behind a text of the label `name` when it is judged."""
        label = self.labels[name]
        whole = label.zero_shot or self.zero_shot
        if whole is None:
            return self.prompt_of(name, context, answer), QUOTE
        before, _, after = whole.partition("<X>")
        word = self._word(name)
        return _filled(before, word, context, answer), _filled(after, word, context, answer)

    def _word(self, name: str) -> str:
        word = self.labels[name].word
        return name if word is None else word

    def for_classes(self, classes: Sequence[str]) -> "Prompts":
        """The same prompts with labels called and ordered as `classes`.

        Args:
            classes: each must be a label or one of its aliases; case, "_" and "-" do not matter.

        Raises:
            RecipeError: classes without a label, or labels without a class; all of them are named.
        """
        owner = {
            _plain(alias): name
            for name, label in self.labels.items()
            for alias in (name, *label.aliases)
        }
        found = {one: owner.get(_plain(one)) for one in classes}
        unknown = [one for one, name in found.items() if name is None]
        unused = sorted(set(self.labels) - {name for name in found.values() if name})
        if unknown or unused or len(set(found.values())) < len(classes):
            raise RecipeError(
                f"got the classes {', '.join(map(repr, classes))} for the prompts {self.name!r}, "
                f"expected its labels {', '.join(map(repr, self.labels))}"
                + (f"; without a label: {', '.join(map(repr, unknown))}" if unknown else "")
                + (f"; without a class: {', '.join(map(repr, unused))}" if unused else "")
                + "; add names under 'aliases' of a file of your own"
            )
        labels = {}
        for one, name in found.items():
            label = self.labels[str(name)]
            labels[one] = label.model_copy(update={"word": self._word(str(name))})
        return self.model_copy(update={"labels": labels})


def load_prompts(name_or_path: str | Path) -> Prompts:
    """Prompts of a shipped task, or of a YAML file of one's own.

    Raises:
        RecipeError: there are none, or the file is wrong; all of its mistakes are told.
    """
    # Here: networks are built in processes that read no prompts.
    import yaml

    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{text}.yaml"
        if text not in list_prompts():
            raise RecipeError(
                f"got prompts {text!r}, expected one of {', '.join(list_prompts())}, or the path "
                "of a .yaml file of your own"
            )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            f"got the prompts {path}, which cannot be read ({error}), expected a YAML file with "
            "'labels' and their prompts"
        ) from error
    return read_prompts(raw, path.stem)


def read_prompts(raw: Any, name: str) -> Prompts:
    """Prompts of values as they stand in a file.

    Raises:
        RecipeError: they are wrong; all mistakes are told.
    """
    if not isinstance(raw, dict):
        raise RecipeError(
            f"got prompts {name!r} of type {type(raw).__name__}, expected a mapping with 'labels'"
        )
    try:
        return Prompts.model_validate({"name": name, **raw})
    except ValidationError as error:
        told = [
            f"{'.'.join(map(str, one['loc'])) or 'prompts'}: "
            f"{one['msg'].removeprefix('Value error, ')}"
            for one in error.errors()
        ]
        raise RecipeError(
            f"got prompts {name!r} with mistakes, expected a file as those of "
            f"{', '.join(list_prompts())}: {'; '.join(told)}"
        ) from None


def list_prompts() -> list[str]:
    """Names of the prompts that come with the library."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-]+", " ", name).casefold().split())


def _filled(template: str, word: str, context: str, answer: str) -> str:
    # In one pass: a context may itself hold what looks like a slot.
    values = {"L": word, "C": context, "Y": answer}
    return _SLOT.sub(lambda found: values.get(found[1], found[0]), template)


def _slots(where: str, template: str, known: set[str], needed: set[str]) -> Iterator[str]:
    found = set(_SLOT.findall(template))
    if wrong := sorted(found - known):
        allowed = ", ".join(f"<{slot}>" for slot in sorted(known)) or "none"
        yield f"{where}: got {', '.join(f'<{slot}>' for slot in wrong)}, expected {allowed}"
    if missing := sorted(needed - found):
        yield f"{where}: lacks {', '.join(f'<{slot}>' for slot in missing)}"


def _opened(where: str, template: str) -> Iterator[str]:
    if not template.endswith(QUOTE):
        yield f"{where}: got {template[-12:]!r} at its end, expected an opening double quote"
