import sys
from itertools import count
from pathlib import Path

import pytest

from vestige.core.registry import Registry
from vestige.errors import ContractError, RecipeError

_NUMBER = count()
CLASS = "class {name}:\n    Config = None\n    def run(self): ...\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A package of its own; its name is new, so that no import of another test is found."""
    path = tmp_path / f"scanned_{next(_NUMBER)}"
    path.mkdir()
    (path / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    return path


def registry(folder: Path, group: str = "vestige.none") -> Registry:
    return Registry(folder.name, kind="method", group=group, marks=("Config", "run"))


def test_every_public_module_is_a_name(folder):
    for module in ("pre_dfkd", "cmi", "_helper"):
        (folder / f"{module}.py").write_text(CLASS.format(name="Found"))
    found = registry(folder)
    assert found.names() == ["cmi", "pre-dfkd"]
    assert found.get("pre-dfkd").__module__ == f"{folder.name}.pre_dfkd"


def test_a_package_of_helpers_is_no_name(folder):
    (folder / "sound.py").write_text(CLASS.format(name="Sound"))
    (folder / "reading").mkdir()
    (folder / "reading" / "__init__.py").write_text("raise ZeroDivisionError")
    assert registry(folder).names() == ["sound"]


def test_names_are_listed_without_importing(folder):
    (folder / "broken.py").write_text("raise ZeroDivisionError")
    (folder / "sound.py").write_text(CLASS.format(name="Sound"))
    found = registry(folder)
    assert found.names() == ["broken", "sound"]
    assert found.get("sound").__name__ == "Sound"
    assert f"{folder.name}.broken" not in sys.modules
    with pytest.raises(ZeroDivisionError):
        found.get("broken")


def test_a_new_file_is_found_without_an_edit_elsewhere(folder):
    found = registry(folder)
    assert found.names() == []
    (folder / "later.py").write_text(CLASS.format(name="Later"))
    assert found.names() == ["later"]


def test_helpers_and_imported_classes_are_no_entries(folder):
    (folder / "first.py").write_text(CLASS.format(name="First"))
    (folder / "second.py").write_text(
        f"from {folder.name}.first import First\n"
        "class Helper:\n    Config = None\n" + CLASS.format(name="Second")
    )
    assert registry(folder).get("second").__name__ == "Second"


@pytest.mark.parametrize(
    ("text", "number"),
    [(CLASS.format(name="A") + CLASS.format(name="B"), 2), ("class Other: ...\n", 0)],
)
def test_a_module_must_hold_exactly_one_class(folder, text, number):
    (folder / "odd.py").write_text(text)
    with pytest.raises(ContractError, match=f"holds {number} classes with Config, run"):
        registry(folder).get("odd")


def test_an_unknown_name_gets_the_nearest(folder):
    for module in ("dfad", "cmi"):
        (folder / f"{module}.py").write_text(CLASS.format(name="Found"))
    with pytest.raises(
        RecipeError, match=r"'dfda', expected one of cmi, dfad; did you mean 'dfad'"
    ):
        registry(folder).get("dfda")
    with pytest.raises(RecipeError) as caught:
        registry(folder).get("zzzzzz")
    assert "did you mean" not in str(caught.value)


def test_entry_points_of_other_distributions_are_found(folder):
    # A distribution as pip leaves it, so that importlib.metadata itself is under test.
    group = f"vestige.{folder.name}"
    module = f"foreign_{folder.name}"
    (folder.parent / f"{module}.py").write_text(CLASS.format(name="Foreign"))
    info = folder.parent / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nfrom-outside = {module}:Foreign\n")
    (folder / "own.py").write_text(CLASS.format(name="Own"))
    found = registry(folder, group)
    assert found.names() == ["from-outside", "own"]
    assert found.get("from-outside").__module__ == module
    assert found.get("own").__name__ == "Own"


def test_entry_points_cannot_hide_what_is_shipped(folder, monkeypatch):
    class Point:
        name = "own"

        def load(self) -> type:
            return Point

    (folder / "own.py").write_text(CLASS.format(name="Own"))
    monkeypatch.setattr("vestige.core.registry.entry_points", lambda group: [Point()])
    found = registry(folder)
    assert found.names() == ["own"]
    assert found.get("own").__name__ == "Own"


def test_a_class_of_the_users_own_goes_by_module_and_name(folder):
    (folder / "mine.py").write_text(CLASS.format(name="Mine") + "class Bare: ...\n")
    found = registry(folder)
    assert found.get(f"{folder.name}.mine:Mine").__name__ == "Mine"
    with pytest.raises(RecipeError, match="which lacks Config, run, expected a class with"):
        found.get(f"{folder.name}.mine:Bare")
    for wrong in (f"{folder.name}.mine:Other", "no_such_module_anywhere:Mine", ":Mine", "mine:"):
        with pytest.raises(RecipeError, match="which cannot be imported"):
            found.get(wrong)
