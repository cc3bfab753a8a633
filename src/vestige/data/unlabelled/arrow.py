"""Images in a folder that `datasets.Dataset.save_to_disk` wrote."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vestige.core.types import InputSpec
from vestige.data.unlabelled.decoding import Block, Skipped
from vestige.data.unlabelled.files import picture_blocks
from vestige.errors import DataError, MissingExtraError

EXTRA = "arrow"
_SPLITS = {"train": ("train",), "select": ("select", "validation", "val"), "test": ("test",)}


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` is one that `save_to_disk` wrote, of one split or of several."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


class ArrowImages:
    """One column of pictures of a saved data set; no other column is read.

    Args:
        folder: that `save_to_disk` wrote.
        name: what is shown to the user.
        split: "train", "select" or "test" of a folder with splits; None takes train, or the only
            one there is.
        column: that holds the pictures; None takes the one that is declared as such.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: the folder is damaged, or has no such split or column.
    """

    left_out = Skipped()

    def __init__(
        self, folder: Path, name: str, *, split: str | None = None, column: str | None = None
    ) -> None:
        self.name = name
        self.paths: tuple[Path, ...] = (folder,)
        part = _split_of(folder, split)
        self.column = _column_of(part, column)
        self._chunks = _open(part, self.column)
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)
        self._folder = part
        if not len(self):
            raise DataError(f"got no rows in {part}, expected at least one; save it again")
        whole = hashlib.sha256()
        for _, picture in self._pictures(np.arange(len(self))):
            whole.update(hashlib.sha256(_content(picture)).digest())
        self.fingerprint = whole.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def blocks(self, spec: InputSpec, rows: NDArray[np.int64]) -> Iterator[Block]:
        """See `decoding.Unlabelled`."""
        yield from picture_blocks(self._pictures(rows), spec)

    def _pictures(self, rows: NDArray[np.int64]) -> Iterator[tuple[str, "Path | bytes"]]:
        chunks = np.searchsorted(self._ends, rows, side="right")
        for row, chunk in zip(rows.tolist(), chunks.tolist(), strict=True):
            start = int(self._ends[chunk]) - len(self._chunks[chunk])
            stored = self._chunks[chunk][row - start].as_py()
            # What has no picture is told as one that cannot be decoded.
            content: Path | bytes = b""
            if isinstance(stored, bytes):
                content = stored
            elif isinstance(stored, Mapping) and stored.get("bytes"):
                content = stored["bytes"]
            elif isinstance(stored, Mapping) and stored.get("path"):
                content = self._folder / str(stored["path"])
            yield f"row {row}", content


def _content(picture: "Path | bytes") -> bytes:
    if isinstance(picture, bytes):
        return picture
    try:
        return picture.read_bytes()
    except OSError:
        return b""


def _split_of(folder: Path, split: str | None) -> Path:
    listing = folder / "dataset_dict.json"
    if not listing.is_file():
        if split not in (None, "all"):
            raise DataError(
                f"got split '{split}' of {folder}, which has no splits; leave the split out"
            )
        return folder
    known = [str(name) for name in _json(listing).get("splits", ())]
    wanted = _SPLITS.get(str(split), ()) if split is not None else ("train",)
    found = [name for name in wanted if name in known] or (
        known if split is None and len(known) == 1 else []
    )
    if not found:
        raise DataError(
            f"got split '{split or 'train'}' of {folder}, expected one of {', '.join(known)}; name "
            "one as split (select stands for validation), or the folder of one"
        )
    return folder / found[0]


def _column_of(folder: Path, column: str | None) -> str:
    features = _json(folder / "dataset_info.json").get("features")
    features = features if isinstance(features, Mapping) else {}
    pictures = [
        str(name)
        for name, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "Image"
    ]
    if column is None and len(pictures) == 1:
        return pictures[0]
    if column in features:
        return str(column)
    raise DataError(
        f"got {f'column {column!r}' if column else 'no column'} for {folder}, whose columns are "
        f"{', '.join(map(str, features)) or 'unknown'} and whose pictures are in "
        f"{', '.join(pictures) or 'none of them'}; name the one that holds pictures as column"
    )


def _open(folder: Path, column: str) -> list[Any]:
    """The chunks of one column, mapped."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingExtraError(
            f"got {folder}, a data set that was saved in the Arrow format, which needs pyarrow; "
            f"pip install 'vestige[{EXTRA}]'"
        ) from error
    files = _json(folder / "state.json").get("_data_files")
    names = [
        str(one["filename"])
        for one in files or ()
        if isinstance(one, Mapping) and "filename" in one
    ]
    chunks: list[Any] = []
    for name in names:
        try:
            mapped = pa.memory_map(str(folder / name))
            table = pa.ipc.open_stream(mapped).read_all()
            chunks.extend(chunk for chunk in table.column(column).chunks if len(chunk))
        except (OSError, KeyError, pa.ArrowException) as error:
            raise DataError(
                f"got {folder / name}, which cannot be read ({error}), expected an Arrow stream "
                f"with the column {column!r}; save the data set again with save_to_disk"
            ) from error
    return chunks


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"got {path}, which cannot be read ({error}), expected what save_to_disk writes; save "
            "the data set again"
        ) from error
    return found if isinstance(found, dict) else {}
