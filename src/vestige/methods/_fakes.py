"""What the methods have in common whose student learns from a generator's latest images."""

from typing import Any

import torch
from torch import Tensor, nn

from vestige.core.protocols import Context, Source, Teacher
from vestige.core.types import Batch, InputSpec, Prediction, predict
from vestige.errors import ShapeError
from vestige.models.factory import build_generator


def make_generator(cfg: Any, spec: InputSpec, **further: Any) -> nn.Module:
    """The generator that `cfg` names by `generator`, `generator_head` and so on, fresh."""
    head = {} if cfg.generator == "dcgan" else {"head": cfg.generator_head}
    return build_generator(
        cfg.generator,
        spec,
        latent_dim=cfg.latent_dim,
        width=cfg.generator_width,
        **head,
        **further,
    )


def latent(count: int, width: int, ctx: Context) -> Tensor:
    """Noise (count, width), standard normal."""
    return torch.randn(count, width, generator=ctx.rng, device=ctx.device)


def as_inputs(made: Tensor, cfg: Any, spec: InputSpec) -> Tensor:
    """A generator's output as inputs of the teacher; differentiable."""
    # Heads that end in BatchNorm are there already. DCGAN gives [-1, 1], which is so for mean and
    # std 0.5 alone.
    if cfg.generator == "dcgan":
        return spec.normalize((made + 1) / 2)
    return spec.normalize(made) if cfg.generator_head == "sigmoid" else made


def known_or_asked(teacher: Teacher, batch: Batch) -> Prediction:
    """The teacher's answers, without graph: those of `extra` where they are there."""
    if "teacher" in batch.extra:
        return Prediction(batch.extra["teacher"])
    with torch.no_grad():
        return predict(teacher, batch.inputs)


def given_images(source: Source, count: int, ctx: Context) -> Tensor:
    """Images that somebody handed in, (count, C, H, W) in the teacher's normalised space.

    Raises:
        ShapeError: the source gives several tensors per input.
    """
    inputs = source.draw(count, ctx.rng)
    if not isinstance(inputs, Tensor):
        raise ShapeError(
            f"got several tensors from the source '{source.name}', expected images (B, C, H, W) in "
            "one; hand in images"
        )
    return inputs
