"""Every command and example of the documentation is run as it stands, page by page."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vestige.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BIN = Path(sys.executable).parent
FENCE = re.compile(
    r"```(?:\{code-block\} (?P<kind>\w+)\n:caption: (?P<file>\S+)\n|(?P<language>\w+)\n)"
    r"(?P<text>.*?)```",
    re.DOTALL,
)
# The snippets of architecture.md are sketches.
SKIPPED = {"generated", "_build", "architecture.md"}
# Each of them starts many runs: from a quarter of a minute to one and a half.
LONG = {
    *("foreign.md", "recipes.md", "running.md", "segmentation.md", "start.md", "text.md"),
    *("tutorials/own-method.md", "tutorials/own-plugin.md", "zerogen.md"),
}


def executed(text):
    return [m for m in FENCE.finditer(text) if m["file"] or m["language"] in ("sh", "python")]


PAGES = sorted(
    str(path.relative_to(DOCS))
    for path in DOCS.rglob("*.md")
    if not SKIPPED & set(path.relative_to(DOCS).parts) and executed(path.read_text("utf8"))
)


def run(arguments, cwd, text=None):
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(cwd) if text is not None else "",
    }
    done = subprocess.run(
        arguments, cwd=cwd, env=env, input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def run_here(arguments, cwd, monkeypatch, capfd):
    """Run a vestige command in this process: each one of its own takes seconds to begin."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as left:
        cli.main(arguments[1:])
    told = capfd.readouterr()
    assert not left.value.code, f"{arguments}\n{told.out[-2000:]}\n{told.err[-3000:]}"


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in LONG else ()) for page in PAGES]
)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capfd):
    text = (DOCS / page).read_text(encoding="utf8")
    # Modules that a page writes must not stay in this process.
    alone = any(block["file"] for block in executed(text))
    said = []
    for block in executed(text):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["text"].lstrip("\n"))
        elif block["language"] == "sh":
            for line in block["text"].splitlines():
                arguments = shlex.split(line, comments=True)
                if arguments[:1] == ["vestige"] and not alone:
                    run_here(arguments, tmp_path, monkeypatch, capfd)
                else:
                    run(arguments, tmp_path)
        else:
            # A page is one session: what an earlier block imported is still there.
            said.append(block["text"])
            run([sys.executable, "-"], tmp_path, "".join(said))


def test_the_pages_that_are_made_from_the_code_name_what_there_is(tmp_path, monkeypatch):
    from vestige.recipes.catalog import METHODS
    from vestige.recipes.schema import Recipe
    from vestige.training.trainer_config import TrainerConfig

    monkeypatch.syspath_prepend(DOCS)
    from generate import write_pages

    folder = tmp_path / "docs"
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    written = {str(path.relative_to(folder / "generated")): path for path in write_pages(folder)}
    for name in METHODS.names():
        text = written[f"methods/{name}.md"].read_text()
        # No row without its meaning: every setting is told in the docstring of its class.
        for field in METHODS.get(name).Config.model_fields:
            assert re.search(rf"^\| `{field}` \| .+ \| \S.+ \|$", text, re.MULTILINE), field
        assert "## Cost per round" in text
    keys = written["recipe-keys.md"].read_text()
    for field in (*Recipe.model_fields, *TrainerConfig.model_fields):
        assert re.search(rf"^\| `{field}` \| .+ \| \S.+ \|$", keys, re.MULTILINE), field
    commands = written["commands.md"].read_text()
    for command in ("demo", "run", "evaluate", "export", "doctor", "bench floor"):
        assert f"## vestige {command}\n" in commands
    assert "Examples" in commands or "Example" in commands


def test_a_link_that_leads_nowhere_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from check_links import broken

    (tmp_path / "a.html").write_text('<a href="b.html#x">1</a><a href="b.html#y">2</a><a id="k">')
    (tmp_path / "b.html").write_text('<p id="x"><a href="c.html">3</a><a href="a.html#k">4</a>')
    assert sorted(broken(tmp_path)) == [
        "a.html: b.html#y leads to no anchor",
        "b.html: c.html leads to no file",
    ]
