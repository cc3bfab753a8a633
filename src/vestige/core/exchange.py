"""What processes exchange: sums of tensors with gradient, and statistics made of them.

Nothing here decides who takes part; `core.parallel` does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from vestige.core.moments import channel_moments
from vestige.errors import ProcessError

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shard:
    """Which rows of a batch this process computes.

    Attributes:
        rank: number of this process.
        world: number of processes.
        rows: of the whole batch; at least `world`.
    """

    rank: int
    world: int
    rows: int

    @property
    def own(self) -> slice:
        """The rows of this process; those of rank r + 1 follow on those of rank r."""
        return slice(self.rows * self.rank // self.world, self.rows * (self.rank + 1) // self.world)

    @property
    def count(self) -> int:
        """Number of rows of this process, at least 1."""
        return int(self.own.stop - self.own.start)


class _AllSum(torch.autograd.Function):
    """Sum over the processes; so is its gradient."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        total = values.detach().clone(memory_format=torch.contiguous_format)
        reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing to remember."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_sum(gradient)


def all_sum(values: Tensor) -> Tensor:
    """Sum over the processes, with gradient."""
    total: Tensor = _AllSum.apply(values)  # type: ignore[no-untyped-call]
    return total


def moments(values: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values per channel over the whole batch."""
    values = wide(values)
    number = values.numel() // values.shape[1]
    if number:
        mean, var, _ = channel_moments(values)
    else:
        # A variance of nothing is NaN; the graph must be there, or backward waits for ever.
        mean = var = values.sum(but_channels(values))
    parts, counts = stacked(torch.stack([mean, var]), mean.new_tensor(number), shard)
    shares = (counts / counts.sum()).view(-1, 1)
    means, variances = parts[:, 0], parts[:, 1]
    mean = (shares * means).sum(0)
    # Deviations from the common mean, not sums of squares, which cancel in float32.
    var = (shares * (variances + (means - mean).square())).sum(0)
    return mean, var, counts.sum()


def stacked(values: Tensor, count: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """`values` of every process as (world, ...), and `count` of every process as (world,)."""
    own = torch.cat([values.reshape(-1), count.view(1)])[None]
    rows = all_sum(_placed(own, shard.rank, shard.world - shard.rank - 1))
    return rows[:, :-1].reshape(shard.world, *values.shape), rows[:, -1].detach()


def gathered(values: Tensor, shard: Shard) -> Tensor:
    """`values` of all processes in order, (b, ...) each with its own b, as (B, ...)."""
    if values.dtype is torch.bool:
        return gathered(values.to(torch.uint8), shard).bool()
    sizes = torch.zeros(shard.world, dtype=torch.int64, device=host())
    sizes[shard.rank] = len(values)
    reduce(sizes)
    counts = sizes.tolist()
    before, after = sum(counts[: shard.rank]), sum(counts[shard.rank + 1 :])
    return all_sum(_placed(values, before, after))


def _placed(rows: Tensor, before: int, after: int) -> Tensor:
    """`rows` with rows of zeros around them: a sum over processes puts them side by side."""
    rest = rows.shape[1:]
    return torch.cat([rows.new_zeros(before, *rest), rows, rows.new_zeros(after, *rest)])


def but_channels(values: Tensor) -> list[int]:
    """All dimensions but the second."""
    return [dim for dim in range(values.dim()) if dim != 1]


def wide(values: Tensor) -> Tensor:
    """`values` in a precision that sums can be formed in."""
    # bfloat16 has 8 bits of mantissa: it can neither count rows nor hold a variance.
    return values.float() if values.dtype in _HALVES else values


def host() -> torch.device:
    """Where small numbers are exchanged: on the CPU, unless the group can only do it on GPUs."""
    on_cpu = "cpu:" in str(dist.get_backend_config())
    return torch.device("cpu" if on_cpu else "cuda")


def reduce(values: Tensor, by: Any = None) -> None:
    """Replace `values`, contiguous, by their sum, or by what `by` makes of them; no gradient."""
    try:
        dist.all_reduce(values, dist.ReduceOp.SUM if by is None else by)
    except RuntimeError as error:
        raise lost(error) from error


def broadcast(values: list[Any]) -> None:
    """Fill `values`, picklable, with those of the first process."""
    try:
        dist.broadcast_object_list(values, src=0, device=host())
    except RuntimeError as error:
        raise lost(error) from error


def lost(error: RuntimeError) -> ProcessError:
    """What is raised when the others do not answer."""
    return ProcessError(
        f"another process of this run has stopped or does something else ({error}); the message of "
        "the one that stopped first says why"
    )
