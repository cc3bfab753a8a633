"""Sums over processes: what two processes get is what one gets of the whole batch."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vestige.core import parallel
from vestige.core.functional import functional
from vestige.core.moments import channel_moments
from vestige.errors import RecipeError
from vestige.losses.prior import total_variation

# Rounding of float64 over a few layers; a wrong term is off by many orders of magnitude more.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
ROWS = (6, 5, 2)


def values(rows):
    made = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, 4, generator=made, dtype=torch.float64) * 2 + 5


def net():
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten())
    layers.append(nn.BatchNorm1d(15, momentum=None))
    return layers.append(nn.Linear(15, 2)).double()


def pairwise(rows):
    """A term that compares every row with every other."""
    flat = rows.flatten(1)
    return torch.cdist(flat, flat + 0.1).square().mean().sqrt()


def cubes(normal):
    return parallel.batch_mean(normal.pow(3)).square().sum()


TERMS = {
    "mean": lambda x: parallel.batch_mean(x.square()).sum().sqrt(),
    "mean of scalars": lambda x: torch.log1p(parallel.batch_mean(x.square().flatten(1).sum(1))),
    "moments": lambda x: sum(m.square().sum() for m in parallel.batch_moments(x)[:2]).sqrt(),
    "log mean exp": lambda x: parallel.batch_log_mean_exp(x).square().sum(),
    "rows": lambda x: pairwise(parallel.batch_rows(x)),
    "uneven rows": lambda x: pairwise(parallel.batch_rows(x[x[:, 0, 0] > 4])),
    "no row of one process": lambda x: parallel.batch_rows(x[:0]).sum() + x.sum() * 0,
    "total variation": lambda x: total_variation(x[:, None]).square(),
    "total variation of one form": lambda x: total_variation(x[:, None], form="l1").square(),
    "batch norm": lambda x: cubes(F.batch_norm(x, None, None, training=True)),
    "native batch norm": lambda x: cubes(
        torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)
    ),
}


def slopes(term, whole, shard):
    """The term and its gradient at the whole batch."""
    whole = whole.clone().requires_grad_()
    rows = whole if shard is None else whole[shard.own]
    value = term(rows)
    (slope,) = torch.autograd.grad(value, whole)
    if shard is not None:
        # Of the sum over processes, so of the mean after division, as for parameters.
        parallel.sum_in_place(slope)
        slope /= shard.world
    return value.detach(), slope


def trained(shard, batch):
    """Weights and buffers of a network after backward through its BatchNorm layers."""
    network = net()
    rows = batch if shard is None else batch[shard.own]
    parallel.batch_mean(network(rows).square().sum(1)).backward()
    grads = [parameter.grad for parameter in network.parameters()]
    for grad in grads if shard is not None else ():
        parallel.sum_in_place(grad)
        grad.div_(2)
    elsewhere = functional(network, {"0.bias": torch.ones(5, dtype=torch.float64)})
    other = parallel.batch_mean(elsewhere(rows))
    return [*grads, *(b.clone() for b in network.buffers()), other.detach()]


def everything():
    """What one process, or each of two, computes."""
    found = {}
    for rows in ROWS:
        batch = values(rows)
        with parallel.sharded(rows) as shard:
            for name, term in TERMS.items():
                found[f"{name}/{rows}"] = slopes(term, batch, shard)
            found[f"penalty/{rows}"] = penalized(batch, shard)
            found[f"network/{rows}"] = trained(shard, batch)
            found[f"asked/{rows}"] = [
                torch.tensor(parallel.rows_of_all(2 * len(batch[shard.own] if shard else batch)))
            ]
            whole = batch > 5
            found[f"flags/{rows}"] = [
                parallel.batch_rows(whole[shard.own] if shard else whole).double()
            ]
    with parallel.sharded(1) as shard:
        found["one row"] = [torch.tensor(shard is None), parallel.batch_mean(values(1)).sum()]
    return found


def penalized(batch, shard):
    """The double backward: gradient of the penalty to a scale in front of BatchNorm."""
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    rows = batch if shard is None else batch[shard.own]
    x = rows + torch.sin(rows * scale)
    normal = F.batch_norm(x, None, None, None, None, True)
    (slope,) = torch.autograd.grad(normal.pow(3).sum(), x, create_graph=True)
    penalty = parallel.batch_mean(slope.square().flatten(1).sum(1))
    (grad,) = torch.autograd.grad(penalty, scale)
    if shard is not None:
        parallel.sum_in_place(grad)
        grad /= shard.world
    return penalty.detach(), grad


def refuse():
    raise RecipeError("the folder is taken")


def talk(rank):
    """What the functions without tensors give."""
    said = {
        "world": parallel.world(),
        "rank": parallel.rank(),
        "first": parallel.first(lambda: f"from {rank}"),
        "once": parallel.once(lambda: rank),
        "same": parallel.differs(7),
        "other": parallel.differs(rank),
        "anywhere": [parallel.anywhere(rank == 1), parallel.anywhere(False)],
        "average": parallel.average([torch.tensor(rank * 1.0), torch.tensor(0.1)]),
    }
    try:
        parallel.first(refuse)
    except RecipeError as error:
        said["error"] = str(error)
    with parallel.sharded(5) as shard:
        said["shard"] = (shard.own.start, shard.own.stop, shard.count)
    try:
        with parallel.sharded(4):
            refuse()
    except RecipeError:
        said["closed"] = parallel.rows_of_all(3)
    return said


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.save((everything(), talk(rank)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    return everything()


@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}/{rows}" for name, rows in itertools.product(TERMS, ROWS)),
        *(f"{name}/{rows}" for name in ("network", "penalty", "asked", "flags") for rows in ROWS),
        "one row",
    ],
)
def test_two_processes_find_what_one_finds(name, two, alone):
    for found, _ in two:
        for value, expected in zip(found[name], alone[name], strict=True):
            torch.testing.assert_close(value, expected, **CLOSE)


def test_processes_talk(two):
    for rank, (_, said) in enumerate(two):
        assert (said["world"], said["rank"]) == (2, rank)
        assert (said["first"], said["once"]) == ("from 0", 0)
        assert (said["same"], said["other"], said["anywhere"]) == (False, True, [True, False])
        assert said["average"][0] == 0.5
        # Exact where all are equal, although 0.1 + 0.1 is rounded in float32.
        assert said["average"][1] == torch.tensor(0.1)
        assert said["error"] == "the folder is taken"
        assert said["closed"] == 3
    assert [said["shard"] for _, said in two] == [(0, 2, 2), (2, 5, 3)]


def test_alone_everything_is_the_plain_thing():
    x = values(6).float()
    scalars = x.flatten(1).sum(1)
    with parallel.sharded(6) as shard:
        assert shard is None
        assert torch.equal(parallel.batch_mean(scalars), scalars.mean())
        assert torch.equal(parallel.batch_mean(x), x.mean(0))
        mean, var, _ = parallel.batch_moments(x)
        expected = torch.var_mean(x, [0, 2], correction=0)
        torch.testing.assert_close((var, mean), expected)
        assert all(map(torch.equal, channel_moments(x), parallel.batch_moments(x)))
        assert parallel.batch_rows(x) is x
        assert parallel.rows_of_all(3) == 3
        assert torch.overrides._get_current_function_mode() is None
    assert (parallel.world(), parallel.rank(), parallel.first(lambda: 5)) == (1, 0, 5)
    assert parallel.anywhere(True) and not parallel.differs(3)
