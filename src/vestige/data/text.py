"""Sets of labelled texts on disk: one JSON object per line, alone or in pairs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vestige.core.texts import PAIR, to_bytes
from vestige.core.types import InputSpec
from vestige.data._layout import SPLITS, Part, Size, check_split, data_folder, place_of
from vestige.data._mentions import NONE, OPTION, mentioning, words_of
from vestige.data._subset import choose, full_name, split_name
from vestige.errors import DataError, ShapeError

_STEMS = {"train": ("train",), "select": ("select", "val", "dev"), "test": ("test",)}
_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question", "sentence"))
_MOST_CLASSES = 100_000
_LAYOUT = (
    'one {"text": ..., "label": ...} or {"premise": ..., "hypothesis": ..., "label": ...} per line'
)


@dataclass(eq=False)
class TextSet:
    """One split of a set of labelled texts; a `core.protocols.DataSet`.

    Attributes:
        name: name of the set, with the classes in brackets where only some are taken.
        split: "train", "select", "test" or "all".
        texts: N of them; the two of a pair with `core.texts.PAIR` in between.
        labels: (N,), int64, in [0, len(classes)).
        classes: names of the classes; where the set gives none, their numbers.
        path: the file it was read from.
        fingerprint: sha256 in hex of texts, labels and class names, in order.
    """

    name: str
    split: str
    texts: list[str]
    labels: Tensor
    classes: tuple[str, ...]
    path: Path
    fingerprint: str

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def open(cls, name: str, split: str) -> "TextSet":
        """The same as `load_texts`."""
        return load_texts(name, split)

    @classmethod
    def find(cls, name: str, split: str) -> None:
        """Look for what `open` would read, without reading it.

        Raises:
            DataError: it is not there.
        """
        _locate(split_name(name)[0], split)

    @classmethod
    def listed(cls) -> list[tuple[str, str, Mapping[str, Size]]]:
        """Every set in the data folder: name, where, and how many lines each split has."""
        root = data_folder()
        folders = sorted(one for one in root.iterdir() if one.is_dir()) if root.is_dir() else []
        return [
            (folder.name, str(folder), {split: _lines(path) for split, path in held.items()})
            for folder in folders
            if (held := _held(folder))
        ]

    def least_classes(self) -> int:
        """The fewest classes that it can have."""
        return len(self.classes)

    def inputs(self, spec: InputSpec) -> Tensor:
        """All texts as rows (N, L) of bytes, see `core.texts`.

        Raises:
            ShapeError: the spec is none of texts.
        """
        if spec.kind != "text" or len(spec.shape) != 1:
            raise ShapeError(
                f"got an input spec of kind '{spec.kind}' and shape {spec.shape}, expected texts "
                "(bytes,); make it with InputSpec.text"
            )
        return to_bytes(self.texts, spec.shape[0])

    def examples(self, spec: InputSpec) -> tuple[Tensor, Tensor]:
        """Texts as rows (N, L), and labels (N,) int64."""
        return self.inputs(spec), self.labels


def load_texts(name_or_path: str, split: str) -> TextSet:
    """Read one split of a set of texts.

    A name is a folder in `data_folder()`, and anything with a path separator is a folder itself. A
    split is SPLIT.jsonl; "select" may be called "val" or "dev". Without it the last 10 % of train
    are "select", and "train" is the rest. Without a test split "select" is the test split, and the
    last 10 % of train are selected on. A folder with only all.jsonl is divided by the sha256 of
    each text, 80 % train, 10 % select, 10 % test. The path of a .jsonl file is one split and opens
    as "test" only.

    Each line is a JSON object with "text" and "label", or with a pair of texts ("premise" and
    "hypothesis", "sentence1" and "sentence2", or "question" and "sentence") and "label". A label is
    a number, or a name. classes.json, a list, names the numbers; without it what stands in all
    files of the folder counts: names in alphabetical order, or the numbers up to the highest.

    Behind all of these, class names in brackets take these classes only, numbered in the order
    given: "ag_news[sports,world]". Or the texts are labelled anew by which of some words they
    mention: "ag_news[mentions=oil|iraq]" has the classes "oil", "iraq" and, as often as both
    together, "none of these"; texts that mention several are left out.

    Args:
        name_or_path: a name in the data folder, or a path.
        split: "train", "select" or "test"; "all" of what is not divided.

    Raises:
        DataError: the split is unknown, or what holds it is missing, damaged or in another layout.
    """
    name_or_path, chosen = split_name(name_or_path)
    part = _locate(name_or_path, split)
    texts, labels = _read(part.path)
    classes, numbers = _numbered(part.path, labels)
    if part.rule == "content":
        digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        rows = [index for index, digest in enumerate(digests) if part.has(digest)]
    else:
        rows = list(range(len(texts)))[part.rows(len(texts))]
    if not rows:
        raise DataError(
            f"got no texts for the '{split}' split in {part.path}, expected at least one; add some"
        )
    place = place_of(name_or_path)
    name = place.stem if place.suffix == ".jsonl" else place.name
    found = _text_set(
        name, part, [texts[row] for row in rows], torch.tensor([numbers[r] for r in rows]), classes
    )
    if not chosen:
        return found
    if chosen[0].startswith(OPTION):
        words = words_of(chosen[0])
        rows, labels_of = mentioning(found.texts, words)
        texts = [found.texts[row] for row in rows]
        named = full_name(name, chosen)
        return _text_set(named, part, texts, torch.tensor(labels_of), (*words, NONE))
    keep, renumbered = choose(name, found.labels.numpy(), chosen, classes)
    kept = [found.texts[row] for row in np.flatnonzero(keep)]
    taken = _text_set(full_name(name, chosen), part, kept, torch.from_numpy(renumbered), chosen)
    return replace(taken, classes=chosen)


def _text_set(
    name: str, part: Part, texts: list[str], labels: Tensor, classes: tuple[str, ...]
) -> TextSet:
    whole = hashlib.sha256()
    for text, label in zip(texts, labels.tolist(), strict=True):
        whole.update(f"{label}\0{text}\n".encode())
    whole.update("\0".join(classes).encode())
    return TextSet(name, part.split, texts, labels, classes, part.path, whole.hexdigest())


def _held(folder: Path) -> dict[str, Path]:
    """What holds each split that `folder` has of its own, or "all"."""
    found = {
        split: path
        for split, stems in _STEMS.items()
        for stem in reversed(stems)
        if (path := folder / f"{stem}.jsonl").is_file()
    }
    whole = folder / "all.jsonl"
    return found if found or not whole.is_file() else {"all": whole}


def _locate(asked: str, split: str) -> Part:
    check_split(split)
    place = place_of(asked)
    if place.suffix == ".jsonl" and not place.is_dir():
        if not place.is_file():
            raise DataError(f"got no file {place}, expected texts there, {_LAYOUT}")
        if split not in ("test", "all"):
            raise DataError(
                f"got {place} for split '{split}', expected a folder with train and test: a file "
                "is one split and taken as 'test', and what judges must not train"
            )
        return Part(place, "whole", split)
    held = _held(place)
    if "test" not in held and "select" in held:
        # Published without the labels of its test split: what is called dev judges.
        held = {**held, "test": held["select"]}
        del held["select"]
    if "all" in held:
        return Part(held["all"], "whole" if split == "all" else "content", split)
    if split == "all" and held:
        raise DataError(
            f"got split 'all' of '{asked}', which is divided into {', '.join(held)}; name one"
        )
    if split in held and (split != "train" or "select" in held):
        return Part(held[split], "whole", split)
    if split in ("train", "select") and "train" in held:
        return Part(held["train"], "tenth", split)
    stem = "train" if split == "select" else split
    raise DataError(
        f"got no file {place / f'{stem}.jsonl'} for split '{split}' of the set of texts '{asked}', "
        f"expected {_LAYOUT}; put {', '.join(f'{one}.jsonl' for one in SPLITS if one != 'select')} "
        f"into {place}, or point $VESTIGE_DATA to the folder that holds it"
    )


def _read(path: Path) -> tuple[list[str], list[Any]]:
    texts: list[str] = []
    labels: list[Any] = []
    try:
        lines = path.read_text(encoding="utf8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"got {path}, which cannot be read ({error}), expected {_LAYOUT}"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = _text_of(row), row["label"]
            if isinstance(label, bool) or not isinstance(label, int | str):
                raise TypeError(f"label {label!r} is neither a number nor a name")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"got line {number} of {path}, which cannot be read ({error!r}), expected {_LAYOUT}"
            ) from error
        texts.append(text)
        labels.append(label)
    return texts, labels


def _text_of(row: Any) -> str:
    if "text" in row:
        return _string(row["text"])
    for first, second in _PAIRS:
        if first in row and second in row:
            return f"{_string(row[first])}{PAIR}{_string(row[second])}"
    raise KeyError("text")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    # JSON may hold halves of characters, which have no bytes.
    return value.replace(PAIR, " ").encode("utf8", errors="replace").decode("utf8")


def _numbered(path: Path, labels: Sequence[Any]) -> tuple[tuple[str, ...], list[int]]:
    """Names of the classes, and each label as a number."""
    listed = path.parent / "classes.json"
    classes: tuple[str, ...] = ()
    if listed.is_file():
        try:
            found = json.loads(listed.read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"got {listed}, which cannot be read ({error}), expected a list"
            ) from error
        if not isinstance(found, list) or len(set(map(str, found))) < len(found):
            raise DataError(f"got {listed}, expected a list of class names, each once; correct it")
        classes = tuple(map(str, found))
    if not classes:
        # One split alone may lack a class.
        beside = [other for other in path.parent.glob("*.jsonl") if other != path]
        found = {*labels, *(label for other in beside for label in _read(other)[1])}
        names = sorted(one for one in found if isinstance(one, str))
        highest = max((one for one in found if isinstance(one, int)), default=0)
        # Beyond it a number is a mistake, and too many names would be made of it.
        classes = tuple(names) or tuple(map(str, range(min(highest, _MOST_CLASSES - 1) + 1)))
    known = {name: number for number, name in enumerate(classes)}
    result = [known.get(label, -1) if isinstance(label, str) else label for label in labels]
    wrong = [
        label for label, number in zip(labels, result, strict=True) if not 0 <= number < len(known)
    ]
    if wrong:
        raise DataError(
            f"got the label {wrong[0]!r} in {path}, expected one of {', '.join(classes[:20])} or "
            f"their numbers from 0; correct it, or name the classes in {listed}"
        )
    return classes, result


def _lines(path: Path) -> Size:
    try:
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError:
        return "damaged"
