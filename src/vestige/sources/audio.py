"""Recordings that somebody handed in, and their transcripts, as sources."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vestige.core.texts import to_bytes
from vestige.errors import DataError
from vestige.sources.images import ORIGINS, TensorSource

_SCALE = 32768.0


class AudioSource:
    """Recordings, drawn uniformly with replacement; kept as 16-bit samples in memory.

    A `core.rows.RowSource`, which knows its parts and its texts (`core.rows.KnowsTexts`); a method
    must not ask for either.

    Args:
        waveforms: (N, samples) float32 in [-1, 1].
        sample_rate_hz: of them.
        origin: as of `TensorSource`.
        name: what is shown to the user.
        parts: names of the parts, each with whether its recordings are wanted; {} for one part.
        part_index: (N,) int64, the position of each row's part; None for one part.
        texts: what is said in each, "" where nothing is, None where nobody knows; () for nobody.
        ids: (N,) what each is called in the record.
    """

    hashes = None

    def __init__(
        self,
        waveforms: Tensor,
        sample_rate_hz: int,
        *,
        origin: str,
        name: str,
        parts: Mapping[str, bool | None] | None = None,
        part_index: Tensor | None = None,
        texts: Sequence[str | None] = (),
        ids: Sequence[str] = (),
    ) -> None:
        if origin not in ORIGINS:
            raise DataError(
                f"got origin '{origin}' for '{name}', expected one of {', '.join(ORIGINS)}; "
                "declare where the recordings come from"
            )
        if waveforms.dim() != 2 or len(waveforms) == 0:
            raise DataError(
                f"got recordings of shape {tuple(waveforms.shape)} for '{name}', expected "
                "(N, samples) with N > 0; hand in at least one"
            )
        self.origin, self.name, self.sample_rate_hz = origin, name, sample_rate_hz
        self.paths: tuple[Path, ...] = ()
        # The depth that recordings have: lossless, and half the memory.
        self._stored = (
            waveforms.detach().cpu().mul(_SCALE).round().clamp(-_SCALE, _SCALE - 1).to(torch.int16)
        )
        self.parts = dict(parts or {name: None})
        self._part_index = (
            torch.zeros(len(self), dtype=torch.int64) if part_index is None else part_index.cpu()
        )
        self._texts = [*texts] or [None] * len(self)
        self.ids = [*ids] or [str(index) for index in range(len(self))]
        if not len(self) == len(self._part_index) == len(self._texts) == len(self.ids):
            raise DataError(
                f"got {len(self)} recordings in '{name}' with {len(self._part_index)} parts and "
                f"{len(self._texts)} texts, expected one of each"
            )

    def __len__(self) -> int:
        return len(self._stored)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: rows never change."""
        return self

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` recordings (count, samples), on the device of `rng`; no gradient."""
        return self.rows(torch.randint(len(self), (count,), generator=rng, device=rng.device))

    def rows(self, index: Tensor) -> Tensor:
        """The recordings (B, samples) float32 with the numbers `index` (B,), on its device."""
        return self._stored[index.cpu()].to(index.device).float().div_(_SCALE)

    def part_of(self, index: Tensor) -> Tensor:
        """Which part, by its position in `parts`, each row (B,) came from; (B,) int64."""
        return self._part_index[index.cpu()].to(index.device)

    def texts_of(self, index: Tensor) -> list[str | None]:
        """What is said in each row (B,); see `texts`."""
        return [self._texts[number] for number in index.tolist()]


def transcript_source(texts: Sequence[str | None], *, name: str) -> TensorSource:
    """Transcripts (N, L) as rows of bytes, an empty row where nothing is said: real labels.

    Raises:
        DataError: nobody wrote down some of them.
    """
    unknown = sum(text is None for text in texts)
    if unknown:
        raise DataError(
            f"got {unknown} of {len(texts)} recordings without a transcript in '{name}', expected "
            "one for each; leave the source of transcripts out, or add them to metadata.jsonl"
        )
    known = [text or "" for text in texts]
    length = max(64, *(4 * len(text) for text in known))
    return TensorSource(to_bytes(known, length), origin="real", name=name)
