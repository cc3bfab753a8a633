"""The commands of benchmarks/gpu: slices that add up, whatever happens in between."""

import importlib.util
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from vestige.bench.floor import load_floor
from vestige.recipes import teacher as teacher_module
from vestige.recipes.loading import load_recipe
from vestige.recipes.teacher_schema import RECIPES_FOLDER, load_teacher_recipe
from vestige.training.budget import Budget
from vestige.training.checkpoint import CheckpointStore

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
ENTRIES = yaml.safe_load((FOLDER / "entries.yaml").read_text())
QUEUE = (FOLDER / "QUEUE.md").read_text()


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN, CARRY = script("run"), script("carry")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A tiny stand-in for an entry: a teacher of 2 epochs and 6 rounds of DFAD, on the digits."""
    values = yaml.safe_load((RECIPES_FOLDER / "digits-convnet.yaml").read_text())
    values["training"]["epochs"] = 2
    values["model"]["args"] = {"widths": [4, 8, 8]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    entry = {
        "method": "dfad",
        "teacher": str(tmp_path / "tiny.yaml"),
        "recipe": "dfad",
        "preset": "smoke",
        "overrides": ["config.rounds=6"],
        "seeds": [0, 1],
        "wanted": {"teacher_score": 0.1, "share_of_teacher": 0.0},
    }
    floors = {
        "floor": str(tmp_path / "floors.yaml"),
        "variants": {"one": [], "two": ["config.generator_width=8"]},
        "wanted": {"ratio": 1e9},
    }
    case = {
        "recipe": "dfad",
        "preset": "smoke",
        "overrides": ["data=null", "config.rounds=9"],
    }
    (tmp_path / "floors.yaml").write_text(yaml.safe_dump({"cases": {"tiny": case}}))
    entries = {
        "tiny": entry,
        "high": {**entry, "seeds": [0], "wanted": {"teacher_score": 2, "share_of_teacher": 0}},
        "floors": floors,
        "gone": {**entry, "overrides": [], "teacher": "mnist-lenet5"},
    }
    (tmp_path / "entries.yaml").write_text(yaml.safe_dump(entries))
    monkeypatch.setattr(RUN, "RESERVE_MINUTES", 0.0)
    monkeypatch.chdir(Path.cwd())  # the script changes it

    def run(name: str, minutes: float = 9, *, device: str = "cpu") -> int:
        paths = ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
        paths += ["--entries", str(tmp_path / "entries.yaml")]
        return int(RUN.main([name, "--minutes", str(minutes), "--device", device, *paths]))

    return run


def result(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def killed_after_a_checkpoint(call: Callable[..., int]) -> int:
    """Exit code of a slice in a process of its own that dies when it has written a checkpoint."""
    child = os.fork()
    if child == 0:
        saves = CheckpointStore.save

        def last(self: CheckpointStore, number: int, *given: Any) -> None:
            saves(self, number, *given)
            # Not the one of a run that has only just begun.
            if number:
                os.kill(os.getpid(), signal.SIGKILL)

        CheckpointStore.save = last  # type: ignore[method-assign, assignment]
        os._exit(call("tiny"))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_slices_and_a_kill_end_as_one_go_does(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("tiny") == 0
    whole = result(tmp_path, "tiny")
    (tmp_path / "tiny.json").unlink()
    (tmp_path / "work").rename(tmp_path / "before")

    # A clock that runs a second per step: a slice of 13 is over after two rounds of 12 steps.
    monkeypatch.setattr(RUN, "_left", lambda options: 13 / 60)
    monkeypatch.setattr(Budget, "seconds", lambda self: float(self.progress.steps))
    monkeypatch.setattr(teacher_module._Pace, "go_on", lambda self: False)
    assert call("tiny") == 130  # the teacher's first epoch
    assert killed_after_a_checkpoint(call) == -signal.SIGKILL  # its second
    assert call("tiny") == 130  # two rounds of the first student
    assert killed_after_a_checkpoint(call) == -signal.SIGKILL  # its third
    codes = [call("tiny")]
    while codes[-1] == 130 and len(codes) < 20:
        codes.append(call("tiny"))
    assert codes == [130] * (len(codes) - 1) + [0]
    assert len(codes) >= 4
    sliced = result(tmp_path, "tiny")
    assert sliced["teacher"] == whole["teacher"]
    for one, other in zip(sliced["runs"], whole["runs"], strict=True):
        for key in ("seed", "score", "steps", "teacher_queries", "share_of_teacher"):
            assert one[key] == other[key]
    for seed in (0, 1):
        name = f"tiny/seed{seed}/student.safetensors"
        assert (tmp_path / "work" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_a_result_that_is_less_than_wanted_is_written_and_said(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("high") == 1
    assert "less than wanted (teacher 0." in capsys.readouterr().err
    found = result(tmp_path, "high")
    assert (found["reached"], found["name"]) == (False, "high")
    assert found["runs"][0]["steps"] == 72  # 6 rounds of 2 iterations of 5 + 1
    # A finished entry is read, not run again.
    assert call("high", minutes=0) == 1
    assert result(tmp_path, "high")["runs"] == found["runs"]


def test_what_is_missing_is_said_with_code_2(
    call: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(name: str, device: str = "cpu") -> str:
        assert call(name, device=device) == 2
        return capsys.readouterr().err

    assert "got 'tin', expected one of" in told("tin")
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "none"))
    assert "Put train.npz and test.npz into" in told("gone")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no GPU" in told("tiny", device="cuda")
    monkeypatch.setitem(RUN.NEEDED, "no_such_module", "no-such-package")
    assert "pip install no-such-package" in told("tiny")
    assert not (tmp_path / "work").exists()


def test_floors_are_measured_variant_by_variant_and_kept(
    call: Callable[..., int], tmp_path: Path
) -> None:
    assert call("floors", minutes=0) == 130
    assert call("floors") == 0
    found = result(tmp_path, "floors")
    assert [case["variant"] for case in found["cases"]] == ["one", "two"]
    assert all(case["name"] == "tiny" and case["ratio"] > 0 for case in found["cases"])
    assert call("floors", minutes=0) == 0
    assert result(tmp_path, "floors")["cases"] == found["cases"]


# Parts


def test_what_was_cut_comes_together_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a"
    source.mkdir()
    contents = {"x": os.urandom(5000), "y": b"", "z": os.urandom(100)}
    for name, data in contents.items():
        (source / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    count = CARRY.pack([Path("a")], Path("parts"), 2000 / 2**20)
    assert count == 3
    sizes = [
        sum(f.stat().st_size for f in part.iterdir() if f.name != "list.json")
        for part in sorted(Path("parts").iterdir())
    ]
    assert sizes == [2000, 2000, 1100]
    there = tmp_path / "there"
    for number in range(count):
        arrived = tmp_path / f"arrived{number}"
        arrived.mkdir()
        (tmp_path / "parts" / str(number)).rename(arrived / str(number))
        code = CARRY.main(["join", str(arrived), "--to", str(there)])
        assert code == (0 if number == count - 1 else 2)
    for name, data in contents.items():
        assert (there / "a" / name).read_bytes() == data
    assert sorted(path.name for path in there.iterdir()) == ["a"]


def test_parts_that_were_changed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").write_bytes(b"abc")
    assert CARRY.main(["pack", "x", "--to", "parts"]) == 0
    Path("parts/0/0-0").write_bytes(b"abd")
    assert CARRY.main(["join", "parts", "--to", "there"]) == 1
    assert not Path("there/x").exists()
    assert CARRY.main(["join", "nothing", "--to", "elsewhere"]) == 2
    assert CARRY.main(["pack", "nothing", "--to", "parts"]) == 2


# The queue


def test_queue_and_entries_name_the_same_in_the_same_order() -> None:
    queued = re.findall(r"^\d+\. \*\*(\S+)\*\*", QUEUE, re.MULTILINE)
    assert queued == list(ENTRIES)
    assert (
        re.findall(r"^   python benchmarks/gpu/run\.py (\S+) --minutes 9$", QUEUE, re.M) == queued
    )


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_valid(name: str) -> None:
    entry = ENTRIES[name]
    if "floor" in entry:
        for case in load_floor(entry["floor"]).cases.values():
            for overrides in entry["variants"].values():
                load_recipe(
                    case.recipe, preset=case.preset, overrides=[*case.overrides, *overrides]
                )
        return
    teacher = load_teacher_recipe(entry["teacher"])
    recipe = load_recipe(
        entry["recipe"], preset=entry["preset"], overrides=entry.get("overrides", ())
    )
    # Of one set of recordings they may take other speakers.
    same = "[" in teacher.data and teacher.input.spec().kind == "audio"
    assert recipe.data is not None
    assert recipe.data == teacher.data or (
        same and recipe.data.partition("[")[0] == teacher.data.partition("[")[0]
    )
    assert recipe.method == entry["method"]
    assert set(entry["wanted"]) == {"teacher_score", "share_of_teacher"}
