"""Asks and answers as Flower's records; the layout has a number, and both sides check it.

From the server: one array record for each group, and "config" with the number of the layout, kind,
round, turn, seed and settings. From a client: one array record for each group, "metrics" with
"num-examples", "partition-id" and the method's own numbers, "label-counts" where a method needs
them, and "reply" with the number of the layout, the kind and round that it answers, and why it
refused if it did.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vestige.core.federation import Answer, Arrays, Ask, ClientUpdate, Payload, Settings, Shapes
from vestige.errors import RejectedUpdateError

if TYPE_CHECKING:
    from flwr.app import Array, ArrayRecord, RecordDict

PROTOCOL = 1
CONFIG, METRICS, COUNTS, REPLY = "config", "metrics", "label-counts", "reply"
_OWN = "setting."
# Above, no count of examples is real, and sums of them would leave the 64 bits.
MOST = 2**40
_LONGEST = 80
_MOST_NUMBERS = 100
# Of a number beside the arrays: sums of several in single precision stay finite.
_LARGEST = 1e30
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


@dataclass(frozen=True)
class Expected:
    """What a client's answer must be.

    Attributes:
        kind: that was asked.
        round: likewise.
        partition: of the client that was asked.
        shapes: `expects` of `Clients.ask`.
        like: what was sent; arrays of the same group and name come back with its dtype.
        numbers: metrics that must be there, each from 0 to what is given.
        most: examples that it may speak for at most; None where that is not known.
    """

    kind: str
    round: int
    partition: int
    shapes: Shapes = field(default_factory=dict)
    like: Payload = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    most: int | None = None


# NumPy's format: magic and version 1.0, two bytes with the length of the header, header, values.
_MAGIC, _LENGTH, _DATA = b"\x93NUMPY\x01\x00", 8, 10


def write_ask(
    kind: str, round: int, turn: int, seed: int, arrays: Payload, settings: Settings
) -> "RecordDict":
    """What the server sends."""
    from flwr.app import ConfigRecord, RecordDict

    config: dict[str, Any] = {
        "protocol": PROTOCOL,
        "kind": kind,
        "server-round": round,
        "turn": turn,
        # As text: a record holds 64 bits with a sign, and half of all seeds have none.
        "seed": str(seed),
        **{f"{_OWN}{name}": value for name, value in settings.items()},
    }
    groups = {group: array_record(values) for group, values in arrays.items()}
    return RecordDict({**groups, CONFIG: ConfigRecord(config)})


def read_ask(content: "RecordDict", partition: int, device: str) -> tuple[Ask, int]:
    """What a client was sent, and the turn.

    Raises:
        RejectedUpdateError: it is of another layout.
    """
    config = content.config_records.get(CONFIG, {})
    check_protocol(config.get("protocol"), "the server")
    settings = {
        name.removeprefix(_OWN): value for name, value in config.items() if name.startswith(_OWN)
    }
    arrays = {group: read_arrays(record) for group, record in content.array_records.items()}
    ask = Ask(
        str(config["kind"]),
        int(config["server-round"]),
        partition,
        arrays,
        settings,
        int(str(config["seed"])),
        device,
    )
    return ask, int(config["turn"])


def write_answer(ask: Ask, answer: Answer) -> "RecordDict":
    """All that leaves a client."""
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    metrics = {name: float(value) for name, value in answer.metrics.items()}
    found: dict[str, Any] = {group: array_record(v) for group, v in answer.arrays.items()}
    if answer.counts is not None:
        found[COUNTS] = array_record({"counts": answer.counts})
    found[METRICS] = MetricRecord(
        {"num-examples": answer.examples, "partition-id": ask.partition, **metrics}
    )
    found[REPLY] = ConfigRecord({"protocol": PROTOCOL, "kind": ask.kind, "server-round": ask.round})
    return RecordDict(found)


def write_refusal(kind: str, partition: int, reason: str) -> "RecordDict":
    """A client's answer that it cannot do what it is asked, with the reason."""
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    reply = ConfigRecord({"protocol": PROTOCOL, "kind": kind, "refused": reason})
    metrics = MetricRecord({"num-examples": 0, "partition-id": partition})
    return RecordDict({METRICS: metrics, REPLY: reply})


