"""What clients upload of single examples: representations, soft labels, labels and row numbers."""

import logging
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.federation import ClientUpdate, Shapes
from vestige.core.types import Batch, predict

logger = logging.getLogger(__name__)
# Examples that go through a network at once where no gradient is needed.
_CHUNK = 256


class Disclosure(BaseModel):
    """Settings of what a client tells of single examples.

    Attributes:
        upload_examples: drawn anew for each upload; null sends all. Lower sends and discloses less.
        half_precision: send representations in float16: half the bytes.
        feature_clip: largest norm of one example's representation; null does not clip.
        feature_noise: standard deviation of the Gaussian noise on each of its values, as a multiple
            of `feature_clip`, which it needs. Higher discloses less and spoils what is learned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    upload_examples: int | None = Field(None, ge=1)
    half_precision: bool = True
    feature_clip: float | None = Field(None, gt=0)
    feature_noise: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _clips_what_it_blurs(self) -> Self:
        if self.feature_noise and self.feature_clip is None:
            raise ValueError(
                f"got feature_noise {self.feature_noise} without feature_clip, of which it is a "
                "multiple; set feature_clip as well"
            )
        return self


@torch.no_grad()
def represented(
    trunk: nn.Module, tail: nn.Module, inputs: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Representations (n, ...) of inputs and the network's soft labels (n, K) of them.

    Args:
        trunk: from inputs to representations, in eval mode.
        tail: from there to logits, likewise.
        inputs: (n, ...), n >= 1.
        temperature: of the soft labels.
    """
    features = torch.cat([trunk(part) for part in inputs.split(_CHUNK)])
    return features, soft_labels(tail, features, temperature=temperature)


@torch.no_grad()
def soft_labels(head: nn.Module, features: Tensor, *, temperature: float) -> Tensor:
    """softmax(logits / temperature), (n, K), of `head` on `features` (n, ...)."""
    logits = torch.cat([predict(head, part).logits for part in features.split(_CHUNK)])
    return F.softmax(logits / temperature, 1)


def disclosed(features: Tensor, cfg: Disclosure, *, rng: torch.Generator) -> Tensor:
    """Representations (n, ...) as they are sent: clipped, noisy and in half precision as asked.

    Args:
        features: of one example in each row.
        cfg: which of these.
        rng: on the CPU.
    """
    clip = cfg.feature_clip
    if clip is not None:
        norms = features.flatten(1).norm(dim=1).clamp_min(torch.finfo(features.dtype).tiny)
        factors = (clip / norms).clamp_max(1.0)
        features = features * factors.view(-1, *[1] * (features.dim() - 1))
        if cfg.feature_noise:
            drawn = torch.randn(features.shape, generator=rng).to(features)
            features = features + cfg.feature_noise * clip * drawn
    return features.half() if cfg.half_precision else features


def expected(shape: tuple[int, ...], num_classes: int) -> Shapes:
    """What an upload must hold, of as many examples as the client likes.

    Args:
        shape: of one representation.
        num_classes: K.
    """
    columns = {"soft_labels": (None, num_classes), "labels": (None,), "rows": (None,)}
    return {"upload": {"features": (None, *shape), **columns}}


def usable(updates: Sequence[ClientUpdate], num_classes: int) -> list[ClientUpdate]:
    """Those whose columns fit together and whose labels are classes; others would stop the run."""
    found = []
    for update in updates:
        arrays = update.arrays["upload"]
        labels = arrays["labels"]
        if (
            len({len(column) for column in arrays.values()}) == 1
            and len(labels) > 0
            and bool(((labels >= 0) & (labels < num_classes)).all())
            and bool((arrays["soft_labels"] >= 0).all())
        ):
            found.append(update)
        else:
            logger.warning(
                "the upload of client %d is left out: got columns of different lengths, or labels "
                "that are no classes, expected one row for each example",
                update.partition,
            )
    return found


def pooled(uploads: Sequence[ClientUpdate], device: torch.device) -> Batch:
    """All uploads by client and row number, whatever the order in which they came."""
    columns: dict[str, list[Tensor]] = {"features": [], "soft_labels": [], "labels": []}
    for upload in sorted(uploads, key=lambda one: one.partition):
        arrays = upload.arrays["upload"]
        order = arrays["rows"].argsort()
        for name, column in columns.items():
            column.append(arrays[name][order])
    pool = {name: torch.cat(column).to(device) for name, column in columns.items()}
    told = {"soft_labels": pool["soft_labels"].float()}
    return Batch(pool["features"].float(), pool["labels"].long(), extra=told)
