"""The grid of one process: nodes answer as Flower's do, and time runs out for each by itself."""

import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from vestige.errors import MissingExtraError
from vestige.federated import grid as module
from vestige.federated.grid import check_flower, in_process


def app(answer):
    made = ClientApp()
    made.train()(answer)
    return made


def ask(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="train")


def test_a_node_has_its_number_and_keeps_its_context():
    def answer(message, context):
        seen = context.state.config_records.get("seen", ConfigRecord({"times": 0}))
        context.state["seen"] = ConfigRecord({"times": int(seen["times"]) + 1})
        config = {
            "partition": int(context.node_config["partition-id"]),
            "all": int(context.node_config["num-partitions"]),
            "times": context.state["seen"]["times"],
        }
        return Message(RecordDict({"told": ConfigRecord(config)}), reply_to=message)

    with in_process(app(answer), 3) as grid:
        assert list(grid.get_node_ids()) == [1, 2, 3]
        told = [
            [tuple(reply.content["told"].values()) for reply in grid.send_and_receive(messages)]
            for messages in ([ask(1), ask(3)], [ask(3)])
        ]
        again = list(grid.pull_messages(grid.push_messages([ask(3)])))
    assert told == [[(0, 3, 1), (2, 3, 1)], [(2, 3, 2)]]
    assert again[0].content["told"]["times"] == 3
    assert again[0].metadata.src_node_id == 3


def test_what_a_node_raises_is_its_answer():
    def answer(message, context):
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("no memory")
        return Message(RecordDict(), reply_to=message)

    with in_process(app(answer), 2) as grid:
        first, second = grid.send_and_receive([ask(1), ask(2)])
    assert not first.has_error()
    assert second.has_error()
    assert "no memory" in second.error.reason
    assert second.metadata.src_node_id == 2


def test_who_takes_too_long_does_not_answer_and_the_others_have_all_their_time():
    def answer(message, context):
        time.sleep(0.2 if context.node_config["partition-id"] == 0 else 0.06)
        return Message(RecordDict(), reply_to=message)

    with in_process(app(answer), 3) as grid:
        messages = [ask(node) for node in (1, 2, 3)]
        found = grid.send_and_receive(messages, timeout=0.15)
    assert [reply.metadata.src_node_id for reply in found] == [2, 3]


def test_a_flower_that_nobody_tried_is_refused(monkeypatch):
    check_flower()
    monkeypatch.setattr(module, "version", lambda name: "2.0.0")
    with pytest.raises(MissingExtraError, match=r"got flwr 2\.0\.0"):
        check_flower()
