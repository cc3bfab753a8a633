"""The doctor's facts: right about what is there, and a command for what is not."""

import getpass
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vestige.recipes import doctor, extras
from vestige.recipes.doctor import Fact, examine, works
from vestige.recipes.extras import packages_of, state_of
from vestige.training.tracking import backends


def by_name(facts: list[Fact], area: str) -> dict[str, Fact]:
    return {fact.name: fact for fact in facts if fact.area == area}


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch):
    """Hides distributions, or gives them another version."""

    def hide(**versions: str | None) -> None:
        def answer(name: str) -> str:
            if name in versions:
                if versions[name] is None:
                    raise PackageNotFoundError(name)
                return str(versions[name])
            return version(name)

        for module in (doctor, extras):
            monkeypatch.setattr(module, "version", answer)

    return hide


def test_here_the_base_works_and_every_area_is_looked_at():
    facts = examine()
    assert works(facts)
    areas = {"base", "machine", "extras", "trackers", "data", "teachers", "folders", "recipes"}
    assert {fact.area for fact in facts} == areas
    base = by_name(facts, "base")
    assert base["torch"].found == version("torch")
    assert base["python"].found.startswith(platform.python_version())
    assert set(by_name(facts, "extras")) >= {"vision", "text", "federated", "export", "hub"}
    assert by_name(facts, "data")["digits"].found == "train 1168, select 129, test 500"
    assert "cpu" in by_name(facts, "recipes")["demo"].found
    for fact in facts:
        assert fact.state == "ok" or fact.mend or fact.name == "GPU", fact


def test_sets_of_texts_are_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "train.jsonl").write_text('{"text": "a", "label": 0}\n' * 3)
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path))
    facts = by_name(list(doctor._data()), "data")
    assert (facts["things"].state, facts["things"].found) == ("ok", "train 3")
    assert facts["mnist"].state == "missing" and "train.npz" in facts["mnist"].mend


def test_the_output_names_neither_user_nor_host(monkeypatch: pytest.MonkeyPatch):
    home = Path.home()
    monkeypatch.setenv("VESTIGE_DATA", str(home / "sets"))
    monkeypatch.setenv("VESTIGE_CACHE", str(home / "cache"))
    facts = examine()
    text = " ".join(f"{fact.found} {fact.mend}" for fact in facts)
    assert by_name(facts, "data")["folder"].found.startswith("~/sets")
    assert str(home) + "/" not in text
    assert platform.node() not in text
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text


def test_an_old_or_absent_package_of_the_base_is_broken_with_its_command(missing):
    missing(pydantic="1.10.0", safetensors=None)
    facts = examine()
    assert not works(facts)
    base = by_name(facts, "base")
    assert base["pydantic"].found.startswith("1.10.0, needs >=")
    assert base["pydantic"].mend.startswith("pip install --upgrade 'pydantic>=")
    assert (base["safetensors"].state, base["safetensors"].found) == ("broken", "not installed")
    # What would ask the broken library is left out.
    assert "data" not in {fact.area for fact in facts}


def test_a_missing_extra_has_its_one_command(missing):
    missing(kornia=None)
    facts = examine()
    extra = by_name(facts, "extras")["augment"]
    assert (extra.state, extra.mend) == ("missing", "pip install 'vestige[augment]'")
    assert "kornia not installed" in extra.found
    assert works(facts)


def test_an_extra_that_is_installed_and_does_not_import_is_missing(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(
        doctor, "_import_failure", lambda name: "OSError: boom" if name == "kornia" else ""
    )
    extra = {fact.name: fact for fact in doctor._extras(imports=True)}["augment"]
    assert extra.state == "missing"
    assert extra.found == "does not import: kornia: OSError: boom"
    assert extra.mend == "pip install --force-reinstall kornia"


def test_packages_are_imported_in_a_process_of_their_own():
    assert doctor._import_failure("pyyaml") == ""
    assert "ModuleNotFoundError" in doctor._import_failure("no-such-package-at-all")


def test_trackers_are_those_that_a_run_can_tell():
    assert tuple(backends.TRACKERS) == doctor.TRACKERS


def test_bounds_are_those_of_the_distribution():
    for needed in packages_of(""):
        assert isinstance(needed, Requirement)
        assert state_of(needed)[0] == "ok"
    assert {needed.name for needed in packages_of("track")} == {"tensorboard"}
    assert not {needed.name for needed in packages_of("")} & {"pytest", "vestige", "onnx"}


def test_missing_data_and_folders_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    facts = examine()
    data = by_name(facts, "data")
    assert data["folder"].mend == f"mkdir -p {tmp_path}/none"
    assert (data["mnist"].state, data["digits"].state) == ("missing", "ok")
    assert f"into {tmp_path}/none/mnist" in data["mnist"].mend
    assert by_name(facts, "teachers")["mnist-convnet"].mend == "vestige train-teacher mnist-convnet"
    dfad = by_name(facts, "recipes")["dfad"]
    assert "cannot: mnist" in dfad.found
    assert dfad.mend == "vestige validate dfad --preset mnist"


def test_little_space_and_read_only_folders_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    folders = {fact.name: fact for fact in doctor._folders()}
    assert folders["runs"].state == "missing"
    assert folders["runs"].mend == "vestige run … --out FOLDER"
    assert folders["data"].state == "ok"
    monkeypatch.undo()
    usage = doctor.shutil.disk_usage("/")._replace(free=2**29)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    folders = {fact.name: fact for fact in doctor._folders()}
    assert (folders["runs"].state, "0.5 GiB free" in folders["runs"].found) == ("note", True)


def test_torchvision_is_not_imported_into_the_process():
    code = (
        "import sys\nfrom vestige.recipes.doctor import examine\nexamine()\n"
        "assert 'torchvision' not in sys.modules and 'timm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
