"""Values that travel between teachers, methods, plug-ins and the trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vestige.core import parallel
from vestige.errors import ContractError, ShapeError

Role = Literal["source", "student", "auxiliary"]
# One tensor, or several by the names of a forward's keywords (embeddings and their mask).
Inputs = Tensor | Mapping[str, Tensor]


def count_rows(inputs: Inputs) -> int:
    """Size of the batch dimension, the first of every tensor."""
    return len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32: losses of logits and of images need more than 8 bits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def pick_rows(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """The rows of `index` of every tensor."""
    if isinstance(inputs, Tensor):
        return inputs[index]
    return {name: value[index] for name, value in inputs.items()}


def join_rows(first: Inputs, second: Inputs) -> Inputs:
    """Rows of `first`, then of `second`; both are of one form."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {name: torch.cat([value, second[name]]) for name, value in first.items()}
    raise ShapeError("got inputs of two forms, expected two tensors or mappings with equal names")


class Access(StrEnum):
    """How much of a teacher can be seen, most first."""

    WHITE_BOX = "white_box"
    SCORES = "scores"
    LABELS = "labels"

    def covers(self, needed: "Access") -> bool:
        """Whether this access level offers at least `needed`."""
        order = list(Access)
        return order.index(self) <= order.index(needed)


@dataclass(frozen=True)
class InputSpec:
    """What one input of the teacher looks like.

    Attributes:
        kind: what the numbers mean, for example "image", "text" or "audio".
        shape: shape of one input without the batch dimension; (C, H, W) for images, (bytes,) for
            texts, (samples,) for audio.
        mean: per channel, subtracted from values in [0, 1]; () means no normalisation.
        std: per channel, divided by after the mean was subtracted; () means no normalisation.
        sample_rate_hz: of audio; 0 for everything else.
    """

    kind: str
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    sample_rate_hz: int = 0

    def __post_init__(self) -> None:
        if not self.shape or any(int(size) < 1 for size in self.shape):
            raise ShapeError(f"got input shape {self.shape}, expected positive sizes")
        if len(self.mean) != len(self.std):
            raise ShapeError(f"got {len(self.mean)} means and {len(self.std)} stds, expected equal")
        if self.mean and len(self.mean) != self.shape[0]:
            raise ShapeError(
                f"got mean and std for {len(self.mean)} channels, expected {self.shape[0]} "
                f"as in the input shape {self.shape}"
            )
        if any(value <= 0 for value in self.std):
            raise ShapeError(f"got std {self.std}, expected values above 0")
        if (self.kind == "audio") != (self.sample_rate_hz > 0):
            raise ShapeError(
                f"got {self.kind} inputs with sample_rate_hz={self.sample_rate_hz}, expected a "
                "rate for audio and none for anything else"
            )

    @classmethod
    def image(
        cls,
        channels: int,
        height: int,
        width: int,
        *,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> "InputSpec":
        """An image of `channels` x `height` x `width` pixels, normalised from [0, 1]."""
        return cls("image", (channels, height, width), tuple(mean), tuple(std))

    @classmethod
    def text(cls, length: int = 1024) -> "InputSpec":
        """A text of at most `length` bytes in UTF-8; see `core.texts`. Networks bring a tokenizer.

        Longer texts are cut. A network may look at less: its tokenizer's own limit.
        """
        return cls("text", (length,))

    @classmethod
    def audio(cls, seconds: float, sample_rate_hz: int = 16_000) -> "InputSpec":
        """Mono audio of at most `seconds`, values in [-1, 1], zeros behind what is shorter."""
        return cls("audio", (round(seconds * sample_rate_hz),), sample_rate_hz=sample_rate_hz)

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, C, ...) in [0, 1] to inputs of the teacher; differentiable."""
        if not self.mean:
            return images
        mean, std = self._columns(images)
        return (images - mean) / std

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Inputs of the teacher (B, C, ...) to images, clamped to [0, 1]."""
        if self.mean:
            mean, std = self._columns(inputs)
            inputs = inputs * std + mean
        return inputs.clamp(0, 1)

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1) + (1,) * (like.dim() - 2)
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device).view(shape)
        std = torch.tensor(self.std, dtype=like.dtype, device=like.device).view(shape)
        return mean, std


