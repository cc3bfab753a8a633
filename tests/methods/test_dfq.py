"""DFQ's invariants, from the paper and DataFree's code."""

import copy
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vestige.core import schedules
from vestige.core.types import Batch, InputSpec, Step
from vestige.errors import NoBatchNormError
from vestige.methods.dafl import DAFL, DAFLConfig
from vestige.methods.dfq import DFQ, DFQConfig
from vestige.methods.zskt import ZSKT, ZSKTConfig
from vestige.models.factory import build_model
from vestige.models.generators import LargeGenerator
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 8, 8)
SMALL = {
    "rounds": 2,
    "iterations": 2,
    "student_steps": 3,
    "batch_size": 8,
    "generator_width": 4,
    "latent_dim": 8,
    "schedule": "constant",
}


def make(
    teacher: nn.Module,
    student: nn.Module,
    kind: Any = DFQ,
    spec: InputSpec = SPEC,
    **settings: Any,
) -> Any:
    """DFQ, or the method it is compared with, with one generator of the same weights."""
    torch.manual_seed(0)
    known = kind.Config.model_fields
    given = {**SMALL, **settings}
    cfg = kind.Config(**{key: value for key, value in given.items() if key in known})
    return kind(cfg, Classification(spec, 3), [WhiteBoxTeacher(teacher)], student, {})


def context() -> RunContext:
    return RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )


def run(method: Any) -> list[Step]:
    return list(method.run(context()))


