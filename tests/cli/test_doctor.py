"""`vestige doctor`: exit code, table and JSON."""

import json

import pytest
from typer.testing import CliRunner

from vestige.cli import main as cli
from vestige.recipes.doctor import Fact

FACTS = [
    Fact("base", "torch", "ok", "2.13.0"),
    Fact("extras", "vision", "missing", "timm not installed", "pip install 'vestige[vision]'"),
]


@pytest.fixture
def doctor(monkeypatch):
    """Runs the command on given facts: exit code and output."""

    def call(facts, *arguments):
        monkeypatch.setattr("vestige.recipes.doctor.examine", lambda *, imports: facts)
        result = CliRunner().invoke(cli.app, ["doctor", *arguments], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    return call


def test_a_missing_extra_leaves_the_exit_code_at_0_and_tells_its_command(doctor):
    code, out = doctor(FACTS)
    assert code == 0
    assert "pip install 'vestige[vision]'" in out
    assert "vestige works here; missing: 1" in out
    assert "\x1b" not in out


def test_a_broken_base_exits_1(doctor):
    broken = [Fact("base", "numpy", "broken", "1.0, needs >=2.0", "pip install --upgrade numpy")]
    code, out = doctor([*FACTS, *broken])
    assert code == 1
    assert "BROKEN" in out and "vestige does not work here; broken: 1" in out
    code, out = doctor([*FACTS, *broken], "--json")
    assert code == 1
    assert json.loads(out)["works"] is False


def test_json_holds_every_fact(doctor):
    code, out = doctor(FACTS, "--json")
    found = json.loads(out)
    assert (code, found["works"]) == (0, True)
    assert [fact["name"] for fact in found["facts"]] == ["torch", "vision"]
    assert set(found["facts"][0]) == {"area", "name", "state", "found", "mend"}
