"""Where sets of images lie, and which file or folder holds a split."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vestige.data._masks import count_masked, holds_masks
from vestige.data._npz import LAYOUT, count_npz, read_names
from vestige.data._pictures import class_folders, count_pictures
from vestige.errors import DataError

BUILT_IN = "digits"
SPLITS = ("train", "select", "test")
_STEMS = {"train": ("train",), "select": ("select", "val"), "test": ("test",)}
_NAMES = "classes.txt"
_SPLIT_NAMES = frozenset(stem for stems in _STEMS.values() for stem in stems)
# A set that is one file, and not a folder that may lie in the data folder.
_FILES = (".npz", ".jsonl")
Size = int | Literal["missing", "damaged"]


@dataclass(frozen=True)
class Part:
    """What to read for a split.

    Attributes:
        path: an .npz file, a folder of class folders, or one of images/ and masks/.
        rule: "whole", all of it; "tenth", the last tenth for "select" and the rest for "train";
            "content", the share of `split` by content.
        split: as it was asked for.
    """

    path: Path
    rule: Literal["whole", "tenth", "content"]
    split: str

    def rows(self, count: int) -> slice:
        """Which of `count` rows, unless the rule is "content"."""
        cut = count - count // 10
        if self.rule == "whole":
            return slice(0, count)
        return slice(cut, count) if self.split == "select" else slice(0, cut)

    def has(self, digest: str) -> bool:
        """Whether content with this digest, in hex, belongs to the split by the rule "content"."""
        share = int(digest[:8], 16) / 16**8
        return self.split == ("train" if share < 0.8 else "select" if share < 0.9 else "test")


def data_folder() -> Path:
    """Where data sets lie: $VESTIGE_DATA, else vestige/data in the user's cache folder."""
    chosen = os.environ.get("VESTIGE_DATA")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vestige" / "data"


def check_split(split: str) -> None:
    """Raise DataError unless `split` is one of "train", "select", "test" and "all"."""
    if split not in (*SPLITS, "all"):
        raise DataError(
            f"got split '{split}', expected one of {', '.join(SPLITS)}, all; use one of these"
        )


def place_of(name_or_path: str) -> Path:
    """The folder or file that a name or a path stands for, whether it is there or not."""
    if "\0" in name_or_path:
        raise DataError(f"got the data set {name_or_path!r}, expected a name or a folder")
    # Not Path's, which raise for a user that does not exist and for a name that is too long.
    path = Path(os.path.expanduser(name_or_path))
    if path.suffix in _FILES and not os.path.isdir(path):
        return path
    if len(path.parts) != 1 or path.is_absolute() or name_or_path in (".", ".."):
        return path.resolve()
    named = data_folder() / name_or_path
    return path.resolve() if os.path.isdir(path) and not os.path.isdir(named) else named


def locate(asked: str, split: str) -> Part:
    """What holds `split` of the set `asked`; nothing is opened.

    Raises:
        DataError: nothing does.
    """
    check_split(split)
    place = place_of(asked)
    try:
        return _located(asked, place, split)
    except OSError as error:
        raise DataError(
            f"got the data set '{asked}', which cannot be looked into ({error}), expected a folder "
            "or a file; correct the name or its permissions"
        ) from error


def _located(asked: str, place: Path, split: str) -> Part:
    if place.suffix == ".npz" and not place.is_dir():
        if not place.is_file():
            raise DataError(
                f"got no file {place}, expected labelled images there; correct the path"
            )
        return _single(place, split)
    stored = _stored(place)
    if not stored:
        whole = _undivided(place)
        if whole is None:
            raise _missing(asked, place, split)
        if whole == place and place.name in _SPLIT_NAMES:
            return _single(place, split)
        return Part(whole, "whole" if split == "all" else "content", split)
    if split == "all":
        raise DataError(
            f"got split 'all' of '{asked}', which is divided into {', '.join(stored)}; name one"
        )
    if split in stored and (split != "train" or "select" in stored):
        return Part(stored[split], "whole", split)
    if split != "test" and "select" not in stored and "train" in stored:
        return Part(stored["train"], "tenth", split)
    raise _missing(asked, place, split)


