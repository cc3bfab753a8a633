"""What FedAvg, FedProx, SCAFFOLD and FedDyn say about themselves, and means of states."""

from typing import Any

import pytest
import torch
from federation import DirectClients, skewed
from torch import Tensor, nn

from vestige.core.federation import Ask, ClientData, ClientUpdate
from vestige.core.types import InputSpec
from vestige.federated.bases import BaseTraining, ClientBase, ServerBase, weighted_mean
from vestige.federated.trained import TrainingClient
from vestige.models.factory import build_model

SPEC = InputSpec.image(1, 8, 8)
SIZES = (8, 16, 24, 16)


def network(norm: str = "batch") -> nn.Module:
    torch.manual_seed(0)
    return build_model("convnet", SPEC, 3, widths=[4, 8], norm=norm)


def parts_of(sizes: tuple[int, ...] = SIZES) -> list[ClientData]:
    whole = skewed(len(sizes), SPEC.shape, 3, each=max(sizes))
    return [
        ClientData(part.inputs[:n], part.labels[:n], 3, part.test_inputs, part.test_labels)
        for part, n in zip(whole, sizes, strict=True)
    ]


class Federation:
    """A server and its clients, round by round, with what is in between."""

    def __init__(self, *, sizes: tuple[int, ...] = SIZES, norm: str = "batch", **cfg: Any) -> None:
        self.cfg = BaseTraining(**{"batch_size": 8, "client_lr": 0.05, **cfg})
        self.net = network(norm)
        self.clients = DirectClients(parts_of(sizes))
        self.clients.client = TrainingClient(self.cfg, self.net, counts=True)
        self.server = ServerBase(self.cfg, self.net, len(sizes))
        self.state = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.updates: list[ClientUpdate] = []

    def round(self, number: int, active: list[int]) -> dict[str, Tensor]:
        """The weights that the clients started from."""
        sizes, before = self.clients.sizes(), self.state
        beside, settings = self.server.offer(sizes)
        expects = {"model": {}, **self.server.expects()}
        self.updates = self.clients.ask(
            "train", number, active, {"model": before, **beside}, settings, expects=expects
        )
        self.state = self.server.aggregate(before, self.updates, sizes)
        return before

    def kept(self, partition: int, name: str) -> Tensor:
        """A client's control variate."""
        return self.clients.states[partition]["control"][name]


def mean(updates: list[ClientUpdate], name: str) -> Tensor:
    """The plain one, in float64."""
    return torch.stack([u.arrays["model"][name].double() for u in updates]).mean(0)


def close(found: Tensor, expected: Tensor) -> None:
    # Sums of up to twenty float32 numbers near 1.
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-5)


ROUNDS = ([0, 1, 3], [1, 2], [0, 1, 2, 3], [3])


# FedAvg and FedProx


def test_fedavg_is_the_mean_by_examples():
    federation = Federation()
    federation.round(0, [0, 2])
    for name in federation.server.names:
        first, second = (u.arrays["model"][name] for u in federation.updates)
        close(federation.state[name], 0.25 * first + 0.75 * second)


def test_the_proximal_term_pulls_to_the_global_network_and_not_to_zero():
    cfg = BaseTraining(base="fedprox", proximal_weight=0.3)
    net = network()
    base = ClientBase(cfg, Ask("train", 0, 0, {}, {}, 0), net, {}, 8)
    named = dict(net.named_parameters())
    before = {name: value.detach().clone() for name, value in named.items()}
    rng = torch.Generator().manual_seed(1)
    for value in named.values():
        value.data += torch.randn(value.shape, generator=rng)
        value.grad = torch.ones_like(value)
    penalty = sum(0.15 * (value - before[name]).square().sum() for name, value in named.items())
    expected = torch.autograd.grad(penalty, list(named.values()))
    base.correct(named)
    for value, slope in zip(named.values(), expected, strict=True):
        torch.testing.assert_close(value.grad, 1 + slope)


def test_a_proximal_weight_of_zero_is_fedavg():
    plain, proximal = Federation(), Federation(base="fedprox", proximal_weight=0.0)
    for number in range(2):
        plain.round(number, [0, 1])
        proximal.round(number, [0, 1])
    assert all(torch.equal(plain.state[name], proximal.state[name]) for name in plain.state)


# SCAFFOLD


