"""Clients on a real engine: each fault is named and counted, and the round goes on."""

import itertools
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from engine import CLASSES, SPEC, Adding, asked, engine, federation, tiny_network
from federation import DirectClients, skewed
from flwr.app import ConfigRecord, Error, Message
from torch import nn

from vestige.core.federation import sent
from vestige.errors import ContractError, ProcessError
from vestige.federated import records
from vestige.federated.apps import ClientHost, client_app
from vestige.federated.bases import weighted_mean
from vestige.federated.federation import Federation
from vestige.federated.simulation import on_ray
from vestige.federated.states import ClientStates
from vestige.models.factory import build_model
from vestige.recipes.build import build_method
from vestige.recipes.catalog import METHODS
from vestige.tasks.classification import Classification
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

PARTS = skewed(4, SPEC.shape, CLASSES)
ARMS = {
    "fedavg": {},
    "fedavg-fedprox": {"base": "fedprox"},
    "fedavg-scaffold": {"base": "scaffold"},
    "fedavg-feddyn": {"base": "feddyn"},
    "fedavg-tuned": {"tune_epochs": 1},
    "fedgen": {},
    "fedgen-lean": {"lean": True},
    "fedftg": {},
    "fedd2s": {"drop_every": 1},
    "fedd2s-soft-labels": {"transport": "soft-labels"},
    "feddistill": {},
    "feddistill-shared": {"share_weights": True},
    "fedensemble": {},
    "local-only": {},
}
SMALL = {
    "rounds": 2,
    "active": 3,
    "batch_size": 8,
    "local_steps": 2,
    "iterations": 2,
    "generator_steps": 2,
    "student_steps": 2,
    "server_batch_size": 8,
    "latent_dim": 8,
    "hidden_dim": 16,
    "generator_width": 4,
}


def name_of(arm: str) -> str:
    names = [name for name in METHODS.names() if arm.startswith(name)]
    return max(names, key=len)


def method_on(clients, arm: str, network: nn.Module | None = None, **options):
    """A method, built on these clients."""
    name = name_of(arm)
    config = METHODS.get(name).Config
    given = {**SMALL, **ARMS.get(arm, {}), **options}
    cfg = config(**{key: value for key, value in given.items() if key in config.model_fields})
    student = layered() if name == "fedd2s" else network or tiny_network()
    task = Classification(SPEC, CLASSES)
    return build_method(name, cfg, task, [], student, {"clients": clients}, 0)


def layered() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        return nn.Sequential(first, second, nn.Sequential(nn.Flatten(), nn.Linear(24, CLASSES)))


def run(method, clients, out=None, **given):
    task, sources = Classification(SPEC, CLASSES), {"clients": clients}
    trainer = Trainer(
        method,
        task,
        student=method.student,
        sources=sources,
        out=out,
        config=TrainerConfig(device="cpu", log_every=1),
        **given,
    )
    if isinstance(clients, Federation):
        with clients.opened(method):
            return trainer.run()
    clients.client = method.client
    return trainer.run()


def weights(method) -> dict[str, torch.Tensor]:
    """Of every network at the server."""
    return {
        f"{part}/{name}": value.clone()
        for part, network in method.parts().items()
        if isinstance(network, nn.Module)
        for name, value in network.state_dict().items()
    }


class Served:
    """What `Federation.opened` wants of a method."""

    def __init__(self, client) -> None:
        self.client = client


def answered(tmp_path, wrong=None, carried=None, **given):
    """Ask all of four clients, of which some misbehave, to add 1 to a network."""
    more = {} if carried is None else {"carried": carried}
    clients = federation(PARTS, tmp_path, engine=engine(wrong, **more), **given)
    with clients.opened(Served(Adding())):
        found = asked(clients, tiny_network())
    return clients, found


# Faults of one client


def altered(change):
    """A client that changes its sound answer before it is sent."""

    def does(message, app):
        reply = app()
        change(reply.content)
        return reply

    return does


def with_array(name, value):
    def change(content):
        arrays = records.read_arrays(content["model"])
        content["model"] = records.array_record({**arrays, name: value})

    return altered(change)


def dies(message, app):
    raise RuntimeError("killed")


def speaks_of_an_error(message, app):
    return Message(Error(code=3, reason="node gone"), reply_to=message)