@dataclass
class Batch:
    """One batch of whatever an update needs; every tensor has the batch as its first dimension.

    Attributes:
        inputs: in the teacher's normalised space, (B, ...), or several tensors by the names of the
            forward's keywords; None where the update makes its own.
        labels: (B,) int64, or None.
        latent: input of a generator, (B, Z), or None.
        weights: (B,), set by plug-ins; multiply per-sample losses before the mean, may be negative.
        extra: further tensors by name, for example the teacher's logits when they are reused.
    """

    inputs: Inputs | None = None
    labels: Tensor | None = None
    latent: Tensor | None = None
    weights: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    _reductions: int = field(default=0, repr=False, compare=False)

    def __len__(self) -> int:
        for value in (self.inputs, self.latent, self.labels, *self.extra.values()):
            if value is not None:
                return count_rows(value)
        return 0

    def rows(self, index: Tensor | slice) -> "Batch":
        """The same batch with only the rows of `index` (a mask, indices or a slice)."""

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return Batch(
            None if self.inputs is None else pick_rows(self.inputs, index),
            pick(self.labels),
            pick(self.latent),
            pick(self.weights),
            {name: value[index] for name, value in self.extra.items()},
        )

    def joined(self, inputs: Inputs) -> "Batch":
        """Inputs of this batch, then `inputs`; the new rows have weight 1.

        Labels, latents and `extra` are left behind: they are known for some of the rows only.
        """
        if self.inputs is None:
            raise ContractError("a batch without inputs cannot be joined with others")
        weights = None
        if self.weights is not None:
            weights = torch.cat([self.weights, self.weights.new_ones(count_rows(inputs))])
        return Batch(join_rows(self.inputs, inputs), weights=weights)

    def weighted(self, weights: Tensor) -> "Batch":
        """The same batch with `weights` (B,) multiplied onto the ones it has."""
        if weights.shape != (len(self),):
            raise ShapeError(
                f"got weights of shape {tuple(weights.shape)}, expected ({len(self)},)"
            )
        weights = weights if self.weights is None else self.weights * weights
        # Counted anew: a mean that was taken before says nothing about these weights.
        return replace(self, weights=weights, _reductions=0)

    def mean(self, per_sample: Tensor) -> Tensor:
        """Mean over the batch of a per-sample loss (B,), weighted if a plug-in set weights.

        Where several processes share a batch this is the mean over all of it, in each of them.

        Divides by B, not by the sum of the weights, so that a weight of 0 lowers the loss and a
        negative weight is well defined.

        Returns:
            Scalar (), with gradient.
        """
        if per_sample.shape != (len(self),):
            raise ShapeError(
                f"got a per-sample loss of shape {tuple(per_sample.shape)}, expected "
                f"({len(self)},); reduce over everything but the batch first"
            )
        self._reductions += 1
        weighted = per_sample if self.weights is None else per_sample * self.weights
        return parallel.batch_mean(weighted)

    @property
    def weights_were_used(self) -> bool:
        """Whether `mean` has been called, that is, whether weights had an effect."""
        return self._reductions > 0


@dataclass(frozen=True)
class Prediction:
    """What a network says: logits (B, K), (B, K, H, W) or (B, T, V), or its plain output."""

    logits: Tensor

    @classmethod
    def of(cls, output: Any) -> "Prediction":
        """Read the logits from what a forward returned.

        Understood are a tensor, a tuple or list whose first member is one, a mapping with the key
        "logits" or "out", and an object with the attribute `logits`. Logits of half precision come
        back in float32, so that losses are computed in it.
        """
        if isinstance(output, Prediction):
            return output
        if isinstance(output, Tensor):
            return cls(at_least_float32(output))
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            return cls(at_least_float32(logits))
        if isinstance(output, Mapping):
            for key in ("logits", "out"):
                if isinstance(output.get(key), Tensor):
                    return cls(at_least_float32(output[key]))
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            return cls(at_least_float32(output[0]))
        raise ShapeError(
            f"a forward returned {type(output).__name__}, expected a tensor of logits, a tuple "
            "that starts with it, a mapping with 'logits' or 'out', or an object with "
            "'logits'; wrap the network so that it returns one of these"
        )

    def detach(self) -> "Prediction":
        """The same prediction without gradient."""
        return Prediction(self.logits.detach())


