"""Clients that train alone, and clients that tune what they have averaged."""

from typing import Any

import pytest
import torch
from federation import DirectClients, skewed
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import seeding
from vestige.core.federation import Ask
from vestige.core.types import InputSpec, Step
from vestige.federated.local import batches
from vestige.methods.fedavg import FedAvg, FedAvgConfig
from vestige.methods.local_only import LocalOnly, LocalOnlyConfig
from vestige.tasks.classification import Classification
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 4, 4)
SMALL = {"rounds": 3, "batch_size": 8, "client_lr": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))


def make(kind: Any = LocalOnly, config: Any = LocalOnlyConfig, **settings: Any) -> Any:
    clients = DirectClients(skewed(3, SPEC.shape, 3))
    cfg = config(**{**SMALL, **settings})
    method = kind(cfg, Classification(SPEC, 3), [], network(), {"clients": clients})
    clients.client = method.client
    return method


def run(method: Any) -> list[Step]:
    ctx = RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )
    return list(method.run(ctx))


def judged(method: Any, number: int) -> dict[str, Tensor]:
    arrays, settings = method.offer()
    ask = Ask("test", 0, number, arrays, settings, 0)
    return method.client.judged(ask, method.clients.states.get(number, {})).state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_client_alone_is_plain_training():
    method = make(client_momentum=0.5)
    run(method)
    for number, data in enumerate(method.clients.parts):
        own = network()
        optimizer = torch.optim.SGD(own.parameters(), 0.1, momentum=0.5)
        for index in range(3):
            rng = seeding.generator(seeding.derive(0, f"client {number}/{index}/train"), "batches")
            for rows in batches(24, 8, 3, rng):
                optimizer.zero_grad()
                F.cross_entropy(own(data.inputs[rows]), data.labels[rows]).backward()
                optimizer.step()
        found = judged(method, number)
        for name, value in own.state_dict().items():
            torch.testing.assert_close(found[name], value)


def test_nothing_comes_or_goes_but_a_loss():
    method = make()
    steps = run(method)
    assert all(not ask.arrays and not ask.settings for ask in method.clients.asked)
    assert [set(step.loss.terms) for step in steps] == [{"cross_entropy"}] * 3
    assert same(method.student.state_dict(), network().state_dict())
    assert method.result().kind == "personal models"


def test_clients_that_are_not_asked_stay():
    method = make(rounds=1, active=1)
    run(method)
    (asked,) = {ask.partition for ask in method.clients.asked}
    for number in range(3):
        assert same(judged(method, number), network().state_dict()) == (number != asked)


@pytest.mark.parametrize("base", ["fedavg", "scaffold", "feddyn"])
def test_tuning_starts_from_the_average_and_stays_with_each_client(base):
    plain, tuned = (make(FedAvg, FedAvgConfig, base=base, tune_epochs=n) for n in (0, 2))
    run(plain)
    steps = run(tuned)
    assert len(steps) == 4
    # The global network is what it is without.
    assert same(plain.student.state_dict(), tuned.student.state_dict())
    assert tuned.variant() == ("tuned" if base == "fedavg" else f"{base}, tuned")
    for number, data in enumerate(tuned.clients.parts):
        assert same(judged(plain, number), plain.student.state_dict())
        own = network()
        own.load_state_dict(plain.student.state_dict())
        optimizer = torch.optim.SGD(own.parameters(), 0.1)
        rng = seeding.generator(seeding.derive(0, f"client {number}/3/tune"), "batches")
        for rows in batches(24, 8, 6, rng):
            optimizer.zero_grad()
            F.cross_entropy(own(data.inputs[rows]), data.labels[rows]).backward()
            optimizer.step()
        found = judged(tuned, number)
        for name, value in own.state_dict().items():
            torch.testing.assert_close(found[name], value)


def test_everyone_tunes_and_sends_nothing():
    method = make(FedAvg, FedAvgConfig, active=1, tune_epochs=1)
    run(method)
    asked = [ask for ask in method.clients.asked if ask.kind == "tune"]
    assert [ask.partition for ask in asked] == [0, 1, 2]
    answer = method.client.answer(asked[0], method.clients.parts[0], {"control": {"a": 1}})
    assert answer.arrays == {}
    # What a base algorithm keeps is not lost.
    assert set(answer.state) == {"control", "network"}
