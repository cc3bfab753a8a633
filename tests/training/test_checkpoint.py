import json
import logging
import math
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from vestige.core import seeding
from vestige.errors import CheckpointError
from vestige.training.checkpoint import CheckpointStore, decode, encode


def round_trip(value: Any, folder: Path) -> Any:
    """Through a file, as a run does it."""
    store = CheckpointStore(folder)
    store.save(0, {"value": value}, {})
    state = CheckpointStore(folder).load()
    assert state is not None
    return state["value"]


# What a state may hold


def test_nested_states_come_back_as_they_were(tmp_path):
    value = {
        "none": None,
        "flag": True,
        "count": 2**62,
        "share": 0.1 + 0.2,
        "text": 'quotes " and ü',
        "list": [1, [2.5, "x"], []],
        "tuple": (1, (2, [3]), ()),
        "int keys": {0: "a", -3: {"b": (1,)}},
        "mixed keys": {1: "one", "1": "text", None: "none", (1, 2): "pair"},
        "empty": {},
        "$": "a key that looks like a mark",
        "mark": {"$": "tensor", "key": "0"},
    }
    found = round_trip(value, tmp_path)
    assert found == value
    assert type(found["flag"]) is bool
    assert type(found["tuple"]) is tuple
    assert type(found["tuple"][1]) is tuple
    assert type(found["list"][1]) is list


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308])
def test_floats_come_back_exactly(tmp_path, value):
    found = round_trip(value, tmp_path)
    assert np.float64(found).tobytes() == np.float64(value).tobytes()


DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    many = (100 * torch.randn(3, 4)).to(dtype)
    tensors = [many, many[0, 0], many[:0], many.T, many[:, 1:3], many[None].expand(2, 3, 4)]
    found = round_trip(tensors, tmp_path)
    for before, after in zip(tensors, found, strict=True):
        assert after.dtype == dtype
        assert torch.equal(before, after)


def test_nan_and_infinity_in_tensors_survive(tmp_path):
    tensor = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    found = round_trip(tensor, tmp_path)
    assert torch.equal(tensor.view(torch.int32), found.view(torch.int32))


def test_tensors_that_share_memory_are_kept_apart(tmp_path):
    base = torch.zeros(4)
    found = round_trip({"all": base, "part": base[:2], "again": base}, tmp_path)
    found["all"] += 1
    assert not found["part"].any()
    assert not found["again"].any()


def test_parameters_lose_their_graph(tmp_path):
    found = round_trip(nn.Linear(2, 2).weight * 2, tmp_path)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [np.uint32, np.uint8, np.int64, np.float32, np.bool_], ids=str)
def test_numpy_arrays_come_back_with_their_dtype(tmp_path, dtype):
    array = np.array([0, 1, 2**31 + 5], dtype=np.uint64).astype(dtype)
    found = round_trip(array, tmp_path)
    assert isinstance(found, np.ndarray)
    assert found.dtype == dtype
    assert np.array_equal(found, array)


def test_numpy_scalars_become_plain_numbers(tmp_path):
    value = [np.float32(0.5), np.int64(3), np.bool_(True), np.float64(0.1)]
    assert round_trip(value, tmp_path) == [0.5, 3, True, 0.1]


def test_the_state_of_every_global_generator_survives(tmp_path):
    np.random.normal()
    state = seeding.global_state()
    first = torch.rand(3), np.random.normal(size=3), np.random.random()
    seeding.set_global_state(round_trip(state, tmp_path))
    assert torch.equal(torch.rand(3), first[0])
    assert np.array_equal(np.random.normal(size=3), first[1])
    assert np.random.random() == first[2]


def test_optimizer_states_survive(tmp_path):
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    found = round_trip(optimizer.state_dict(), tmp_path)
    assert found["param_groups"] == optimizer.state_dict()["param_groups"]
    for key, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(found["state"][key][name], value)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", nn.Linear(1, 1), {"deep": [1j]}])
def test_what_cannot_be_stored_is_refused_by_name(value):
    inner = value["deep"][0] if isinstance(value, dict) else value
    with pytest.raises(CheckpointError, match=f"{type(inner).__name__} in a state"):
        encode(value, {})


def test_a_mark_of_a_newer_version_is_refused():
    with pytest.raises(CheckpointError, match="newer version"):
        decode({"$": "hologram"}, {})