def test_scaffolds_control_is_the_mean_of_the_clients_by_size():
    """sum_k n~_k c_k / N = c after each round, whoever takes part."""
    federation = Federation(base="scaffold", client_lr_decay=0.9)
    relative = torch.tensor(SIZES) / (sum(SIZES) / len(SIZES))
    for number, active in enumerate(ROUNDS):
        federation.round(number, active)
        for name, control in federation.server.control.items():
            own = [
                size * federation.kept(k, name)
                for k, size in enumerate(relative)
                if k in federation.clients.states
            ]
            close(control, torch.stack(own).sum(0) / len(SIZES))
    assert max(control.abs().max() for control in federation.server.control.values()) > 0.1


def test_scaffolds_first_control_is_the_mean_gradient_of_the_round():
    """c_k = (w - theta_k) / (steps lr), which is the mean gradient of plain SGD."""
    federation = Federation(base="scaffold", sizes=(16, 16), local_epochs=2)
    before = federation.round(0, [0, 1])
    for update in federation.updates:
        for name in federation.server.names:
            slope = (before[name] - update.arrays["model"][name]) / (4 * 0.05)
            close(federation.kept(update.partition, name), slope)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_scaffold_goes_a_share_of_the_way_to_the_plain_mean(share):
    federation = Federation(base="scaffold", control_server_lr=share)
    before = federation.round(0, [0, 1, 2])
    for name in federation.server.names:
        expected = share * mean(federation.updates, name) + (1 - share) * before[name]
        close(federation.state[name], expected)


def test_scaffolds_correction_vanishes_where_all_clients_pull_alike():
    """With equal controls, c / n~_k - c_k is 0 and a client trains as in FedAvg."""
    plain, corrected = Federation(sizes=(16, 16)), Federation(base="scaffold", sizes=(16, 16))
    control = {name: torch.ones_like(c) for name, c in corrected.server.control.items()}
    corrected.server.control = dict(control)
    corrected.clients.states = {k: {"control": control} for k in range(2)}
    plain.round(0, [0, 1])
    corrected.round(0, [0, 1])
    assert all(torch.equal(plain.state[name], corrected.state[name]) for name in plain.state)


def test_scaffolds_gradient_is_the_servers_control_by_size_less_the_clients():
    """c / n~_k - c_k, with n~_k = 8 / 16."""
    net = network()
    named = dict(net.named_parameters())
    own = {name: torch.full_like(value, 3.0) for name, value in named.items()}
    common = {name: torch.full_like(value, 5.0) for name, value in named.items()}
    ask = Ask("train", 0, 0, {"control": common}, {"mean-examples": 16.0}, 0)
    base = ClientBase(BaseTraining(base="scaffold"), ask, net, {"control": own}, 8)
    for value in named.values():
        value.grad = torch.ones_like(value)
    base.correct(named)
    # 1 + 5 / 0.5 - 3.
    assert all(torch.equal(value.grad, torch.full_like(value, 8.0)) for value in named.values())


# FedDyn


def test_feddyns_clients_keep_the_sum_of_their_own_drifts():
    federation = Federation(base="feddyn", client_lr_decay=0.9)
    sums: dict[int, dict[str, Tensor]] = {}
    for number, active in enumerate(ROUNDS):
        before = federation.round(number, active)
        for update in federation.updates:
            own = sums.setdefault(update.partition, {})
            for name in federation.server.names:
                drift = update.arrays["model"][name].double() - before[name].double()
                own[name] = own.get(name, torch.zeros_like(drift)) + drift
        for partition, own in sums.items():
            for name, drift in own.items():
                close(federation.kept(partition, name), drift)
        # The server never sees them, and still has their mean over all clients.
        for name, control in federation.server.control.items():
            close(control, torch.stack([own[name] for own in sums.values()]).sum(0) / len(SIZES))


def test_feddyn_adds_the_mean_of_all_drifts_to_the_plain_mean():
    federation = Federation(base="feddyn")
    for number, active in enumerate(ROUNDS):
        federation.round(number, active)
        for name, control in federation.server.control.items():
            close(federation.state[name], mean(federation.updates, name) + control)


def test_feddyn_without_weight_is_not_fedavg_but_goes_twice_as_far():
    """h is kept unscaled: with all clients, w = 2 mean theta - w_before in the first round."""
    federation = Federation(base="feddyn", dynamic_weight=0.0)
    before = federation.round(0, [0, 1, 2, 3])
    for name in federation.server.names:
        close(federation.state[name], 2 * mean(federation.updates, name) - before[name].double())


