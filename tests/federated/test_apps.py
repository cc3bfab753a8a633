"""What a client does with what it is asked, and what it never tells."""

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from engine import Adding, tiny_network
from federation import skewed
from torch import nn

from vestige.core.federation import Answer, ClientData
from vestige.errors import DataError, RejectedUpdateError
from vestige.federated import records
from vestige.federated.apps import EVALUATE, JOIN, ClientHost, by_class, checked
from vestige.federated.records import Expected
from vestige.federated.states import ClientStates

PART = skewed(1, (1, 8, 8), 3)[0]
NOTHING = torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)


class Sum(nn.Module):
    """Logits by the sign of an input's sum: class 0 or 1, never 2."""

    def forward(self, inputs):
        total = inputs.flatten(1).sum(1, keepdim=True)
        return torch.cat([-total, total, torch.full_like(total, -1e9)], 1)


class Keeping(Adding):
    """Keeps the seed of what it was asked, and tells what it kept before."""

    def answer(self, ask, data, state):
        kept = float(state["own"]["seed"]) if state else -1.0
        drawn = float(torch.rand(()))
        own = {"own": {"seed": torch.tensor(float(ask.round))}}
        return Answer({}, len(data), metrics={"kept": kept, "drawn": drawn}, state=own)

    def judged(self, ask, state):
        return Sum()


class Failing(Adding):
    def answer(self, ask, data, state):
        raise ValueError(f"could not convert {data.inputs[0, 0, 0, 0]} of Jane Doe")


def host_of(client, tmp_path, data=PART, load=None) -> ClientHost:
    states = ClientStates(tmp_path, keep=9)
    return ClientHost(client, load or (lambda partition, count: data), states)


def told(host, kind="train", round=0, turn=0, seed=0, arrays=None, most=None):
    content = records.write_ask(kind, round, turn, seed, arrays or {}, {})
    shapes = {}
    if arrays:
        shapes = {
            group: {name: tuple(value.shape) for name, value in values.items()}
            for group, values in arrays.items()
        }
    return records.read_answer(
        host.answer(content, 0, 1), Expected(kind, round, 0, shapes, most=most), 3
    )


def refused(host, **given) -> str:
    with pytest.raises(RejectedUpdateError) as caught:
        told(host, **given)
    return caught.value.reason


def test_a_client_says_at_the_door_how_much_it_holds(tmp_path):
    update = told(host_of(Adding(), tmp_path), JOIN)
    assert update.metrics == {"holds": float(len(PART))}
    empty = replace(PART, inputs=NOTHING[0], labels=NOTHING[1])
    assert told(host_of(Adding(), tmp_path, empty), JOIN).metrics == {"holds": 0.0}


def test_it_is_given_what_it_kept_before_and_nothing_of_later(tmp_path):
    host = host_of(Keeping(), tmp_path)
    kept = [told(host, round=round).metrics["kept"] for round in (0, 1, 2)]
    assert kept == [-1.0, 0.0, 1.0]
    # The server was killed and went back.
    assert told(host, round=1).metrics["kept"] == 0.0
    assert told(host, round=2, turn=1).metrics["kept"] == 2.0


def test_what_it_draws_goes_by_the_seed_alone(tmp_path):
    host = host_of(Keeping(), tmp_path)
    before = torch.get_rng_state()
    first = told(host, seed=2**64 - 1).metrics["drawn"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert told(host, seed=2**64 - 1).metrics["drawn"] == first
    assert told(host, seed=1).metrics["drawn"] != first


def test_a_client_is_judged_on_its_own_held_out_part(tmp_path):
    # Right on the first two of class 0 and on the one of class 1; no class 2.
    inputs = torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    data = replace(PART, test_inputs=inputs, test_labels=torch.tensor([0, 0, 0, 1]))
    update = told(host_of(Keeping(), tmp_path, data), EVALUATE)
    assert update.examples == 4
    assert update.metrics["accuracy"] == pytest.approx(3 / 4)
    assert update.metrics["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    none = replace(PART, test_inputs=NOTHING[0], test_labels=NOTHING[1])
    assert refused(host_of(Keeping(), tmp_path, none), kind=EVALUATE) == "no test examples"


def test_right_answers_are_counted_by_class_across_parts_and_the_mode_stays():
    network = nn.Sequential(Sum(), nn.Dropout(0.9)).train()
    inputs = torch.ones(3000, 1, 2, 2)
    labels = torch.arange(3000) % 3
    assert by_class(network, inputs, labels, 3).tolist() == [0, 1000, 0]
    assert network.training


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": PART.labels + 1}, "labels outside the range"),
        ({"labels": PART.labels - 1}, "labels outside the range"),
        ({"labels": PART.labels[:-1]}, "labels that do not fit the inputs"),
        ({"labels": PART.labels[:, None]}, "labels that do not fit the inputs"),
        ({"test_labels": PART.test_labels + 3}, "labels outside the range"),
        ({"inputs": PART.inputs / 0}, "inputs that are not finite"),
        ({"inputs": NOTHING[0], "labels": NOTHING[1]}, "no examples"),
    ],
)
def test_data_that_is_not_as_it_must_be_is_refused_by_name(change, reason, tmp_path):
    data = replace(PART, **change)
    assert refused(host_of(Adding(), tmp_path, data)) == reason
    if reason != "no examples":
        with pytest.raises(RejectedUpdateError):
            checked(data)


def test_data_that_cannot_be_opened_is_refused_without_its_path(tmp_path):
    def load(partition, count):
        raise DataError("got no folder /srv/ward-3/patients")

    assert refused(host_of(Adding(), tmp_path, load=load)) == "data that cannot be opened"


def test_what_a_client_raises_is_told_by_its_name_alone(tmp_path, caplog):
    """Its text may hold values of the data; the client's own log has it."""
    host = host_of(Failing(), tmp_path)
    with caplog.at_level(logging.WARNING):
        content = host.answer(records.write_ask("train", 0, 0, 0, {}, {}), 0, 1)
    assert content["reply"]["refused"] == "ValueError at the client"
    assert "Jane" not in str(dict(content))
    assert set(content) == {"metrics", "reply"}
    assert "Jane Doe" in caplog.text


def test_a_server_of_another_layout_is_refused(tmp_path):
    content = records.write_ask("train", 0, 0, 0, {}, {})
    content["config"]["protocol"] = records.PROTOCOL + 1
    answer = host_of(Adding(), tmp_path).answer(content, 0, 1)
    assert answer["reply"]["refused"] == "wrong protocol"


def test_data_is_opened_once_and_again_for_another_giver(tmp_path):
    opened: list[int] = []

    @dataclass
    class Folder:
        """With equality and without a hash, as users write it."""

        number: int

        def __call__(self, partition: int, count: int) -> ClientData:
            opened.append(self.number)
            return PART

    with pytest.raises(TypeError):
        hash(Folder(1))
    for number in (1, 1, 2, 1):
        # Each message brings a copy of its own.
        told(host_of(Adding(), tmp_path, load=Folder(number)), JOIN)
    assert opened == [1, 2, 1]


def test_a_giver_that_fails_is_asked_again(tmp_path):
    tries: list[int] = []

    def load(partition, count):
        tries.append(partition)
        if len(tries) == 1:
            raise OSError("the disk is not there yet")
        return PART

    host = host_of(Adding(), tmp_path, load=load)
    assert refused(host) == "data that cannot be opened"
    model = {"model": dict(tiny_network().named_parameters())}
    assert told(host, arrays=model).examples == len(PART)