def set_number(name, value):
    return altered(lambda content: content["metrics"].__setitem__(name, value))


def set_reply(name, value):
    return altered(lambda content: content["reply"].__setitem__(name, value))


FAULTS = {
    "dies": (dies, "failed"),
    "tells an error": (speaks_of_an_error, "failed"),
    "another protocol": (set_reply("protocol", 0), "wrong protocol"),
    "another kind": (set_reply("kind", "upload"), "another kind"),
    "an older round": (set_reply("server-round", -1), "another round"),
    "another's number": (set_number("partition-id", 0), "another client's answer"),
    "no examples": (set_number("num-examples", 0), "no examples"),
    "fewer than none": (set_number("num-examples", -(2**40)), "no examples"),
    "more than it holds": (set_number("num-examples", 2**50), "more examples than it has"),
    "an unknown group": (
        altered(lambda content: content.__setitem__("inputs", content["model"])),
        "unexpected keys",
    ),
    "a group that is a text": (
        altered(lambda content: content.__setitem__("model", ConfigRecord({"a": "b"}))),
        "arrays that cannot be read",
    ),
    "another shape": (with_array("classifier.bias", torch.zeros(4)), "another model"),
    "one array more": (with_array("classifier.more", torch.zeros(4)), "another model"),
    "NaN": (with_array("classifier.bias", torch.full((3,), torch.nan)), "NaN or infinite values"),
    "whole numbers": (with_array("classifier.bias", torch.ones(3).long()), "another dtype"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_client_is_named_and_the_others_are_averaged(fault, tmp_path):
    wrong, reason = FAULTS[fault]
    clients, found = answered(tmp_path, {2: wrong})
    assert [update.partition for update in found] == [0, 1, 3]
    (exchange,) = clients.exchanges
    assert exchange.rejected == {reason: 1}
    assert (exchange.asked, exchange.answered, exchange.void) == (4, 3, False)
    _, whole = answered(tmp_path / "whole")
    for update, sound in zip(found, [whole[0], whole[1], whole[3]], strict=True):
        assert all(
            torch.equal(sound.arrays["model"][n], v) for n, v in update.arrays["model"].items()
        )


@pytest.mark.parametrize(("name", "value"), [("accuracy", 1.5), ("balanced_accuracy", -0.5)])
def test_a_client_that_claims_what_cannot_be_is_not_counted(name, value, tmp_path, caplog):
    def judges(message, app):
        reply = app()
        if message.metadata.message_type == "evaluate":
            reply.content["metrics"][name] = value
        return reply

    clients = federation(PARTS, tmp_path, engine=engine({2: judges}))
    method = method_on(clients, "fedavg")
    with caplog.at_level("INFO", logger="vestige"), clients.opened(method):
        found = clients.judge(method, range(4))
    assert [update.partition for update in found] == [0, 1, 3]
    assert f"numbers that cannot be: client 2: got {name} {value}, expected 0 to 1" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": PARTS[0].labels + 9}, "labels outside the range"),
        ({"inputs": PARTS[0].inputs[:0], "labels": PARTS[0].labels[:0]}, "no examples"),
    ],
)
def test_a_client_with_unfit_data_is_named_and_the_round_goes_on(change, reason, tmp_path):
    parts = [replace(PARTS[0], **change), *PARTS[1:]]
    clients = federation(parts, tmp_path)
    with clients.opened(Served(Adding())):
        found = asked(clients, tiny_network())
        sizes = clients.sizes().tolist()
    assert [update.partition for update in found] == [1, 2, 3]
    # With labels that nobody can use it is not even let in.
    expected = "not connected" if reason == "labels outside the range" else reason
    assert clients.exchanges[0].rejected == {expected: 1}
    assert sizes == [0, 24, 24, 24]


def test_another_precision_is_taken_with_the_dtype_that_was_sent(tmp_path):
    value = torch.tensor([1.5, 2.5, 3.5])
    clients, found = answered(
        tmp_path,
        {
            1: with_array("classifier.bias", value.double()),
            2: with_array("classifier.bias", value.half()),
        },
    )
    assert clients.exchanges[0].rejected == {}
    state = tiny_network().state_dict()
    for update in found:
        for name, like in state.items():
            assert update.arrays["model"][name].dtype == like.dtype
    assert torch.equal(found[1].arrays["model"]["classifier.bias"], value)


