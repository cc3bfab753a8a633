"""What a student is to retain: earlier inputs kept in chunks, or made again by a small network."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vestige.core import modes
from vestige.core.protocols import Teacher
from vestige.core.types import Batch, Inputs, Loss, count_rows, predict
from vestige.errors import ContractError, ShapeError
from vestige.losses.distill import l1_logits
from vestige.losses.latent import latent_moments_loss, standard_normal_divergence
from vestige.losses.prior import class_balance_loss, one_hot_loss
from vestige.models.replay_vae import ReplayEncoder, sample_code

# Of Adam, whose first step from standing still is this one.
_ADAM_EPS = 1e-8


class Chunk(NamedTuple):
    """Earlier inputs (n, ...) and the teacher's logits for them, or None; without gradient."""

    inputs: Inputs
    answers: Tensor | None


class ChunkBank:
    """The newest `capacity` chunks of inputs that were pushed, each with the teacher's answers.

    Retain's memory bank (arXiv 2302.14290). Since a frozen teacher always answers the same, what it
    said is kept with the chunk, and no pass is needed when it is replayed. Rows are kept as they
    come and where they are: synthetic inputs are real-valued, so eight bits would change them.

    The first push decides how many rows a chunk has.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ContractError(f"got capacity {capacity}, expected at least 1 chunk")
        self.capacity = capacity
        self._pushed = 0
        self._inputs: dict[str, Tensor] = {}
        self._answers: Tensor | None = None

    def __len__(self) -> int:
        """Number of chunks."""
        return min(self._pushed, self.capacity)

    @property
    def rows(self) -> int:
        """Rows of a chunk; 0 before the first push."""
        return next((one.shape[1] for one in self._inputs.values()), 0)

    def push(self, inputs: Inputs, answers: Tensor | None = None) -> None:
        """Keep a chunk in the place of the oldest.

        Args:
            inputs: (n, ...), or several tensors by name. Of more rows than the first chunk had the
                first ones stay; fewer are taken round again.
            answers: the teacher's logits (n, ...) for them. Once a push comes without, none are
                kept any more.

        Raises:
            ShapeError: there are no rows, rows and answers differ in number, or rows differ in form
                from those of the first chunk.
        """
        count = count_rows(inputs)
        if count == 0 or (answers is not None and len(answers) != count):
            told = "no answers" if answers is None else f"{len(answers)} answers"
            raise ShapeError(f"got {count} rows and {told}, expected as many of both, at least 1")
        given = {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        if self._inputs and any(
            name not in given or given[name].shape[1:] != kept.shape[2:]
            for name, kept in self._inputs.items()
        ):
            forms = {name: tuple(one.shape[1:]) for name, one in given.items()}
            expected = {name: tuple(one.shape[2:]) for name, one in self._inputs.items()}
            raise ShapeError(f"got rows {forms}, expected {expected} as in the first chunk")
        rows = torch.arange(self.rows or count) % count
        place = self._pushed % self.capacity
        if self._pushed and self._answers is None:
            answers = None
        for name, one in given.items():
            self._inputs[name] = self._written(self._inputs.get(name), place, one, rows)
        self._answers = (
            None if answers is None else self._written(self._answers, place, answers, rows)
        )
        self._pushed += 1

    def draw(self, rng: torch.Generator) -> Chunk:
        """One chunk, each as likely, on the device of `rng`.

        Raises:
            ContractError: nothing was pushed yet.
        """
        if not self._inputs:
            raise ContractError("an empty memory was drawn from; push first")
        # A checkpoint is read back to the CPU; moved once, not in every step.
        self._inputs = {name: kept.to(rng.device) for name, kept in self._inputs.items()}
        self._answers = None if self._answers is None else self._answers.to(rng.device)
        index = torch.randint(len(self), (1,), generator=rng, device=rng.device)
        drawn = {name: kept[index][0] for name, kept in self._inputs.items()}
        answers = None if self._answers is None else self._answers[index][0]
        return Chunk(drawn.get("", drawn), answers)

    def state_dict(self) -> Mapping[str, Any]:
        """The valid chunks and the number pushed so far."""
        return {
            "inputs": {name: kept[: len(self)] for name, kept in self._inputs.items()},
            "answers": None if self._answers is None else self._answers[: len(self)],
            "pushed": self._pushed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._pushed = int(state["pushed"])
        self._inputs = {name: self._padded(kept) for name, kept in state["inputs"].items()}
        self._answers = None if state["answers"] is None else self._padded(state["answers"])

    def _written(self, kept: Tensor | None, place: int, values: Tensor, rows: Tensor) -> Tensor:
        values = values.detach()[rows.to(values.device)]
        if kept is None:
            kept = values.new_zeros((self.capacity, *values.shape))
        kept = kept.to(values.device)
        kept[place] = values
        return kept

    def _padded(self, kept: Tensor) -> Tensor:
        whole = kept.new_zeros((self.capacity, *kept.shape[1:]))
        whole[: len(kept)] = kept
        return whole


class GenerativeReplay:
    """Remembers earlier inputs in the weights of a small autoencoder (PRE-DFKD, arXiv 2201.03019).

    Nothing is stored. To replay, standard normal codes take one step towards inputs of which the
    teacher is sure and that spread over the classes, and the memory generator makes images of them.
    The generator is taught step by step to give back new inputs and, so that it forgets none, what
    it replays itself. Whoever holds it makes the steps.

    Args:
        teacher: a network; its gradient with respect to its input moves the codes.
        encoder: inputs to moments of codes.
        generator: codes to images.
        as_inputs: the generator's output in the teacher's normalised space; differentiable.
        one_hot_weight: of the step of the codes.
        balance_weight: of the step of the codes; the logarithm has base 10, as in the paper's code.
        latent_lr: size of that step, of Adam.
        divergence_weight: of the codes' divergence from a standard normal distribution.
        leak_latent_grad: add the gradient that the step of the codes has at the generator to that
            of reconstruction, as the reference code does by an oversight.
    """

    def __init__(
        self,
        teacher: Teacher,
        encoder: ReplayEncoder,
        generator: nn.Module,
        as_inputs: Callable[[Tensor], Tensor],
        *,
        one_hot_weight: float = 1.0,
        balance_weight: float = 5.0,
        latent_lr: float = 0.02,
        divergence_weight: float = 1e-5,
        leak_latent_grad: bool = False,
    ) -> None:
        self.teacher = teacher
        self.encoder = encoder
        self.generator = generator
        self.as_inputs = as_inputs
        self.one_hot_weight = one_hot_weight
        self.balance_weight = balance_weight
        self.latent_lr = latent_lr
        self.divergence_weight = divergence_weight
        self.leak_latent_grad = leak_latent_grad
        self._untuned: Tensor | None = None

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` remembered inputs (count, ...) for the student, without gradient.

        The generator is in eval mode meanwhile, so its running statistics stay.
        """
        with modes.evaluating(self.generator):
            return self._remembered(self._codes(count, rng))

    def target(self, fresh: Tensor, count: int, rng: torch.Generator) -> Batch:
        """What the next step is to reconstruct: `fresh` inputs and `count` remembered ones.

        Draws everything that `loss` needs, with the generator in train mode, as in the reference
        code.

        Args:
            fresh: new inputs (n, ...).
            count: remembered rows to add; 0 as long as the generator has seen nothing.
            rng: draws.
        """
        self.encoder.train()
        self.generator.train()
        self._untuned = None
        inputs = fresh.detach()
        if count:
            codes = self._codes(count, rng)
            inputs = torch.cat([inputs, self._remembered(codes)])
            if self.leak_latent_grad:
                self._untuned = codes
        shape = (len(inputs), self.encoder.latent_dim)
        noise = torch.randn(shape, generator=rng, device=rng.device)
        return Batch(inputs, extra={"noise": noise})

    def loss(self, model: Any, batch: Batch) -> Loss:
        """Reconstruction of `batch`, minimised over encoder and generator; `model` is not used.

        Returns:
            Terms "images" (mean absolute difference over batch and values), "answers" (of the
            teacher's logits, over batch and classes) and "divergence" (mean over the batch, in
            nats, before its weight).
        """
        inputs = batch.inputs
        if not isinstance(inputs, Tensor):
            raise ContractError("generative replay got several tensors, expected images")
        mean, log_variance = self.encoder(inputs)
        code = sample_code(mean, log_variance, batch.extra["noise"])
        images = self.as_inputs(self.generator(code))
        with torch.no_grad():
            wanted = predict(self.teacher, inputs).logits
        terms = {
            "images": batch.mean((images - inputs).abs().flatten(1).mean(1)),
            "answers": batch.mean(l1_logits(predict(self.teacher, images).logits, wanted)),
            "divergence": batch.mean(standard_normal_divergence(mean, log_variance)),
        }
        total = terms["images"] + terms["answers"] + self.divergence_weight * terms["divergence"]
        if self._untuned is not None:
            terms["leaked"] = self._clear(self.as_inputs(self.generator(self._untuned)))
            total = total + terms["leaked"]
        return Loss(terms, total)

    def _clear(self, inputs: Tensor) -> Tensor:
        """How unsure the teacher is of remembered inputs, and how unlike they are in class."""
        logits = predict(self.teacher, inputs).logits
        sure = self.one_hot_weight * one_hot_loss(logits).mean()
        return sure + self.balance_weight * class_balance_loss(logits, base=10.0)

    def _codes(self, count: int, rng: torch.Generator) -> Tensor:
        shape = (count, self.encoder.latent_dim)
        return torch.randn(shape, generator=rng, device=rng.device)

    def _remembered(self, codes: Tensor) -> Tensor:
        with torch.enable_grad():
            codes = codes.detach().requires_grad_(True)
            images = self.as_inputs(self.generator(codes))
            total = self._clear(images) + latent_moments_loss(codes)
            with torch.autocast(total.device.type, enabled=False):
                (slope,) = torch.autograd.grad(total, codes)
        with torch.no_grad():
            # Adam's first step: both moments are those of this gradient alone.
            tuned = codes - self.latent_lr * slope / (slope.abs() + _ADAM_EPS)
            made: Tensor = self.as_inputs(self.generator(tuned))
        return made
