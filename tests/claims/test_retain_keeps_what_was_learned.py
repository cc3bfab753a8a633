"""A source that is scripted to move on makes the student forget; Retain keeps more than replay."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vestige
from vestige.core.types import InputSpec
from vestige.models.factory import build_model
from vestige.recipes.examples import load_examples

SPEC = InputSpec.image(1, 16, 16, mean=(0.3058,), std=(0.3193,))
PHASE = 300  # student updates


class MovesOn:
    """Digits below 5 for `PHASE` draws, then the others."""

    origin = "real"
    name = "digits, one half after the other"
    paths: tuple[Path, ...] = ()

    def __init__(self) -> None:
        inputs, labels = load_examples("digits", SPEC, split="train")
        self.halves = (inputs[labels < 5], inputs[labels >= 5])
        self.draws = 0

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        half = self.halves[min(self.draws // PHASE, 1)]
        self.draws += 1
        return half[torch.randint(len(half), (count,), generator=rng)]


def scores(teacher: nn.Module, seed: int, **retain: object) -> tuple[float, float]:
    """Accuracy on the digits that came first and on those that came last."""
    torch.manual_seed(seed)
    student = build_model("convnet", SPEC, 10, widths=[6, 12, 24])
    # The bank reaches back over the whole run, as it does in runs of many rounds.
    config = {"inner_lr": 0.1, "pushes": 10, **retain}
    vestige.distill(
        teacher,
        student,
        method="kd",
        spec=SPEC,
        num_classes=10,
        config={
            "rounds": 20,
            "iterations": PHASE // 10,
            "batch_size": 64,
            "loss": "l1",
            "student_optimizer": "adam",
            "student_lr": 2e-3,
            "student_weight_decay": 0,
            "schedule": "constant",
        },
        plugins=[("retain", config)] if retain else [],
        sources={"inputs": MovesOn()},
        seed=seed,
        device="cpu",
        progress=False,
    )
    inputs, labels = load_examples("digits", SPEC, split="test")
    with torch.no_grad():
        right = (student.eval()(inputs).argmax(1) == labels).double()
    return float(right[labels < 5].mean()), float(right[labels >= 5].mean())


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return vestige.load_teacher("builtin:digits-convnet").eval()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_retain_keeps_more_than_replay_with_the_same_memory_and_steps(teacher, seed):
    plain = scores(teacher, seed)
    replay = scores(teacher, seed, meta="none")
    first_order = scores(teacher, seed, meta="first-order")
    full = scores(teacher, seed, meta="full")
    assert plain[0] + 0.2 < replay[0] < min(first_order[0], full[0])
    # What it costs on the new ones is less than what forgetting costs.
    assert sum(full) > sum(plain) + 0.3
    assert min(first_order[1], full[1]) > 0.85
