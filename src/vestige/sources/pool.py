"""A store of synthetic inputs that only grows."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.errors import DataError, ShapeError


class Pool:
    """Append-only pool; every `add` is one shard of a checkpoint and never changes afterwards.

    Args:
        spec: with a spec, inputs are kept as uint8 images: a quarter of the memory, and a drawn
            value is off by at most half a grey level, values outside of [0, 1] being clamped.
            None keeps inputs as they are.
        device: where the pool lies; drawing moves rows to the device of the generator.
    """

    origin = "synthetic"
    name = "pool"
    paths: tuple[Path, ...] = ()

    def __init__(
        self, spec: InputSpec | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        self._spec = spec
        self._device = torch.device(device)
        self._ends: list[int] = []
        self._inputs: Tensor | None = None
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def add(self, inputs: Tensor, labels: Tensor | None = None) -> None:
        """Append one shard.

        Args:
            inputs: (B, ...) in the teacher's normalised space, B > 0; gradients are cut.
            labels: (B,) int64, what each input was made for; either every shard has them or none.

        Raises:
            ShapeError: inputs or labels do not fit each other or the shards before.
        """
        if self._spec is not None and tuple(inputs.shape[1:]) != self._spec.shape:
            raise ShapeError(
                f"got inputs of shape {tuple(inputs.shape)}, expected (B, "
                f"{', '.join(map(str, self._spec.shape))}) as in the pool's input spec"
            )
        self._append(self._stored(inputs.detach()), labels)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` inputs, uniformly with replacement, on the device of `rng`; no gradient."""
        return self._drawn(self._content()[self._index(count, rng)], rng)

    def draw_labelled(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Like `draw`, with the labels (count,) that the inputs were added with."""
        content = self._content()
        if self._labels is None:
            raise DataError("got a pool without labels, expected labels; hand them to every `add`")
        index = self._index(count, rng)
        return self._drawn(content[index], rng), self._labels[index].to(rng.device)

    def shard_count(self) -> int:
        """Number of shards, one per `add`."""
        return len(self._ends)

    def shard(self, index: int) -> Mapping[str, Tensor]:
        """Shard `index` as it is stored: "inputs" and, where there are any, "labels"."""
        rows = slice(self._ends[index - 1] if index else 0, self._ends[index])
        shard = {"inputs": self._content()[rows]}
        if self._labels is not None:
            shard["labels"] = self._labels[rows]
        return shard

    def load_shards(self, shards: Iterable[Mapping[str, Tensor]]) -> None:
        """Replace the content by `shards`, as `shard` gave them."""
        self._ends, self._inputs, self._labels = [], None, None
        for shard in shards:
            self._append(shard["inputs"], shard.get("labels"))

    def _append(self, stored: Tensor, labels: Tensor | None) -> None:
        count = len(self)
        if stored.dim() < 1 or len(stored) == 0:
            raise ShapeError(f"got inputs of shape {tuple(stored.shape)}, expected (B, ...), B > 0")
        if labels is not None and labels.shape != stored.shape[:1]:
            raise ShapeError(
                f"got labels of shape {tuple(labels.shape)}, expected ({len(stored)},) for "
                f"{len(stored)} inputs"
            )
        if self._ends and (labels is None) != (self._labels is None):
            raise ShapeError("got a mix of labelled and unlabelled inputs, expected one of the two")
        like = self._inputs
        if like is not None and (stored.shape[1:], stored.dtype) != (like.shape[1:], like.dtype):
            raise ShapeError(
                f"got inputs of shape {tuple(stored.shape)} and dtype {stored.dtype}, expected "
                f"{tuple(like.shape[1:])} and {like.dtype} per input like the shards before"
            )
        self._inputs = self._grown(self._inputs, stored, count)
        if labels is not None:
            self._labels = self._grown(self._labels, labels.detach().long(), count)
        self._ends.append(count + len(stored))

    def _grown(self, buffer: Tensor | None, rows: Tensor, count: int) -> Tensor:
        """`buffer` with `rows` written behind its first `count` rows, moved if it is full."""
        needed = count + len(rows)
        if buffer is None or needed > len(buffer):
            # Doubling: copying at every add would cost a square of the pool's size.
            larger = rows.new_empty((max(needed, 2 * count), *rows.shape[1:]), device=self._device)
            if buffer is not None:
                larger[:count] = buffer[:count]
            buffer = larger
        buffer[count:needed] = rows
        return buffer

    def _content(self) -> Tensor:
        if self._inputs is None:
            raise DataError("got an empty pool, expected inputs in it; call `add` before drawing")
        return self._inputs

    def _index(self, count: int, rng: torch.Generator) -> Tensor:
        index = torch.randint(len(self), (count,), generator=rng, device=rng.device)
        return index.to(self._device)

    def _stored(self, inputs: Tensor) -> Tensor:
        if self._spec is None:
            return inputs
        return self._spec.denormalize(inputs.float()).mul(255).round().to(torch.uint8)

    def _drawn(self, stored: Tensor, rng: torch.Generator) -> Tensor:
        rows = stored.to(rng.device)
        return rows if self._spec is None else self._spec.normalize(rows.float() / 255)
