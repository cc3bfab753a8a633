"""The rules of the house, read from the source tree.

Each check takes the folder of a package and returns what breaks the rule. Every check runs on
`src/vestige` and on a small tree that breaks the rule: a check that cannot fail checks nothing.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "vestige"

LEVELS = [
    {"errors"},
    {"core"},
    {"losses"},
    {"models"},
    {"teachers"},
    {"tasks", "sources", "compress", "metrics", "data"},
    {"federated"},
    {"methods", "plugins", "training"},
    {"recipes"},
    {"bench", "api"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
WITHOUT_DATA = {"methods", "plugins", "sources", "teachers", "losses", "models", "compress"}
WITHOUT_NAMES = {"core", "losses", "models", "teachers", "tasks", "sources", "training"}
# Names of methods that are also ordinary words (`retain_graph`): only a whole string counts.
ORDINARY_WORDS = {"amalgamation", "boot", "fast", "impression", "retain"}
METHOD_LINES = 200
METHOD_SECTIONS = ("Paper:", "Differs from the paper:", "Cost per round:")

Check = Callable[[Path], list[str]]


def modules(tree: Path) -> Iterator[tuple[str, ast.Module]]:
    """Path below the package and syntax tree of every module."""
    for path in sorted(tree.rglob("*.py")):
        name = path.relative_to(tree).as_posix()
        yield name, ast.parse(path.read_text(encoding="utf-8"), filename=name)


def room_of(name: str) -> str:
    return name.split("/", maxsplit=1)[0].removesuffix(".py")


def absolute(name: str, level: int, target: str) -> str:
    """What `from <level dots><target> import` means in the module `name`."""
    package = ["vestige", *name.split("/")[:-1]]
    return ".".join([*package[: len(package) - level + 1], *filter(None, [target])])


def imports(name: str, module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, inside functions and by import_module too."""
    for node in ast.walk(module):
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=target, names=aliases, level=level):
                base = absolute(name, level, target or "") if level else target or ""
                for alias in aliases:
                    yield node.lineno, f"{base}.{alias.name}"
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                level = len(target) - len(target.lstrip("."))
                yield node.lineno, absolute(name, level, target[level:]) if level else target


def inner_imports(tree: Path) -> Iterator[tuple[str, int, str, str]]:
    """Module, line, own room and imported room of every import of a room of vestige."""
    for name, module in modules(tree):
        for line, target in imports(name, module):
            package, _, rest = target.partition(".")
            if package == "vestige" and rest != "__version__":
                yield name, line, room_of(name), rest.split(".")[0]


def import_order(tree: Path) -> list[str]:
    """Rooms import lower levels only, and no other room of their own level."""
    found = []
    for name, line, own, other in inner_imports(tree):
        if own in {"__init__", "__main__"} or own == other:
            continue
        if other not in LEVEL:
            found.append(f"{name}:{line} imports {other or 'vestige itself'}, which is no room")
        elif own in LEVEL and LEVEL[other] >= LEVEL[own]:
            found.append(f"{name}:{line} {own} imports {other}")
    return found


def rooms_are_known(tree: Path) -> list[str]:
    """No folder or module beside the rooms, so that none escapes the import order."""
    names = {path.stem for path in tree.iterdir() if path.is_dir() or path.suffix == ".py"}
    return sorted(names - set(LEVEL) - {"__init__", "__main__", "__pycache__"})


def no_real_data(tree: Path) -> list[str]:
    """What must work without data cannot import `vestige.data`."""
    return [
        f"{name}:{line} {own} imports data"
        for name, line, own, other in inner_imports(tree)
        if own in WITHOUT_DATA and other == "data"
    ]


def no_assert(tree: Path) -> list[str]:
    """`python -O` removes asserts; what is checked is checked with an exception."""
    return [
        f"{name}:{node.lineno} assert"
        for name, module in modules(tree)
        for node in ast.walk(module)
        if isinstance(node, ast.Assert)
    ]


def is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(is_broad(member) for member in kind.elts)
    return isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"}


def does_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass | ast.Continue) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def no_swallowed_errors(tree: Path) -> list[str]:
    """No bare except, and no broad one that says nothing."""
    found = []
    for name, module in modules(tree):
        for node in ast.walk(module):
            match node:
                case ast.ExceptHandler(type=None):
                    found.append(f"{name}:{node.lineno} bare except")
                case ast.ExceptHandler(type=kind, body=body) if is_broad(kind):
                    if all(map(does_nothing, body)):
                        found.append(f"{name}:{node.lineno} swallows every error")
                case ast.Call(
                    func=ast.Name(id="suppress") | ast.Attribute(attr="suppress"), args=kinds
                ) if any(map(is_broad, kinds)):
                    found.append(f"{name}:{node.lineno} swallows every error")
    return found


