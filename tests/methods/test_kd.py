"""The reference arms: what KD minimises, from what, and with how little access."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vestige.core.types import Access, Batch, InputSpec
from vestige.errors import AccessError, RecipeError
from vestige.methods.kd import KD, KDConfig
from vestige.models.generators import UpsampleGenerator
from vestige.recipes.requirements import check_requirements
from vestige.sources.generator import GeneratorSource
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
TASK = Classification(SPEC, 3)


def make(teacher: Any, student: nn.Module, source: Any = None, **settings: Any) -> KD:
    cfg = KDConfig(**{"rounds": 2, "iterations": 3, "batch_size": 8, **settings})
    return KD(cfg, TASK, [teacher], student, {"inputs": source or NoiseSource(SPEC)})


def train(method: KD, **given: Any) -> Any:
    trainer = Trainer(
        method,
        TASK,
        teachers=[method.teacher],
        student=method.student,
        config=TrainerConfig(device="cpu"),
        **given,
    )
    return trainer.run()


class Fixed(nn.Module):
    """Answers with given logits, whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.logits


def loss_of(s: torch.Tensor, t: torch.Tensor, **settings: Any) -> float:
    method = make(WhiteBoxTeacher(Fixed(t)), Fixed(s), **settings)
    inputs = torch.zeros(len(s), 1, 8, 8)
    return method.imitation(method.student, Batch(inputs=inputs)).total.item()


def logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(5, 4, generator=rng, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_the_loss_is_hintons(temperature):
    s, t = logits()

    def soft(row: np.ndarray) -> np.ndarray:
        weights = [math.exp(value / temperature) for value in row]
        return np.array(weights) / sum(weights)

    slow = 0.0
    for i in range(5):
        p, q = soft(t[i].numpy()), soft(s[i].numpy())
        for k in range(4):
            slow += p[k] * math.log(p[k] / q[k])
    slow = slow / 5 * temperature**2
    # Two float64 routes to one number.
    assert loss_of(s, t, temperature=temperature) == pytest.approx(slow, rel=1e-10)


def test_at_high_temperature_it_matches_logits():
    # Hinton et al., eq. 4: for T much larger than the logits, half the mean square of the centred
    # differences; the next order is the logits' size over T, here 1e-3.
    s, t = logits()
    difference = s - t
    centred = difference - difference.mean(1, keepdim=True)
    limit = float((centred.square().sum(1) / (2 * 4)).mean())
    assert loss_of(s, t, temperature=1e4) == pytest.approx(limit, rel=1e-2)
    shifted = loss_of(s + 7, t, temperature=1e4)
    assert shifted == pytest.approx(loss_of(s, t, temperature=1e4), rel=1e-6)


def test_at_low_temperature_only_the_teachers_class_counts():
    s, t = logits()
    temperature = 1e-3
    gaps = s.max(1).values - s.gather(1, t.argmax(1, keepdim=True)).squeeze(1)
    assert float(gaps.mean()) > 0.5
    # KL -> gap / T where the student's order differs, 0 where it does not.
    found = loss_of(s, t, temperature=temperature) / temperature
    assert found == pytest.approx(float(gaps.mean()), rel=1e-6)


def test_l1_is_dfads_loss():
    s, t = logits()
    slow = np.abs(s.numpy() - t.numpy()).mean()
    assert loss_of(s, t, loss="l1") == pytest.approx(slow, rel=1e-12)
    assert loss_of(s, t, loss="l1", temperature=9) == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize("loss", ["kl", "l1"])
def test_a_student_that_equals_the_teacher_is_left_alone(loss):
    _, t = logits()
    # KL of equal distributions rounds to within 1e-15 of 0.
    assert loss_of(t, t, loss=loss) == pytest.approx(0, abs=1e-14)


def test_gradient_flows_to_the_student_alone(tiny_teacher, tiny_student):
    method = make(WhiteBoxTeacher(tiny_teacher), tiny_student)
    inputs = torch.randn(8, 1, 8, 8, requires_grad=True)
    loss = method.imitation(tiny_student, Batch(inputs=inputs))
    assert not loss.teacher.logits.requires_grad
    loss.total.backward()
    assert all(parameter.grad is not None for parameter in tiny_student.parameters())
    assert all(parameter.grad is None for parameter in tiny_teacher.parameters())


def test_inputs_come_from_the_source_and_nowhere_else(tiny_teacher, tiny_student):
    rows = torch.randn(5, 1, 8, 8)
    source = TensorSource(rows, origin="foreign", name="five")
    seen: list[torch.Tensor] = []
    teacher = WhiteBoxTeacher(tiny_teacher)
    teacher.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    train(make(teacher, tiny_student, source))
    known = {tuple(row.flatten().tolist()) for row in rows}
    asked = {tuple(row.flatten().tolist()) for batch in seen for row in batch}
    assert len(seen) == 6
    # 48 draws from 5 rows: all of them turn up, with probability of missing one below 2e-4.
    assert asked == known


def test_both_networks_see_the_inputs_through_the_same_views(tiny_teacher, tiny_student):
    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    method = make(
        WhiteBoxTeacher(tiny_teacher),
        tiny_student,
        TensorSource(images, origin="foreign", name="one"),
        recolour=0.5,
        turn=45,
    )
    seen: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    for name, net in (("teacher", method.teacher), ("student", method.student)):
        net.register_forward_hook(
            lambda module, args, output, to=seen[name]: to.append(args[0].clone())
        )
    train(method)
    updates = [batch for batch in seen["teacher"] if len(batch) == 8]
    assert len(updates) == 6
    assert all(any(torch.equal(batch, other) for other in seen["student"]) for batch in updates)
    # One image, of which no two views are alike.
    assert len(torch.cat(updates).unique(dim=0)) == 48


def test_views_of_what_is_no_image_are_refused(tiny_teacher, tiny_student):
    task = Classification(InputSpec("embedding", (7,)), 3)
    source = TensorSource(torch.rand(4, 7), origin="foreign", name="rows")
    with pytest.raises(RecipeError, match=r"got \{'recolour': 0\.5\} for embedding inputs"):
        KD(
            KDConfig(recolour=0.5),
            task,
            [WhiteBoxTeacher(tiny_teacher)],
            tiny_student,
            {"inputs": source},
        )


def test_it_learns_what_the_inputs_show(tiny_teacher, tiny_student):
    method = make(
        WhiteBoxTeacher(tiny_teacher), tiny_student, rounds=4, iterations=40, batch_size=32
    )
    inputs = torch.randn(256, 1, 8, 8)

    def distance() -> float:
        return (tiny_student.eval()(inputs) - tiny_teacher(inputs)).abs().mean().item()

    before = distance()
    train(method)
    # Measured 0.43 of it; 75 weights cannot follow 195 much closer. Without learning it stays at 1.
    assert distance() < 0.6 * before


def test_a_source_with_state_is_part_of_the_run(tiny_teacher, tiny_student):
    teacher = WhiteBoxTeacher(tiny_teacher)
    assert set(make(teacher, tiny_student).parts()) == {"student"}
    source = GeneratorSource(UpsampleGenerator(8, 1, 8, width=4))
    parts = make(teacher, tiny_student, source).parts()
    assert set(parts) == {"student", "source"}
    assert parts["source"] is source


def test_a_generator_source_resumes_with_its_running_statistics(
    tiny_teacher, dropout_student, tmp_path
):
    def run(out, stop: int | None, resume: bool = False) -> Any:
        torch.manual_seed(4)
        source = GeneratorSource(UpsampleGenerator(8, 1, 8, width=4))
        student = copy.deepcopy(dropout_student)
        steps: list[int] = []

        def callback(event: Any) -> None:
            steps.append(event.kind == "step")
            if sum(steps) == stop:
                raise InterruptedError

        method = make(WhiteBoxTeacher(copy.deepcopy(tiny_teacher)), student, source)
        trainer = Trainer(
            method,
            TASK,
            teachers=[method.teacher],
            student=student,
            out=out,
            config=TrainerConfig(device="cpu", log_every=1),
            callbacks=[callback],
        )
        trainer.run(resume=resume)
        return {**source.state_dict(), **student.state_dict()}

    whole = run(tmp_path / "whole", None)
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", 5)
    resumed = run(tmp_path / "cut", None, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_scores_of_a_black_box_suffice(tiny_teacher, tiny_student):
    teacher = BlackBoxTeacher(tiny_teacher)
    check_requirements("kd", KD.requires, TASK, [teacher], {"inputs": NoiseSource(SPEC)})
    before = tiny_student[0].weight.clone()
    outcome = train(make(teacher, tiny_student))
    assert outcome.teacher_queries == teacher.queries == 2 * 3 * 8
    assert not torch.equal(before, tiny_student[0].weight)


def test_labels_of_a_black_box_do_not(tiny_teacher):
    teacher = BlackBoxTeacher(tiny_teacher, access=Access.LABELS)
    with pytest.raises(AccessError, match="'kd' needs scores access, the teacher offers labels"):
        check_requirements("kd", KD.requires, TASK, [teacher], {"inputs": NoiseSource(SPEC)})


def test_a_missing_source_is_named(tiny_teacher):
    with pytest.raises(RecipeError, match=r"'kd' needs the sources \['inputs'\]"):
        check_requirements("kd", KD.requires, TASK, [WhiteBoxTeacher(tiny_teacher)], {})
