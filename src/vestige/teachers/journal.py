"""Answers of a black box on disk, so that what a run repeats after a kill is not asked twice."""

import hashlib
import os
import struct
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Queries before the question, rows, digest of the question, bytes and checksum of the answer.
_HEAD = struct.Struct("<QQ32sQI")


@dataclass(frozen=True)
class _Entry:
    rows: int
    digest: bytes
    answer: bytes


class Journal:
    """A file of questions that were asked, each with its answer once it is there.

    A resumed run repeats the steps since its checkpoint, and on one machine it asks the same again:
    such a question is answered from here. Where it asks something else (another machine, a GPU that
    rounds differently), what was paid for is lost, and `lost` says how much that was. Written
    without waiting for the disk: what a killed process wrote is there, after a power cut the last
    entries may be missing. For one thread of one process.

    Args:
        path: of the file; its folder is made.
        resume: keep what is in it; else it is emptied.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._closing: weakref.finalize[..., Journal] | None = None
        self._entries: dict[int, _Entry] = {}
        held = path.read_bytes() if resume and path.is_file() else b""
        whole = 0
        for start, entry, end in _entries(held):
            self._entries[start] = entry
            whole = end
        # A record that a kill cut off would hide all that follow.
        self._rewrite(held[:whole])
        self._marks = [0, 0]

    def ask(self, queries: int, rows: int, question: Tensor) -> None:
        """Note that `question` is asked when `queries` rows were asked before."""
        self._append(queries, _Entry(rows, _digest(question), b""))

    def answered(self, queries: int, question: Tensor, answer: Tensor) -> None:
        """Note the answer to what `ask` noted."""
        from safetensors.torch import save

        plain = {"answer": answer.detach().cpu().contiguous()}
        rows = self._entries[queries].rows
        self._append(queries, _Entry(rows, _digest(question), save(plain)))

    def find(self, queries: int, question: Tensor) -> Tensor | None:
        """The answer to `question` if it was asked at this place before, on the CPU."""
        from safetensors.torch import load

        entry = self._entries.get(queries)
        if entry is None or not entry.answer or entry.digest != _digest(question):
            return None
        return load(entry.answer)["answer"]

    def lost(self, queries: int) -> int:
        """Rows that were asked from here on and are of no use any more; forgets them."""
        useless = [start for start in self._entries if start >= queries]
        return sum(self._entries.pop(start).rows for start in useless)

    def checkpointed(self, queries: int) -> None:
        """A checkpoint was written after `queries` rows; keeps what those since the one before ask.

        One checkpoint more than the last, because it is what counts if the last turns out damaged.
        """
        self._marks = [self._marks[1], queries]
        self._entries = {s: entry for s, entry in self._entries.items() if s >= self._marks[0]}
        self._rewrite(b"".join(_record(s, entry) for s, entry in self._entries.items()))

    def close(self) -> None:
        """Give the file back; nothing can be noted from now on."""
        if self._closing is not None:
            self._closing()

    def _append(self, queries: int, entry: _Entry) -> None:
        self._entries[queries] = entry
        # In one write, so that a kill leaves whole records or one torn record at the end.
        os.write(self._file, _record(queries, entry))

    def _rewrite(self, content: bytes) -> None:
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_bytes(content)
        os.replace(partial, self._path)
        self.close()
        # Stays open until nobody needs it; every answer is written to it.
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._closing = weakref.finalize(self, os.close, self._file)


def _record(start: int, entry: _Entry) -> bytes:
    checksum = zlib.crc32(entry.answer)
    head = _HEAD.pack(start, entry.rows, entry.digest, len(entry.answer), checksum)
    return head + entry.answer


def _entries(content: bytes) -> Iterator[tuple[int, _Entry, int]]:
    """Place, entry and end in `content` of each whole record."""
    position = 0
    while position + _HEAD.size <= len(content):
        start, rows, digest, length, checksum = _HEAD.unpack_from(content, position)
        position += _HEAD.size
        answer = content[position : position + length]
        position += length
        if len(answer) < length or zlib.crc32(answer) != checksum:
            return
        yield start, _Entry(rows, digest, answer), position


def _digest(question: Tensor) -> bytes:
    digest = hashlib.sha256(f"{question.dtype}{tuple(question.shape)}".encode())
    flat = question.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.digest()
