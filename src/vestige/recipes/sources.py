"""The sources that a recipe names, and the record of what they read."""

from collections.abc import Sized
from pathlib import Path

import torch

from vestige.core import seeding
from vestige.core.protocols import DataSet, Source
from vestige.core.types import InputSpec
from vestige.models.factory import build_generator
from vestige.recipes.catalog import DATA
from vestige.recipes.factories import call
from vestige.recipes.schema import SourceConfig
from vestige.sources.generator import GeneratorSource
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.sources.pool_files import open_pool
from vestige.training.summary import RealData

# Origins of inputs that nobody photographed, wrote or measured.
MADE_UP = ("noise", "generator", "synthetic")


def build_source(
    config: SourceConfig,
    spec: InputSpec,
    seed: int,
    device: torch.device,
    read: list[RealData],
    reader: str,
) -> Source:
    """A source; what it reads is added to `read`."""
    if config.kind == "noise":
        return NoiseSource(spec, distribution=config.distribution)
    if config.kind == "untrained-generator":
        with seeding.seeded(seed, "generator"):
            generator = build_generator(
                config.generator, spec, latent_dim=config.latent_dim, width=config.generator_width
            )
        return GeneratorSource(generator.to(device))
    if config.kind == "pool":
        return open_pool(Path(str(config.data)), spec)
    if config.kind == "factory":
        made: Source = call("sources", str(config.factory), {"spec": spec, **config.args})
        if made.origin not in MADE_UP:
            count = len(made) if isinstance(made, Sized) else 0
            read.append(RealData(made.name, made.origin, reader, "distillation", count, ""))
        return made
    found = DATA.get(spec.kind).open(str(config.data), config.split)
    read.append(record_of(found, config.origin, reader, "distillation"))
    inputs = found.inputs(spec).to(device)
    return TensorSource(inputs, origin=config.origin, name=found.name)


def record_of(found: DataSet, origin: str, by: str, purpose: str) -> RealData:
    """That a set was read, by whom and for what."""
    return RealData(
        f"{found.name}/{found.split}", origin, by, purpose, len(found), found.fingerprint
    )
