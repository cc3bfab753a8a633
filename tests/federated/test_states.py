"""A client finds what it kept before a position, whatever a killed run left after it."""

import torch

from vestige.federated.states import ClientStates


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"network": {"a.weight": torch.full((2,), value)}, "momentum": {"a/b": torch.ones(())}}


def value_of(states: ClientStates, before: tuple[int, int], partition: int = 0) -> float:
    return float(states.load(partition, before)["network"]["a.weight"][0])


def test_a_state_comes_back_with_its_groups_and_names(tmp_path):
    states = ClientStates(tmp_path, keep=9)
    states.save(3, (0, 0), state(1.0))
    found = states.load(3, (0, 1))
    assert {group: [*arrays] for group, arrays in found.items()} == {
        "network": ["a.weight"],
        "momentum": ["a/b"],
    }
    assert states.load(3, (0, 0)) == {}
    assert states.load(4, (9, 0)) == {}


def test_the_newest_before_a_position_is_read(tmp_path):
    states = ClientStates(tmp_path, keep=9)
    for number, position in enumerate([(0, 0), (1, 0), (1, 1), (3, 0)]):
        states.save(0, position, state(float(number)))
    read = [value_of(states, at) for at in [(0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (9, 0)]]
    assert read == [0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 3.0]
    # As a resumed run repeats it.
    states.save(0, (1, 1), state(7.0))
    assert value_of(states, (3, 0)) == 7.0


def test_what_no_run_goes_back_to_is_forgotten(tmp_path):
    states = ClientStates(tmp_path, keep=3)
    for round in range(10):
        states.save(0, (round, 0), state(float(round)))
    kept = sorted(int(path.name[:8]) for path in (tmp_path / "000000").iterdir())
    assert kept == [6, 7, 8, 9]
    # A run that goes back by `keep` finds what it would have found then.
    assert value_of(states, (7, 0)) == 6.0


def test_a_client_that_is_seldom_asked_keeps_its_only_state(tmp_path):
    states = ClientStates(tmp_path, keep=3)
    states.save(0, (0, 0), state(0.0))
    states.save(0, (50, 0), state(1.0))
    assert value_of(states, (50, 0)) == 0.0
    assert value_of(states, (51, 0)) == 1.0


def test_what_a_killed_client_was_writing_is_not_read(tmp_path):
    states = ClientStates(tmp_path, keep=9)
    states.save(0, (0, 0), state(1.0))
    (tmp_path / "000000" / "00000001-0000.4711.tmp").write_bytes(b"half")
    assert value_of(states, (9, 0)) == 1.0
