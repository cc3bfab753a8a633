"""A few of the student's inputs at moments of the run, kept small, for a strip over time."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vestige.core.types import InputSpec

# As many moments are shown; up to twice as many are kept, since nobody knows how long a run gets.
SHOWN, _KEPT = 8, 16
_ROWS, _SIDE = 4, 64
# In place of a class where the teacher has none for the whole input, but one for each pixel of it.
NO_CLASS = -1


@dataclass(frozen=True)
class Moment:
    """Inputs at the end of one round.

    Attributes:
        loop: name of the loop.
        round: finished rounds of that loop.
        step: optimizer steps of the whole run.
        images: (n, C, H, W), uint8, at most 4 of at most 64 x 64 pixels.
        classes: (n,), int64, the teacher's answers to the inputs at their full size, or `NO_CLASS`.
    """

    loop: str
    round: int
    step: int
    images: Tensor
    classes: Tensor


def drawable(spec: InputSpec) -> bool:
    """Whether inputs can be shown: grey or colour images."""
    return spec.kind == "image" and len(spec.shape) == 3 and spec.shape[0] in (1, 3)


class Moments:
    """Keeps inputs of at most 17 rounds, evenly spaced whatever the length of the run.

    Every `stride`-th round is kept; when 16 are full, every second one is dropped and the stride is
    doubled. The latest round is always kept, too. Nothing is drawn by chance.

    Args:
        spec: of one input; nothing is kept where it is not `drawable`.
    """

    def __init__(self, spec: InputSpec) -> None:
        self._spec = spec
        self._seen: tuple[Tensor, Tensor] | None = None
        self._kept: list[Moment] = []
        self._latest: Moment | None = None
        self._stride = 1
        self._rounds = 0

    def observe(self, inputs: Tensor, classes: Tensor) -> None:
        """Take note of the newest inputs (B, C, H, W) and the teacher's classes (B,); no copy."""
        if drawable(self._spec):
            self._seen = inputs[:_ROWS], classes[:_ROWS]

    def end_round(self, loop: str, number: int, step: int) -> None:
        """Keep what was observed last in this round; nothing where there was nothing."""
        if self._seen is None:
            return
        inputs, classes = self._seen
        self._seen = None
        images = self._spec.denormalize(inputs.detach().float().cpu())
        self._latest = Moment(loop, number, step, _small(images), classes.cpu())
        if self._rounds % self._stride == 0:
            self._kept.append(self._latest)
            if len(self._kept) == _KEPT:
                del self._kept[1::2]
                self._stride *= 2
        self._rounds += 1

    def chosen(self) -> list[Moment]:
        """At most 8 moments in order, evenly spaced, the first round and the last among them."""
        if self._latest is None:
            return []
        known = list(self._kept)
        if known[-1].step != self._latest.step:
            known.append(self._latest)
        if len(known) <= SHOWN:
            return known
        last = known[-1].step
        places = [known[0].step + (last - known[0].step) * k / (SHOWN - 1) for k in range(SHOWN)]
        near = {min(range(len(known)), key=lambda i: abs(known[i].step - at)) for at in places}
        return [known[index] for index in sorted(near)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept; at a round's end, when checkpoints are written, all there is."""
        return {
            "kept": [astuple(moment) for moment in self._kept],
            "latest": None if self._latest is None else astuple(self._latest),
            "stride": self._stride,
            "rounds": self._rounds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._seen = None
        self._kept = [Moment(*values) for values in state["kept"]]
        self._latest = None if state["latest"] is None else Moment(*state["latest"])
        self._stride, self._rounds = int(state["stride"]), int(state["rounds"])


def _small(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, averaged over whole pixels until no side exceeds 64."""
    times = -(-max(images.shape[-2:]) // _SIDE)
    if times > 1:
        images = functional.avg_pool2d(images, times, ceil_mode=True)
    return images.nan_to_num(nan=0.0).mul(255).round().to(torch.uint8)
