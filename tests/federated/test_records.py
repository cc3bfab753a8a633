"""Records come back as they were written, and whatever else a client may send is named."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from vestige.core.federation import Answer, Ask
from vestige.errors import RejectedUpdateError
from vestige.federated import records
from vestige.federated.records import Expected

ASK = Ask("train", 3, 2, {}, {}, seed=1)
MODEL = {
    "weight": torch.arange(6.0).view(2, 3),
    "steps": torch.tensor(4),
    "mask": torch.tensor([True, False]),
}
EXPECTED = Expected(
    "train",
    3,
    2,
    {"model": {"weight": (2, 3), "steps": (), "mask": (2,)}},
    {"model": MODEL},
    {"loss": 1e9},
    most=9,
)


def answer(arrays=None, examples=9, counts=(4, 5, 0), metrics=None) -> RecordDict:
    return records.write_answer(
        ASK,
        Answer(
            {"model": MODEL} if arrays is None else arrays,
            examples,
            None if counts is None else torch.tensor(counts),
            {"loss": 0.5} if metrics is None else metrics,
        ),
    )


def read(content: RecordDict, expected: Expected = EXPECTED):
    return records.read_answer(content, expected, 3)


def model(**arrays) -> RecordDict:
    return answer({"model": {**MODEL, **arrays}})


def changed(group: str, name: str, value) -> RecordDict:
    content = answer()
    content[group][name] = value
    return content


def with_record(name: str, record) -> RecordDict:
    content = answer()
    content[name] = record
    return content


def without(group: str) -> RecordDict:
    content = answer()
    del content[group]
    return content


def raw(dtype: str, shape: tuple[int, ...], data: bytes, kind: str = "numpy.ndarray") -> RecordDict:
    weight = Array(dtype=dtype, shape=shape, stype=kind, data=data)
    steps = Array(np.asarray(4))
    return with_record("model", ArrayRecord({"weight": weight, "steps": steps}))


def test_an_ask_comes_back_as_it_was_written():
    # Half of all seeds have no place in 64 bits with a sign.
    seed = 2**64 - 1
    settings = {"on": True, "cut": 2, "rate": 0.1, "how": "so", "labels": [0, 2], "none": []}
    groups = {"model": MODEL, "generator": {"half": torch.ones(2, dtype=torch.float16)}}
    ask, turn = records.read_ask(
        records.write_ask("upload", 7, 1, seed, groups, settings), 5, "cpu"
    )
    assert (ask.kind, ask.round, turn, ask.partition, ask.seed) == ("upload", 7, 1, 5, seed)
    assert ask.settings == settings
    assert {type(value) for value in ask.settings.values()} == {bool, int, float, str, list}
    for group, arrays in groups.items():
        for name, value in arrays.items():
            found = ask.arrays[group][name]
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
            # Training writes into it.
            found.zero_()


def test_an_answer_comes_back_as_it_was_written():
    update = read(answer())
    assert (update.partition, update.examples, update.metrics) == (2, 9, {"loss": 0.5})
    assert update.counts.tolist() == [4, 5, 0]
    for name, value in MODEL.items():
        assert update.arrays["model"][name].dtype == value.dtype
        assert torch.equal(update.arrays["model"][name], value)
    assert read(answer(counts=None)).counts.tolist() == [0, 0, 0]


def test_the_state_of_a_network_with_batchnorm_keeps_its_dtypes():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    network[1].num_batches_tracked += 7
    state = network.state_dict()
    found = records.read_arrays(records.array_record(state))
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in state.items()
    }
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found["1.num_batches_tracked"].shape == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (changed("reply", "protocol", 2), "wrong protocol"),
        (without("reply"), "wrong protocol"),
        (changed("reply", "kind", "upload"), "another kind"),
        (changed("reply", "server-round", 2), "another round"),
        (changed("metrics", "partition-id", 1), "another client's answer"),
        (without("metrics"), "another client's answer"),
        (answer(examples=0), "no examples"),
        (answer(examples=-4), "no examples"),
        (changed("metrics", "num-examples", 2.5), "no examples"),
        (changed("metrics", "num-examples", [1]), "no examples"),
        (answer(examples=10), "more examples than it has"),
        (answer({}), "unexpected keys"),
        (answer({"model": MODEL, "inputs": MODEL}), "unexpected keys"),
        (with_record("inputs", MetricRecord({"x": 1.0})), "unexpected keys"),
        (answer(metrics={}), "unexpected keys"),
        (answer({"model": {"weight": MODEL["weight"]}}), "another model"),
        (model(more=torch.ones(1)), "another model"),
        (model(weight=torch.ones(3, 2)), "another model"),
        (model(weight=torch.ones(2, 3, 1)), "another model"),
        (model(weight=torch.full((2, 3), torch.nan)), "NaN or infinite values"),
        (model(weight=torch.full((2, 3), -torch.inf)), "NaN or infinite values"),
        (model(weight=torch.full((2, 3), 1e200, dtype=torch.float64)), "NaN or infinite values"),
        (model(weight=torch.ones(2, 3).long()), "another dtype"),
        (model(weight=torch.ones(2, 3).bool()), "another dtype"),
        (model(weight=torch.ones(2, 3, dtype=torch.complex64)), "another dtype"),
        (model(steps=torch.tensor(4.0)), "another dtype"),
        (model(steps=torch.tensor(True)), "another dtype"),
        (model(mask=torch.tensor([1, 0])), "another dtype"),
        (raw("float32", (2, 3), b"no array"), "arrays that cannot be read"),
        (raw("float32", (2, 3), b""), "arrays that cannot be read"),
        (raw("float32", (2, 3), b"PK\x03\x04"), "arrays that cannot be read"),
        (raw("float32", (2, 3), b"", kind="torch"), "arrays that cannot be read"),
        (answer(metrics={"loss": -0.1}), "numbers that cannot be"),
        (answer(metrics={"loss": 1.0, "x" * 81: 1.0}), "unexpected keys"),
        (answer(metrics={"loss": 1.0, **{f"{n}": 1.0 for n in range(100)}}), "unexpected keys"),
        (answer(metrics={"loss": 2e9}), "numbers that cannot be"),
        (with_record("model", MetricRecord({"weight": 1.0})), "arrays that cannot be read"),
        (with_record("model", ConfigRecord({"weight": "x"})), "arrays that cannot be read"),
        (answer(metrics={"loss": float("nan")}), "numbers that are not finite"),
        (answer(metrics={"loss": 1.0, "more": float("inf")}), "numbers that are not finite"),
        (changed("metrics", "loss", [1.0, 2.0]), "numbers that are not finite"),
        (changed("metrics", "loss", 10**400), "numbers that are not finite"),
        # Finite here, and infinite in the single precision of the loss that it would be part of.
        (answer(metrics={"loss": 1.0, "more": 1e300}), "numbers that are not finite"),
        (answer(counts=(1, 2)), "label counts that do not fit"),
        (answer(counts=(1, 2, -1)), "label counts that do not fit"),
        (answer(counts=(1.0, 2.0, 0.0)), "label counts that do not fit"),
        (answer(counts=(2**60, 0, 0)), "label counts that do not fit"),
        (answer(counts=(1j, 0, 0)), "label counts that do not fit"),
        (with_record("label-counts", MetricRecord({"counts": 1})), "arrays that cannot be read"),
    ],
)
def test_what_is_not_as_it_must_be_is_named(content, reason):
    with pytest.raises(RejectedUpdateError) as caught:
        read(content)
    assert caught.value.reason == reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_precision_becomes_that_of_what_was_sent(dtype):
    update = read(model(weight=MODEL["weight"].to(dtype), steps=torch.tensor(4).int()))
    assert update.arrays["model"]["weight"].dtype == torch.float32
    assert update.arrays["model"]["steps"].dtype == torch.int64
    assert torch.equal(update.arrays["model"]["weight"], MODEL["weight"])


def test_what_was_never_sent_may_have_half_precision_but_not_double():
    shapes = {"upload": {"features": (None, 2), "labels": (None,)}}
    expected = Expected("train", 3, 2, shapes)

    def dtypes(features: torch.dtype) -> set[torch.dtype]:
        upload = {"features": torch.ones(5, 2, dtype=features), "labels": torch.ones(5).int()}
        found = read(answer({"upload": upload}), expected).arrays["upload"]
        return {value.dtype for value in found.values()}

    assert dtypes(torch.float16) == {torch.float16, torch.int32}
    assert dtypes(torch.float64) == {torch.float32, torch.int32}


def test_a_refusal_is_counted_by_its_reason_and_is_no_longer_than_a_line():
    with pytest.raises(RejectedUpdateError, match=r"^no examples: client 2 refused$") as caught:
        read(records.write_refusal("train", 2, "no examples"))
    assert caught.value.reason == "no examples"
    with pytest.raises(RejectedUpdateError) as caught:
        read(records.write_refusal("train", 2, "x" * 10**6))
    assert len(caught.value.reason) < 100


@pytest.mark.parametrize("number", [None, 1.5, [0], "0"])
def test_who_says_no_number_is_refused(number):
    metrics = {} if number is None or isinstance(number, str) else {"partition-id": number}
    with pytest.raises(RejectedUpdateError, match="no client's number"):
        records.partition_of(RecordDict({"metrics": MetricRecord(metrics)}))


def test_the_size_of_a_record_is_that_of_its_arrays():
    small = records.size_of(records.write_ask("train", 0, 0, 0, {"model": MODEL}, {}))
    more = {"model": MODEL, "head": {"weight": torch.zeros(1000)}}
    assert 4000 <= records.size_of(records.write_ask("train", 0, 0, 0, more, {})) - small < 4300
