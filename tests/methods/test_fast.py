import copy
import math

import pytest
import torch
from torch import nn

from vestige.core.types import Batch, InputSpec
from vestige.losses.statistics import Stats, bn_statistics_loss
from vestige.methods.fast import Fast, FastConfig
from vestige.recipes.build import build_method
from vestige.sources.augment import draw_shifts
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8, mean=(0.5,), std=(0.25,))
SMALL = {
    "rounds": 1,
    "warmup": 0,
    "inversion_steps": 3,
    "synthesis_batch_size": 6,
    "student_steps": 1,
    "batch_size": 8,
    "generator_width": 4,
    "latent_dim": 8,
}


def net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )  # fmt: skip


def method(**config: object) -> Fast:
    torch.manual_seed(0)
    cfg = FastConfig(**{**SMALL, **config})
    teacher = WhiteBoxTeacher(net(6))
    return build_method("fast", cfg, Classification(SPEC, 3), [teacher], net(3), {}, 0)


def trainer(made: Fast) -> Trainer:
    return Trainer(
        made,
        Classification(SPEC, 3),
        teachers=[made.teacher],
        student=made.student,
        seed=0,
        config=TrainerConfig(device="cpu"),
    )


def sources(made: Fast) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Gradients and weights of G' at each of its steps, while the whole method runs."""
    grads, weights = [], []
    run = trainer(made)
    plain = run.ctx.optimizer

    def spied(name, *args, **given):
        optimizer = plain(name, *args, **given)
        if name == "generator":
            params = list(made.generator.parameters())

            def note(*_: object) -> None:
                grads.append([p.grad.clone() for p in params])
                weights.append([p.detach().clone() for p in params])

            optimizer.register_step_pre_hook(note)
        return optimizer

    run.ctx.optimizer = spied
    run.run()
    return grads, weights


def adam_step(before: list[torch.Tensor], grads: list[torch.Tensor], lr: float):
    weights = [nn.Parameter(weight.clone()) for weight in before]
    optimizer = torch.optim.Adam(weights, lr, betas=(0.5, 0.999))
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_meta_generator_takes_one_step_along_the_sum_of_gradients(steps):
    made = method(inversion_steps=steps, generator_lr=0.01)
    before = [p.detach().clone() for p in made.meta.parameters()]
    grads, weights = sources(made)
    assert len(grads) == steps
    for start, first in zip(before, weights[0], strict=True):
        assert torch.equal(start, first)  # G' begins as the meta generator
    summed = [torch.stack(each).sum(0) for each in zip(*grads, strict=True)]
    expected = adam_step(before, summed, 0.01 * steps)
    for weight, wanted in zip(made.meta.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-4, atol=1e-6)


def test_reptile_goes_towards_the_last_generator():
    made = method(meta="reptile", generator_lr=0.01)
    before = [p.detach().clone() for p in made.meta.parameters()]
    sources(made)
    ends = [p.detach() for p in made.generator.parameters()]
    grads = [67.0 * (start - end) for start, end in zip(before, ends, strict=True)]
    expected = adam_step(before, grads, 0.03)
    for weight, wanted in zip(made.meta.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-4, atol=1e-6)


def test_without_meta_learning_each_batch_starts_anew():
    made = method(meta="none", rounds=2)
    before = copy.deepcopy(made.meta.state_dict())
    _, weights = sources(made)
    for name, value in made.meta.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Three steps per batch: the fourth is the first of the second batch.
    assert not torch.equal(weights[0][0], weights[3][0])
    assert weights[0][0].std() < 0.03  # drawn with 0.02, not torch's own initialisation


def test_a_latent_rate_of_zero_leaves_the_noise_as_drawn():
    def latents(rate: float) -> list[torch.Tensor]:
        made = method(latent_lr=rate)
        seen: list[torch.Tensor] = []
        made.generator.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        trainer(made).run()
        return seen

    fixed, moved = latents(0.0), latents(0.05)
    assert torch.equal(fixed[0], fixed[2])
    assert not torch.equal(moved[0], moved[2])


def test_without_momentum_the_statistics_are_those_of_the_batch():
    """The first batch has nothing before it; with momentum 0 no batch has."""
    rng = torch.Generator().manual_seed(1)
    drawn = Batch(
        labels=torch.randint(3, (6,), generator=rng),
        latent=torch.randn(6, 8, generator=rng),
        extra={"shifts": draw_shifts(6, 1, rng)},
    )

    def term(momentum: float, *, earlier: bool) -> torch.Tensor:
        made = method(bn_momentum=momentum)
        made.generator.eval()
        if earlier:
            made.smoothing.earlier = (Stats(torch.full((6,), 3.0), torch.full((6,), 2.0)),)
        loss = made.inversion(made.generator, drawn)
        seen, stored = made.statistics.observed(), made.statistics.stored()
        torch.testing.assert_close(loss.terms["bn_statistics"].isfinite(), torch.tensor(True))
        if not earlier or momentum == 0:
            torch.testing.assert_close(
                loss.terms["bn_statistics"], bn_statistics_loss(seen, stored)
            )
        return loss.terms["bn_statistics"].detach()

    assert torch.equal(term(0.0, earlier=True), term(0.9, earlier=False))
    assert not torch.equal(term(0.9, earlier=True), term(0.9, earlier=False))


def test_statistics_move_once_per_batch():
    made = method(rounds=3, inversion_steps=4)
    moves = []
    plain = made.smoothing.update
    made.smoothing.update = lambda: (moves.append(made.pool.shard_count()), plain())
    trainer(made).run()
    assert moves == [1, 2, 3]


def test_images_of_the_best_iteration_are_kept():
    made = method(inversion_steps=5, generator_lr=0.5)
    losses = []
    run = trainer(made)
    for step in made.run(run.ctx):
        if step.role == "source":
            losses.append((float(step.loss.total), step.loss.inputs.clone()))
        if step.role == "auxiliary":
            break
    best, inputs = min(losses, key=lambda pair: pair[0])
    assert made.pool.losses == [pytest.approx(best)]
    stored = made.pool.shard(0)["inputs"]
    again = made.spec.denormalize(inputs).mul(255).round().to(torch.uint8)
    assert torch.equal(stored, again)


def test_the_first_layers_are_drawn_anew_once():
    made = method(renew=2, rounds=3)
    starts = []
    plain = made.generator.load_state_dict

    def note(state, *args, **given):
        starts.append({name: value.clone() for name, value in state.items()})
        return plain(state, *args, **given)

    made.generator.load_state_dict = note
    trainer(made).run()
    name = "project.0.bias"
    # Renewed biases are 0; after the second batch, so seen at the start of the third.
    assert starts[1][name].abs().sum() > 0
    assert starts[2][name].abs().sum() == 0
    assert all(math.isfinite(float(value.float().sum())) for value in starts[2].values())
