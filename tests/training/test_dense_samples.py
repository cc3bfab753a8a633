"""What is kept and shown of inputs to which the teacher answers pixel by pixel."""

from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import Tensor

from vestige.core.protocols import Progress
from vestige.core.types import InputSpec, Loss, Prediction, Result, Step
from vestige.tasks.classification import Classification
from vestige.training.moments import NO_CLASS
from vestige.training.outcome import Outcome
from vestige.training.summary import write_samples, write_samples_over_time
from vestige.training.tracking.metrics import MetricsFile
from vestige.training.watch import Watch

SPEC = InputSpec.image(1, 4, 6)
TASK = Classification(SPEC, 3)


def seen(images: Tensor, *, dense: bool, rounds: int = 1) -> Watch:
    """A watch that saw a student update on each of the images' batches."""
    watch = Watch(TASK)
    shape = (len(images), 3, 4, 6) if dense else (len(images), 3)
    answers = Prediction(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    for number in range(1, rounds + 1):
        loss = Loss({}, torch.zeros(()), SPEC.normalize(images), answers, answers)
        watch.observe(Step("student", loss), number)
        progress = Progress(loop="train", round=number, steps=number)
        watch.log(MetricsFile(None), progress, 0.0, 0)
        watch.end_round(None, MetricsFile(None), progress, 0.0)
    return watch


def outcome(watch: Watch) -> Outcome:
    return Outcome(
        Result("student", None),
        [],
        samples=watch.latest_samples(),
        moments=watch.moments.chosen(),
    )


def test_inputs_with_a_class_per_pixel_are_kept_without_one() -> None:
    images = torch.rand(5, 1, 4, 6)
    kept, classes = seen(images, dense=True).latest_samples()
    torch.testing.assert_close(SPEC.denormalize(kept), images)
    assert classes.tolist() == [NO_CLASS] * 5
    _, classes = seen(images, dense=False).latest_samples()
    assert set(classes.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("count", [3, 47])
def test_the_latest_of_them_are_shown_in_order(count: int, tmp_path: Path) -> None:
    images = (torch.arange(count) / 255).view(-1, 1, 1, 1).expand(-1, 1, 4, 6)
    assert write_samples(tmp_path, outcome(seen(images, dense=True)), TASK, ("a", "b", "c"))
    sheet = matplotlib.image.imread(tmp_path / "samples.png")[..., 0]
    # Enlarged to as many whole times as 64 pixels hold, ten in a row, two pixels of gap.
    height, width = 40, 60
    shown = min(count, 30)
    assert sheet.shape == (2 + -(-shown // 10) * (height + 2), 2 + min(10, shown) * (width + 2))
    values = [
        round(255 * float(sheet[2 + (height + 2) * (index // 10), 2 + (width + 2) * (index % 10)]))
        for index in range(shown)
    ]
    assert values == list(range(count - shown, count))


def test_moments_without_classes_leave_no_room_for_captions(tmp_path: Path) -> None:
    images = torch.rand(5, 1, 4, 6)
    sizes = {}
    for dense in (True, False):
        found = outcome(seen(images, dense=dense, rounds=3))
        assert write_samples_over_time(tmp_path, found, ("a", "b", "c"))
        sizes[dense] = matplotlib.image.imread(tmp_path / "samples-over-time.png").shape[:2]
    # A heading, and four rows of 4x6 pixels, 21 times enlarged.
    assert sizes[True] == (8 + 22 + 4 * (84 + 8), 8 + 3 * (126 + 8))
    assert sizes[False] != sizes[True]