def test_training_goes_on_without_a_failing_client_as_if_only_the_others_had_been_asked(tmp_path):
    clients = federation(PARTS, tmp_path, engine=engine({2: dies}))
    method = method_on(clients, "fedavg", active=None, rounds=1)
    before = sent(method.student.state_dict())
    run(method, clients)
    direct = DirectClients(PARTS)
    direct.client = method.client
    expects = {"model": {}}
    three = direct.ask("train", 0, [0, 1, 3], {"model": before}, {}, expects=expects)
    states = [update.arrays["model"] for update in three]
    mean = weighted_mean(states, [float(update.examples) for update in three])
    for name, value in method.student.state_dict().items():
        assert torch.equal(value, mean[name]), name
        assert value.dtype == before[name].dtype


def test_terms_that_one_client_leaves_out_or_makes_up_do_not_stop_the_run(tmp_path):
    def silent(content):
        del content["metrics"]["cross_entropy"]
        content["metrics"]["other"] = 1e6

    clients = federation(PARTS, tmp_path, engine=engine({0: altered(silent)}))
    method = method_on(clients, "fedavg", active=None)
    with clients.opened(method):
        losses = [step.loss for step in steps_of(method, clients)]
    assert [set(loss.terms) for loss in losses] == [{"cross_entropy"}] * 2
    assert all(float(loss.total) < 100 for loss in losses)


def steps_of(method, clients):
    """Steps without the trainer around them."""
    trainer = Trainer(method, Classification(SPEC, CLASSES), student=method.student)
    return list(method.run(trainer.ctx))


# Faults on the way


def test_of_a_client_that_answers_twice_the_first_answer_counts(tmp_path):
    def carried(messages, replies):
        second = [one for one in replies if one.metadata.src_node_id == 3]
        return [*replies, *second, *second]

    for wrong, valid in ((None, [0, 1, 2, 3]), ({2: dies}, [0, 1, 3])):
        clients, found = answered(tmp_path, wrong, skip_door(carried))
        assert [update.partition for update in found] == valid
        rejected = {"answered twice": 2, **({"failed": 1} if wrong else {})}
        assert clients.exchanges[0].rejected == rejected


def skip_door(carried):
    """Only what comes after the clients were met goes wrong."""

    def does(messages, replies):
        door = not messages or messages[0].metadata.message_type == "query"
        return replies if door else carried(messages, replies)

    return does


def test_a_node_that_nobody_asked_is_not_heard(tmp_path):
    clients = federation(PARTS, tmp_path, engine=engine(carried=skip_door(strangers)))
    with clients.opened(Served(Adding())):
        model = {"model": sent(tiny_network().state_dict())}
        expects = {"model": {name: tuple(v.shape) for name, v in model["model"].items()}}
        found = clients.ask("train", 0, [1, 2], model, expects=expects)
    assert [update.partition for update in found] == [1, 2]
    assert clients.exchanges[0].rejected == {"nobody asked": 1}


def strangers(messages, replies):
    reply = replies[0]
    copy = Message(reply.content, reply_to=messages[0])
    copy.metadata.__dict__["_src_node_id"] = 77
    return [*replies, copy]


def test_an_answer_to_an_earlier_round_is_not_taken_for_this_one(tmp_path):
    kept: list = []

    def late(message, app):
        kept.append(app().content)
        return Message(kept[0], reply_to=message)

    clients = federation(PARTS, tmp_path, engine=engine({1: late}))
    with clients.opened(Served(Adding())):
        first, second = asked(clients, tiny_network()), asked(clients, tiny_network(), round=1)
    assert [update.partition for update in first] == [0, 1, 2, 3]
    assert [update.partition for update in second] == [0, 2, 3]
    assert clients.exchanges[1].rejected == {"another round": 1}


def test_who_does_not_answer_in_time_is_left_out(tmp_path):
    carried = skip_door(lambda messages, replies: replies[:1])
    clients, found = answered(tmp_path, carried=carried)
    assert [update.partition for update in found] == [0]
    assert clients.exchanges[0].rejected == {"no answer in time": 3}


