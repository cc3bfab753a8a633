"""Several processes that run one program: whose rows are whose, and sums over all of them.

Every process runs the whole program with the same seeds, so what is drawn and computed outside of
an update is the same everywhere. Inside an update the batch is cut by rows: `sharded` says so while
it is open, and only then do the functions here (means, moments and rows of the whole batch) talk to
the other processes. Alone, and outside, they are the plain thing. All of them are differentiable,
as often as one likes: the gradient that a process gets is that of the sum of the losses of all
processes, so averaged over the processes it is the gradient of their mean.

What runs inside `sharded` must take the same branches in every process, since each call here waits
for the others.
"""

import hashlib
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vestige.core import exchange
from vestige.core.exchange import Shard
from vestige.core.moments import channel_moments
from vestige.errors import ProcessError

T = TypeVar("T")
_open: ContextVar[Shard | None] = ContextVar("shard", default=None)


def world() -> int:
    """Number of processes that run this program together."""
    return int(dist.get_world_size()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(dist.get_rank()) if dist.is_available() and dist.is_initialized() else 0


def first(act: Callable[[], T]) -> T:
    """What `act` gives in the first process; the others wait for it and do not call it.

    So a file that `act` writes is there for all of them afterwards. An error is raised in every
    process. What `act` gives must be picklable, and nothing in it may talk to other processes.
    """
    if world() == 1:
        return act()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = act()
        except BaseException as error:
            exchange.broadcast([None, _portable(error)])
            raise
    exchange.broadcast(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def once(act: Callable[[], T]) -> T:
    """What `act` gives, where each call costs: outside of `sharded` only one process asks."""
    return act() if _open.get() is not None else first(act)


def _portable(error: BaseException) -> BaseException:
    """The error, or what it says where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PicklingError, AttributeError, TypeError):
        return ProcessError(f"{type(error).__name__} in the first process: {error}")
    return error


def differs(number: int) -> bool:
    """Whether `number`, below 2^62, is not the same in all processes."""
    if world() == 1:
        return False
    ends = torch.tensor([number, -number], device=exchange.host())
    exchange.reduce(ends, dist.ReduceOp.MAX)
    return int(ends[0]) != -int(ends[1])


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if world() == 1:
        return flag
    flags = torch.tensor(int(flag), device=exchange.host())
    exchange.reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


@contextmanager
def sharded(rows: int) -> Iterator[Shard | None]:
    """Cut a batch of `rows` rows over the processes inside the block.

    BatchNorm layers in train mode then normalise by the statistics of the whole batch, and move
    their running statistics with them, whatever network they are part of.

    Yields:
        The part of this process; None where there is nothing to share: alone, or when there are
        fewer rows than processes, each of which then computes the whole batch.
    """
    if world() == 1 or rows < world():
        yield None
        return
    shard = Shard(rank(), world(), rows)
    token = _open.set(shard)
    try:
        with _WholeBatchNorm(shard):
            yield shard
    finally:
        _open.reset(token)


def batch_mean(values: Tensor) -> Tensor:
    """Mean over the rows of the whole batch.

    Args:
        values: (b, ...), the rows of this process; any number of them.

    Returns:
        (...), the same in every process, with gradient.
    """
    shard = _open.get()
    if shard is None:
        return values.mean() if values.dim() == 1 else values.mean(0)
    wide = exchange.wide(values)
    count = wide.new_tensor([len(wide)])
    sums = exchange.all_sum(torch.cat([wide.sum(0).reshape(-1), count]))
    return (sums[:-1] / sums[-1]).reshape(values.shape[1:]).to(values.dtype)


def batch_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over the whole batch, and means of single rows.

    Args:
        values: (b, C, ...), the rows of this process.

    Returns:
        Mean (C,) and variance (C,) over rows and positions, the same in every process, and the
        means (b, C) over positions of the rows of this process; all with gradient.
    """
    shard = _open.get()
    if shard is None:
        return channel_moments(values)
    mean, var, _ = exchange.moments(values, shard)
    return mean, var, values.flatten(2).mean(2) if values.dim() > 2 else values


def batch_log_mean_exp(values: Tensor) -> Tensor:
    """Log of the mean of exp(values) over the rows of the whole batch, without leaving log space.

    Args:
        values: (b, ...), the rows of this process, finite.

    Returns:
        (...), the same in every process, with gradient.
    """
    shard = _open.get()
    if shard is None:
        return torch.logsumexp(values, 0) - math.log(len(values))
    wide = exchange.wide(values)
    sums, counts = exchange.stacked(torch.logsumexp(wide, 0), wide.new_tensor(len(wide)), shard)
    return (torch.logsumexp(sums, 0) - counts.sum().log()).to(values.dtype)


def batch_rows(values: Tensor, *, own_first: bool = False) -> Tensor:
    """All rows of the whole batch, for terms that compare each row with each other.

    Args:
        values: (b, ...), the rows of this process; any number of them.
        own_first: begin with the rows of this process, and go round; else all are in order.

    Returns:
        (B, ...), in order the same in every process, with gradient.
    """
    shard = _open.get()
    if shard is None:
        return values
    rows = exchange.gathered(values, shard)
    return rows.roll(-shard.own.start, 0) if own_first else rows


def rows_of_all(count: int) -> int:
    """Rows of the whole batch that stand behind `count` rows of this process.

    Exact for whatever has a fixed number of rows for each row of the batch.
    """
    shard = _open.get()
    return count if shard is None else round(count * shard.rows / shard.count)


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Means over the processes of a few scalars, without gradient; exact where all are equal."""
    if world() == 1 or not tensors:
        return list(tensors)
    # Not every device has float64.
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    values = torch.stack([tensor.detach().to(wide) for tensor in tensors])
    exchange.reduce(values)
    means = values / world()
    return [mean.to(tensor.dtype) for mean, tensor in zip(means, tensors, strict=True)]


def share(tensors: Iterable[Tensor]) -> None:
    """Fill `tensors` with what the first process holds; no gradient."""
    if world() == 1:
        return
    for tensor in tensors:
        values = tensor.detach().contiguous()
        try:
            dist.broadcast(values, src=0)
        except RuntimeError as error:
            raise exchange.lost(error) from error
        tensor.detach().copy_(values)


def says(message: str) -> bool:
    """Whether this process is the first that has `message` to tell; all of them may have it."""
    if world() == 1:
        return True
    key = hashlib.sha256(message.encode()).hexdigest()
    try:
        told: int = dist.distributed_c10d._get_default_store().add(f"vestige/{key}", 1)
        return told == 1
    except RuntimeError:
        # Who kept the account is gone; better twice than never.
        return True


def sum_in_place(values: Tensor) -> None:
    """Replace `values`, contiguous, by their sum over the processes; no gradient."""
    exchange.reduce(values)


class _WholeBatchNorm(TorchFunctionMode):
    """Lets `batch_norm` in train mode see the whole batch; layers stay what they are."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        # Kept here: a recomputed forward may run in a thread that knows no context variable.
        self._shard = shard

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return self._functional(*args, **(kwargs or {}))
        if func is torch.batch_norm:
            return self._native(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _functional(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        running = (running_mean, running_var)
        if not training:
            return F.batch_norm(input, *running, weight, bias, False, momentum, eps)
        return _normalized(input, running, weight, bias, momentum, eps, self._shard)

    def _native(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        running = (running_mean, running_var)
        return self._functional(input, *running, weight, bias, training, momentum, eps)


def _normalized(
    values: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    shard: Shard,
) -> Tensor:
    """Batch normalisation by the statistics of the whole batch, as torch does it alone."""
    mean, var, count = exchange.moments(values, shard)
    running_mean, running_var = running
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = var * (count / (count - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1) + (1,) * (values.dim() - 2)
    return (values * scale.view(shape) + shift.view(shape)).to(values.dtype)
