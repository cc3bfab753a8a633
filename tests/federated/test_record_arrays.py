"""Arrays of records are read as Flower itself reads them."""

import numpy as np
import pytest
import torch

from vestige.errors import RejectedUpdateError
from vestige.federated import records

flwr = pytest.importorskip("flwr.app")


@pytest.mark.parametrize(
    "values",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.array(7, dtype=np.int64),
        np.zeros((0, 3), dtype=np.float16),
        np.array([True, False]),
        # A header of version 1.0 in other byte order.
        np.arange(3, dtype=">f4").astype("<f4"),
    ],
    ids=["plain", "fortran", "scalar", "empty", "bool", "order"],
)
def test_an_array_is_what_numpy_reads(values):
    array = flwr.Array(values)
    (found,) = records.read_arrays(flwr.ArrayRecord({"x": array})).values()
    assert found.shape == values.shape and found.numpy().dtype == values.dtype
    assert np.array_equal(found.numpy(), array.numpy())
    # Of its own memory: it can be changed, and the record stays as it was.
    found.fill_(1)
    assert np.array_equal(array.numpy(), values)


def test_arrays_with_equal_headers_keep_their_values():
    record = records.array_record({"a": torch.ones(2, 2), "b": torch.zeros(2, 2)})
    found = records.read_arrays(record)
    assert found["a"].sum() == 4 and found["b"].sum() == 0


def _array(data, stype="numpy.ndarray"):
    return flwr.Array(dtype="float32", shape=(2,), stype=stype, data=data)


@pytest.mark.parametrize(
    "array",
    [
        _array(b""),
        _array(b"\x93NUMPY\x01\x00"),
        # Cut short: the header promises two values.
        _array(flwr.Array(np.ones(2, dtype=np.float32)).data[:-4]),
        _array(b"\x93NUMPY\x01\x00\x04\x00nope" + b"\x00" * 8),
        _array(flwr.Array(np.ones(2, dtype=np.float32)).data, stype="torch.tensor"),
    ],
    ids=["nothing", "magic alone", "cut", "no header", "another type"],
)
def test_what_cannot_be_read_is_refused_by_name(array):
    with pytest.raises(RejectedUpdateError) as caught:
        records.read_arrays(flwr.ArrayRecord({"x": array}))
    assert caught.value.reason == "arrays that cannot be read"


def test_objects_are_never_unpickled():
    data = flwr.Array(np.ones(2, dtype=np.float32)).data.replace(b"'<f4'", b"'|O' ")
    with pytest.raises(RejectedUpdateError):
        records.read_arrays(flwr.ArrayRecord({"x": _array(data)}))
