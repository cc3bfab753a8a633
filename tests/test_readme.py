"""Every command and example of the README is run as it stands."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program):
    lines = "".join(blocks("sh")).splitlines()
    return [line for line in lines if line.split()[0] == program]


def execute(command, cwd):
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        shlex.split(command), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_command_belongs_to_a_program_that_is_tested_here():
    programs = {line.split()[0] for line in "".join(blocks("sh")).splitlines()}
    assert programs == {"make", "pip", "vestige"}


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_do_what_the_readme_says(command):
    # Not run for real: `make test` would run itself, and `vestige demo` is run below.
    plan = execute(f"{command} -n", ROOT)
    assert {"make demo": "vestige demo", "make test": "-m pytest"}[command] in plan


@pytest.mark.parametrize("command", commands("pip"))
def test_pip_commands_install_the_library(command, tmp_path):
    out = tmp_path / "site"
    where = ROOT
    if ".whl" in command:
        where = tmp_path
        execute(
            f"{sys.executable} -m build --wheel --no-isolation --outdir {tmp_path} {ROOT}", ROOT
        )
    # What it depends on is there already; without isolation nothing has to be fetched.
    execute(
        f"{sys.executable} -m {command} --no-deps --no-build-isolation -q --target {out}", where
    )
    assert (out / "vestige" / "recipes" / "demo.yaml").is_file()


def test_the_example_in_python_trains_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    lines = [line for line in example.splitlines() if line and "torch import" not in line]
    assert len(lines) == 6
    names: dict[str, object] = {}
    exec(example, names)
    import torch

    from vestige.data.image import load_images, to_inputs
    from vestige.tasks.classification import Classification

    test, spec, report = load_images("digits", "test"), names["spec"], names["report"]
    data = (to_inputs(test.images, spec), torch.from_numpy(test.labels))
    scores = Classification(spec, 10).evaluate(report.student, data)
    # Chance is 0.1; measured were 0.92 and 0.93 on seeds 0 and 1.
    assert scores["accuracy"] > 0.8
    assert report.summary["diagnosis"] == []


# Minutes: one of them trains a teacher, two of them students.
@pytest.mark.slow
def test_the_commands_run_in_the_order_of_the_readme(tmp_path):
    for command in commands("vestige"):
        execute(command, tmp_path)
    demo = json.loads((tmp_path / "runs/demo-seed0/summary.json").read_text())
    student, teacher = demo["student"], demo["teacher"]
    assert student["score"] >= 0.95 * teacher["score"]
    assert student["parameters"] <= teacher["parameters"] / 4
    for lower in ("noise", "untrained-generator"):
        assert student["score"] >= demo["arms"][lower] + 0.20
    assert demo["arms"]["cmi"] >= 0.9 * teacher["score"]
    assert [item["purpose"] for item in demo["real_data"]] == ["evaluation"]
    mine = json.loads((tmp_path / "runs/mine/summary.json").read_text())
    assert (mine["seed"], mine["method"], mine["complete"]) == (1, "dfad", True)
    assert (tmp_path / "both.html").stat().st_size > 10_000
    compared = json.loads((tmp_path / "runs/compared/summary.json").read_text())
    assert set(compared["arms"]) == {"dfad", "kd"}
    assert "- Seed: 1\n" in (tmp_path / "my-student/README.md").read_text()
    assert (tmp_path / "teachers/digits-convnet.safetensors").is_file()


def test_generated_tables_are_up_to_date():
    from vestige.bench.tables import claims_page, generated, read_claims

    claims = read_claims(ROOT / "benchmarks" / "claims")
    assert generated(README, claims) == README
    assert (ROOT / "benchmarks" / "CLAIMS.md").read_text(encoding="utf-8") == claims_page(claims)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