@dataclass(frozen=True)
class Loss:
    """What a loss function returns: named terms, their weighted sum and what was made on the way.

    Attributes:
        terms: scalars by name, for curves; the method's own before weighting, those that plug-ins
            add as they enter the total.
        total: scalar that is minimised.
        inputs: what the networks saw, (B, ...), still attached for role "source".
        teacher: aligned with `inputs` row by row.
        student: aligned with `inputs` row by row.
        fresh: (B,), bool, rows that no update has seen before; None where all are. What is replayed
            says nothing about how the student does on new inputs.
    """

    terms: Mapping[str, Tensor]
    total: Tensor
    inputs: Inputs | None = None
    teacher: Prediction | None = None
    student: Prediction | None = None
    fresh: Tensor | None = None

    def detach(self) -> "Loss":
        """The same values without graph."""
        return Loss(
            {name: term.detach() for name, term in self.terms.items()},
            self.total.detach(),
            _detached(self.inputs),
            None if self.teacher is None else self.teacher.detach(),
            None if self.student is None else self.student.detach(),
            self.fresh,
        )

    def plus(self, extra: Mapping[str, Tensor]) -> "Loss":
        """The same loss with further terms, each already weighted, added to the total."""
        clash = sorted(set(extra) & set(self.terms))
        if clash:
            raise ContractError(
                f"loss terms {clash} exist already; name the added terms differently"
            )
        total = self.total
        for term in extra.values():
            total = total + term
        return replace(self, terms={**self.terms, **extra}, total=total)


def _detached(inputs: Inputs | None) -> Inputs | None:
    if isinstance(inputs, Mapping):
        return {name: value.detach() for name, value in inputs.items()}
    return None if inputs is None else inputs.detach()


@dataclass(frozen=True)
class Step:
    """One optimizer step, as a method yields it; `loss` carries no graph."""

    role: Role
    loss: Loss | None = None


@dataclass(frozen=True)
class Result:
    """What the user gets: `kind` names it ("student", "pool", "images", "global model")."""

    kind: str
    object: Any


@dataclass(frozen=True)
class Requires:
    """What a method or plug-in needs before it can start; checked when a recipe is built.

    Attributes:
        access: the least access to the teacher that suffices.
        batchnorm: whether stored BatchNorm statistics are needed whatever the configuration.
        tasks: task kinds it can serve.
        sources: names of the input sources that must be handed in.
        optional_sources: names of the input sources that may be handed in.
        extras: optional packages, as named in the project's extras.
        teachers: smallest and largest number of teachers.
        student: whether it trains a student; where not, it is handed None.
        roles: roles that it updates, so that a plug-in which wraps others is refused at once; ()
            leaves that to be found out while it runs.
        closed_to: names of plug-ins that cannot work on it; "*" means all.
    """

    access: Access = Access.WHITE_BOX
    batchnorm: bool = False
    tasks: tuple[str, ...] = ("classification",)
    sources: tuple[str, ...] = ()
    optional_sources: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    teachers: tuple[int, int] = (1, 1)
    student: bool = True
    roles: tuple[Role, ...] = ()
    closed_to: tuple[str, ...] = ()


def predict(model: Any, inputs: Any) -> Prediction:
    """Call `model` (a module, a teacher, or a module at other weights) and read its logits.

    Inputs in a mapping are handed over as keywords.
    """
    return Prediction.of(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen weights of `module`, buffers not counted."""
    return sum(parameter.numel() for parameter in module.parameters())