@pytest.mark.parametrize("arm", ["fedavg-scaffold", "fedgen", "fedftg", "feddistill-shared"])
def test_a_round_with_too_few_answers_leaves_everything_and_is_said(arm, tmp_path, caplog):
    clients = federation(PARTS, tmp_path, engine=engine({0: dies, 1: dies, 3: dies}), least=2)
    method = method_on(clients, arm, active=None)
    before = weights(method)
    run(method, clients)
    after = weights(method)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [one.void for one in clients.exchanges] == [True, True]
    assert (
        "round 1 is void: 1 of 4 clients gave a valid answer, 2 are needed (failed 3)"
        in caplog.text
    )


def test_a_round_in_which_time_runs_out_for_all_keeps_the_model(tmp_path):
    carried = skip_door(lambda messages, replies: [])
    clients = federation(PARTS, tmp_path, engine=engine(carried=carried))
    method = method_on(clients, "fedavg")
    before = weights(method)
    run(method, clients)
    assert all(torch.equal(before[name], value) for name, value in weights(method).items())
    assert all(one.void and one.rejected == {"no answer in time": 3} for one in clients.exchanges)


# Who is there


def at_door(changes):
    """Nodes that misbehave when they are asked who they are, by node."""

    def carried(messages, replies):
        if messages and messages[0].metadata.message_type == "query":
            for reply in replies:
                if reply.metadata.src_node_id in changes:
                    changes[reply.metadata.src_node_id](reply.content)
        return replies

    return carried


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["metrics"].__setitem__("partition-id", 0),
        lambda content: content["metrics"].__setitem__("partition-id", 9),
        lambda content: content["metrics"].__setitem__("partition-id", -1),
        lambda content: content["metrics"].__setitem__("partition-id", [1]),
        lambda content: content["metrics"].__setitem__("holds", -5.0),
        lambda content: content["metrics"].__setitem__("holds", 0.5),
        lambda content: content["metrics"].__setitem__("holds", 1e30),
        lambda content: content["metrics"].pop("holds"),
        lambda content: content.pop("metrics"),
        lambda content: content["reply"].__setitem__("protocol", 0),
    ],
)
def test_a_node_that_is_no_client_is_not_let_in(change, tmp_path, caplog):
    clients, found = answered(tmp_path, carried=at_door({2: change}))
    assert [update.partition for update in found] == [0, 2, 3]
    assert clients.exchanges[0].rejected == {"not connected": 1}
    assert "1 of 4 nodes were not let in" in caplog.text


def test_without_any_client_the_run_does_not_begin(tmp_path):
    drop = {node: lambda content: content.pop("metrics") for node in (1, 2, 3, 4)}
    with pytest.raises(
        ProcessError, match=r"none of them could be used .*the first said: "
    ) as told:
        answered(tmp_path, carried=at_door(drop))
    assert "got 4 nodes" in str(told.value)
    assert not str(told.value).endswith("nothing")


def test_who_leaves_is_not_asked_and_who_comes_back_under_another_node_is(tmp_path):
    clients = federation(PARTS, tmp_path)
    with clients.opened(Served(Adding())):
        grid = clients._grid
        nodes = list(grid.get_node_ids())
        grid.get_node_ids = lambda: nodes[:3]
        assert len(asked(clients, tiny_network())) == 3
        grid.get_node_ids = lambda: nodes
        assert len(asked(clients, tiny_network(), round=1)) == 4
        # Its size is known still.
        assert clients.sizes().tolist() == [24] * 4
    assert [one.rejected for one in clients.exchanges] == [{"not connected": 1}, {}]


def test_a_number_that_was_taken_is_free_when_its_holder_leaves(tmp_path):
    clients = federation(PARTS, tmp_path)
    with clients.opened(Served(Adding())):
        grid = clients._grid
        # Node 5 says that it is client 3, as node 4 does.
        grid.contexts[5] = type(grid.contexts[4])(1, 5, grid.contexts[4].node_config, None, {})
        grid.get_node_ids = lambda: [1, 2, 3, 4, 5]
        asked(clients, tiny_network())
        assert clients.nodes[3] == 4
        grid.get_node_ids = lambda: [1, 2, 3, 5]
        assert len(asked(clients, tiny_network(), round=1)) == 4
        assert clients.nodes[3] == 5


