"""Devices, processes and memory: what a run needs to know of the machine."""

import atexit
import ctypes
import logging
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from vestige.core import parallel
from vestige.errors import TOLD_ELSEWHERE, TOLD_HERE, ProcessError, RecipeError

P = ParamSpec("P")
R = TypeVar("R")
# The first process may train a teacher while the others wait; who is gone is noticed at once.
_PATIENCE = timedelta(hours=6)
# Numbers per message between processes: 32 MiB in float32.
_BUCKET = 2**23


def device(name: str) -> torch.device:
    """The device that `name` stands for; "auto" takes a GPU if there is one.

    Of several processes each takes a GPU of its own.

    Raises:
        RecipeError: a GPU is asked for and there is none, or the name is not known.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available() and parallel.world() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"got device {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"got device {name!r}, but torch sees no GPU; set trainer.device: auto")
    if found.type == "cuda" and parallel.world() > 1:
        raise RecipeError(
            f"got device {name!r} for {parallel.world()} processes, expected one for each; set "
            "trainer.device: auto"
        )
    return found


def launched() -> int:
    """Number of processes that torchrun started this one with; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def processes(name: str) -> Iterator[None]:
    """Let the processes that torchrun started work together inside the block; alone, do nothing.

    They stay together afterwards, until the program ends or an error leaves the block.

    Args:
        name: of the device, as for `device`.

    Raises:
        RecipeError: the device cannot be shared by several processes, or there are too few.
        ProcessError: an error parted them before.
    """
    if launched() == 1:
        yield
        return
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(
            f"got device {name!r} for {launched()} processes, expected one for each; set "
            "trainer.device: auto"
        )
    if parallel.world() == 1:
        _join(device(name).type == "cuda", int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if parallel.world() == 1:
        raise ProcessError("the processes of this program parted after an error; start it again")
    try:
        yield
    except BaseException as error:
        # All may fail at the same thing, and one says so.
        here = parallel.says(f"{type(error).__name__}: {error}")
        error.add_note(TOLD_HERE if here else TOLD_ELSEWHERE)
        # Or the others would wait for this one, if it goes on with something else.
        if _join.cache_info().currsize:
            _leave_group()
        raise


@cache
def _join(gpu: bool, local: int) -> None:
    """Meet the other processes; once, since torchrun's meeting place is good for one meeting."""
    if gpu and torch.cuda.device_count() < local:
        raise RecipeError(
            f"got {local} processes on a machine with {torch.cuda.device_count()} GPUs, expected "
            "at most one for each; lower --nproc-per-node or set trainer.device: cpu"
        )
    # Six seconds, so only where it is needed.
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    # Small numbers go through gloo, so that nobody waits for a GPU on their account.
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    fabric = Fabric(
        accelerator="cuda" if gpu else "cpu",
        devices=local,
        num_nodes=launched() // local,
        # Only for devices and the group: its wrapper would not see what a loss does by itself.
        strategy=DDPStrategy(process_group_backend=backend, timeout=_PATIENCE),
    )
    fabric.launch()
    # Threads of gloo that outlive the interpreter abort the process.
    atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def with_processes(function: Callable[P, R]) -> Callable[P, R]:
    """`function` in `processes` of the device that its keyword `device` names."""

    @wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> R:
        with processes(str(named.get("device", "auto"))):
            return function(*args, **named)

    return call


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def keep_memory() -> bool:
    """Let the C library keep the memory that torch frees on the CPU; once a process.

    glibc hands large blocks back at every `free`, and the system fills them with zeros when the
    next layer asks again: a tenth of a DFAD round's time on WRN-40-2 with batch 64. Up to 2 GiB
    stay with the process. Whoever set glibc's own variables for this has decided already.

    Returns:
        Whether it was done; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, 2**31 - 1))


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Average gradients over the processes of a torch.distributed group; alone, do nothing.

    A parameter without gradient in some processes counts there as 0; without one in any it keeps
    none, so that optimizers pass it over as they would in one process.
    """
    count = parallel.world()
    if count == 1:
        return
    for bucket in _buckets(params):
        grads = [parameter.grad for parameter in bucket]
        flat = torch.cat(
            [
                parameter.new_zeros(parameter.numel()) if grad is None else grad.flatten()
                for parameter, grad in zip(bucket, grads, strict=True)
            ]
            + [bucket[0].new_tensor([float(grad is not None) for grad in grads])]
        )
        parallel.sum_in_place(flat)
        had = flat[-len(bucket) :]
        flat[: -len(bucket)] /= count
        means = flat[: -len(bucket)].split([parameter.numel() for parameter in bucket])
        for index, (parameter, mean) in enumerate(zip(bucket, means, strict=True)):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view(parameter.shape))
            elif had[index]:
                parameter.grad = mean.view(parameter.shape).clone()


def _buckets(params: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one kind that are reduced together: few messages, little extra memory."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in params:
        other = bucket and (bucket[0].dtype, bucket[0].device) != (
            parameter.dtype,
            parameter.device,
        )
        if bucket and (other or size > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def peak_memory_mib(where: torch.device) -> float:
    """The largest amount of memory this process has held, on the GPU if it ran there."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> dict[str, Any]:
    """What the run ran on, without anything that names a user or a host."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("vestige", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
