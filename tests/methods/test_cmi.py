import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vestige.core.types import Batch, InputSpec, predict
from vestige.errors import NoBatchNormError, RecipeError
from vestige.losses.statistics import bn_statistics_loss
from vestige.methods.cmi import CMI, CMIConfig
from vestige.models.probes import BatchNormProbe
from vestige.recipes.build import build_method
from vestige.sources.augment import crop_resize, draw_boxes, draw_shifts, shift
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8, mean=(0.5,), std=(0.25,))
SMALL = {
    "rounds": 2,
    "inversion_steps": 3,
    "synthesis_batch_size": 6,
    "student_steps": 2,
    "batch_size": 8,
    "bank_size": 12,
    "negatives": 5,
    "head_queries": 3,
    "head_dim": 4,
    "generator_width": 4,
    "latent_dim": 8,
}


def net(widths: tuple[int, ...], *, bn: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.BatchNorm2d(after)] if bn else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))


def method(*, teacher: nn.Module | None = None, seed: int = 0, **config: object) -> CMI:
    torch.manual_seed(seed)
    teacher = WhiteBoxTeacher(teacher or net((4, 6)))
    cfg = CMIConfig(**{**SMALL, **config})
    return build_method("cmi", cfg, Classification(SPEC, 3), [teacher], net((3,)), {}, seed)


def batch(count: int = 6, *, still: bool = False) -> Batch:
    rng = torch.Generator().manual_seed(1)
    reach = 0 if still else 2
    return Batch(
        labels=torch.randint(3, (count,), generator=rng),
        latent=torch.randn(count, 8, generator=rng).requires_grad_(),
        extra={
            "shifts": draw_shifts(count, reach, rng, flip=not still),
            "boxes": draw_boxes(count, (8, 8), rng),
        },
    )


def gradients(made: CMI, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(made.generator.parameters()), allow_unused=True))


def test_without_contrast_and_adversary_it_is_model_inversion():
    made, drawn = method(contrast_weight=0, bn_weight=2.0, one_hot_weight=0.5), batch(still=True)
    made.generator.eval()  # the same images twice
    loss = made.inversion(made.generator, drawn)
    inputs = SPEC.normalize(made.generator(drawn.latent))
    with BatchNormProbe(made.teacher) as probe:
        logits = predict(made.teacher, inputs).logits
    expected = 2.0 * bn_statistics_loss(probe.observed(), probe.stored())
    expected = expected + 0.5 * nn.functional.cross_entropy(logits, drawn.labels)
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.inputs, inputs)


