"""The pool of a run: its folder, its picture, and whose it is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vestige.core import seeding
from vestige.core.protocols import Source
from vestige.metrics.diversity import measure
from vestige.sources.pool import Pool
from vestige.sources.pool_files import save_pool
from vestige.training.diagnosis import Finding
from vestige.training.moments import drawable
from vestige.training.pictures import contact_sheet, save_png
from vestige.training.summary import RunFacts

_CLASSES, _COLUMNS, _CHUNK = 20, 10, 1024


def pool_of(parts: Mapping[str, Any]) -> Pool | None:
    """The images that a method has gathered as its part "pool"; None without any."""
    found = parts.get("pool")
    return found if isinstance(found, Pool) and found.spec is not None and len(found) else None


def pool_facts(pool: Pool, network: nn.Module | None, seed: int) -> dict[str, Any]:
    """What is told about a pool: its size, how its inversions ended and how its images differ.

    Args:
        pool: at least one image.
        network: judges the images by what enters its last layer; None, or a single image, and
            nothing is said about how they differ.
        seed: of the draw of images that are compared one by one.
    """
    losses = [loss for loss in pool.losses if loss is not None]
    known: dict[str, Any] = {
        "images": len(pool),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }
    if network is None or len(pool) < 2:
        return known
    found = measure(network, _inputs(pool), seeding.generator(seed, "diversity", "cpu"))
    return {**known, "diversity": asdict(found)}


def _inputs(pool: Pool) -> Iterator[Tensor]:
    for start in range(0, len(pool), _CHUNK):
        images = pool.between(start, min(start + _CHUNK, len(pool))).float() / 255
        yield images if pool.spec is None else pool.spec.normalize(images)


def write_pool(
    out: Path, pool: Pool, about: Mapping[str, Any], facts: RunFacts, classes: Sequence[str]
) -> None:
    """`pool/` of a run folder: images.npy, labels.npy, pool.json and samples.png.

    Args:
        out: the run folder.
        pool: at least one image.
        about: `pool_facts`, for the card.
        facts: of the run; the card tells method, seed and the teacher's fingerprint.
        classes: their names, where they are known.
    """
    folder = out / "pool"
    folder.mkdir(parents=True, exist_ok=True)
    sheet = pool_sheet(pool, classes)
    if sheet is not None:
        save_png(sheet, folder / "samples.png")
    save_pool(
        pool,
        folder,
        {
            "method": facts.method,
            "variant": facts.variant,
            "seed": facts.seed,
            "teacher_fingerprint": facts.teacher_fingerprint,
            "teacher_score": facts.teacher_score,
            "classes": list(classes),
            "real_data": [item.name for item in facts.real_data if item.purpose == "distillation"],
            "losses": pool.losses,
            "diversity": about.get("diversity"),
            "command": facts.command,
            "started": facts.started,
        },
    )


def pool_sheet(pool: Pool, classes: Sequence[str]) -> NDArray[np.uint8] | None:
    """Images of a pool, one row per class, from its first to its last; None if undrawable.

    At most 10 images of each of the 20 classes with the most images.
    """
    if pool.spec is None or not drawable(pool.spec):
        return None
    labels = pool.labels
    groups: list[tuple[str, torch.Tensor]] = []
    if labels is None:
        groups.append(("", torch.arange(len(pool))))
    else:
        counts = torch.bincount(labels)
        shown = counts.argsort(descending=True, stable=True)[:_CLASSES].sort().values
        groups += [
            (classes[label] if label < len(classes) else str(label), (labels == label).nonzero())
            for label in shown.tolist()
            if counts[label]
        ]
    index, names = [], []
    for name, rows in groups:
        spread = torch.linspace(0, len(rows) - 1, min(_COLUMNS, len(rows))).round().long()
        index += rows.flatten()[spread].tolist()
        names += [name] * len(spread)
    images = torch.stack([pool.between(row, row + 1)[0] for row in index]).float().cpu() / 255
    return contact_sheet(
        images,
        columns=_COLUMNS,
        scale=max(1, 64 // images.shape[-1]),
        labels=None if labels is None else names,
    )


def foreign_pools(sources: Mapping[str, Source], teacher: str) -> list[Finding]:
    """A finding for each source that is a pool inverted from another teacher.

    Args:
        sources: of the run.
        teacher: fingerprint of its teacher.
    """
    found = []
    for name, source in sources.items():
        card = getattr(source, "card", None)
        made_with = card.get("teacher_fingerprint") if isinstance(card, Mapping) else None
        if made_with is not None and made_with != teacher:
            found.append(
                Finding(
                    "pool-of-another-teacher",
                    "warning",
                    f"the pool of source {name!r} was inverted from teacher {made_with[:16]}, and "
                    f"this run's is {teacher[:16]}; its images carry what the other one knew",
                    "synthesise a pool from this teacher, or take its result as transfer",
                )
            )
    return found