def is_undivided(asked: str) -> bool:
    """Whether `asked` is the path of a folder of pictures by class that holds no splits."""
    place = place_of(asked)
    # Joined to an absolute path the data folder vanishes, and that is no name in it.
    named = not os.path.isabs(os.path.expanduser(asked)) and place == data_folder() / asked
    if named or not os.path.isdir(place) or _stored(place):
        return False
    return place.name not in _SPLIT_NAMES and _undivided(place) == place


def named_classes(path: Path) -> tuple[str, ...]:
    """Names of the classes of what holds a split, without reading its images; () without any."""
    if path.suffix == ".npz":
        return read_names(path)
    return listed_names(path) if holds_masks(path) else class_names(path)


def listed_names(folder: Path) -> tuple[str, ...]:
    """The lines of classes.txt in `folder`, or beside it where `folder` is a split; () without.

    Raises:
        DataError: it names a class twice, or is no text.
    """
    beside = folder.name in (*_SPLIT_NAMES, "all")
    for place in (folder, folder.parent) if beside else (folder,):
        path = place / _NAMES
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"got {path}, which cannot be read ({error}), expected a class name in each line; "
                "save it as UTF-8"
            ) from error
        names = tuple(line.strip() for line in lines if line.strip())
        if len(set(names)) < len(names):
            raise DataError(f"got {path} with a name twice, expected each once; rename one")
        return names
    return ()


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in `folder`, and of those in the splits beside it."""
    roots = [folder]
    if folder.name in _SPLIT_NAMES:
        roots += [folder.with_name(stem) for stem in _SPLIT_NAMES]
    return tuple(sorted({one.name for root in roots for one in class_folders(root)}))


def sizes(folder: Path) -> dict[str, Size]:
    """Images in each split of a set, counted without reading them; {} where there is no set."""
    stored = _stored(folder)
    if not stored:
        whole = _undivided(folder)
        return {} if whole is None else {"all": _count(whole)}
    found: dict[str, Size] = {}
    for split in SPLITS:
        try:
            part = locate(str(folder), split)
        except DataError:
            found[split] = "missing"
            continue
        count = _count(part.path)
        rows = part.rows(count) if isinstance(count, int) else None
        found[split] = "damaged" if rows is None else rows.stop - rows.start
    return found


def _count(path: Path) -> int | Literal["damaged"]:
    if path.suffix == ".npz":
        return count_npz(path)
    return count_masked(path) if holds_masks(path) else count_pictures(path)


def _stored(folder: Path) -> dict[str, Path]:
    """What holds each split that `folder` has of its own."""
    found: dict[str, Path] = {}
    for split, stems in _STEMS.items():
        for stem in stems:
            path = _file_or_folders(folder, stem)
            if path is not None:
                found.setdefault(split, path)
    return found


def _file_or_folders(folder: Path, stem: str) -> Path | None:
    file = folder / f"{stem}.npz"
    if file.is_file():
        return file
    return folder / stem if class_folders(folder / stem) else None


def _undivided(folder: Path) -> Path | None:
    """What holds a set that is stored in one piece."""
    whole = _file_or_folders(folder, "all")
    if whole is not None:
        return whole
    found = class_folders(folder)
    loose = [one.name for one in found if one.name in (*_SPLIT_NAMES, "all")]
    if loose:
        raise DataError(
            f"got pictures in {folder / loose[0]} itself, expected them in one folder per class: "
            f"{folder / loose[0] / 'CLASS'}/*.png; sort them by class"
        )
    return folder if found else None


def _single(path: Path, split: str) -> Part:
    if split not in ("test", "all"):
        raise DataError(
            f"got {path} for split '{split}', expected a folder with train and test: a file or "
            "folder that is one split is taken as 'test', and what judges must not train; name "
            "the folder that holds the splits"
        )
    return Part(path, "whole", split)


def _missing(asked: str, folder: Path, split: str) -> DataError:
    stem = "train" if split == "select" else split
    where = "" if asked != folder.name else ", or point $VESTIGE_DATA to the folder that holds it"
    return DataError(
        f"got no file {folder / f'{stem}.npz'} for split '{split}' of data set '{asked}', and no "
        f"class folders of pictures; expected {LAYOUT}. Put train.npz and test.npz into "
        f"{folder}{where}, or pictures as {folder / stem}/CLASS/*.png (with masks as "
        f"{stem}/images/*.png and {stem}/masks/*.png). From arrays of your own: "
        f"numpy.savez('train.npz', x=images, y=labels, classes=names). '{BUILT_IN}' is always there"
    )