def test_clients_cannot_be_asked_for_inputs_nor_before_they_are_met(tmp_path):
    clients = federation(PARTS, tmp_path)
    with pytest.raises(ContractError, match="whose data stays with them"):
        clients.draw(1, torch.Generator())
    with pytest.raises(ContractError, match="before the federation was opened"):
        asked(clients, tiny_network())


def test_clients_are_drawn_without_replacement_and_equally_often(tmp_path):
    clients, rng = federation(PARTS, tmp_path), torch.Generator().manual_seed(0)
    drawn = [tuple(clients.sample(2, rng)) for _ in range(600)]
    assert all(one == tuple(sorted(set(one))) and len(one) == 2 for one in drawn)
    times = [drawn.count(pair) for pair in itertools.combinations(range(4), 2)]
    # 100 of each expected, with a standard deviation of 9.
    assert sum(times) == 600
    assert min(times) > 60
    assert clients.sample(9, rng) == [0, 1, 2, 3]


# What leaves a client

MODEL = {"train/model"}
LEAVES = {
    "fedavg": MODEL,
    "fedavg-fedprox": MODEL,
    "fedavg-scaffold": {"train/model", "train/control-change"},
    "fedavg-feddyn": MODEL,
    "fedavg-tuned": MODEL,
    "fedgen": {"train/model", "train/label-counts"},
    "fedgen-lean": {"train/model", "train/label-counts"},
    "fedftg": {"train/model", "train/label-counts"},
    "fedd2s": {"upload/upload"},
    "fedd2s-soft-labels": {"upload/upload"},
    "feddistill": {"train/class-logits", "train/label-counts"},
    "feddistill-shared": {"train/class-logits", "train/model", "train/label-counts"},
    "fedensemble": MODEL,
    "local-only": set(),
}


@pytest.mark.parametrize("arm", ARMS)
def test_nothing_but_what_is_known_leaves_a_client_and_no_inputs(arm, tmp_path):
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def look(messages, replies):
        for reply in replies:
            for group, record in reply.content.array_records.items():
                arrays = records.read_arrays(record)
                shapes.extend((f"{group}/{name}", tuple(v.shape)) for name, v in arrays.items())
        return replies

    clients = federation(PARTS, tmp_path, engine=engine(carried=look))
    method = method_on(clients, arm)
    run(method, clients)
    assert set(clients.leaves) == LEAVES[arm]
    assert not any(one.rejected for one in clients.exchanges)
    # Of one input, or of any number of them.
    inputs = {tuple(SPEC.shape), tuple(SPEC.shape[1:])}
    assert not [name for name, shape in shapes if shape in inputs or shape[1:] in inputs]
    assert bool(shapes) == bool(LEAVES[arm])


def test_every_federated_method_is_among_those():
    federated = {
        name for name in METHODS.names() if METHODS.get(name).requires.sources == ("clients",)
    }
    assert {name_of(arm) for arm in ARMS} == federated
    assert set(ARMS) == set(LEAVES)


def test_the_bytes_of_a_round_are_those_of_the_table(tmp_path):
    """Up 106 KB, down 185 KB with the generator: `stride-cnn` of FedGen on MNIST."""
    parts = skewed(2, (1, 28, 28), 10)
    clients = federation(parts, tmp_path)
    clients.num_classes = 10
    spec = replace(SPEC, shape=(1, 28, 28))
    network = build_model("stride-cnn", spec, 10)
    cfg = METHODS.get("fedgen").Config(rounds=2, local_steps=1, generator_steps=1)
    task = Classification(spec, 10)
    method = build_method("fedgen", cfg, task, [], network, {"clients": clients}, 0)
    with clients.opened(method):
        steps_of(method, clients)
    first, second = clients.exchanges
    assert first.bytes_down / 2 == pytest.approx(106e3, rel=0.05)
    assert second.bytes_down / 2 == pytest.approx(185e3, rel=0.05)
    assert second.bytes_up / 2 == pytest.approx(106e3, rel=0.05)


# Equality with other engines


@pytest.mark.parametrize("arm", ARMS)
def test_the_engine_changes_no_bit(arm, tmp_path):
    clients, direct = federation(PARTS, tmp_path), DirectClients(PARTS)
    ours, other = method_on(clients, arm), method_on(direct, arm)
    run(ours, clients)
    run(other, direct)
    found, wanted = weights(ours), weights(other)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    for partition, state in direct.states.items():
        kept = clients.states.load(partition, (99, 0))
        assert kept.keys() == {group for group, arrays in state.items() if arrays}
        for group, arrays in kept.items():
            assert all(torch.equal(value, state[group][name]) for name, value in arrays.items())