def test_feddyn_without_weight_and_without_drifts_is_the_plain_mean():
    plain, dynamic = Federation(sizes=(16,) * 4), Federation(
        base="feddyn", dynamic_weight=0.0, sizes=(16,) * 4
    )  # fmt: skip
    for number in range(2):
        plain.round(number, [0, 1, 3])
        dynamic.server.control = {n: c * 0 for n, c in dynamic.server.control.items()}
        dynamic.round(number, [0, 1, 3])
        dynamic.state |= {n: mean(dynamic.updates, n).float() for n in dynamic.server.names}
        for name in plain.state:
            close(plain.state[name], dynamic.state[name])


def test_feddyns_gradient_is_that_of_its_penalty():
    """(a / n~_k) (<theta, h_k - w> + ||theta||^2 / 2), with n~_k = 8 / 16."""
    cfg = BaseTraining(base="feddyn", dynamic_weight=0.2)
    net = network()
    named = dict(net.named_parameters())
    rng = torch.Generator().manual_seed(2)
    own = {name: torch.randn(value.shape, generator=rng) for name, value in named.items()}
    before = {name: value.detach().clone() for name, value in named.items()}
    ask = Ask("train", 0, 0, {}, {"mean-examples": 16.0}, 0)
    base = ClientBase(cfg, ask, net, {"control": own}, 8)
    for value in named.values():
        value.data += torch.randn(value.shape, generator=rng)
        value.grad = torch.zeros_like(value)
    penalty = sum(
        0.4 * ((value * (own[name] - before[name])).sum() + value.square().sum() / 2)
        for name, value in named.items()
    )
    expected = torch.autograd.grad(penalty, list(named.values()))
    base.correct(named)
    for value, slope in zip(named.values(), expected, strict=True):
        torch.testing.assert_close(value.grad, slope, atol=1e-6, rtol=1e-5)


# States


@pytest.mark.parametrize("base", ["scaffold", "feddyn"])
def test_buffers_follow_the_plain_mean_without_any_control(base):
    federation = Federation(base=base)
    federation.round(0, [0, 2])
    buffers = [name for name in federation.state if name not in federation.server.names]
    assert len(buffers) == 6
    for name in buffers:
        expected = mean(federation.updates, name)
        if not federation.state[name].is_floating_point():
            expected = expected.round()
        close(federation.state[name], expected)


def test_a_mean_of_states_keeps_every_type_and_shape():
    first, second = network().state_dict(), network().state_dict()
    for name, value in second.items():
        second[name] = value + 3
    found = weighted_mean([first, second], [1, 2])
    for name, value in first.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        close(found[name], value + 2)
    assert first["body.1.num_batches_tracked"].dtype == torch.int64
    network().load_state_dict(found)


def test_counters_of_batchnorm_are_rounded():
    states = [{"n": torch.tensor(value)} for value in (1, 2, 2)]
    assert weighted_mean(states, [1, 1, 1])["n"].item() == 2
    assert weighted_mean(states, [9, 1, 1])["n"].item() == 1


def test_masks_stay_masks_as_most_have_them():
    states = [{"mask": torch.tensor(value)} for value in ([True, True], [True, False], [False] * 2)]
    assert torch.equal(weighted_mean(states, [1, 1, 1])["mask"], torch.tensor([True, False]))


def test_a_state_survives_its_own_mean():
    state = network().state_dict()
    found = weighted_mean([state] * 4, [1, 1, 1, 1])
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("base", ["fedavg", "feddyn", "scaffold"])
def test_what_clients_do_not_send_stays(base):
    federation = Federation(base=base, bn_policy="frozen")
    before = federation.round(0, [0, 1])
    kept = [name for name in before if "running" in name or "tracked" in name]
    assert len(kept) == 6
    assert all(torch.equal(federation.state[name], before[name]) for name in kept)


@pytest.mark.parametrize("base", ["fedavg", "fedprox", "scaffold", "feddyn"])
def test_a_server_that_starts_again_knows_its_controls(base):
    first, second = Federation(base=base), Federation(base=base)
    first.round(0, [0, 1])
    second.server.load_state_dict(first.server.state_dict())
    assert second.server.control.keys() == first.server.control.keys()
    assert all(torch.equal(first.server.control[n], c) for n, c in second.server.control.items())
    assert bool(first.server.control) == (base in ("scaffold", "feddyn"))
