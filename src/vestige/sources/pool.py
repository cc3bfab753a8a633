"""A store of synthetic inputs that only grows."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.errors import ContractError, DataError, ShapeError
from vestige.sources._rows import FileRows, MemoryRows, Rows

MEMORY_LIMIT = 2**30


class Pool:
    """Append-only pool; every `add` is one shard of a checkpoint and never changes afterwards.

    Args:
        spec: with a spec, inputs are kept as uint8 images: a quarter of the memory, and a drawn
            value is off by at most half a grey level, values outside of [0, 1] being clamped.
            None keeps inputs as they are.
        device: where the pool lies; drawing moves rows to the device of the generator.
        memory_limit: bytes of inputs kept in memory; beyond, they move to a file in the directory
            for temporary files (TMPDIR), and memory grows no more.
    """

    origin = "synthetic"
    name = "pool"
    paths: tuple[Path, ...] = ()

    def __init__(
        self,
        spec: InputSpec | None = None,
        *,
        device: torch.device | str = "cpu",
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.spec = spec
        self._device = torch.device(device)
        self._limit = memory_limit
        self._clear()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def labels(self) -> Tensor | None:
        """What each input was made for (N,), int64 on the CPU; None without labels."""
        return None if self._labels is None else self._labels.between(0, len(self))

    @property
    def losses(self) -> list[float | None]:
        """The loss that each `add` was given, None where it was given none."""
        return [None if loss is None else float(loss) for loss in self._losses]

    def add(
        self, inputs: Tensor, labels: Tensor | None = None, *, loss: Tensor | None = None
    ) -> None:
        """Append one shard.

        Args:
            inputs: (B, ...) in the teacher's normalised space, B > 0; gradients are cut.
            labels: (B,) int64, what each input was made for; either every shard has them or none.
            loss: () that they were made with, kept for the record.

        Raises:
            ContractError: the pool was opened from a folder.
            ShapeError: inputs or labels do not fit each other or the shards before.
        """
        if self.paths:
            raise ContractError(
                f"got an `add` to the pool in {self.paths[0].parent}, which is only read; make a "
                "Pool of your own and add there"
            )
        if self.spec is not None and tuple(inputs.shape[1:]) != self.spec.shape:
            raise ShapeError(
                f"got inputs of shape {tuple(inputs.shape)}, expected (B, "
                f"{', '.join(map(str, self.spec.shape))}) as in the pool's input spec"
            )
        self._append(self._stored(inputs.detach()), labels, loss)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` inputs, uniformly with replacement, on the device of `rng`; no gradient."""
        return self._drawn(self._content().at(self._index(count, rng)), rng)

    def draw_labelled(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Like `draw`, with the labels (count,) that the inputs were added with."""
        content, labels = self._content(), self._labelled()
        index = self._index(count, rng)
        return self._drawn(content.at(index), rng), labels.at(index).to(rng.device)

    def draw_of(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """One input for each of `labels`, uniformly among those that were made for it.

        Args:
            labels: (N,) int64.
            rng: draws; the inputs are on its device.

        Returns:
            (N, ...), row i was made for labels[i]; no gradient.

        Raises:
            DataError: the pool has no labels, or no input that was made for one of them.
        """
        order, counts, starts = self._classes()
        wanted = labels.cpu()
        if missing := sorted(
            {int(label) for label in wanted.unique() if label >= len(counts) or not counts[label]}
        ):
            raise DataError(
                f"got a pool without inputs of class {', '.join(map(str, missing[:5]))}, expected "
                f"at least one; it has {int((counts > 0).sum())} classes; synthesise more, or ask "
                "for those"
            )
        drawn = torch.rand(len(wanted), generator=rng, device=rng.device, dtype=torch.float64).cpu()
        index = order[starts[wanted] + (drawn * counts[wanted]).long()]
        return self._drawn(self._content().at(index), rng)

    def between(self, start: int, stop: int) -> Tensor:
        """Inputs number `start` up to `stop` as they are stored: uint8 images with a spec."""
        return self._content().between(start, stop)

    def shard_count(self) -> int:
        """Number of shards, one per `add`."""
        return len(self._ends)

    def shard(self, index: int) -> Mapping[str, Tensor]:
        """Shard `index` as it is stored: "inputs" and, where there are any, "labels" and "loss"."""
        start, stop = self._ends[index - 1] if index else 0, self._ends[index]
        shard = {"inputs": self._content().between(start, stop)}
        if self._labels is not None:
            shard["labels"] = self._labels.between(start, stop)
        loss = self._losses[index]
        return shard if loss is None else {**shard, "loss": loss}

    def load_shards(self, shards: Iterable[Mapping[str, Tensor]]) -> None:
        """Replace the content by `shards`, as `shard` gave them."""
        self._clear()
        for shard in shards:
            self._append(shard["inputs"], shard.get("labels"), shard.get("loss"))

    def _clear(self) -> None:
        self._ends: list[int] = []
        self._inputs: Rows | None = None
        self._labels: Rows | None = None
        self._losses: list[Tensor | None] = []
        self._by_class: tuple[Tensor, Tensor, Tensor] | None = None

    def _append(self, stored: Tensor, labels: Tensor | None, loss: Tensor | None) -> None:
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
        if like is not None and (tuple(stored.shape[1:]), stored.dtype) != (like.shape, like.dtype):
            raise ShapeError(
                f"got inputs of shape {tuple(stored.shape)} and dtype {stored.dtype}, expected "
                f"{like.shape} and {like.dtype} per input like the shards before"
            )
        count = len(self) + len(stored)
        self._inputs = self._roomy(like or MemoryRows(stored, self._device), stored, count)
        self._inputs.append(stored)
        if labels is not None:
            labels = labels.detach().long()
            self._labels = self._labels or MemoryRows(labels, torch.device("cpu"))
            self._labels.append(labels)
        self._losses.append(None if loss is None else loss.detach().float().cpu())
        self._ends.append(count)
        self._by_class = None

    def _roomy(self, rows: Rows, like: Tensor, count: int) -> Rows:
        """`rows`, moved to a file if `count` of them are more than memory is to hold."""
        size = like[0].numel() * like.element_size()
        if isinstance(rows, FileRows) or count * size <= self._limit:
            return rows
        moved = FileRows(None, rows.shape, rows.dtype)
        moved.append(rows.between(0, rows.count))
        return moved

    def _content(self) -> Rows:
        if self._inputs is None:
            raise DataError("got an empty pool, expected inputs in it; call `add` before drawing")
        return self._inputs

    def _labelled(self) -> Rows:
        if self._labels is None:
            raise DataError("got a pool without labels, expected labels; hand them to every `add`")
        return self._labels

    def _classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row numbers sorted by class, and per class how many there are and where they start."""
        if self._by_class is None:
            labels = self._labelled().between(0, len(self))
            counts = torch.bincount(labels)
            self._by_class = labels.argsort(stable=True), counts, counts.cumsum(0) - counts
        return self._by_class

    def _index(self, count: int, rng: torch.Generator) -> Tensor:
        return torch.randint(len(self), (count,), generator=rng, device=rng.device)

    def _stored(self, inputs: Tensor) -> Tensor:
        if self.spec is None:
            return inputs
        return self.spec.denormalize(inputs.float()).mul(255).round().to(torch.uint8)

    def _drawn(self, stored: Tensor, rng: torch.Generator) -> Tensor:
        rows = stored.to(rng.device)
        return rows if self.spec is None else self.spec.normalize(rows.float() / 255)
