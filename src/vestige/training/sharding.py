"""One update over several processes: each takes some rows, and all come to the same end."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core import parallel, seeding
from vestige.core.exchange import Shard
from vestige.core.types import Batch, Inputs, Loss, Prediction

Backward = Callable[[Batch], Loss]


def over_processes(
    batch: Batch, run: Backward, seed: int, generators: Mapping[str, torch.Generator]
) -> Loss:
    """Forward and backward of `batch`, each process on its own rows.

    Dropout and whatever else draws from the global generators draws other numbers in each process,
    which depend on `seed`; afterwards the global generators stand where they stood. Named ones are
    the method's: what they give is the same in every process.

    Args:
        batch: the whole one, the same in every process.
        run: forward and backward of the batch it is given; leaves gradients and returns the loss.
        seed: of this update.
        generators: the named ones.

    Returns:
        The loss of the whole batch without graph, the same in every process: means of the scalars,
        rows of all processes in order.
    """
    with parallel.sharded(len(batch)) as shard:
        if shard is None:
            return run(batch).detach()
        mine = batch.rows(shard.own)
        with _own_randomness(seed, shard, generators):
            loss = run(mine)
        return _whole(loss, batch, mine)


@contextmanager
def _own_randomness(
    seed: int, shard: Shard, generators: Mapping[str, torch.Generator]
) -> Iterator[None]:
    before = {name: made.get_state() for name, made in generators.items()}
    with seeding.seeded(seed, f"process {shard.rank}"):
        yield
    if shard.rows % shard.world == 0:
        return
    # Drawing for more rows moves a generator further: all go on where the first process stands.
    moved = {
        name: made.get_state()
        for name, made in generators.items()
        if name not in before or not torch.equal(before[name], made.get_state())
    }
    for name, state in parallel.first(lambda: moved).items():
        if name in generators:
            generators[name].set_state(state)


def _whole(loss: Loss, batch: Batch, mine: Batch) -> Loss:
    names = list(loss.terms)
    *terms, total = parallel.average([*(loss.terms[name] for name in names), loss.total])
    # What is made of nothing but the batch is there already.
    inputs = batch.inputs if loss.inputs is mine.inputs else _rows(loss.inputs)
    return replace(
        loss,
        terms=dict(zip(names, terms, strict=True)),
        total=total,
        inputs=inputs,
        teacher=_answers(loss.teacher),
        student=_answers(loss.student),
        fresh=None if loss.fresh is None else parallel.batch_rows(loss.fresh),
    ).detach()


def _rows(inputs: Inputs | None) -> Inputs | None:
    if inputs is None or isinstance(inputs, Tensor):
        return None if inputs is None else parallel.batch_rows(inputs.detach())
    return {name: parallel.batch_rows(value.detach()) for name, value in inputs.items()}


def _answers(answers: Prediction | None) -> Prediction | None:
    return None if answers is None else Prediction(parallel.batch_rows(answers.logits.detach()))


def state_number(networks: Mapping[str, nn.Module], state: Mapping[str, Any]) -> int:
    """A number below 2^56 for the weights and generators, the same where all of them are.

    Args:
        networks: by name.
        state: of the context.
    """
    digest = hashlib.blake2b(digest_size=7)
    weights = [weight for network in networks.values() for weight in network.parameters()]
    streams = [state["rng"], *state["generators"].values(), torch.get_rng_state()]
    for values in (*weights, *streams):
        digest.update(values.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return int.from_bytes(digest.digest(), "little")