def noise(rows: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    drawn = torch.randn(rows, 8, generator=torch.Generator().manual_seed(5))
    return Batch(latent=drawn.to(dtype))


def doubled(method: Any) -> Any:
    """Everything in float64, where a statement about arithmetic holds to 1e-9."""
    for module in (method.teacher, method.student, method.generator):
        module.double()
    return method


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# What the paper says


def test_the_generators_loss_is_the_sum_of_four_terms(tiny_teacher, tiny_student):
    chosen = {
        "adversarial_weight": 1.5,
        "bn_weight": 0.7,
        "one_hot_weight": 0.4,
        "balance_weight": 3.0,
    }
    method = doubled(make(tiny_teacher, tiny_student, **chosen))
    loss = method.generation(method.generator, noise(dtype=torch.float64))

    inputs = loss.inputs.detach()
    t = tiny_teacher(inputs).numpy()
    s = tiny_student.eval()(inputs).detach().numpy()
    p, q = (np.exp(one) / np.exp(one).sum(1, keepdims=True) for one in (t, s))
    divergence = sum(p[b, k] * math.log(p[b, k] / q[b, k]) for b in range(8) for k in range(3)) / 8
    one_hot = -sum(math.log(row.max()) for row in p) / 8
    balance = sum(one * math.log(one) for one in p.mean(0))
    seen, norm = tiny_teacher[0](inputs).numpy(), tiny_teacher[1]
    bn = np.linalg.norm(seen.mean((0, 2, 3)) - norm.running_mean.numpy())
    bn += np.linalg.norm(seen.var((0, 2, 3)) - norm.running_var.numpy())
    slow = {
        "adversarial": -divergence,
        "one_hot": one_hot,
        "class_balance": balance,
        "bn_statistics": bn,
    }
    assert divergence > 1e-3
    assert {name: term.item() for name, term in loss.terms.items()} == pytest.approx(slow, rel=1e-8)
    total = -1.5 * divergence + 0.4 * one_hot + 3.0 * balance + 0.7 * bn
    assert loss.total.item() == pytest.approx(total, rel=1e-8)


def test_a_student_that_equals_the_teacher_leaves_no_divergence(tiny_teacher):
    student = copy.deepcopy(tiny_teacher).requires_grad_(True)
    method = make(tiny_teacher, student)
    loss = method.generation(method.generator, noise())
    assert loss.terms["adversarial"].item() == 0
    assert method.imitation(student, Batch(loss.inputs.detach())).total.item() == 0


def test_the_order_is_one_generation_and_student_steps_on_fresh_images(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    latents: list[Tensor] = []
    method.generator.register_forward_hook(lambda module, args, out: latents.append(args[0]))
    steps = run(method)
    assert [step.role for step in steps] == (["source"] + ["student"] * 3) * 4
    assert len({tuple(latent.flatten().tolist()) for latent in latents}) == len(steps) == 16
    for step in steps[1:4]:
        assert set(step.loss.terms) == {"distillation"}


def test_each_step_changes_its_own_network_alone(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    nets = {"teacher": tiny_teacher, "student": tiny_student, "generator": method.generator}
    before = {name: weights(net) for name, net in nets.items()}
    for step in method.run(context()):
        after = {name: weights(net) for name, net in nets.items()}
        moved = {name for name in nets if not same(before[name], after[name])}
        assert moved == {"student" if step.role == "student" else "generator"}
        before = after


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_network_that_is_not_trained_is_in_eval_mode(tiny_teacher, tiny_student, mode):
    method = make(tiny_teacher, tiny_student.eval(), generator_mode=mode)
    modes: list[tuple[bool, bool]] = []
    method.teacher.register_forward_hook(
        lambda *_: modes.append((tiny_student[1].training, method.generator.training))
    )
    made: list[bool] = []
    method.generator.register_forward_hook(lambda module, *_: made.append(module.training))
    answered: list[bool] = []
    tiny_student.register_forward_hook(lambda module, *_: answered.append(module.training))
    run(method)
    assert made == ([True] + [mode == "train"] * 3) * 4
    assert answered == ([False] + [True] * 3) * 4
    # Put back after each pass.
    assert set(modes) == {(True, True)}


def test_in_eval_mode_only_a_generation_moves_the_generators_statistics(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    running = method.generator.project[2].running_mean
    before = running.clone()
    for step in method.run(context()):
        assert torch.equal(running, before) == (step.role == "student")
        before = running.clone()


def test_the_defaults_are_datafrees_for_cifar(tiny_teacher, tiny_student):
    cfg = DFQConfig()
    # Epochs of 400 student steps.
    assert (cfg.rounds, cfg.iterations * cfg.student_steps, cfg.student_steps) == (200, 400, 10)
    assert (cfg.batch_size, cfg.latent_dim, cfg.generator_lr) == (256, 256, 1e-3)
    assert (cfg.adversarial_weight, cfg.bn_weight, cfg.one_hot_weight) == (1, 1, 1)
    assert cfg.balance_weight == 20
    assert (cfg.student_optimizer, cfg.student_lr, cfg.student_weight_decay) == ("sgd", 0.1, 1e-4)
    schedule = schedules.named(cfg.schedule, cfg.milestones)
    assert schedule is not None
    assert [schedule.factor(share) for share in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    method = make(tiny_teacher, tiny_student)
    assert isinstance(method.generator, LargeGenerator)
    assert method.variant() == ""
    made = method.generation(method.generator, noise()).inputs.detach()
    assert 0 < float(made.min()) < float(made.max()) < 1


def test_the_generators_adam_forgets_sooner_than_usual(tiny_teacher, tiny_student):
    betas: dict[str, Any] = {}

    class Watched(RunContext):
        def optimizer(self, name: str, *args: Any, **given: Any) -> torch.optim.Optimizer:
            made = super().optimizer(name, *args, **given)
            betas[name] = made.defaults.get("betas")
            return made

    ctx = Watched(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )
    next(make(tiny_teacher, tiny_student).run(ctx))
    assert betas == {"student": None, "generator": (0.5, 0.999)}


# Limits in which it equals something else


def test_without_its_priors_it_is_zskt_on_fresh_images(tiny_teacher, tiny_student):
    # ZSKT keeps the student in train mode; without statistics of a batch that decides nothing.
    tiny_student.eval()
    alike = {"generator": "upsample", "generator_head": "tanh_bn"}
    ours = make(
        tiny_teacher, tiny_student, bn_weight=0, one_hot_weight=0, balance_weight=0, **alike
    )
    theirs = make(tiny_teacher, tiny_student, ZSKT, attention_weight=0, z_policy="fresh", **alike)
    assert isinstance(theirs.cfg, ZSKTConfig)
    inputs = Batch(torch.randn(8, 1, 8, 8))
    pairs = [
        [one.generation(one.generator, noise()) for one in (ours, theirs)],
        [one.imitation(tiny_student, inputs) for one in (ours, theirs)],
    ]
    for first, second in pairs:
        assert first.total.abs() > 1e-3
        # ZSKT divides by the number of classes, too.
        torch.testing.assert_close(first.total, 3 * second.total)


def test_without_adversary_and_statistics_it_is_dafl_without_activation(tiny_teacher, tiny_student):
    alike = {
        "generator": "upsample",
        "generator_head": "tanh_bn",
        "one_hot_weight": 0.3,
        "balance_weight": 4.0,
    }
    ours = make(tiny_teacher, tiny_student, adversarial_weight=0, bn_weight=0, **alike)
    theirs = make(
        tiny_teacher, tiny_student, DAFL, activation_weight=0, log_base="e", inner_eps=1e-5, **alike
    )
    assert isinstance(theirs.cfg, DAFLConfig)
    first, second = (one.generation(one.generator, noise()) for one in (ours, theirs))
    torch.testing.assert_close(first.total, second.total)
    inputs = Batch(torch.randn(8, 1, 8, 8))
    losses = [one.imitation(tiny_student.eval(), inputs) for one in (ours, theirs)]
    assert torch.equal(losses[0].total, losses[1].total)


# Options


def test_without_adversary_the_student_is_not_asked(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, adversarial_weight=0)
    counts: Counter[str] = Counter()
    tiny_student.register_forward_hook(lambda *_: counts.update(["student"]))
    steps = run(method)
    assert counts["student"] == sum(step.role == "student" for step in steps)
    assert all("adversarial" not in step.loss.terms for step in steps)
    passes = method.passes(method.cfg)
    assert passes["student_forward"] == 6
    assert passes["student_backward_to_input"] == 0
    assert method.variant() == "no adversary"


def test_bn_weight_needs_a_teacher_with_batchnorm_and_says_so_at_build():
    spec = InputSpec.image(1, 16, 16)
    teacher, student = (build_model(name, spec, 3) for name in ("lenet5", "lenet5-half"))
    with pytest.raises(NoBatchNormError, match="bn_weight: 0"):
        make(teacher, student, spec=spec)
    method = make(teacher, student, spec=spec, bn_weight=0)
    assert method.variant() == "no BN statistics"
    for step in run(method):
        assert "bn_statistics" not in step.loss.terms
        assert math.isfinite(step.loss.total.item())


def test_the_statistics_term_pulls_fakes_to_the_teachers_statistics(tiny_teacher, tiny_student):
    def distance(weight: float) -> float:
        settings = {
            "iterations": 30,
            "student_steps": 1,
            "generator_lr": 1e-2,
            "generator_head": "tanh_bn",
        }
        method = make(tiny_teacher, copy.deepcopy(tiny_student), bn_weight=weight, **settings)
        run(method)
        measured = make(tiny_teacher, tiny_student, generator_head="tanh_bn")
        measured.generator.load_state_dict(method.generator.state_dict())
        loss = measured.generation(measured.generator, noise(64)).detach()
        return loss.terms["bn_statistics"].item()

    # Well apart: with the weight it is the main term, without it nothing holds the statistics.
    assert distance(20.0) < 0.8 * distance(0.0)


def test_a_sigmoids_images_are_normalised_for_the_teacher(tiny_teacher, tiny_student):
    spec = InputSpec.image(1, 8, 8, mean=(0.4,), std=(0.2,))
    method = make(tiny_teacher, tiny_student, spec=spec)
    made: list[Tensor] = []
    method.generator.register_forward_hook(lambda module, args, out: made.append(out.detach()))
    steps = run(method)
    for images, step in zip(made, steps, strict=True):
        torch.testing.assert_close(step.loss.inputs, (images - 0.4) / 0.2)
