"""Flower's own loop with our clients: without a server step it is FedAvg, Flower's and ours."""

import pytest
import torch
from engine import CLASSES, SPEC, Held, federation, tiny_network
from federation import skewed
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import nn
from torch.nn import functional as F

from vestige.core.federation import sent
from vestige.core.types import predict
from vestige.errors import ContractError
from vestige.federated import records
from vestige.federated.apps import ClientHost, client_app
from vestige.federated.grid import in_process
from vestige.federated.states import ClientStates
from vestige.federated.strategy import distill_strategy
from vestige.federated.trained import TrainingClient
from vestige.methods.fedavg import FedAvg, FedAvgConfig
from vestige.tasks.classification import Classification
from vestige.training.trainer import Trainer

PARTS = skewed(4, SPEC.shape, CLASSES)
BASES = ["fedavg", "fedprox", "scaffold", "feddyn"]


def config(**given) -> FedAvgConfig:
    return FedAvgConfig(**{"batch_size": 8, "local_steps": 2, "client_lr": 0.1, **given})


def app_of(cfg, network, folder, wrong=None):
    app = client_app(
        ClientHost(
            TrainingClient(cfg, network, counts=True), Held(PARTS), ClientStates(folder, keep=9)
        )
    )

    def node(message, context):
        if (
            wrong == context.node_config["partition-id"]
            and "query" not in message.metadata.message_type
        ):
            raise RuntimeError("killed")
        return app(message, context)

    return node


def strategy_of(cfg, network, **given):
    return distill_strategy(network, cfg, clients=len(PARTS), num_classes=CLASSES, **given)


def started(cfg, folder, rounds=3, wrong=None, **given):
    """The strategy after some rounds, and the last global state as tensors."""
    network = tiny_network()
    strategy = strategy_of(cfg, network, **given)
    with in_process(app_of(cfg, network, folder, wrong), len(PARTS)) as grid:
        result = strategy.start(grid, records.array_record(network.state_dict()), rounds)
    return strategy, records.read_arrays(result.arrays), result


@pytest.mark.parametrize("base", BASES)
def test_without_a_server_step_it_is_our_fedavg_bit_for_bit(base, tmp_path):
    """The same clients are drawn when both draw from one generator."""
    cfg = config(base=base, rounds=3, active=3)
    network = tiny_network()
    strategy = strategy_of(cfg, network, seed=0)
    clients = federation(PARTS, tmp_path / "ours")
    student = tiny_network()
    method = FedAvg(cfg, Classification(SPEC, CLASSES), [], student, {"clients": clients})
    trainer = Trainer(method, Classification(SPEC, CLASSES), student=student)
    strategy.rng.set_state(trainer.ctx.rng.get_state())
    with clients.opened(method):
        list(method.run(trainer.ctx))
    with in_process(app_of(cfg, network, tmp_path / "flower"), len(PARTS)) as grid:
        result = strategy.start(grid, records.array_record(network.state_dict()), 3)
    found = records.read_arrays(result.arrays)
    for name, value in student.state_dict().items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    for name, value in method.base.control.items():
        assert torch.equal(strategy.base.control[name], value)


def test_without_a_server_step_it_is_flowers_fedavg_bit_for_bit(tmp_path):
    cfg = config()
    network = tiny_network()
    strategy = strategy_of(cfg, network)
    start = records.array_record(network.state_dict())
    with in_process(app_of(cfg, network, tmp_path), len(PARTS)) as grid:
        replies = list(
            grid.send_and_receive(strategy.configure_train(1, start, ConfigRecord(), grid))
        )
    theirs = []
    for reply in replies:
        numbers = MetricRecord({"num-examples": reply.content["metrics"]["num-examples"]})
        content = RecordDict({"arrays": reply.content["model"], "metrics": numbers})
        theirs.append(Message(content, dst_node_id=1, message_type="train"))
    wanted, _ = FlowerFedAvg().aggregate_train(1, theirs)
    arrays, metrics = strategy.aggregate_train(1, reversed(replies))
    found = records.read_arrays(arrays)
    assert set(metrics) == {"cross_entropy"}
    assert set(found) == set(wanted)
    for name, like in network.state_dict().items():
        value = torch.from_numpy(wanted[name].numpy())
        if like.is_floating_point():
            assert torch.equal(found[name], value), name
        else:
            # Counters come back as floats from Flower.
            assert found[name].dtype == torch.int64
            assert float(found[name]) == float(value)