def test_clients_are_judged_with_what_they_tuned_for_themselves(tmp_path):
    clients = federation(PARTS, tmp_path)
    method = method_on(clients, "fedavg", tune_epochs=20, client_lr=0.1, active=None)
    untuned: list[float] = []
    with clients.opened(method):
        for step in method.run(
            Trainer(method, Classification(SPEC, CLASSES), student=method.student).ctx
        ):
            if len(clients.exchanges) == 2 and step.role == "student" and not untuned:
                untuned = [one.metrics["accuracy"] for one in clients.judge(method, range(4))]
        tuned = clients.judge(method, range(4))
    direct = DirectClients(PARTS)
    other = method_on(direct, "fedavg", tune_epochs=20, client_lr=0.1, active=None)
    run(other, direct)
    for update in tuned:
        data = PARTS[update.partition]
        own = other.client.judged(direct.asked[-1], direct.states[update.partition]).eval()
        hits = (own(data.test_inputs).argmax(1) == data.test_labels).float().mean()
        assert update.metrics["accuracy"] == pytest.approx(float(hits))
        assert update.examples == len(data.test_labels)
    assert [update.metrics["accuracy"] for update in tuned] != untuned
    assert {"accuracy", "balanced_accuracy"} <= clients.numbers


def test_the_record_of_a_run_is_saved_with_it(tmp_path):
    clients, _ = answered(tmp_path, {2: dies})
    other = federation(PARTS, tmp_path)
    other.load_state_dict(clients.state_dict())
    assert other.state_dict() == clients.state_dict()
    assert other.exchanges == clients.exchanges
    assert other.holds == {number: 24 for number in range(4)}


@pytest.mark.slow
def test_on_ray_the_weights_are_those_of_one_process(tmp_path):
    pytest.importorskip("ray")
    served, here = {}, {}
    for arm in ("fedavg", "fedgen", "fedftg"):
        clients = federation(PARTS, tmp_path / arm)
        method = method_on(clients, arm)
        run(method, clients)
        served[arm], here[arm] = method.client, weights(method)
    parts = PARTS

    # Within the function, so that it travels to the workers by value.
    class Several:
        """Clients of all these methods, since Ray takes long to start; the message says which."""

        def answer(self, ask, data, state):
            return served[str(ask.settings["arm"])].answer(ask, data, state)

    states = ClientStates(tmp_path / "ray", keep=9)
    app = client_app(ClientHost(Several(), lambda partition, count: parts[partition], states))
    with on_ray(app, len(PARTS), client_cpus=1, client_gpus=0, address=None) as grid:
        for arm, wanted in here.items():
            clients = federation(PARTS, tmp_path / "unused", engine=lent(grid, arm), timeout_s=120)
            method = method_on(clients, arm)
            run(method, clients)
            assert not any(one.rejected for one in clients.exchanges)
            for name, value in weights(method).items():
                torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


def lent(grid, arm):
    """An engine that runs already; each message says whose client is to answer."""

    class Lent:
        get_node_ids = staticmethod(grid.get_node_ids)

        @staticmethod
        def send_and_receive(messages, *, timeout):
            for message in messages:
                message.content["config"]["setting.arm"] = arm
            return grid.send_and_receive(messages, timeout=timeout)

    return lambda app, count: nullcontext(Lent())


@pytest.mark.slow
def test_a_thousand_clients_of_whom_twenty_are_asked_are_quick(tmp_path):
    parts = skewed(1000, SPEC.shape, CLASSES)
    clients = federation(parts, tmp_path)
    # As published but for the number of rounds.
    cfg = METHODS.get("fedgen").Config(rounds=5, active=20)
    network = build_model("stride-cnn", SPEC, CLASSES)
    task = Classification(SPEC, CLASSES)
    began = time.perf_counter()
    method = build_method("fedgen", cfg, task, [], network, {"clients": clients}, 0)
    run(method, clients)
    assert time.perf_counter() - began < 60
    assert [one.answered for one in clients.exchanges] == [20] * 5
    assert clients.sizes().tolist() == [24] * 1000
