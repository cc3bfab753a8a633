"""How many inputs a run made: new rows of the student's updates, or all that its pool holds."""

import torch
from torch import Tensor, nn

from vestige.core.types import InputSpec, Loss
from vestige.sources.memory import RingMemory
from vestige.sources.pool import Pool
from vestige.training.checkpoint import decode, encode
from vestige.training.made import Made

SPEC = InputSpec.image(1, 4, 4)


def loss(rows: int, fresh: list[bool] | None = None) -> Loss:
    mask = None if fresh is None else torch.tensor(fresh)
    return Loss({}, torch.zeros(()), torch.zeros(rows, 1, 4, 4), fresh=mask)


def test_replayed_rows_are_not_made_again():
    made = Made()
    made.observe(loss(5))
    made.observe(loss(4, [True, True, True, False]))
    made.observe(loss(4, [False] * 4))
    assert made.count({}) == 5 + 3


def test_several_tensors_are_one_input():
    made = Made()
    inputs = {"embeddings": torch.zeros(3, 2, 2), "mask": torch.zeros(3, 2)}
    made.observe(Loss({}, torch.zeros(()), inputs))
    assert made.count({"student": nn.Linear(1, 1)}) == 3


def test_of_a_pool_everything_in_it_counts_however_often_it_was_seen():
    made, pool = Made(), Pool(SPEC)
    for _ in range(3):
        pool.add(torch.zeros(6, 1, 4, 4))
    for _ in range(50):
        made.observe(loss(8))
    assert made.count({"pool": pool}) == 18
    # What forgets does not know how many it was given.
    ring = RingMemory(4)
    ring.push(torch.zeros(6, 1, 4, 4))
    assert made.count({"pool": ring}) == 400


def test_what_no_update_showed_is_not_known():
    made = Made()
    assert made.count({}) is None
    made.observe(Loss({}, torch.zeros(())))
    assert made.count({}) is None
    # A pool is known without a student: a run may stop after the synthesis.
    assert made.count({"pool": Pool(SPEC)}) == 0


def test_the_count_survives_a_checkpoint():
    made, tensors = Made(), dict[str, Tensor]()
    made.observe(loss(5))
    made.observe(loss(2, [True, False]))
    state = decode(encode(made.state_dict(), tensors), tensors)
    again = Made()
    again.observe(loss(7, [True] * 7))
    again.load_state_dict(state)
    assert again.count({}) == made.count({}) == 6
    again.observe(loss(1))
    assert (again.count({}), made.count({})) == (7, 6)
