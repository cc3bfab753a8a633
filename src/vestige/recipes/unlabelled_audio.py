"""Unlabelled recordings of a recipe as sources: one set, or a heap of several."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.data.audio import AudioSet, load_audio
from vestige.data.unlabelled.audio_shifts import shifted_audio
from vestige.data.unlabelled.made_up import stream
from vestige.errors import DataError
from vestige.recipes.schema import PartConfig, SourceConfig
from vestige.recipes.unlabelled import Read
from vestige.sources.audio import AudioSource, transcript_source
from vestige.sources.images import TensorSource

TEXT = "text"


@dataclass(frozen=True)
class OpenedAudio:
    """A source with what was read for it; as `recipes.unlabelled.Opened`."""

    source: AudioSource | TensorSource
    read: tuple[Read, ...]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    found: AudioSet
    waveforms: Tensor
    texts: list[str | None]
    ids: list[str]


def open_audio(name: str, config: SourceConfig, spec: InputSpec, seed: int) -> OpenedAudio:
    """A source of kind "folder" or "heap" for audio.

    With `column: text` it is the transcripts of the same recordings in the same order, which count
    as real labels.

    Raises:
        DataError: there are no such recordings, or fewer than are asked for; there is no such
            column; or transcripts are asked for and nobody wrote them.
    """
    if config.column not in (None, TEXT):
        raise DataError(
            f"got column {config.column!r} of the recordings in source {name!r}, expected "
            f"{TEXT!r}, their transcripts; leave it out for the recordings themselves"
        )
    if config.kind == "folder":
        alone = PartConfig(data=str(config.data), split=config.split, count=config.count)
        parts = {name: _part(name, alone, spec, seed)}
        wanted: dict[str, bool | None] = {name: None}
    else:
        parts = {key: _part(key, part, spec, seed) for key, part in config.parts.items()}
        wanted = {key: part.wanted for key, part in config.parts.items()}
    sizes = [len(part.waveforms) for part in parts.values()]
    order = torch.from_numpy(stream(seed, "order of the heap").permutation(sum(sizes)))
    if config.kind == "folder":
        order = torch.arange(sum(sizes))
    texts = [text for part in parts.values() for text in part.texts]
    ids = [one for part in parts.values() for one in part.ids]
    ordered = [texts[row] for row in order.tolist()]
    source: AudioSource | TensorSource
    if config.column == TEXT:
        source = transcript_source(ordered, name=f"{name}: transcripts")
    else:
        source = AudioSource(
            torch.cat([part.waveforms for part in parts.values()])[order],
            spec.sample_rate_hz,
            origin=config.origin,
            name=name,
            parts=wanted,
            part_index=torch.repeat_interleave(torch.tensor(sizes))[order],
            texts=ordered,
            ids=[ids[row] for row in order.tolist()],
        )
    about = {
        key: {
            "data": part.found.name,
            "rows": len(part.waveforms),
            "shift": list(config.parts[key].shift) if key in config.parts else [],
            "wanted": wanted[key],
            **part.found.notes.counts(),
            "first_skipped": part.found.notes.skipped[:5],
        }
        for key, part in parts.items()
    }
    read = tuple(
        Read(f"{name}/{key}: {part.found.name}", len(part.waveforms), part.found.fingerprint)
        for key, part in parts.items()
    )
    return OpenedAudio(source, read, {"rows": sum(sizes), "parts": about})


def _part(name: str, part: PartConfig, spec: InputSpec, seed: int) -> _Part:
    """The recordings of one part, distorted, with their texts and names."""
    split = part.split
    if split is None:
        split = "all" if AudioSet.undivided(part.data) else "train"
    found = load_audio(part.data, split)
    waveforms, texts, ids = found.read_named(spec)
    if part.count is not None:
        if part.count > len(waveforms):
            raise DataError(
                f"got {len(waveforms)} recordings in part {name!r} of {found.name}, expected at "
                f"least count: {part.count}; lower it"
            )
        chosen = stream(seed, f"{name}: choice").permutation(len(waveforms))[: part.count]
        rows = np.sort(chosen)
        waveforms = waveforms[torch.from_numpy(rows)]
        texts, ids = [texts[row] for row in rows], [ids[row] for row in rows]
    if part.shift:
        changed, spoken = shifted_audio(waveforms.numpy(), part.shift, stream(seed, name))
        waveforms = torch.from_numpy(changed)
        texts = [text if says else "" for text, says in zip(texts, spoken, strict=True)]
    return _Part(found, waveforms, texts, ids)