def safe_load(tree: Path) -> list[str]:
    """`torch.load` without `weights_only=True` runs code from the file."""
    found = []
    for name, module in modules(tree):
        torches, loads = {"torch"}, set()
        for node in ast.walk(module):
            if isinstance(node, ast.Import):
                torches |= {a.asname for a in node.names if a.name == "torch" and a.asname}
            elif isinstance(node, ast.ImportFrom) and node.module in {
                "torch",
                "torch.serialization",
            }:
                loads |= {
                    alias.asname or alias.name for alias in node.names if alias.name == "load"
                }
        for node in ast.walk(module):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr="load")):
                    loading = owner in torches
                case ast.Call(
                    func=ast.Attribute(value=ast.Attribute(attr="serialization"), attr="load")
                ):
                    loading = True
                case ast.Call(func=ast.Name(id=function)):
                    loading = function in loads
                case _:
                    continue
            if loading and not any(
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in node.keywords
            ):
                found.append(f"{name}:{node.lineno} torch.load without weights_only=True")
    return found


def registered(tree: Path) -> set[str]:
    """Names of methods and plug-ins, as their files spell them."""
    files = [path for room in ("methods", "plugins") for path in (tree / room).glob("[!_]*.py")]
    return {path.stem for path in files}


def words(identifier: str) -> str:
    """`ABDTerms` and `abd_terms` both as `_abd_terms_`."""
    parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+", identifier)
    return f"_{'_'.join(parts).lower()}_"