def partition_of(content: "RecordDict") -> int:
    """The number that a client says it has.

    Raises:
        RejectedUpdateError: it says none.
    """
    number = content.metric_records.get(METRICS, {}).get("partition-id")
    if not isinstance(number, int):
        raise RejectedUpdateError("no client's number", f"got {number}, expected one from 0")
    return number


def read_answer(content: "RecordDict", expected: Expected, num_classes: int) -> ClientUpdate:
    """A client's answer, checked in every part.

    Args:
        content: as it came.
        expected: what it must be.
        num_classes: C.

    Raises:
        RejectedUpdateError: it is not as it must be; its `reason` says in few words why.
    """
    who, reply = expected.partition, content.config_records.get(REPLY, {})
    check_protocol(reply.get("protocol"), f"client {who}")
    if "refused" in reply:
        # By a stranger: no longer than a line, however long it is.
        said = str(reply["refused"])[:_LONGEST]
        raise RejectedUpdateError(said, f"client {who} refused")
    metrics = dict(content.metric_records.get(METRICS, {}))
    own, examples = metrics.pop("partition-id", None), metrics.pop("num-examples", None)
    kind, answered = reply.get("kind"), reply.get("server-round")
    _require(kind == expected.kind, "another kind", who, kind, expected.kind)
    _require(answered == expected.round, "another round", who, answered, expected.round)
    _require(own == who, "another client's answer", who, own, who)
    _require(isinstance(examples, int) and examples > 0, "no examples", who, examples, "at least 1")
    most = MOST if expected.most is None else expected.most
    _require(examples <= most, "more examples than it has", who, examples, f"at most {most}")
    groups = {name: record for name, record in content.items() if name not in (METRICS, REPLY)}
    counts, shapes = groups.pop(COUNTS, None), expected.shapes
    _require(groups.keys() == shapes.keys(), "unexpected keys", who, [*groups], [*shapes])
    missing = sorted(expected.numbers.keys() - metrics.keys())
    _require(not missing, "unexpected keys", who, [*metrics], [*expected.numbers])
    arrays = {
        group: _checked(group, read_arrays(record), shapes[group], expected)
        for group, record in groups.items()
    }
    short = len(metrics) <= _MOST_NUMBERS and all(len(name) <= _LONGEST for name in metrics)
    _require(short, "unexpected keys", who, f"{len(metrics)} numbers", "some with short names")
    numbers = {}
    for name, value in metrics.items():
        sound = isinstance(value, int | float) and abs(value) <= _LARGEST
        _require(sound, "numbers that are not finite", who, name, f"at most {_LARGEST:g}")
        numbers[name] = float(value)
    for name, largest in expected.numbers.items():
        possible, found = 0 <= numbers[name] <= largest, f"{name} {numbers[name]}"
        _require(possible, "numbers that cannot be", who, found, f"0 to {largest}")
    return ClientUpdate(who, arrays, examples, _counts(counts, who, num_classes), numbers)


def check_protocol(found: object, who: str) -> None:
    """Refuse records of another layout.

    Raises:
        RejectedUpdateError: the number is another one, or there is none.
    """
    if found != PROTOCOL:
        raise RejectedUpdateError(
            "wrong protocol",
            f"{who} speaks protocol {found}, expected {PROTOCOL}; install the same version of "
            "vestige everywhere",
        )


def array_record(values: Mapping[str, Tensor]) -> "ArrayRecord":
    """Tensors as Flower's arrays."""
    from flwr.app import Array, ArrayRecord

    arrays = {name: np.asarray(value.detach().cpu().numpy()) for name, value in values.items()}
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def read_arrays(record: "ArrayRecord") -> dict[str, Tensor]:
    """Flower's arrays as tensors of their own memory.

    Raises:
        RejectedUpdateError: they cannot be read.
    """
    try:
        return {name: torch.from_numpy(_values(array)) for name, array in record.items()}
    except Exception as error:
        # They are bytes of a stranger, or no arrays at all: reading may fail in any way.
        raise RejectedUpdateError("arrays that cannot be read", str(error)) from error


