"""Files that are never half-written under their final name."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from vestige.errors import RecipeError, StorageError

LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that could not be written, and what to do.

    Raises:
        StorageError: for any OSError inside the block; it has the same `errno`.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        remedy = "see that nothing is in the way there"
        if error.errno in _FULL:
            remedy = "free some space"
        elif error.errno in _CLOSED:
            remedy = "make the folder writable, or name another one"
        told = StorageError(
            f"could not write {path}: {error.strerror or error}; {remedy}. What was written before "
            "is whole, and a run goes on from its last checkpoint with --resume"
        )
        told.errno = error.errno
        raise told from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name in the same folder, flush to disk, then rename.

    Raises:
        StorageError: it cannot be written; a file that was there before stays as it was.
    """
    _write(path, (data,))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Likewise of lines of text, each taken when it is written."""
    _write(path, (f"{line}\n".encode() for line in lines))


def _write(path: Path, parts: Iterable[bytes]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as stream:
                for part in parts:
                    stream.write(part)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file; None where it is missing, damaged or holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def tensors_to_bytes(
    tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> bytes:
    """Tensors in the safetensors format; views and other devices are copied."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, metadata=metadata)


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Keep other processes from running in `folder` inside the block; None locks nothing.

    Raises:
        RecipeError: another process holds it.
    """
    if folder is None:
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    # The lock goes with the process, so that a killed run leaves none behind.
    with open(folder / LOCK, "a", encoding="utf8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(
                f"another process is running in {folder}; wait for it or name another folder"
            ) from error
        try:
            yield
        finally:
            Path(stream.name).unlink(missing_ok=True)


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()
