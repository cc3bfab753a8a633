"""What every method holds that serves dense prediction, beside what `test_all` asks of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vestige.core.protocols import Source
from vestige.core.types import InputSpec
from vestige.models.segmentation import EncoderDecoder
from vestige.recipes.build import build_method
from vestige.recipes.catalog import METHODS
from vestige.sources.images import TensorSource
from vestige.tasks.segmentation import Segmentation
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

# Not square, so that height and width cannot be confused.
SPEC = InputSpec.image(3, 8, 12, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CLASSES = 4
SMALL = {
    "rounds": 2,
    "iterations": 2,
    "student_steps": 2,
    "batch_size": 4,
    "generator": "pyramid",
    "generator_head": "sigmoid",
    "generator_width": 4,
    "latent_dim": 6,
    "discriminator_width": 4,
}
NAMES = [n for n in METHODS.names() if "segmentation" in METHODS.get(n).requires.tasks]


class InADict(nn.Module):
    """Answers as torchvision's networks do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"out": self.network(inputs), "aux": inputs}


@pytest.fixture
def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    teacher = EncoderDecoder(3, CLASSES, widths=(4, 6))
    with torch.no_grad():
        for _ in range(3):
            teacher(torch.randn(8, *SPEC.shape))  # statistics that are neither 0 nor 1
    return teacher.eval().requires_grad_(False), EncoderDecoder(3, CLASSES, widths=(3, 4))


def trainer(name: str, teacher: nn.Module, student: nn.Module, out: Path | None = None) -> Trainer:
    method = METHODS.get(name)
    fields = method.Config.model_fields
    cfg = method.Config(**{key: value for key, value in SMALL.items() if key in fields})
    task, wrapped = Segmentation(SPEC, CLASSES), WhiteBoxTeacher(teacher)
    rng = torch.Generator().manual_seed(1)
    images = SPEC.normalize(torch.rand(6, *SPEC.shape, generator=rng))
    sources: dict[str, Source] = {
        needed: TensorSource(images, origin="foreign", name="given")
        for needed in method.requires.sources
    }
    built = build_method(name, cfg, task, [wrapped], student, sources, 0)
    masks = torch.randint(CLASSES, (6, *SPEC.shape[1:]), generator=rng)
    return Trainer(
        built,
        task,
        teachers=[wrapped],
        student=student,
        sources=sources,
        evaluate=lambda model: task.evaluate(model, (images, masks)),
        out=out,
        config=TrainerConfig(device="cpu", log_every=1),
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_dfad_kd_and_mosaickd_serve_it():
    assert {"dfad", "kd", "mosaickd"} <= set(NAMES)


@pytest.mark.parametrize("wrap", [lambda network: network, InADict], ids=["logits", "dict"])
@pytest.mark.parametrize("name", NAMES)
def test_two_rounds_train_the_student_and_leave_the_teacher(name, wrap, networks):
    teacher, student = (wrap(network) for network in networks)
    before = weights(teacher), weights(student)
    outcome = trainer(name, teacher, student).run()
    assert outcome.complete
    assert same(before[0], weights(teacher))
    assert not same(before[1], weights(student))
    assert all(torch.isfinite(value).all() for value in weights(student).values())
    assert 0 <= outcome.scores[-1]["miou"] <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(name, networks, tmp_path):
    def run(out: Path, resume: bool = False, callbacks: Any = ()) -> dict[str, Tensor]:
        student = copy.deepcopy(networks[1])
        made = trainer(name, networks[0], student, out)
        made.callbacks.extend(callbacks)
        made.run(resume=resume)
        return weights(student)

    class Killed(Exception):
        pass

    def kill(event: Any) -> None:
        if event.kind == "round":
            raise Killed

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", callbacks=[kill])
    assert same(whole, run(tmp_path / "killed", resume=True))
