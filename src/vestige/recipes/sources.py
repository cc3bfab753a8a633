"""The sources that a recipe names, and the record of what they read."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vestige.core import seeding
from vestige.core.protocols import DataSet, Source
from vestige.core.types import InputSpec
from vestige.models.factory import build_generator
from vestige.recipes.catalog import DATA
from vestige.recipes.factories import call
from vestige.recipes.leaks import Hashed, hashes_of_set
from vestige.recipes.schema import SourceConfig
from vestige.recipes.unlabelled import open_folder, open_heap
from vestige.recipes.unlabelled_audio import open_audio
from vestige.sources.generator import GeneratorSource
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.sources.pool_files import open_pool
from vestige.training.summary import RealData

# Origins of inputs that nobody photographed, wrote or measured.
MADE_UP = ("noise", "generator", "synthetic")


@dataclass
class Ledger:
    """What was read to build the sources of a run.

    Attributes:
        reader: who reads, for the records.
        records: everything real.
        about: by source, what else is known of it, for the run record.
        hashed: by source, what gives the hashes of its images; of labelled sets only on demand,
            since that decodes them once more.
    """

    reader: str
    records: list[RealData] = field(default_factory=list)
    about: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    hashed: dict[str, Hashed] = field(default_factory=dict)

    def note(self, name: str, origin: str, images: int, fingerprint: str) -> None:
        """That something real was read to learn from."""
        self.records.append(
            RealData(name, origin, self.reader, "distillation", images, fingerprint)
        )


def build_source(
    name: str,
    config: SourceConfig,
    spec: InputSpec,
    seed: int,
    device: torch.device,
    ledger: Ledger,
) -> Source:
    """The source `name`; what it reads is noted in `ledger`."""
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
            ledger.note(made.name, made.origin, len(made) if isinstance(made, Sized) else 0, "")
        return made
    if config.kind in ("folder", "heap") and spec.kind == "audio":
        heard = open_audio(name, config, spec, seed)
        for part in heard.read:
            ledger.note(part.name, heard.source.origin, part.images, part.fingerprint)
        ledger.about[name] = heard.about
        return heard.source
    if config.kind in ("folder", "heap"):
        opening = open_folder if config.kind == "folder" else open_heap
        opened = opening(name, config, spec, seed, device)
        for part in opened.read:
            ledger.note(part.name, config.origin, part.images, part.fingerprint)
        ledger.about[name] = opened.about
        ledger.hashed[name] = partial(getattr, opened.source, "hashes")
        return opened.source
    found = DATA.get(spec.kind).open(str(config.data), config.split or "train")
    ledger.records.append(record_of(found, config.origin, ledger.reader, "distillation"))
    ledger.hashed[name] = partial(hashes_of_set, found, spec)
    inputs = found.inputs(spec).to(device)
    return TensorSource(inputs, origin=config.origin, name=found.name)


def record_of(found: DataSet, origin: str, by: str, purpose: str) -> RealData:
    """That a set was read, by whom and for what."""
    return RealData(
        f"{found.name}/{found.split}", origin, by, purpose, len(found), found.fingerprint
    )
