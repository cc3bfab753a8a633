"""What was heard in the rows of a source, and what became of it, as items of a record."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from vestige.core.filtering import Better, Filtered, Item, Rule
from vestige.core.rows import RowSource
from vestige.core.transcripts import Transcripts
from vestige.sources.quality_filters import cleaning_reason


class HeardItems(Sequence[Item]):
    """Items that are made when they are asked for, since each holds its recording.

    Args:
        heard: transcripts of the rows.
        proxy: those of a second recogniser, or None.
        audio: the rows.
        sample_rate_hz: of them.
        scores: by filter, each (N,).
        reasons: (N,) why each was dropped; "" where it is kept.
    """

    def __init__(
        self,
        heard: Transcripts,
        proxy: Transcripts | None,
        audio: RowSource,
        sample_rate_hz: int,
        scores: Mapping[str, Tensor],
        reasons: Sequence[str],
    ) -> None:
        self._heard, self._proxy, self._audio = heard, proxy, audio
        self._rate, self._reasons = sample_rate_hz, reasons
        self._scores = {name: values.tolist() for name, values in scores.items()}

    def __len__(self) -> int:
        return len(self._reasons)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        about: dict[str, Any] = {
            "row": row,
            "tokens": int(self._heard.written[row]),
            "ended": bool(self._heard.ended[row]),
        }
        if self._proxy is not None:
            about["proxy"] = self._proxy.texts[row]
        waveform = self._audio.rows(torch.tensor([row]))
        return Item(
            self._heard.texts[row],
            not self._reasons[row],
            self._reasons[row],
            {name: _known(values[row]) for name, values in self._scores.items()},
            about,
            waveform[0] if isinstance(waveform, Tensor) else None,
            self._rate,
        )

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))


def reasons_of(
    heard: Transcripts,
    scores: Tensor | None,
    rule: Rule | None,
    *,
    named: str,
    drop_upper_case: bool,
    most_compression: float | None,
) -> list[str]:
    """Why each transcript is dropped; "" for one that is kept.

    Args:
        heard: N of them.
        scores: (N,) of the filter that decides; None where none does.
        rule: of that filter.
        named: the reason where it drops one.
        drop_upper_case: as of `cleaning_reason`.
        most_compression: likewise.
    """
    reasons = [
        cleaning_reason(
            text, ended, drop_upper_case=drop_upper_case, most_compression=most_compression
        )
        for text, ended in zip(heard.texts, heard.ended.tolist(), strict=True)
    ]
    if rule is None or scores is None:
        return reasons
    # What was cleaned away counts as the worst, so that all filters keep as many.
    clean = torch.tensor([not reason for reason in reasons])
    kept = rule.kept(scores.masked_fill(~clean, torch.nan))
    return [
        reason or ("" if stays else named)
        for reason, stays in zip(reasons, kept.tolist(), strict=True)
    ]


def heard_items(
    heard: Transcripts,
    proxy: Transcripts | None,
    audio: RowSource,
    sample_rate_hz: int,
    scores: Mapping[str, Tensor],
    better: Mapping[str, Better],
    reasons: Sequence[str],
    rule: Rule | None,
    chosen: str,
) -> Filtered:
    """The record of what was heard.

    Args:
        heard: as of `HeardItems`.
        proxy: likewise.
        audio: likewise.
        sample_rate_hz: likewise.
        scores: likewise.
        better: by filter its direction.
        reasons: likewise.
        rule: that decided; None where none did.
        chosen: name of the filter that decided; "" where none did.
    """
    counts = Counter(reason or "kept" for reason in reasons)
    filters: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        filters[name] = {"better": better[name]}
        if name != chosen or rule is None:
            continue
        kept = torch.tensor([not reason for reason in reasons])
        limit = rule.threshold
        if limit is None and bool(kept.any()):
            own = values[kept]
            limit = float(own.max() if rule.better == "low" else own.min())
        # JSON has no infinity.
        limit = limit if limit is not None and math.isfinite(limit) else None
        filters[name] |= {"threshold": limit, "keep_fraction": rule.keep_fraction}
    return Filtered(
        HeardItems(heard, proxy, audio, sample_rate_hz, scores, reasons),
        {"kept": counts.pop("kept", 0), **dict(sorted(counts.items()))},
        filters,
        chosen,
    )


def _known(value: float) -> float | None:
    return None if value != value else value
