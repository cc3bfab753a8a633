"""What a recipe names and the machine lacks is found without loading it."""

from pathlib import Path
from typing import Any

import pytest

from vestige.recipes.loading import load_recipe
from vestige.recipes.presence import absent


def lacking(*overrides: str, name: str = "kd", **given: Any) -> list[str]:
    return absent(load_recipe(name, overrides=overrides, **given))


def test_a_recipe_of_what_is_always_there_lacks_nothing():
    assert lacking(name="demo") == []


def test_missing_weights_sets_and_factories_are_all_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path))
    found = lacking(
        "teacher={factory: 'no_such_package.nets:make', weights: gone.safetensors}",
        "input={channels: 1, height: 16, width: 16}",
        "num_classes=10",
        "data=nowhere",
        "student={factory: 'os:no_such_thing', name: null}",
        "student.args={}",
        "sources.inputs={kind: images, data: mnist}",
    )
    for expected in (
        "student.factory: got 'os:no_such_thing', expected 'package.module:callable'",
        "teacher.factory: got 'no_such_package.nets:make'",
        "teacher.weights: got 'gone.safetensors', which is no file here",
        "data: got no file",
        "sources.inputs.data: got no file",
    ):
        assert sum(line.startswith(expected) for line in found) == 1, (expected, found)
    assert len(found) == 5


def test_a_language_model_that_is_not_there_is_told():
    found = absent(load_recipe("zerogen", preset="paper"))
    assert "teacher.lm: got 'gpt2-xl', which is no folder here; correct the path" in found


def test_members_of_an_ensemble_are_looked_for_too():
    (told,) = lacking("teacher={ensemble: ['builtin:digits-convnet', gone/student.json]}")
    assert told.startswith("teacher.ensemble.1: got 'gone/student.json', which is no file here")


def test_sources_of_arms_are_looked_for_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path))
    found = lacking("arms.real.sources.inputs.data=mnist", name="demo")
    assert [line.partition(": ")[0] for line in found] == ["arms.real.sources.inputs.data"]


def test_a_teacher_that_must_be_trained_first_needs_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    found = lacking("teacher=recipe:mnist-convnet")
    assert len(found) == 1
    assert found[0].startswith("teacher: is to be trained first: got no file")
    assert lacking("teacher=recipe:digits-convnet") == []


def test_nothing_is_read_to_find_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Damaged files are there all the same.
    (tmp_path / "junk").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"junk/{split}.npz").write_bytes(b"junk")
    (tmp_path / "weights.safetensors").write_bytes(b"junk")
    assert not lacking(
        f"data={tmp_path}/junk",
        f"teacher={{model: convnet, weights: {tmp_path}/weights.safetensors}}",
        "input={channels: 1, height: 16, width: 16}",
        "num_classes=10",
    )


def test_a_user_module_that_fails_or_offers_no_callable_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken_net_of_mine.py").write_text("def make(:")
    (tmp_path / "sound_net_of_mine.py").write_text("make = 5")
    monkeypatch.syspath_prepend(str(tmp_path))
    drop = "student.args={}"
    (told,) = lacking("student={factory: 'broken_net_of_mine:make', name: null}", drop)
    assert "SyntaxError" in told
    (told,) = lacking("student={factory: 'sound_net_of_mine:make', name: null}", drop)
    assert "a int, expected a callable" in told
