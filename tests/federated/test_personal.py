"""A network that stays with its client: it goes on as if its training had not been cut."""

import torch
from federation import skewed
from torch import nn

from vestige.federated import personal
from vestige.federated.local import descend, descent
from vestige.federated.personal import PersonalTraining


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounds_of_a_kept_network_are_one_training():
    (data,) = skewed(1, (1, 3, 3), 3)
    cfg = PersonalTraining(client_momentum=0.9, batch_size=8)
    whole, state, start = network(), {}, network()
    optimizer = descent(whole, cfg, 0.1)

    def loss_of(rows):
        return nn.functional.cross_entropy(whole(data.inputs[rows]), data.labels[rows])

    for number in range(3):
        wanted = descend(whole, data, cfg, loss_of, optimizer, rng=rng(number))
        own = personal.opened(start, state, "cpu")
        loss, state = personal.train(own, data, cfg, state, lr=0.1, rng=rng(number))
        assert loss == wanted
    for name, value in whole.state_dict().items():
        assert torch.equal(state["network"][name], value)
    # The network that every client starts from is no client's.
    assert all(map(torch.equal, start.state_dict().values(), network().state_dict().values()))


def test_without_momentum_none_is_kept():
    (data,) = skewed(1, (1, 3, 3), 3)
    cfg = PersonalTraining(batch_size=8)
    _, state = personal.train(network(), data, cfg, {}, lr=0.1, rng=rng(0))
    assert set(state) == {"network"}


def test_a_kept_state_is_not_changed_by_training_from_it():
    (data,) = skewed(1, (1, 3, 3), 3)
    cfg = PersonalTraining(client_momentum=0.9, batch_size=8)
    _, state = personal.train(network(), data, cfg, {}, lr=0.1, rng=rng(0))
    before = {name: value.clone() for name, value in state["momentum"].items()}
    own = personal.opened(network(), state, "cpu")
    personal.train(own, data, cfg, state, lr=0.1, rng=rng(1))
    assert all(torch.equal(before[name], value) for name, value in state["momentum"].items())
