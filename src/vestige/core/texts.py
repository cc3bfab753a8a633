"""Texts as tensors: rows of UTF-8 bytes, so that a network brings its own tokenizer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.errors import DataError, ShapeError

# Between the two texts of a pair; a control character that no text needs.
PAIR = "\x1f"


def to_bytes(texts: Sequence[str], length: int) -> Tensor:
    """Texts as rows of UTF-8 bytes; what is longer than a row is cut between two characters.

    Args:
        texts: N of them; a pair is one text with `PAIR` between the two. NUL becomes a space, since
            rows end with it, and a lone surrogate becomes "?".
        length: bytes of a row, L.

    Returns:
        (N, L), uint8, filled up with zeros.
    """
    rows = torch.zeros(len(texts), length, dtype=torch.uint8)
    for row, text in zip(rows, texts, strict=True):
        raw = text.replace("\0", " ").encode("utf8", errors="replace")
        if len(raw) > length:
            raw = raw[:length].decode("utf8", errors="ignore").encode("utf8")
        if raw:
            row[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return rows


def to_texts(rows: Tensor) -> list[str]:
    """The texts of rows (N, L) of `to_bytes`; bytes that are no UTF-8 are left out.

    Raises:
        ShapeError: not two dimensions.
        DataError: no bytes.
    """
    if rows.dim() != 2:
        raise ShapeError(f"got texts of shape {tuple(rows.shape)}, expected (N, bytes)")
    if rows.dtype != torch.uint8:
        raise DataError(
            f"got texts of dtype {rows.dtype}, expected rows of UTF-8 bytes as uint8; make them "
            "with vestige.core.texts.to_bytes"
        )
    return [
        bytes(row).split(b"\0", 1)[0].decode("utf8", errors="ignore")
        for row in rows.cpu().contiguous().numpy()
    ]


def as_pair(text: str) -> tuple[str, str | None]:
    """The two texts of a pair; the second is None where there is one text alone."""
    first, separator, second = text.partition(PAIR)
    return first, second if separator else None