def test_queries_alone_move_the_generator_as_the_whole_comparison_does():
    """All rows against all, as the reference code has it, gives G the same gradient."""
    made, drawn = method(head_queries=0), batch()
    made.bank.push(torch.randn(6, made.bank.width))
    made.negatives = made.bank.draw(5, torch.Generator().manual_seed(2))
    made.generator.eval()
    ours = gradients(made, made.inversion(made.generator, drawn).terms["contrast"])

    images = made.generator(drawn.latent)
    views = (
        made.spec.normalize(view)
        for view in (
            shift(images, drawn.extra["shifts"]),
            crop_resize(images, drawn.extra["boxes"]),
        )
    )
    of_global, of_local = (features(made, view) for view in views)
    earlier_local, earlier_global = made.negatives.chunk(2, 1)
    u = made.head(torch.cat([of_local, earlier_local]))
    v = made.head(torch.cat([of_global, earlier_global])).detach()
    each = nn.functional.cross_entropy(
        u @ v.t() / made.cfg.contrast_temperature, torch.arange(11), reduction="none"
    )
    whole = gradients(made, each[:6].mean() + each[6:].mean())
    for one, other in zip(ours, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def features(made: CMI, view: Tensor) -> Tensor:
    with made.probe as probe:
        predict(made.teacher, view)
    return probe.instance_means()


def test_the_bank_trains_the_head_and_never_the_generator():
    made, drawn = method(), batch()
    made.bank.push(torch.randn(6, made.bank.width))
    made.negatives = made.bank.draw(5, torch.Generator().manual_seed(2)).requires_grad_()
    made.generator.eval()

    def of(queries: int) -> tuple[list[Tensor], list[Tensor]]:
        made.cfg = made.cfg.model_copy(update={"head_queries": queries})
        loss = made.inversion(made.generator, drawn).terms["contrast"]
        nets = (list(made.generator.parameters()), list(made.head.parameters()))
        found = torch.autograd.grad(loss, [*nets[0], *nets[1]], retain_graph=True)
        return list(found[: len(nets[0])]), list(found[len(nets[0]) :])

    without, some = of(0), of(3)
    for one, other in zip(without[0], some[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    moved = [not torch.allclose(a, b) for a, b in zip(without[1], some[1], strict=True)]
    assert any(moved)


def test_keys_are_constants_and_the_global_view_gets_no_contrast():
    made, drawn = method(bn_weight=0, one_hot_weight=0), batch()
    seen = []
    handle = made.teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = made.inversion(made.generator, drawn)
    handle.remove()
    of_global, of_local = torch.autograd.grad(loss.terms["contrast"], seen, allow_unused=True)
    assert of_global is None
    assert of_local.abs().sum() > 0


def test_with_an_empty_bank_a_batch_is_compared_with_itself():
    made, drawn = method(), batch()

    class Same(nn.Module):
        """Projects everything to one point."""

        def forward(self, rows: Tensor) -> Tensor:
            return nn.functional.normalize(rows[:, :4] * 0 + 1, dim=1)

    made.head = Same()
    loss = made.inversion(made.generator, drawn)
    assert loss.terms["contrast"].item() == pytest.approx(math.log(6), rel=1e-6)


def trained(**config: object) -> tuple[CMI, Trainer]:
    made = method(**config)
    run = Trainer(
        made,
        Classification(SPEC, 3),
        teachers=[made.teacher],
        student=made.student,
        seed=0,
        config=TrainerConfig(device="cpu"),
    )
    run.run()
    return made, run


def test_pool_and_bank_grow_by_one_batch_at_a_time_and_the_student_waits():
    made, _ = trained(warmup=2, rounds=3)
    assert len(made.pool) == 5 * 6
    assert made.pool.shard_count() == 5
    assert len(made.bank) == 12  # 5 batches of 6 into 12 rows
    assert made.pool.labels is not None
    assert all(loss is not None and math.isfinite(loss) for loss in made.pool.losses)


def test_stopping_after_the_synthesis_leaves_the_student_and_gives_the_pool():
    before = {name: value.clone() for name, value in method().student.state_dict().items()}
    made, run = trained(warmup=2, rounds=0)
    assert made.result().kind == "pool"
    assert made.result().object is made.pool
    assert len(made.pool) == 12
    for name, value in made.student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert run.ctx.progress.steps == 2 * 3


def test_images_are_never_hard_for_the_student_before_it_learns():
    made = method(warmup=1, rounds=1, adversarial_weight=0.5)
    run = Trainer(
        made,
        Classification(SPEC, 3),
        teachers=[made.teacher],
        student=made.student,
        seed=0,
        config=TrainerConfig(device="cpu"),
    )
    terms = [set(step.loss.terms) for step in made.run(run.ctx) if step.role == "source"]
    assert ["adversarial" in names for names in terms] == [False] * 3 + [True] * 3


def test_synthesis_leaves_the_students_batchnorm_alone():
    made = method(rounds=1, student_steps=1)
    made.adversarial_weight = 0.5
    made.student.train()
    before = {name: value.clone() for name, value in made.student.named_buffers()}
    made.inversion(made.generator, batch()).total.backward()
    assert made.student.training
    for name, value in made.student.named_buffers():
        assert torch.equal(value, before[name]), name


def test_a_bank_smaller_than_a_batch_is_refused():
    with pytest.raises(ValidationError, match="bank_size 4, expected at least the 6 rows"):
        CMIConfig(**{**SMALL, "bank_size": 4})
    assert CMIConfig(**{**SMALL, "bank_size": 4, "contrast_weight": 0}).bank_size == 4


def test_a_batch_that_does_not_divide_the_bank_is_kept_whole():
    made, _ = trained(bank_size=7, rounds=3)
    assert len(made.bank) == 7


def test_a_student_without_images_is_refused_at_once():
    with pytest.raises(RecipeError, match="pool is empty when the student asks"):
        method(batches_per_round=0)
    with pytest.raises(RecipeError, match="rounds 0 and warmup 0"):
        method(rounds=0)


def test_a_teacher_without_batchnorm_needs_a_weight_of_zero():
    with pytest.raises(NoBatchNormError):
        method(teacher=net((4, 6), bn=False))
    made = method(teacher=net((4, 6), bn=False), bn_weight=0)
    assert made.statistics is None
    loss = made.inversion(made.generator, batch())
    assert set(loss.terms) == {"one_hot", "contrast"}
    assert math.isfinite(loss.total.item())


def test_features_may_be_the_inputs_of_named_layers():
    made = method(feature_layers=("3", "7"))
    # What enters the second convolution, 4 channels, and the classifier, 6.
    assert made.bank.width == 2 * (4 + 6)


def test_in_a_teacher_without_maps_what_enters_the_last_layer_counts():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    made = method(teacher=flat, bn_weight=0)
    assert made.bank.width == 2 * 5
    assert math.isfinite(made.inversion(made.generator, batch()).total.item())


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 224), (4, 30)])
def test_any_size_and_number_of_channels(channels, size):
    spec = InputSpec.image(channels, size, size)
    teacher = nn.Sequential(
        nn.Conv2d(channels, 2, 5, stride=4), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(2, 1000),
    )  # fmt: skip
    student = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 1000))
    cfg = CMIConfig(**{**SMALL, "generator": "pyramid", "rounds": 1, "inversion_steps": 1})
    task = Classification(spec, 1000)
    made = build_method("cmi", cfg, task, [WhiteBoxTeacher(teacher)], student, {}, 0)
    run = Trainer(
        made, task, teachers=[made.teacher], student=student, seed=0, config=TrainerConfig()
    )
    run.run()
    assert made.pool.shard(0)["inputs"].shape == (6, channels, size, size)
