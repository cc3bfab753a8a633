"""Asks and answers as Flower's records; the layout has a number, and both sides check it.

From the server: one array record for each group, and "config" with the number of the layout, kind,
round, turn, seed and settings. From a client: one array record for each group, "metrics" with
"num-examples", "partition-id" and the method's own numbers, "label-counts" where a method needs
them, and "reply" with the number of the layout, the kind, and why it refused if it did.
"""

import io
import math
from collections.abc import Mapping
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


def write_answer(kind: str, partition: int, answer: Answer) -> "RecordDict":
    """All that leaves a client."""
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    metrics = {name: float(value) for name, value in answer.metrics.items()}
    found: dict[str, Any] = {group: array_record(v) for group, v in answer.arrays.items()}
    if answer.counts is not None:
        found[COUNTS] = array_record({"counts": answer.counts})
    found[METRICS] = MetricRecord(
        {"num-examples": answer.examples, "partition-id": partition, **metrics}
    )
    found[REPLY] = ConfigRecord({"protocol": PROTOCOL, "kind": kind})
    return RecordDict(found)


def write_refusal(kind: str, partition: int, reason: str) -> "RecordDict":
    """A client's answer that it cannot do what it is asked, with the reason."""
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    reply = ConfigRecord({"protocol": PROTOCOL, "kind": kind, "refused": reason})
    metrics = MetricRecord({"num-examples": 0, "partition-id": partition})
    return RecordDict({METRICS: metrics, REPLY: reply})


def read_answer(
    content: "RecordDict", kind: str, partition: int, expects: Shapes, num_classes: int
) -> ClientUpdate:
    """A client's answer, checked in every part.

    Args:
        content: as it came.
        kind: that was asked.
        partition: of the client that was asked.
        expects: as of `Clients.ask`.
        num_classes: C.

    Raises:
        RejectedUpdateError: it is not as it must be; its `reason` says in few words why.
    """
    reply = content.config_records.get(REPLY, {})
    check_protocol(reply.get("protocol"), f"client {partition}")
    if "refused" in reply:
        raise RejectedUpdateError(str(reply["refused"]), f"client {partition} refused")
    metrics = dict(content.metric_records.get(METRICS, {}))
    own, examples = metrics.pop("partition-id", None), metrics.pop("num-examples", None)
    _require(reply.get("kind") == kind, "another kind", partition, reply.get("kind"), kind)
    _require(own == partition, "another client's answer", partition, own, partition)
    _require(
        isinstance(examples, int) and examples > 0, "no examples", partition, examples, "at least 1"
    )
    groups = {name: record for name, record in content.items() if name not in (METRICS, REPLY)}
    counts = groups.pop(COUNTS, None)
    _require(groups.keys() == expects.keys(), "unexpected keys", partition, [*groups], [*expects])
    arrays = {
        group: _checked(group, read_arrays(record), expects[group], partition)
        for group, record in groups.items()
    }
    numbers = {}
    for name, value in metrics.items():
        sound = isinstance(value, int | float) and np.isfinite(value)
        _require(sound, "numbers that are not finite", partition, {name: value}, "finite numbers")
        numbers[name] = float(value)
    return ClientUpdate(
        partition,
        arrays,
        int(examples),
        _counts(counts, partition, num_classes),
        numbers,
    )


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
    except (ValueError, TypeError, EOFError, OSError) as error:
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
    group: str, arrays: dict[str, Tensor], shapes: Mapping[str, tuple[int | None, ...]], who: int
) -> Arrays:
    missing = sorted(shapes.keys() ^ arrays.keys())
    _require(not missing, "another model", who, f"{group}: {missing[:3]}", "the same names")
    for name, shape in shapes.items():
        found = tuple(arrays[name].shape)
        fits = len(found) == len(shape) and all(
            want is None or have == want for have, want in zip(found, shape, strict=True)
        )
        _require(fits, "another model", who, f"{group}/{name} {found}", shape)
        if arrays[name].is_floating_point():
            sound = bool(torch.isfinite(arrays[name]).all())
            _require(sound, "NaN or infinite values", who, f"{group}/{name}", "finite values")
    return arrays


def _counts(record: Any, who: int, num_classes: int) -> Tensor:
    if record is None:
        return torch.zeros(num_classes, dtype=torch.int64)
    counts = read_arrays(record).get("counts")
    sound = (
        counts is not None
        and counts.shape == (num_classes,)
        and not counts.is_floating_point()
        and bool((counts >= 0).all())
    )
    shown = None if counts is None else tuple(counts.shape)
    _require(sound, "label counts that do not fit", who, shown, f"({num_classes},) counts")
    found: Tensor = counts  # type: ignore[assignment]
    return found.long()


def _require(holds: bool, reason: str, who: int, got: object, expected: object) -> None:
    if not holds:
        raise RejectedUpdateError(reason, f"client {who}: got {got}, expected {expected}")
