"""How a plug-in remembers what the student saw: kept, or made again."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vestige.core import optim, seeding
from vestige.core.protocols import PluginContext, Stateful, Teacher
from vestige.core.types import Batch, Inputs, InputSpec, Loss, count_rows, pick_rows
from vestige.errors import ContractError
from vestige.models.replay_vae import replay_networks
from vestige.sources.replay import Chunk, ChunkBank, GenerativeReplay
from vestige.teachers.white_box import module_of

Rows = Callable[[int], int]


class Memory(Protocol):
    """Draws only from the plug-in's own stream."""

    def draw(self, batch: Batch) -> Chunk | None:
        """What this update replays; None as long as nothing is remembered."""
        ...

    def remember(self, batch: Batch, loss: Loss) -> None:
        """Take in an update, after its gradient was made."""
        ...

    def parts(self) -> Mapping[str, Stateful]:
        """Everything with state, by name."""
        ...


@dataclass
class Place:
    """Where a memory is in a run.

    Attributes:
        loop: that runs.
        due: chunks that its position asked for so far.
        updates: of the student that were seen.
        steps: that an autoencoder took.
    """

    loop: str = ""
    due: int = 0
    updates: int = 0
    steps: int = 0

    def state_dict(self) -> Mapping[str, Any]:
        """All of it."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)


class Kept:
    """A ring of chunks, pushed at even distances of each loop.

    Within the first round of a run, whose length nobody knows, at ever longer distances.

    Args:
        ctx: of the plug-in.
        chunks: that the ring holds.
        pushes: in the course of a loop.
        rows: of a chunk, from the size of the first batch.
    """

    def __init__(self, ctx: PluginContext, *, chunks: int, pushes: int, rows: Rows) -> None:
        self.ctx = ctx
        self.bank = ChunkBank(chunks)
        self.place = Place()
        self.pushes = pushes
        self.rows = rows

    def parts(self) -> Mapping[str, Stateful]:
        """The ring, and where the run is."""
        return {"place": self.place, "bank": self.bank}

    def draw(self, batch: Batch) -> Chunk | None:
        """One chunk with the teacher's answers, if they are known."""
        return self.bank.draw(self.ctx.rng) if len(self.bank) else None

    def remember(self, batch: Batch, loss: Loss) -> None:
        """Keep the first new rows of the batch where the run has come to it."""
        if not self._due():
            return
        inputs = inputs_of(batch)
        new = torch.arange(len(batch), device=loss.total.device)
        if "fresh" in batch.extra:
            new = batch.extra["fresh"].nonzero()[:, 0]
        new = new[: self.bank.rows or self.rows(len(batch))]
        if len(new):
            rows = pick_rows(inputs, new)
            self.bank.push(rows, _answers(loss, rows, new, len(batch)))

    def _due(self) -> bool:
        progress, place = self.ctx.progress, self.place
        if progress.loop != place.loop:
            place.loop, place.due = progress.loop, 0
        place.updates += 1
        due = math.floor(progress.position * self.pushes)
        if not progress.steps_per_round:
            # Nothing tells yet how long a round is: at updates 1, 2, 4, 8 and so on.
            return place.updates.bit_count() == 1
        before, place.due = place.due, max(due, place.due)
        return due > before


class Made:
    """An autoencoder that is taught step by step and makes remembered inputs again.

    Args:
        ctx: of the plug-in.
        cfg: has `generator`, `generator_head`, `generator_width`, `latent_dim`, `memory_lr`,
            `memory_steps`, `latent_lr`, `one_hot_weight` and `balance_weight`.
        spec: of one image.
        teacher: its gradient moves the codes.
        rows: to replay, from the size of a batch.

    Raises:
        AccessError: the teacher gives no gradient.
        ShapeError: the inputs are no images, or their size does not fit the generator.
    """

    def __init__(
        self, ctx: PluginContext, cfg: Any, spec: InputSpec, teacher: Teacher, *, rows: Rows
    ) -> None:
        module_of(teacher)
        self.ctx = ctx
        self.place = Place()
        self.rows = rows
        self.steps = cfg.memory_steps
        seed = torch.randint(2**62, (1,), generator=ctx.rng, device=ctx.rng.device)
        with seeding.seeded(int(seed), "memory"):
            encoder, generator = replay_networks(
                spec,
                latent_dim=cfg.latent_dim,
                width=cfg.generator_width,
                generator=cfg.generator,
                head=cfg.generator_head,
            )
        self.replay = GenerativeReplay(
            teacher,
            encoder.to(ctx.device),
            generator.to(ctx.device),
            spec.normalize if cfg.generator_head == "sigmoid" else nn.Identity(),
            one_hot_weight=cfg.one_hot_weight,
            balance_weight=cfg.balance_weight,
            latent_lr=cfg.latent_lr,
        )
        self.weights = [*encoder.parameters(), *generator.parameters()]
        self.optimizer = ctx.optimizer("memory", self.weights, optim.factory("adam", cfg.memory_lr))

    def parts(self) -> Mapping[str, Stateful]:
        """The networks, and where the run is."""
        replay = self.replay
        return {"place": self.place, "encoder": replay.encoder, "generator": replay.generator}

    def draw(self, batch: Batch) -> Chunk | None:
        """Images that are made now; their answers are not known."""
        if not self.place.steps:
            return None
        return Chunk(self.replay.draw(self.rows(len(batch)), self.ctx.rng), None)

    def remember(self, batch: Batch, loss: Loss) -> None:
        """Teach the autoencoder half of the batch, and what it remembers; not after each update."""
        seen = self.place.updates
        self.place.updates += 1
        if math.ceil((seen + 1) * self.steps) == math.ceil(seen * self.steps):
            return
        inputs = inputs_of(batch)
        if not isinstance(inputs, Tensor):
            raise ContractError(
                "got several tensors as inputs, expected images to make again; take memory: bank"
            )
        count = self.rows(len(batch)) if self.place.steps else 0
        target = self.replay.target(inputs[: max(2, len(batch) // 2)], count, self.ctx.rng)
        total = self.replay.loss(None, target).total
        self.optimizer.zero_grad()
        with torch.autocast(self.ctx.device.type, enabled=False):
            total.backward(inputs=self.weights)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.place.steps += 1


def inputs_of(batch: Batch) -> Inputs:
    """What the student sees.

    Raises:
        ContractError: the method hands it over in another way.
    """
    if batch.inputs is None:
        raise ContractError(
            "a student update got a batch without inputs, expected some to remember; put what the "
            "student sees into batch.inputs"
        )
    return batch.inputs


def _answers(loss: Loss, rows: Inputs, index: Tensor, least: int) -> Tensor | None:
    """The teacher's logits for `rows`, if the loss holds them: it may be of something else."""
    if loss.teacher is None or loss.inputs is None:
        return None
    logits = loss.teacher.logits
    if not count_rows(loss.inputs) == len(logits) >= least:
        return None
    return logits[index] if _same(rows, pick_rows(loss.inputs, index)) else None


def _same(first: Inputs, second: Inputs) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    return first.keys() == second.keys() and all(
        torch.equal(one, second[name]) for name, one in first.items()
    )