def test_a_server_step_sees_the_average_and_the_clients_and_its_result_goes_on(tmp_path):
    seen = []

    def shifted(round, arrays, updates):
        seen.append((round, [update.partition for update in updates]))
        assert all(update.counts.sum() == update.examples for update in updates)
        return {**arrays, "classifier.bias": arrays["classifier.bias"].double() + 5}

    cfg = config(client_lr=1e-9)
    _, plain, _ = started(cfg, tmp_path / "plain", rounds=2)
    _, moved, _ = started(cfg, tmp_path / "moved", rounds=2, server_step=shifted)
    assert seen == [(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3])]
    # Five in each of two rounds, since clients go on from what the step gave.
    torch.testing.assert_close(moved["classifier.bias"], plain["classifier.bias"] + 10)
    assert moved["classifier.bias"].dtype == torch.float32


def test_a_server_step_may_distill(tmp_path):
    """The step is a plain function of tensors: here the mean of the clients' answers to noise."""

    def distilled(round, arrays, updates):
        student = tiny_network()
        student.load_state_dict(dict(arrays))
        rng = torch.Generator().manual_seed(round)
        inputs = torch.randn(32, *SPEC.shape, generator=rng)
        teachers = [answer_of(update.arrays["model"], inputs) for update in updates]
        target = torch.stack(teachers).softmax(2).mean(0)
        before = apart(student, inputs, target)
        optimizer = torch.optim.SGD(student.parameters(), 0.5)
        for _ in range(10):
            loss = apart(student, inputs, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert apart(student, inputs, target) < before
        return student.state_dict()

    _, _, result = started(config(), tmp_path, rounds=2, server_step=distilled)
    assert set(result.train_metrics_clientapp) == {1, 2}


def answer_of(state, inputs):
    network = tiny_network().eval()
    network.load_state_dict(dict(state))
    with torch.no_grad():
        return predict(network, inputs).logits


def apart(student: nn.Module, inputs, target):
    logits = predict(student.eval(), inputs).logits
    return F.kl_div(logits.log_softmax(1), target, reduction="batchmean")


def test_clients_are_drawn_by_their_numbers_and_again_by_the_same_seed(tmp_path):
    def drawn(folder, seed):
        cfg, rounds = config(active=2), []
        started(
            cfg,
            tmp_path / folder,
            rounds=6,
            seed=seed,
            server_step=lambda _, arrays, updates: (
                rounds.append([update.partition for update in updates]) or arrays
            ),
        )
        return rounds

    first = drawn("first", 1)
    assert first == drawn("again", 1) != drawn("other", 2)
    assert all(len(one) == 2 for one in first)
    assert {number for one in first for number in one} == {0, 1, 2, 3}


def test_a_failing_client_is_left_out_and_a_void_round_changes_nothing(tmp_path):
    strategy, _, result = started(config(), tmp_path / "least 1", rounds=1, wrong=2)
    assert [one.rejected for one in strategy.roster.exchanges] == [{"failed": 1}]
    assert result.arrays is not None
    network = tiny_network()
    void = strategy_of(config(), network, least=4)
    with in_process(app_of(config(), network, tmp_path / "least 4", wrong=2), len(PARTS)) as grid:
        result = void.start(grid, records.array_record(network.state_dict()), 2)
    assert len(result.arrays) == 0
    assert [one.void for one in void.roster.exchanges] == [True, True]


def test_settings_of_flowers_loop_reach_the_clients(tmp_path):
    network, cfg = tiny_network(), config()
    strategy = strategy_of(cfg, network)
    with in_process(app_of(cfg, network, tmp_path), len(PARTS)) as grid:
        start = records.array_record(network.state_dict())
        message = strategy.configure_train(1, start, ConfigRecord({"note": "x"}), grid)[0]
    ask, _ = records.read_ask(message.content, 0, "cpu")
    assert ask.settings == {"note": "x"}
    assert (ask.kind, ask.round) == ("train", 0)
    assert all(
        torch.equal(ask.arrays["model"][n], v) for n, v in sent(network.state_dict()).items()
    )


def test_another_networks_state_is_refused(tmp_path):
    strategy = strategy_of(config(), tiny_network())
    with in_process(app_of(config(), tiny_network(), tmp_path), len(PARTS)) as grid:
        with pytest.raises(ContractError, match="that only one of the network"):
            strategy.start(grid, ArrayRecord(), 1)
        with pytest.raises(ContractError, match="was not configured"):
            strategy.aggregate_train(1, [])
