"""A store of written texts that only grows, with what was dropped and why."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vestige.errors import CheckpointError, DataError
from vestige.sources.cleaning import advice

# So many of a label in a row that were all dropped: no more will come.
_IN_VAIN = 2000


@dataclass(frozen=True)
class Record:
    """One text that was kept.

    Attributes:
        text: cleaned.
        label: name of what it was written for; "" for a context.
        context: what it was written about; None where there is none.
        prompt: number of the prompt's template: the label's, -1 for one that names none.
        seed: of the run.
        logprob: mean log-probability of its tokens in nats; None where nobody told.
        answer: of a question; None where it is none.
        answer_start: the character of the context at which the answer begins.
    """

    text: str
    label: str
    context: str | None = None
    prompt: int = 0
    seed: int = 0
    logprob: float | None = None
    answer: str | None = None
    answer_start: int | None = None

    def as_line(self) -> dict[str, Any]:
        """As it stands in a file: C, X, Y and what else is known."""
        line: dict[str, Any] = {"C": self.context, "X": self.text, "Y": self.label}
        line |= {"prompt_id": self.prompt, "seed": self.seed, "logprob": self.logprob}
        if self.answer is not None:
            line |= {"answer": self.answer, "answer_start": self.answer_start}
        return line


class TextPool:
    """Texts in the order in which they were written; every `add` is one shard of a checkpoint.

    Args:
        pairs: whether a text and its context are a pair that is learned together.
    """

    def __init__(self, *, pairs: bool = False) -> None:
        self.pairs = pairs
        self._clear()

    def __len__(self) -> int:
        return len(self.records)

    def add(
        self, records: Sequence[Record], keys: Sequence[bytes], dropped: Mapping[str, Counter[str]]
    ) -> None:
        """Append what was kept, and count what was not.

        Args:
            records: those whose keys were not `seen` before.
            keys: of the records, see `cleaning.duplicate_key`.
            dropped: by label, how many for each reason.
        """
        self._shards.append(
            json.dumps(
                {
                    "records": [asdict(record) for record in records],
                    "keys": [key.hex() for key in keys],
                    "dropped": {label: dict(found) for label, found in dropped.items()},
                },
                ensure_ascii=True,
            ).encode()
        )
        self.records += records
        self._keys.update(keys)
        fresh = {record.label for record in records}
        for label in fresh:
            self._in_vain[label] = 0
        for label, found in dropped.items():
            self.dropped.setdefault(label, Counter()).update(found)
            if label not in fresh:
                self._in_vain[label] += sum(found.values())

    def lacking(self, labels: Sequence[str], each: int) -> list[str]:
        """Those of `labels` with fewer than `each` texts, of which more may come.

        Where the last 2,000 texts of a label, or more, were all dropped, none will.
        """
        few = [label for label in labels if self.count(label) < each]
        return [label for label in few if self._in_vain[label] < _IN_VAIN]

    def check_any_kept(self, what: str, label: str | None = None) -> None:
        """Raise unless a text is there.

        Args:
            what: the texts are, for the message.
            label: of which one must be there; None takes any.

        Raises:
            DataError: none is; it says why each was dropped, and what helps.
        """
        kept = len(self) if label is None else self.count(label)
        if kept:
            return
        dropped: Counter[str] = Counter()
        for name, found in self.dropped.items():
            dropped.update(found if label in (None, name) else {})
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items()))
        of = "to learn from" if label is None else f"of the label {label!r}"
        raise DataError(
            f"got no {what} {of}: all of {sum(dropped.values()):,} were dropped "
            f"({reasons or 'none was asked for'}), expected some to be kept; {advice(dropped)}"
        )

    def seen(self, key: bytes) -> bool:
        """Whether a text with this key is there."""
        return key in self._keys

    def count(self, label: str) -> int:
        """Texts of one label."""
        return sum(record.label == label for record in self.records)

    def counts(self) -> dict[str, int]:
        """How many texts there are ("kept"), and how many were dropped for each reason."""
        found: Counter[str] = Counter()
        for one in self.dropped.values():
            found.update(one)
        return {"kept": len(self.records), **dict(sorted(found.items()))}

    def asked(self, label: str) -> int:
        """Texts of one label that were written, kept or not."""
        return self.count(label) + sum(self.dropped.get(label, Counter()).values())

    def kept_share(self, before: float) -> float:
        """Share of what was written that was kept, at least 0.05; `before` anything was written."""
        counts = self.counts()
        asked = sum(counts.values())
        return max(0.05, counts["kept"] / asked) if asked else before

    def of_label(self, label: str) -> list[int]:
        """Places of a label's texts in an order that says nothing about how they came about.

        By a digest of each text, so that a run which is resumed, or asks for more, has the same.
        """
        places = [place for place, record in enumerate(self.records) if record.label == label]
        return sorted(places, key=lambda place: _digest(self.records[place]))

    def shard_count(self) -> int:
        """One for each `add`."""
        return len(self._shards)

    def shard(self, index: int) -> Mapping[str, Tensor]:
        """Shard `index`: its JSON as bytes."""
        return {"json": torch.frombuffer(bytearray(self._shards[index]), dtype=torch.uint8)}

    def load_shards(self, shards: Iterable[Mapping[str, Tensor]]) -> None:
        """Replace the content by `shards`, as `shard` gave them.

        Raises:
            CheckpointError: one of them is no shard of this class.
        """
        self._clear()
        for shard in shards:
            try:
                found = json.loads(bytes(shard["json"].cpu().numpy()))
                records = [Record(**record) for record in found["records"]]
                keys = [bytes.fromhex(key) for key in found["keys"]]
                dropped = {label: Counter(one) for label, one in found["dropped"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"got a shard of texts that cannot be read ({error}), expected one that this "
                    "version wrote; start again without --resume"
                ) from error
            self.add(records, keys, dropped)

    def _clear(self) -> None:
        self.records: list[Record] = []
        self.dropped: dict[str, Counter[str]] = {}
        self._keys: set[bytes] = set()
        self._shards: list[bytes] = []
        self._in_vain: Counter[str] = Counter()


def _digest(record: Record) -> bytes:
    content = f"order\0{record.text}\0{record.context}\0{record.answer_start}"
    return hashlib.sha256(content.encode("utf8", errors="replace")).digest()