def _values(array: "Array") -> NDArray[Any]:
    """An array of its own memory, as `array.numpy()` has it."""
    data, start = array.data, _DATA + int.from_bytes(array.data[_LENGTH:_DATA], "little")
    if array.stype == "numpy.ndarray" and data.startswith(_MAGIC):
        shape, fortran, dtype = _layout(data[:start])
        if 0 not in shape and not fortran and not dtype.hasobject:
            flat = np.frombuffer(data, dtype, math.prod(shape), start)
            # Copied: what numpy reads from bytes cannot be written to.
            return flat.reshape(shape).copy()
    values: NDArray[Any] = array.numpy()
    return values.copy()


@lru_cache(maxsize=4096)
def _layout(header: bytes) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, order and dtype of an array in NumPy's format; arrays of all rounds have the same.

    NumPy compiles the text of a header each time, which takes longer than a small array.
    """
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    return np.lib.format.read_array_header_1_0(stream)


def size_of(content: "RecordDict") -> int:
    """Bytes of all arrays and numbers of a record."""
    return sum(record.count_bytes() for record in content.values())


def _checked(
    group: str,
    arrays: dict[str, Tensor],
    shapes: Mapping[str, tuple[int | None, ...]],
    expected: Expected,
) -> Arrays:
    who, like = expected.partition, expected.like.get(group, {})
    missing = sorted(shapes.keys() ^ arrays.keys())
    _require(not missing, "another model", who, f"{group}: {missing[:3]}", "the same names")
    for name, shape in shapes.items():
        found = tuple(arrays[name].shape)
        fits = len(found) == len(shape) and all(
            want is None or have == want for have, want in zip(found, shape, strict=True)
        )
        _require(fits, "another model", who, f"{group}/{name} {found}", shape)
        arrays[name] = _cast(f"{group}/{name}", arrays[name], like.get(name), who)
        sound = bool(torch.isfinite(arrays[name]).all())
        _require(sound, "NaN or infinite values", who, f"{group}/{name}", "finite values")
    return arrays


def _cast(name: str, value: Tensor, like: Tensor | None, who: int) -> Tensor:
    """`value` with the dtype of `like`; without one a float of 64 bits becomes one of 32.

    Only the precision may differ: what is counted and what is measured do not pass for each other.
    """
    known = value.is_floating_point() or value.dtype in _INTEGERS
    same = like is None or value.is_floating_point() == like.is_floating_point()
    if like is not None and torch.bool in (value.dtype, like.dtype):
        # A mask of the network.
        known, same = True, value.dtype == like.dtype
    wanted = "floats or integers" if like is None else like.dtype
    _require(known and same, "another dtype", who, f"{name} {value.dtype}", wanted)
    if like is not None:
        return value.to(like.dtype)
    return value.float() if value.dtype == torch.float64 else value


def _counts(record: Any, who: int, num_classes: int) -> Tensor:
    if record is None:
        return torch.zeros(num_classes, dtype=torch.int64)
    counts = read_arrays(record).get("counts")
    sound = (
        counts is not None
        and counts.shape == (num_classes,)
        and counts.dtype in _INTEGERS
        and bool(((counts >= 0) & (counts <= MOST)).all())
    )
    shown = None if counts is None else tuple(counts.shape)
    _require(sound, "label counts that do not fit", who, shown, f"({num_classes},) counts")
    found: Tensor = counts  # type: ignore[assignment]
    return found.long()


def _require(holds: bool, reason: str, who: int, got: object, expected: object) -> None:
    if not holds:
        raise RejectedUpdateError(reason, f"client {who}: got {got}, expected {expected}")
