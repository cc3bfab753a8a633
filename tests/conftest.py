"""Shared set-up: threads, seeds, shape checks of losses, tiny networks, the data folder."""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

# The networks are too small to gain from two threads, and where other processes run, too, threads
# that wait for one another make a test eight times slower.
THREADS = 1
torch.set_num_threads(THREADS)
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

LONGEST = ("test_readme.py", "test_docs.py", "test_defaults.py", "test_cli.py")

# Must run before the first import of a loss; users never pay for it.
jaxtyping.install_import_hook("vestige.losses", "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and thereby show, GPU tests where there is no GPU; the longest tests go first."""
    # At the end they would run alone, with the other processes idle.
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same global generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def program(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """The command line's `main`: gives exit code, stdout and stderr, in an empty folder."""
    # After the import hook above.
    from vestige.cli import main as cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str, str]:
        words = list(map(str, arguments))
        monkeypatch.setattr(sys, "argv", ["vestige", *words])
        with pytest.raises(SystemExit) as left:
            cli.main(words)
        signal.signal(signal.SIGTERM, handler)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(left.value.code or 0), out, err

    return call


def _network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 3),
    )


@pytest.fixture
def tiny_teacher() -> nn.Sequential:
    """A frozen network of 195 weights on (1, 8, 8) with 3 classes and BatchNorm, in eval mode.

    Its running statistics are neither 0 nor 1, so that code that confuses them is caught.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = _network(8)
        norm = teacher[1]
        assert isinstance(norm, nn.BatchNorm2d)
        norm.running_mean = torch.randn(8) * 0.3
        norm.running_var = torch.rand(8) + 0.5
    return teacher.eval().requires_grad_(False)


@pytest.fixture
def tiny_student() -> nn.Sequential:
    """A trainable network of 75 weights with the teacher's inputs and classes, in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return _network(3)


@pytest.fixture
def dropout_student() -> nn.Sequential:
    """`tiny_student` with dropout before its last layer: a network that draws while it trains."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = _network(3)
    network.insert(5, nn.Dropout(0.3))
    return network


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data sets; skips where there is none."""
    folder = os.environ.get("VESTIGE_DATA")
    if not folder:
        pytest.skip("needs real data: set VESTIGE_DATA to a folder of data sets")
    if not Path(folder).is_dir():
        pytest.skip(f"needs real data: VESTIGE_DATA names {folder}, which is no folder")
    return Path(folder)
