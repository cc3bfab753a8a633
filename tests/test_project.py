"""What a user installs: the wheel and what is in it, the pins, the make targets."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "vestige"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEMO = ["demo", "--preset", "smoke", "--out"]


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Output of `command`, which sees the packages below `path` first and no other PYTHONPATH."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def requirements(*extras: str) -> list[Requirement]:
    """Base requirements, or those of the named extras."""
    optional = PROJECT["project"]["optional-dependencies"]
    lists = [optional[extra] for extra in extras] or [PROJECT["project"]["dependencies"]]
    return [Requirement(line) for lines in lists for line in lines]


def pins() -> dict[str, str]:
    """Version of each package in the constraints file."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, version in pairs}


def make_extras() -> set[str]:
    """Extras that `make test` installs."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^EXTRAS := (\S+)$", text, re.MULTILINE)
    assert found
    return set(found[1].split(","))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout with the tools that are installed."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def assert_demo_ran(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["schema"] == 1
    assert 0 <= summary["student"]["score"] <= 1
    assert (out / "report.html").stat().st_size > 0


def test_wheel_holds_the_whole_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("vestige/")}
    files = {path for path in SOURCE.rglob("*") if path.is_file()}
    expected = {path.relative_to(SOURCE.parent).as_posix() for path in files}
    assert packed == {name for name in expected if "__pycache__" not in name}


@pytest.mark.parametrize(
    "pattern",
    [
        r"vestige/py\.typed",
        r"vestige/cli/main\.py",
        r"vestige/recipes/\w+\.ya?ml",
        r"vestige/.+\.safetensors",
        r"vestige/models/prompt_files/ag-news\.yaml",
        r"vestige/recipes/teachers/bert-tiny\.yaml",
        r"vestige/federated/template/client_app\.py\.j2",
        r"vestige/.+\.(html|jinja2?|j2)",
    ],
)
def test_wheel_holds(wheel: Path, pattern: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if re.fullmatch(pattern, name)]


def test_shipped_teachers_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in SOURCE.rglob("*.safetensors")}
    assert sizes
    assert {name: size for name, size in sizes.items() if size >= 400_000} == {}


def test_demo_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--target"]
    run(sys.executable, *install, site, wheel, cwd=tmp_path)
    where = run(
        sys.executable, "-c", "import vestige; print(vestige.__file__)", cwd=tmp_path, path=site
    )
    assert Path(where.strip()).is_relative_to(site)
    run(site / "bin" / "vestige", *DEMO, tmp_path / "out", cwd=tmp_path, path=site)
    assert_demo_ran(tmp_path / "out")


@pytest.mark.slow
def test_base_dependencies_suffice_for_the_demo(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "fresh", cwd=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    install = ["-m", "pip", "install", "-qq", "--no-compile", "-c"]
    run(python, *install, ROOT / "constraints.txt", wheel, cwd=tmp_path)
    run(python.with_name("vestige"), *DEMO, tmp_path / "out", cwd=tmp_path)
    assert_demo_ran(tmp_path / "out")


def test_every_requirement_is_pinned_inside_its_bounds() -> None:
    pinned = pins()
    extras = [name for name in PROJECT["project"]["optional-dependencies"] if name != "all"]
    for requirement in [*requirements(), *requirements(*extras)]:
        version = pinned.get(str(canonicalize_name(requirement.name)))
        assert version, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_torch_is_pinned_in_the_constraints_only() -> None:
    assert pins()["torch"] == "2.13.0"
    everything = [*requirements(), *requirements(*PROJECT["project"]["optional-dependencies"])]
    exact = [str(line) for line in everything if "==" in str(line.specifier)]
    assert exact == []


def test_extras_agree() -> None:
    optional = set(PROJECT["project"]["optional-dependencies"])
    (everything,) = requirements("all")
    assert everything.extras == optional - {"all", "dev", "docs"}
    # torchvision breaks other packages beside a CPU-only torch: it has its own environment.
    assert make_extras() == optional - {"all", "dev", "vision"}


def test_version_is_the_same_everywhere() -> None:
    import vestige

    version = PROJECT["project"]["version"]
    assert vestige.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_make_help_names_every_target() -> None:
    shown = run("make", "--no-print-directory", "help", cwd=ROOT)
    wanted = ["setup", "demo", "test", "test-slow", "test-vision", "lint", "bench", "clean", "help"]
    assert [target for target in wanted if f"make {target} " not in shown] == []


def test_no_file_names_a_registry_or_a_machine() -> None:
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "--index" + "-url", "--find" + "-links"]
    places = ["/" + folder + "/" for folder in ("home", "root", "work", "opt")]
    pattern = re.compile("|".join(map(re.escape, hosts)) + rf"|(?<![\w./$])({'|'.join(places)})")
    assert pattern.search("see /" + "opt/x") and not pattern.search("shared/work/x")
    folders = [SOURCE, ROOT / "tests", ROOT / "docs", ROOT / "benchmarks", ROOT / ".ci"]
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    text = {".py", ".toml", ".txt", ".md", ".yaml", ".yml", ".cff", ".json", ".html", ""}
    named = {
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in files
        if path.suffix in text and "__pycache__" not in path.parts
        if (found := pattern.search(path.read_text(encoding="utf-8")))
    }
    assert named == set()
