"""MosaicKD's invariants, from the paper and its reference code."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vestige.core.types import Batch, InputSpec, Loss, Step
from vestige.errors import RecipeError
from vestige.losses.distill import kl_divergence
from vestige.methods.mosaickd import MosaicKD, MosaicKDConfig
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 8, 8, mean=(0.5,), std=(0.25,))
SMALL = {
    "rounds": 2,
    "iterations": 2,
    "student_steps": 3,
    "batch_size": 8,
    "generator_width": 4,
    "latent_dim": 8,
    "discriminator_width": 4,
    "crop_padding": 1,
}


class Constant(nn.Module):
    """The same logits for every input; a function of it, so that gradients exist."""

    def __init__(self, *logits: float, dense: bool = False) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.dense = dense

    def forward(self, inputs: Tensor) -> Tensor:
        nothing = 0 * inputs.mean(1, keepdim=True)
        shape = (1, -1, 1, 1) if self.dense else (1, -1)
        rows = nothing if self.dense else nothing.mean((2, 3))
        return self.logits.view(shape) + rows


class Dense:
    """As much of a segmentation task as a method may look at."""

    kind = "segmentation"
    num_classes = 3
    spec = SPEC


def foreign(rows: int = 32) -> TensorSource:
    rng = torch.Generator().manual_seed(4)
    return TensorSource(
        SPEC.normalize(torch.rand(rows, 1, 8, 8, generator=rng)), origin="foreign", name="noise"
    )


def make(
    teacher: nn.Module, student: nn.Module, *, task: Any = None, source: Any = None, **settings: Any
) -> MosaicKD:
    torch.manual_seed(0)  # decides the weights of generator and discriminator
    cfg = MosaicKDConfig(**{**SMALL, **settings})
    return MosaicKD(
        cfg,
        task or Classification(SPEC, 3),
        [WhiteBoxTeacher(teacher)],
        student,
        {"foreign": source or foreign()},
    )


def run(method: MosaicKD) -> list[Step]:
    return list(method.run(context()))


def context() -> RunContext:
    return RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )


def inputs(rows: int = 8) -> Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(6))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def changed(before: dict[str, Tensor], module: nn.Module) -> bool:
    return any(not torch.equal(before[name], value) for name, value in module.named_parameters())


# What the paper says


def test_a_discriminator_that_knows_nothing_costs_64_log_2_at_32_pixels(tiny_teacher, tiny_student):
    spec = InputSpec.image(1, 32, 32)
    method = make(tiny_teacher, tiny_student, task=Classification(spec, 3))
    for weight in method.discriminator.parameters():
        nn.init.zeros_(weight)
    images = torch.rand(4, 1, 32, 32)
    loss = method.discrimination(method.discriminator, Batch(images, extra={"given": images}))
    assert loss.total.item() == pytest.approx(64 * math.log(2))
    patches = method.generation(method.generator, Batch(images)).terms["patches"]
    assert patches.item() == pytest.approx(64 * math.log(2))


@pytest.mark.parametrize(("reference", "total"), [(64, 64), (None, 4), (16, 16)])
def test_a_patch_weight_means_the_same_for_every_image_size(
    reference, total, tiny_teacher, tiny_student
):
    # 8x8 pixels are 4 patches.
    method = make(tiny_teacher, tiny_student, reference_patches=reference, patch_weight=0.5)
    for weight in method.discriminator.parameters():
        nn.init.zeros_(weight)
    batch = Batch(inputs(), extra={"given": inputs()})
    loss = method.discrimination(method.discriminator, batch)
    assert loss.total.item() == pytest.approx(0.5 * total * math.log(2))


def test_alignment_and_balance_of_an_undecided_and_of_a_decided_teacher():
    undecided = make(Constant(0, 0, 0, 0), Constant(0, 0, 0, 0), task=Classification(SPEC, 4))
    terms = undecided.generation(undecided.generator, Batch(inputs())).terms
    assert terms["alignment"].item() == pytest.approx(math.log(4))
    assert terms["class_balance"].item() == pytest.approx(-2)  # in bits
    assert terms["adversarial"].item() == 0
    decided = make(Constant(99, 0, 0, 0), Constant(0, 0, 0, 0), task=Classification(SPEC, 4))
    terms = decided.generation(decided.generator, Batch(inputs())).terms
    assert terms["alignment"].item() == pytest.approx(0)
    assert terms["class_balance"].item() == pytest.approx(0, abs=1e-6)
    # KL of a certain teacher to an undecided student.
    assert terms["adversarial"].item() == pytest.approx(-math.log(4))


def test_the_generator_loss_is_the_weighted_sum(tiny_teacher, tiny_student):
    weights = {"patch_weight": 0.3, "align_weight": 0.5, "adversarial_weight": 0.7}
    method = make(tiny_teacher, tiny_student.eval(), **weights, balance_weight=1.1)
    loss = method.generation(method.generator, Batch(inputs()))
    parts = {name: value.item() for name, value in loss.terms.items()}
    expected = (
        0.3 * (64 / 4) * parts["patches"]
        + 0.5 * parts["alignment"]
        + 0.7 * parts["adversarial"]
        + 1.1 * parts["class_balance"]
    )
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


def test_fooling_the_student_moves_through_both_networks(tiny_teacher, tiny_student):
    method = make(
        tiny_teacher, tiny_student.eval(), patch_weight=0, align_weight=0, balance_weight=0
    )
    images = inputs().requires_grad_()
    (grad,) = torch.autograd.grad(method.generation(None, Batch(images)).total, images)
    student, teacher = tiny_student(images), tiny_teacher(images)
    (expected,) = torch.autograd.grad(-kl_divergence(student, teacher).mean(), images)
    torch.testing.assert_close(grad, expected)
    (half,) = torch.autograd.grad(
        -kl_divergence(tiny_student(images), teacher.detach()).mean(), images
    )
    assert not torch.allclose(grad, half)


def test_each_stage_moves_its_own_player(tiny_teacher, tiny_student):
    teacher = copy.deepcopy(tiny_teacher.state_dict())
    method = make(tiny_teacher, tiny_student)
    nets = {
        "auxiliary": method.discriminator,
        "source": method.generator,
        "student": method.student,
    }
    before = {role: state(net) for role, net in nets.items()}
    roles = []
    for step in method.run(context()):
        moved = {role for role, net in nets.items() if changed(before[role], net)}
        assert moved == {step.role}
        before = {role: state(net) for role, net in nets.items()}
        roles.append(step.role)
    assert roles == ["auxiliary", "source", *["student"] * 3] * 4
    for name, value in tiny_teacher.state_dict().items():
        assert torch.equal(value, teacher[name])


def test_the_generator_is_judged_on_the_images_that_the_discriminator_saw(
    tiny_teacher, tiny_student
):
    method = make(tiny_teacher, tiny_student)
    discriminated: list[Tensor] = []
    plain = method.discrimination

    def watched(discriminator: Any, batch: Batch) -> Loss:
        assert isinstance(batch.inputs, Tensor)
        assert not batch.inputs.requires_grad
        discriminated.append(batch.inputs)
        return plain(discriminator, batch)

    method.discrimination = watched  # type: ignore[method-assign]
    sources = [step.loss for step in run(method) if step.role == "source"]
    for seen, loss in zip(discriminated, sources, strict=True):
        assert loss is not None
        assert isinstance(loss.inputs, Tensor)
        assert torch.equal(seen, loss.inputs)


def test_the_student_learns_from_as_many_fakes_as_foreign_images(tiny_teacher, tiny_student):
    source = foreign(3)
    method = make(tiny_teacher, tiny_student, source=source, crop_padding=0, flip=False)
    for step in run(method):
        if step.role != "student":
            continue
        assert step.loss is not None
        assert isinstance(step.loss.inputs, Tensor)
        assert step.loss.fresh is not None
        assert step.loss.fresh.tolist() == [True] * 8 + [False] * 8
        known = source.rows(torch.arange(3)).flatten(1)
        distances = torch.cdist(step.loss.inputs.flatten(1), known).min(1).values
        assert distances[8:].max() == 0 < distances[:8].min()


def test_without_patches_the_discriminator_rests(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, patch_weight=0)
    before = state(method.discriminator)
    assert {step.role for step in run(method)} == {"source", "student"}
    assert not changed(before, method.discriminator)
    assert method.variant() == "without patches"


def test_without_its_other_terms_it_is_an_adversary_on_fakes_alone(tiny_teacher, tiny_student):
    # mosaickd.md: DFAD with KL, the generator first.
    method = make(
        tiny_teacher,
        tiny_student,
        patch_weight=0,
        align_weight=0,
        balance_weight=0,
        mix_foreign=False,
        temperature=2,
    )
    steps = run(method)
    assert [step.role for step in steps] == ["source", *["student"] * 3] * 4
    for step in steps:
        loss = step.loss
        assert loss is not None
        assert loss.teacher is not None
        assert loss.student is not None
        assert len(loss.teacher.logits) == 8
        temperature = 1.0 if step.role == "source" else 2.0
        distance = kl_divergence(
            loss.student.logits, loss.teacher.logits, temperature=temperature
        ).mean()
        torch.testing.assert_close(loss.total, -distance if step.role == "source" else distance)


def test_rates_follow_a_cosine_over_all_steps(tiny_teacher, tiny_student):
    method, ctx = make(tiny_teacher, tiny_student, student_lr=0.1), context()
    optimizers: dict[str, torch.optim.Optimizer] = {}
    plain = ctx.optimizer

    def kept(name: str, *args: Any, **given: Any) -> torch.optim.Optimizer:
        optimizers[name] = plain(name, *args, **given)
        return optimizers[name]

    ctx.optimizer = kept  # type: ignore[method-assign]
    seen = []
    for step in method.run(ctx):
        if step.role == "student":
            seen.append(optimizers["student"].param_groups[0]["lr"])
    # 12 student steps; each sets the rate of the next.
    assert seen == pytest.approx([0.05 * (1 + math.cos(math.pi * n / 12)) for n in range(1, 13)])


# Dense prediction


def test_losses_of_maps_of_one_pixel_are_those_of_classification(tiny_teacher, tiny_student):
    def dense(net: nn.Module) -> nn.Module:
        return nn.Sequential(net, nn.Unflatten(1, (3, 1, 1)))

    flat = make(tiny_teacher, tiny_student.eval())
    mapped = make(dense(tiny_teacher), dense(tiny_student).eval(), task=Dense())
    batch = Batch(inputs())
    for name in ("generation", "imitation"):
        first = getattr(flat, name)(tiny_student, batch)
        second = getattr(mapped, name)(mapped.student, batch)
        for term in first.terms:
            torch.testing.assert_close(first.terms[term], second.terms[term])


def test_a_map_counts_each_pixel():
    method = make(Constant(0, 0, 0, dense=True), Constant(99, 0, 0, dense=True), task=Dense())
    terms = method.generation(None, Batch(inputs())).terms
    assert terms["alignment"].item() == pytest.approx(math.log(3))
    assert terms["class_balance"].item() == pytest.approx(-math.log2(3))


# Foreign images


def test_the_subset_leaves_out_what_the_teacher_is_sure_of(tiny_teacher, tiny_student):
    source = foreign(20)
    method = make(tiny_teacher, tiny_student, source=source, subset=5)
    run(method)
    probs = tiny_teacher(source.rows(torch.arange(20))).softmax(1)
    entropy = -(probs * probs.log()).sum(1)
    expected = sorted(entropy.argsort(descending=True)[:5].tolist())
    assert method.selections()["foreign"].kept.nonzero()[:, 0].tolist() == expected


def test_without_a_subset_nothing_is_selected(tiny_teacher, tiny_student):
    assert make(tiny_teacher, tiny_student).selections() == {}


def test_a_subset_of_what_has_no_numbers_is_refused(tiny_teacher, tiny_student):
    with pytest.raises(RecipeError, match="expected a folder or a set of images"):
        make(tiny_teacher, tiny_student, source=NoiseSource(SPEC), subset=5)
