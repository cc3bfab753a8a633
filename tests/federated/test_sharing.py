import copy

import pytest
import torch
from torch import nn

from vestige.federated import local
from vestige.federated.sharing import Sharing


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def same(first: nn.Module, second: nn.Module, names: list[str]) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], other[name]) for name in names)


ALL = list(network(0).state_dict())
STATISTICS = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


@pytest.mark.parametrize("policy", ["average", "local", "frozen"])
def test_a_network_shared_whole_travels_as_the_policy_says(policy):
    sharing, net = Sharing(policy), network(0)
    assert list(sharing.offered(net)) == ALL
    assert sharing.returned(net).keys() == local.returned(net, policy).keys()
    assert set(sharing.kept(net)) == ({"statistics"} if policy == "local" else set())
    other = network(1)
    sharing.opened(other, sharing.offered(net), {})
    assert same(net, other, ALL)


@pytest.mark.parametrize("names", [["0.weight", "0.bias"], []])
def test_arrays_that_are_not_shared_stay_with_the_client(names):
    sharing, server, client = Sharing("average", names), network(0), network(1)
    client(torch.randn(4, 3))
    start = copy.deepcopy(client)
    assert list(sharing.returned(client)) == list(sharing.offered(server)) == names
    kept = sharing.kept(client)
    assert list(kept["own"]) == [name for name in ALL if name not in names]
    opened = network(2)
    sharing.opened(opened, sharing.offered(server), kept)
    assert same(opened, start, list(kept["own"])) and same(opened, server, names)
    # The first time, nothing was kept.
    fresh = network(3)
    sharing.opened(fresh, sharing.offered(server), {})
    assert same(fresh, network(3), list(kept["own"])) and same(fresh, server, names)


def test_what_is_kept_does_not_change_with_the_network():
    net = network(0)
    sharing = Sharing("average", [])
    kept = sharing.kept(net)["own"]["0.weight"]
    before = kept.clone()
    nn.init.zeros_(net[0].weight)
    assert torch.equal(kept, before)