def identifiers(module: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module):
        for field in ("id", "attr", "arg", "name", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield getattr(node, "lineno", 0), value


def strings(module: ast.Module) -> Iterator[tuple[int, str]]:
    """String constants that are not docstrings."""
    documentation = {
        id(node.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(module):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in documentation:
                yield node.lineno, text


def no_method_names(tree: Path) -> list[str]:
    """What serves every method knows none by name."""
    found = []
    for name, module in modules(tree):
        if room_of(name) not in WITHOUT_NAMES:
            continue
        texts = [(line, text.lower()) for line, text in strings(module)]
        named = [(line, words(text)) for line, text in identifiers(module)]
        for method in registered(tree):
            spelled = re.escape(method).replace("_", "[_-]")
            if method in ORDINARY_WORDS:
                pattern = re.compile(spelled)
                hits = [line for line, text in texts if pattern.fullmatch(text)]
            else:
                pattern = re.compile(rf"(?<![a-z0-9]){spelled}(?![a-z0-9])")
                hits = [line for line, text in texts if pattern.search(text)]
                # Two letters (`kd`) are too common in variables to mean a method there.
                if len(method) > 2:
                    hits += [line for line, text in named if f"_{method}_" in text]
            found += [f"{name}:{line} names {method}" for line in hits]
    return found


def own_lines(source: str) -> int:
    """Lines of a method file without its Config and without docstrings."""
    module = ast.parse(source)
    excluded: set[int] = set()
    for node in ast.walk(module):
        match node:
            case ast.ClassDef(name=name) if name.endswith("Config"):
                left_out = True
            case ast.Expr(value=ast.Constant(value=str())):
                left_out = True
            case _:
                left_out = False
        if left_out:
            excluded |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(source.splitlines()) - len(excluded)


def short_methods(tree: Path) -> list[str]:
    """A method is one file that can be read in one go."""
    found = []
    for path in sorted((tree / "methods").glob("[!_]*.py")):
        lines = own_lines(path.read_text(encoding="utf-8"))
        if lines > METHOD_LINES:
            found.append(f"methods/{path.name} has {lines} lines of its own, over {METHOD_LINES}")
    return found


def documented_methods(tree: Path) -> list[str]:
    """The docstring of a method says whose it is, how it differs and what it costs."""
    found = []
    for name, module in modules(tree):
        if room_of(name) == "methods" and not Path(name).name.startswith("_"):
            text = ast.get_docstring(module) or ""
            found += [f"{name} lacks '{part}'" for part in METHOD_SECTIONS if part not in text]
    return found


def public_docstrings(tree: Path) -> list[str]:
    """Every public function and class of a module says what it is."""
    return [
        f"{name}:{node.lineno} {node.name} has no docstring"
        for name, module in modules(tree)
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]


def loaded_by(tree: Path, statements: str) -> set[str]:
    """Top-level modules that `statements` load in a fresh interpreter that imports from `tree`."""
    code = (
        "import sys\nbefore = set(sys.modules)\n"
        f"try:\n    {statements}\nexcept SystemExit as stop:\n    failed = stop.code\n"
        "else:\n    failed = 0\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print('\\nLOADED', *sorted(new))\nsys.exit(failed)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree.parent,
        env={**os.environ, "PYTHONPATH": str(tree.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


def light_import(tree: Path) -> list[str]:
    """`import vestige` loads the standard library only."""
    return sorted(loaded_by(tree, "import vestige") - sys.stdlib_module_names - {"vestige"})


def light_help(tree: Path) -> list[str]:
    """`vestige --help` does not wait for torch, nor for anything as slow."""
    statements = "sys.argv = ['vestige', '--help']; from vestige.cli.main import main; main()"
    heavy = {"torch", "torchmetrics", "lightning_fabric", "sklearn", "scipy", "matplotlib"}
    return sorted(loaded_by(tree, statements) & heavy)


CHECKS: list[Check] = [
    import_order,
    rooms_are_known,
    no_real_data,
    no_assert,
    no_swallowed_errors,
    safe_load,
    no_method_names,
    short_methods,
    documented_methods,
    public_docstrings,
    light_import,
    light_help,
]

METHOD = '"""M.\n\nPaper: P.\nDiffers from the paper: nothing.\nCost per round: 1.\n"""\n'

# Check, files of a small tree, what the check must say: "" for a tree that obeys.
CASES: list[tuple[Check, dict[str, str], str]] = [
    (import_order, {"core/a.py": "from vestige.losses import prior"}, "core imports losses"),
    (import_order, {"core/a.py": "def f():\n import vestige.cli.main"}, "core imports cli"),
    (import_order, {"errors.py": "import vestige.core"}, "errors imports core"),
    (import_order, {"tasks/a.py": "from ..sources import noise"}, "tasks imports sources"),
    (import_order, {"tasks/a.py": "from .. import models"}, ""),
    (import_order, {"methods/a.py": "import vestige.training.trainer"}, "methods imports training"),
    (import_order, {"training/a.py": "from vestige import plugins"}, "training imports plugins"),
    (import_order, {"bench/a.py": "from vestige.api import distill"}, "bench imports api"),
    (import_order, {"core/a.py": "from vestige import distill"}, "which is no room"),
    (
        import_order,
        {"losses/a.py": "import importlib\nimportlib.import_module('vestige.models.factory')"},
        "losses imports models",
    ),
    (
        import_order,
        {"models/a.py": "import_module('..tasks', __package__)"},
        "models imports tasks",
    ),
    (import_order, {"recipes/a.py": "import vestige.methods, vestige.data, vestige.errors"}, ""),
    (import_order, {"cli/a.py": "from vestige import __version__, api, bench"}, ""),
    (import_order, {"core/a.py": "from . import types\nfrom .types import Batch"}, ""),
    (import_order, {"__init__.py": "def __getattr__(n):\n import vestige.api"}, ""),
    (rooms_are_known, {"utils/a.py": ""}, "utils"),
    (rooms_are_known, {"helpers.py": ""}, "helpers"),
    (rooms_are_known, {"errors.py": "", "core/a.py": "", "__init__.py": ""}, ""),
    (no_real_data, {"methods/a.py": "from vestige.data import images"}, "methods imports data"),
    (no_real_data, {"plugins/a.py": "def f():\n from vestige import data"}, "plugins imports data"),
    (no_real_data, {"sources/a.py": "from ..data.image import load"}, "sources imports data"),
    (no_real_data, {"recipes/a.py": "from vestige.data import images"}, ""),
    (no_assert, {"core/a.py": "def f(x):\n assert x"}, "core/a.py:2"),
    (no_assert, {"core/a.py": "'assert'"}, ""),
    (no_swallowed_errors, {"a.py": "try:\n f()\nexcept:\n g()"}, "bare except"),
    (no_swallowed_errors, {"a.py": "try:\n f()\nexcept Exception:\n pass"}, "swallows"),
    (no_swallowed_errors, {"a.py": "try:\n f()\nexcept (OSError, Exception):\n ..."}, "swallows"),
    (no_swallowed_errors, {"a.py": "with contextlib.suppress(Exception):\n f()"}, "swallows"),
    (no_swallowed_errors, {"a.py": "try:\n f()\nexcept OSError:\n pass"}, ""),
    (no_swallowed_errors, {"a.py": "try:\n f()\nexcept Exception as e:\n say(e)\n raise"}, ""),
    (safe_load, {"a.py": "torch.load(path)"}, "a.py:1"),
    (safe_load, {"a.py": "import torch as t\nt.load(path, weights_only=False)"}, "a.py:2"),
    (safe_load, {"a.py": "from torch import load\nload(path)"}, "a.py:2"),
    (safe_load, {"a.py": "torch.load(path, weights_only=True)\njson.load(file)"}, ""),
    (no_method_names, {"methods/kd.py": "", "core/a.py": "if m == 'kd': pass"}, "names kd"),
    (no_method_names, {"methods/kd.py": "", "core/a.py": "kd = 'bkd'"}, ""),
    (no_method_names, {"methods/dfad.py": "", "losses/a.py": "dfad_weight = 1"}, "names dfad"),
    (no_method_names, {"methods/dfad.py": "", "losses/a.py": "def f():\n 'As in DFAD.'"}, ""),
    (no_method_names, {"plugins/abd.py": "", "training/a.py": "class ABDTerms: pass"}, "names abd"),
    (
        no_method_names,
        {"plugins/abd.py": "", "training/a.py": "x = f'no abd for {y}'"},
        "names abd",
    ),
    (no_method_names, {"methods/pre_dfkd.py": "", "core/a.py": "x = 'pre-dfkd'"}, "names pre_dfkd"),
    (no_method_names, {"plugins/retain.py": "", "core/a.py": "x = 'retain'"}, "names retain"),
    (no_method_names, {"plugins/retain.py": "", "core/a.py": "g(retain_graph=True)"}, ""),
    (no_method_names, {"methods/dfad.py": "", "cli/a.py": "x = 'dfad'"}, ""),
    (short_methods, {"methods/a.py": "x = 1\n" * 201}, "has 201 lines"),
    (short_methods, {"methods/a.py": "x = 1\n" * 200}, ""),
    (
        short_methods,
        {
            "methods/a.py": '"""'
            + "d\n" * 90
            + '"""\nclass Config:\n'
            + " x = 1\n" * 150
            + "y = 1\n"
        },
        "",
    ),
    (documented_methods, {"methods/a.py": METHOD.replace("Paper:", "")}, "lacks 'Paper:'"),
    (documented_methods, {"methods/a.py": METHOD.replace("Differs", "")}, "lacks 'Differs"),
    (documented_methods, {"methods/a.py": METHOD.replace("Cost", "")}, "lacks 'Cost"),
    (documented_methods, {"methods/a.py": METHOD, "methods/__init__.py": ""}, ""),
    (public_docstrings, {"a.py": "def f(): pass"}, "f has no docstring"),
    (public_docstrings, {"a.py": "class A:\n x = 1"}, "A has no docstring"),
    (public_docstrings, {"a.py": "def _f(): pass\nclass A:\n 'Doc.'\n def g(self): pass"}, ""),
    (light_import, {"__init__.py": "import pydantic"}, "pydantic"),
    (light_import, {"__init__.py": "import json\nimport vestige.errors", "errors.py": ""}, ""),
    (light_help, {"cli/main.py": "import torch\ndef main(): raise SystemExit(0)"}, "torch"),
    (light_help, {"cli/main.py": "def main():\n print('help')"}, ""),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_source_obeys(check: Check) -> None:
    assert any(SOURCE.rglob("*.py"))
    assert check(SOURCE) == []


@pytest.mark.parametrize(
    ("check", "files", "expected"),
    CASES,
    ids=[f"{check.__name__}-{n}" for n, (check, _, _) in enumerate(CASES)],
)
def test_check_tells_right_from_wrong(
    check: Check, files: dict[str, str], expected: str, tmp_path: Path
) -> None:
    tree = tmp_path / "vestige"
    for name in {"__init__.py": "", **files}:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(files.get(name, ""), encoding="utf-8")
    # Stands in for the real one, which takes seconds to import.
    (tmp_path / "torch.py").touch()
    found = check(tree)
    assert (expected in "\n".join(found)) if expected else (found == [])
    assert bool(found) == bool(expected)


def test_every_check_is_seen_to_fail() -> None:
    assert {check for check, _, expected in CASES if expected} == set(CHECKS)


def test_import_linter_holds_the_same_order() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers, forbidden = settings["tool"]["importlinter"]["contracts"]
    declared = [set(re.findall(r"\w+", layer)) for layer in reversed(layers["layers"])]
    assert declared == LEVELS
    assert {name.split(".")[1] for name in forbidden["source_modules"]} == WITHOUT_DATA
    assert forbidden["forbidden_modules"] == ["vestige.data"]


def test_levels_are_a_chain_without_repeats() -> None:
    assert sum(map(len, LEVELS)) == len(LEVEL)
    assert all(LEVEL[min(low)] + 1 == LEVEL[min(high)] for low, high in pairwise(LEVELS))
