"""Devices, threads, memory, and gradients over processes."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from vestige.errors import RecipeError
from vestige.training import runtime


def _average(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    first.grad = torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)
    # Only one process has a gradient here; both must still take part.
    second.grad = torch.ones(2) if rank == 0 else None
    runtime.average_gradients([first, second])
    torch.save([first.grad, second.grad], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gradients_are_averaged_over_processes(tmp_path):
    torch.multiprocessing.spawn(_average, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        first, second = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(first, torch.tensor([1.5, 3.0, 4.5]))
        assert torch.equal(second, torch.tensor([0.5, 0.5]))


def test_alone_gradients_stay_as_they_are():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    runtime.average_gradients([parameter])
    assert torch.equal(parameter.grad, torch.tensor([1.0, 2.0]))


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(RecipeError, match="expected auto, cpu, cuda"):
        runtime.device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="sees no GPU"):
            runtime.device("cuda")
        assert runtime.device("auto") == torch.device("cpu")


def test_threads_are_put_back_even_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), runtime.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_machine_names_no_host_and_no_user():
    assert set(runtime.machine()) == {"system", "processor", "cores", "gpu"}
    assert {"python", "vestige", "torch", "numpy"} == set(runtime.versions())


FREED = """
import resource, torch
from vestige.training import runtime
if {keep}:
    assert runtime.keep_memory()
for _ in range(12):
    torch.ones(2**24)  # 64 MiB, more than glibc keeps by itself
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept():
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(keep, **more):
        command = [sys.executable, "-c", FREED.format(keep=keep)]
        done = subprocess.run(
            command, env={**env, **more}, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    # Without, each block is faulted in anew.
    assert faults(keep=True) * 4 < faults(keep=False)


def test_whoever_tuned_malloc_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert runtime.keep_memory.__wrapped__() is False
