"""Texts that were paid for, on disk, so that a run that was killed does not pay for them again."""

import json
import os
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vestige.core.writing import Written


@dataclass(frozen=True)
class Spent:
    """What was spent so far.

    Attributes:
        requests: that were sent, answered or not.
        tokens_in: of prompts.
        tokens_out: of what was written.
        money: in the unit of the prices.
    """

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    money: float = 0.0

    @property
    def tokens(self) -> int:
        """Both kinds together."""
        return self.tokens_in + self.tokens_out

    def plus(self, other: "Spent") -> "Spent":
        """The sum."""
        return replace(
            self,
            requests=self.requests + other.requests,
            tokens_in=self.tokens_in + other.tokens_in,
            tokens_out=self.tokens_out + other.tokens_out,
            money=self.money + other.money,
        )


class TextJournal:
    """Answers by the digest of their request; every answer is one line, written before it is used.

    A line that a kill cut off, or that was altered, is left out with all that follow it.

    Args:
        path: of the file, or None to keep answers in memory alone.
        resume: keep what is in it; else it is emptied.
    """

    def __init__(self, path: Path | None = None, *, resume: bool = False) -> None:
        self.spent = Spent()
        self._answers: dict[str, list[Written]] = {}
        self._file: int | None = None
        self._closing: weakref.finalize[..., TextJournal] | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.read_bytes() if resume and path.is_file() else b""
        whole = 0
        for line in held.splitlines(keepends=True):
            if not line.endswith(b"\n") or not self._read(line):
                break
            whole += len(line)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(held[:whole])
        os.replace(partial, path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._closing = weakref.finalize(self, os.close, self._file)

    def find(self, key: str) -> list[Written]:
        """The texts of a request; [] where it was never answered."""
        return self._answers.get(key, [])

    def note(self, key: str, texts: Sequence[Written], cost: Spent) -> None:
        """Keep the answer to a request; without texts it is what an attempt cost."""
        body = json.dumps(
            {
                "key": key,
                "texts": [[one.text, one.logprob] for one in texts],
                "cost": [cost.requests, cost.tokens_in, cost.tokens_out, cost.money],
            }
        ).encode()
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        if self._file is not None:
            # In one write, so that a kill leaves whole lines or one torn line at the end.
            view = memoryview(line)
            while view:
                view = view[os.write(self._file, view) :]
        self._take(key, texts, cost)

    def close(self) -> None:
        """Give the file back."""
        if self._closing is not None:
            self._closing()
        self._file = None

    def _read(self, line: bytes) -> bool:
        checksum, _, body = line.rstrip(b"\n").partition(b" ")
        try:
            if int(checksum, 16) != zlib.crc32(body):
                return False
            found = json.loads(body)
            texts = [Written(str(text), logprob) for text, logprob in found["texts"]]
            self._take(str(found["key"]), texts, Spent(*found["cost"]))
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _take(self, key: str, texts: Sequence[Written], cost: Spent) -> None:
        self.spent = self.spent.plus(cost)
        if texts:
            self._answers[key] = list(texts)