_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
)
_STATES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(_STATES)
@settings(max_examples=100, deadline=None)
def test_decode_is_the_inverse_of_encode(value):
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(encode(value, tensors)))
    assert decode(tree, tensors) == value


# Damage


@pytest.fixture
def three(tmp_path) -> CheckpointStore:
    """A store that was asked to keep three checkpoints."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for number in (1, 2, 3):
        store.save(number, {"number": number, "weights": torch.full((40,), float(number))}, {})
    return store


def files(store: CheckpointStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


def test_the_last_two_are_kept(three):
    assert [path.name[:8] for path in files(three)] == ["00000002", "00000003"]
    assert three.load()["number"] == 3


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_not_read_and_the_one_before_is(three, kept, caplog):
    newest = files(three)[-1]
    newest.write_bytes(newest.read_bytes()[:kept])
    with caplog.at_level(logging.WARNING):
        state = three.load()
    assert state["number"] == 2
    assert torch.equal(state["weights"], torch.full((40,), 2.0))
    assert f"{newest.name} is damaged; the one before it is used" in caplog.text


def test_bytes_that_were_added_are_noticed(three):
    newest = files(three)[-1]
    newest.write_bytes(newest.read_bytes() + b"\0")
    assert three.load()["number"] == 2


@given(st.data())
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_altered_byte_is_noticed(three, data):
    newest = files(three)[-1]
    sound = newest.read_bytes()
    place = data.draw(st.integers(0, len(sound) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged = bytearray(sound)
    damaged[place] ^= flip
    newest.write_bytes(damaged)
    try:
        assert three._read(newest) is None
    finally:
        newest.write_bytes(sound)
    assert three._read(newest)["number"] == 3


def test_a_renamed_file_is_not_trusted(three):
    newest = files(three)[-1]
    newest.rename(newest.with_name("00000009-0123456789abcdef.safetensors"))
    assert three.load()["number"] == 2


def test_without_a_sound_one_the_run_does_not_quietly_start_anew(three):
    for path in files(three):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"got 2 checkpoints.*all are damaged"):
        three.load()


def test_after_damage_two_sound_ones_are_kept_again(three):
    newest = files(three)[-1]
    newest.write_bytes(b"nothing")
    assert three.load()["number"] == 2
    three.save(3, {"number": 3}, {})
    latest = files(three)[-1]
    assert three.load()["number"] == 3
    latest.write_bytes(b"nothing")
    assert three.load()["number"] == 2


def test_leftovers_of_a_killed_write_are_ignored(three):
    for name in (".00000004-0123456789abcdef.safetensors.partial", "notes.txt", "4.safetensors"):
        (three.folder / name).write_bytes(b"half")
    assert three.load()["number"] == 3


def test_a_write_that_fails_leaves_nothing_and_the_old_ones(three, monkeypatch):
    before = files(three)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vestige.training.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        three.save(4, {"number": 4}, {})
    assert sorted(three.folder.iterdir()) == before
    assert three.load()["number"] == 3


def test_a_file_that_cannot_be_read_is_no_damaged_one(three, monkeypatch):
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name.startswith("00000003"):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    before = files(three)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        three.load()
    assert files(three) == before


def test_an_older_one_under_a_higher_number_is_not_taken_for_the_newest(three):
    older, newest = files(three)
    (three.folder / f"00000009{older.name[8:]}").write_bytes(older.read_bytes())
    assert three.load()["number"] == 3
    assert files(three) == [older, newest]


def named(data: bytes, number: int = 9) -> str:
    return f"{number:08d}-{sha256(data).hexdigest()[:16]}.safetensors"


def with_header(header: bytes, rest: bytes = b"", length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return size.to_bytes(8, "little") + header + rest


def foreign(tree: Any) -> bytes:
    return save({"0": torch.ones(2)}, {"tree": tree if isinstance(tree, str) else json.dumps(tree)})


FOREIGN = {
    "no header": b"\1",
    "a huge length": with_header(b"{}", length=2**64 - 1),
    "a length beyond the file": with_header(b"{}", length=10**6),
    "an empty header": with_header(b"{}"),
    "a header that is a list": with_header(b"[]"),
    "a deep header": with_header(b"[" * 100_000),
    "another program's": save({"weight": torch.ones(2)}),
    "metadata without a tree": save({"weight": torch.ones(2)}, {"format": "pt"}),
    "a tree that is no JSON": foreign("{"),
    "a deep tree": foreign("[" * 100_000),
    "a tree that is a number": foreign(3),
    "a tree without shards": foreign({"number": 9}),
    "shards that are no mapping": foreign({"number": 9, "shards": [1]}),
    "names of shards that are numbers": foreign({"number": 9, "shards": {"a": [1]}}),
    "a tensor that is missing": foreign(
        {"number": 9, "shards": {}, "x": {"$": "tensor", "key": "7"}}
    ),
    "a tensor without key": foreign({"number": 9, "shards": {}, "x": {"$": "tensor"}}),
    "keys that cannot be keys": foreign(
        {"number": 9, "shards": {}, "x": {"$": "items", "items": [[[1], 2]]}}
    ),
    "an array of a number": foreign({"number": 9, "shards": {}, "x": {"$": "numpy", "array": 1}}),
    "another number": foreign({"number": 8, "shards": {}}),
    "offsets beyond the data": with_header(
        b'{"0":{"dtype":"F32","shape":[2],"data_offsets":[0,800]},"__metadata__":{"tree":"{}"}}',
        b"12345678",
    ),
    "shapes that overflow": with_header(
        b'{"0":{"dtype":"F32","shape":[18446744073709551615,9],"data_offsets":[0,8]}}', b"12345678"
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_file_whose_name_fits_is_damaged_all_the_same(three, what, caplog):
    data = FOREIGN[what]
    path = three.folder / named(data)
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert three.load()["number"] == 3
    assert f"{path.name} is damaged" in caplog.text
    assert not path.exists()


def test_a_mark_of_a_newer_version_is_told_and_the_file_kept(three):
    data = foreign({"number": 9, "shards": {}, "x": {"$": "hologram"}})
    (three.folder / named(data)).write_bytes(data)
    with pytest.raises(CheckpointError, match="newer version"):
        three.load()
    assert (three.folder / named(data)).exists()


ACCIDENTS = ("flip", "cut", "insert", "swap", "renumber", "length", "drop", "forge")
STATES = {
    number: {"weights": torch.arange(5) + number, "text": f"round {number}", "none": [None, (1,)]}
    for number in (1, 2)
}


def after_accidents(draw: Any, sound: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a store after a few accidents; a forged one has a name that fits its bytes."""
    found = {name: bytearray(data) for name, data in sound.items()}
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(found)))
        data = found[name]
        # Most of what can be misread stands at the front.
        end = len(data) if draw(st.booleans()) else min(len(data), 64)
        place = draw(st.integers(0, max(0, end - 1)))
        match draw(st.sampled_from(ACCIDENTS)):
            case "flip" if data:
                data[place] ^= draw(st.integers(1, 255))
            case "cut":
                del data[place:]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=40))
            case "swap":
                other = draw(st.sampled_from(sorted(found)))
                found[name], found[other] = found[other], found[name]
            case "renumber":
                found[f"{draw(st.integers(0, 5)):08d}{name[8:]}"] = bytearray(data)
            case "length":
                data[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
            case "drop" if len(found) > 1:
                del found[name]
            case "forge":
                found[named(bytes(data), draw(st.integers(0, 5)))] = found.pop(name)
    return {name: bytes(data) for name, data in found.items()}


def load_after_accidents(sound: Mapping[str, bytes], folder: Path, data: Any) -> None:
    """Whatever happened to the bytes, what is loaded is what was saved, or nothing is."""
    left = after_accidents(data.draw, sound)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in left.items():
        (folder / name).write_bytes(content)
    store = CheckpointStore(folder)
    whole = [int(name[:8]) for name in left if sound.get(name) == left[name]]
    forged = [
        name for name in left if name not in sound and name == named(left[name], int(name[:8]))
    ]
    try:
        found = store.load()
    except CheckpointError:
        assert not whole or forged
        return
    assert isinstance(found, dict)
    assert found["number"] >= max(whole, default=0)
    assert whole or forged
    # The bytes of a forged file are right by their name, whatever they say.
    if not forged:
        assert found["number"] == max(whole)
        expected = STATES[found["number"]]
        assert torch.equal(found.pop("weights"), expected["weights"])
        assert found["text"] == expected["text"]
        assert found["none"] == expected["none"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, bytes]:
    """The files of two checkpoints that nothing happened to."""
    store = CheckpointStore(tmp_path_factory.mktemp("sound"))
    for number, state in STATES.items():
        store.save(number, state, {})
    return {path.name: path.read_bytes() for path in files(store)}


@given(st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_accidents_cost_a_checkpoint_or_are_told_and_never_give_a_wrong_state(
    sound, tmp_path, data
):
    load_after_accidents(sound, tmp_path / "fuzz", data)


@pytest.mark.slow
@given(st.data())
@settings(
    max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_ten_thousand_accidents(sound, tmp_path, data):
    load_after_accidents(sound, tmp_path / "fuzz", data)


def test_an_empty_or_missing_folder_holds_none(tmp_path):
    assert CheckpointStore(tmp_path / "missing").load() is None
    (tmp_path / "empty").mkdir()
    assert CheckpointStore(tmp_path / "empty").load() is None


# Shards


class Growing:
    """A part that only grows; counts how often a shard is asked for."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.asked: list[int] = []

    def add(self, value: float) -> None:
        self.rows.append(torch.full((3,), value))

    def shard_count(self) -> int:
        return len(self.rows)

    def shard(self, index: int) -> Mapping[str, Tensor]:
        self.asked.append(index)
        return {"rows": self.rows[index]}

    def load_shards(self, shards: Any) -> None:
        self.rows = [shard["rows"] for shard in shards]


def grown(store: CheckpointStore, numbers: list[int]) -> Growing:
    pool = Growing()
    for number in numbers:
        pool.add(float(number))
        store.save(number, {"number": number}, {"method.pool": pool})
    return pool


def shard_files(store: CheckpointStore) -> list[str]:
    return sorted(path.name[:18] for path in (store.folder / "shards").iterdir())


def test_each_shard_is_written_once_and_all_come_back(tmp_path):
    store = CheckpointStore(tmp_path)
    pool = grown(store, [0, 1, 2, 3])
    assert pool.asked == [0, 1, 2, 3]
    state = store.load()
    other = Growing()
    other.load_shards(store.shards(state["shards"]["method.pool"]))
    assert torch.equal(torch.stack(other.rows), torch.stack(pool.rows))


def test_parts_whose_names_begin_alike_have_shards_of_their_own(tmp_path):
    store, pools = CheckpointStore(tmp_path), {}
    for value, name in enumerate(("pool", "pool-b", "pool.c")):
        pools[name] = Growing()
        pools[name].add(float(value))
    store.save(0, {}, pools)
    store.save(1, {}, pools)
    manifest = store.load()["shards"]
    for value, name in enumerate(pools):
        (shard,) = store.shards(manifest[name])
        assert shard["rows"].tolist() == [value] * 3


def test_shards_beyond_the_manifest_are_dropped(tmp_path):
    # The newest checkpoint is damaged, so its round is repeated and makes another shard 2.
    store = CheckpointStore(tmp_path)
    grown(store, [0, 1, 2])
    files(store)[-1].write_bytes(b"nothing")
    state = store.load()
    assert shard_files(store) == ["method.pool-000000", "method.pool-000001"]
    pool = Growing()
    pool.load_shards(store.shards(state["shards"]["method.pool"]))
    pool.add(77.0)
    store.save(2, {"number": 2}, {"method.pool": pool})
    last = list(store.shards(store.load()["shards"]["method.pool"]))[-1]
    assert last["rows"].tolist() == [77.0] * 3


@pytest.mark.parametrize("how", ["missing", "altered", "truncated"])
def test_a_damaged_shard_is_an_error_with_its_name(tmp_path, how):
    store = CheckpointStore(tmp_path)
    grown(store, [0, 1])
    state = store.load()
    path = tmp_path / "shards" / state["shards"]["method.pool"][1]
    sound = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(sound[:-3] if how == "truncated" else sound[:-1] + b"\7")
    with pytest.raises(CheckpointError, match=path.name):
        list(store.shards(state["shards"]["method.pool"]))


def test_a_run_that_starts_anew_finds_nothing_of_the_old_one(tmp_path):
    store = CheckpointStore(tmp_path)
    grown(store, [0, 1])
    store.clear()
    assert store.load() is None
    assert shard_files(store) == []
