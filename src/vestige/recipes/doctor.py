"""What this machine can do and what not, each with the command that mends it."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

from vestige.recipes.extras import packages_of, state_of

State = Literal["ok", "note", "missing", "broken"]
# Distributions whose module has another name.
_MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
# Extras that only gather others, or that those who work on the library need.
_NOT_SHOWN = ("all", "dev")
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
_LITTLE_SPACE_GIB, _IMPORT_SECONDS = 2.0, 120


@dataclass(frozen=True)
class Fact:
    """One thing that was looked at.

    Attributes:
        area: "machine", "base", "extras", "trackers", "data", "teachers", "folders" or "recipes".
        name: of the thing.
        state: "ok"; "note": works, but not everything does; "missing": what needs it does not work;
            "broken": the library itself does not work.
        found: what was found, in words.
        mend: the command that mends it, or "".
    """

    area: str
    name: str
    state: State
    found: str
    mend: str = ""


def examine(*, imports: bool = False) -> list[Fact]:
    """Look at everything; takes a few seconds.

    Args:
        imports: also import each package of an extra, in a process of its own; takes minutes.
    """
    base = list(_base())
    facts = [*base, *_machine(base), *_extras(imports), *_trackers()]
    if not works(base):
        # The rest asks the library, which would not get far.
        return facts
    for look in (_data, _teachers, _folders, _recipes):
        try:
            facts.extend(look())
        except (ImportError, OSError) as error:
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            facts.append(Fact("base", look.__name__[1:], "broken", told, "pip install vestige"))
    return facts


def works(facts: Sequence[Fact]) -> bool:
    """Whether the library itself works; extras and data may be missing."""
    return not any(fact.state == "broken" for fact in facts)


def shown_path(path: Path) -> str:
    """A path without the name of the user whose home it lies in."""
    try:
        return str(Path("~") / path.absolute().relative_to(Path.home()))
    except (ValueError, RuntimeError):
        return str(path)


def _base() -> Iterator[Fact]:
    here = platform.python_version()
    wanted = ",".join(metadata("vestige").get_all("Requires-Python") or ())
    fits = SpecifierSet(wanted).contains(here, prereleases=True)
    yield Fact(
        "base",
        "python",
        "ok" if fits else "broken",
        f"{here}, needs {wanted}",
        "" if fits else f"make an environment with Python {wanted}",
    )
    yield Fact("base", "vestige", "ok", version("vestige"))
    for needed in packages_of(""):
        state, found = state_of(needed)
        yield Fact(
            "base",
            needed.name,
            "ok" if state == "ok" else "broken",
            found,
            "" if state == "ok" else f"pip install --upgrade '{needed.name}{needed.specifier}'",
        )
    try:
        import torch

        yield Fact("base", "import torch", "ok", f"built for {torch.version.cuda or 'the CPU'}")
    except (ImportError, OSError) as error:
        yield Fact(
            "base",
            "import torch",
            "broken",
            str(error).splitlines()[0],
            "pip install --force-reinstall torch",
        )


def _machine(base: Sequence[Fact]) -> Iterator[Fact]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Fact("machine", "system", "ok", f"{platform.system()} on {platform.machine()}")
    yield Fact("machine", "cores", "ok", f"{usable} of {os.cpu_count()} usable")
    if memory := _memory_gib():
        yield Fact("machine", "memory", "ok", f"{memory:.1f} GiB")
    if not works(base):
        return
    import torch

    chosen = os.environ.get("OMP_NUM_THREADS")
    told = f"{torch.get_num_threads()} of torch"
    yield Fact(
        "machine",
        "threads",
        "ok",
        told + (f", by OMP_NUM_THREADS={chosen}" if chosen else "; trainer.threads changes it"),
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            yield Fact(
                "machine",
                f"GPU {index}",
                "ok",
                f"{found.name}, {found.total_memory / 2**30:.0f} GiB, trainer.device=cuda:{index}",
            )
    else:
        yield Fact("machine", "GPU", "note", "none that torch can use; runs take the CPU")
    yield _compiler()


def _compiler() -> Fact:
    named = os.environ.get("CXX")
    found = next((name for name in (named, "g++", "clang++") if name and shutil.which(name)), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if found and header.is_file():
        return Fact("machine", "compiler", "ok", f"{found}, so trainer.compile works")
    if found:
        told = f"{found}, but the headers of Python are not here; trainer.compile=true may fail"
        return Fact("machine", "compiler", "note", told, "apt-get install python3-dev")
    told = "none; trainer.compile=true does not work on the CPU"
    return Fact("machine", "compiler", "note", told, "apt-get install g++ python3-dev")


def _memory_gib() -> float:
    """What this process may use; 0 where the system does not tell."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError, AttributeError):
        return 0.0
    # Absent, or "max", where no limit is set.
    with suppress(OSError, ValueError):
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(sizes) / 2**30


def _extras(imports: bool) -> Iterator[Fact]:
    installed: list[tuple[str, str]] = []
    facts = []
    for extra in metadata("vestige").get_all("Provides-Extra") or []:
        if extra in _NOT_SHOWN:
            continue
        states = {needed.name: state_of(needed) for needed in packages_of(extra)}
        wrong = {name: found for name, (state, found) in states.items() if state != "ok"}
        listed = ", ".join(f"{name} {found}" for name, (_, found) in states.items())
        state: State = "missing" if wrong else "ok"
        facts.append((extra, state, listed))
        installed.extend((extra, name) for name in states if name not in wrong)
    # What is built for another torch raises and takes others with it, so never in this process.
    tried = installed if imports else [pair for pair in installed if pair[1] == "torchvision"]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(_import_failure, [name for _, name in tried]))
    failures = dict(zip(tried, said, strict=True))
    for extra, told, listed in facts:
        bad = [f"{name}: {why}" for (one, name), why in failures.items() if one == extra and why]
        pip = f"pip install 'vestige[{extra}]'"
        if bad:
            mend = f"pip install --force-reinstall {' '.join(b.split(':')[0] for b in bad)}"
            yield Fact("extras", extra, "missing", f"does not import: {'; '.join(bad)}", mend)
        else:
            yield Fact("extras", extra, told, listed, "" if told == "ok" else pip)


def _import_failure(name: str) -> str:
    """The last line of what importing a distribution says, "" if it works."""
    module = _MODULES.get(name, name.replace("-", "_"))
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {_IMPORT_SECONDS} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]


def _trackers() -> Iterator[Fact]:
    for name in TRACKERS:
        try:
            yield Fact("trackers", name, "ok", version(name))
        except PackageNotFoundError:
            told = "not installed; metrics.jsonl is always written"
            yield Fact("trackers", name, "note", told, f"pip install {name}")


def _data() -> Iterator[Fact]:
    from vestige.data.image import data_folder
    from vestige.recipes.catalog import listed_data

    folder = data_folder()
    by = "$VESTIGE_DATA" if os.environ.get("VESTIGE_DATA") else "the default; set $VESTIGE_DATA"
    there = folder.is_dir()
    yield Fact(
        "data",
        "folder",
        "ok" if there else "note",
        f"{shown_path(folder)} ({by}){'' if there else ', not there yet'}",
        "" if there else f"mkdir -p {shown_path(folder)}",
    )
    for one in listed_data():
        name, splits = one["name"], one["splits"]
        sizes = ", ".join(f"{split} {count}" for split, count in splits.items())
        wrong = [split for split, count in splits.items() if isinstance(count, str)]
        files = "train.npz and test.npz" if one["kind"] == "image" else "its files once more"
        mend = f"put {files} into {shown_path(folder / name)}" if wrong else ""
        yield Fact("data", name, "missing" if wrong else "ok", sizes, mend)


def _teachers() -> Iterator[Fact]:
    from vestige.recipes.teacher import cache_folder, trained_already
    from vestige.recipes.teacher_schema import teacher_recipes
    from vestige.teachers.loading import builtin_teachers

    yield Fact("teachers", "cache", "ok", shown_path(cache_folder()))
    for name in teacher_recipes():
        if name in builtin_teachers():
            yield Fact("teachers", name, "ok", f"shipped, builtin:{name}")
        elif trained_already(name):
            yield Fact("teachers", name, "ok", f"trained, recipe:{name}")
        else:
            told = f"is trained when recipe:{name} is first used"
            yield Fact("teachers", name, "note", told, f"vestige train-teacher {name}")


def _folders() -> Iterator[Fact]:
    from vestige.data.image import data_folder
    from vestige.recipes.teacher import cache_folder

    for name, folder in {
        "runs": Path("runs"),
        "teacher cache": cache_folder(),
        "data": data_folder(),
    }.items():
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free / 2**30
        where = f"{shown_path(folder)}, {free:.1f} GiB free"
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            # Data need only be read.
            state: State = "ok" if name == "data" else "missing"
            mend = "" if name == "data" else _other_folder(name)
            yield Fact("folders", name, state, f"{where}, read-only", mend)
        elif free < _LITTLE_SPACE_GIB and name != "data":
            yield Fact("folders", name, "note", f"{where}, which is little", _other_folder(name))
        else:
            yield Fact("folders", name, "ok", where)


def _other_folder(name: str) -> str:
    return "vestige run … --out FOLDER" if name == "runs" else "export VESTIGE_CACHE=FOLDER"


def _recipes() -> Iterator[Fact]:
    """Whether each preset of each shipped recipe would find what it needs."""
    from vestige.errors import VestigeError
    from vestige.recipes.catalog import shipped
    from vestige.recipes.files import read_yaml
    from vestige.recipes.loading import load_recipe
    from vestige.recipes.presence import absent

    for name in shipped():
        lacking: dict[str, str] = {}
        presets: Mapping[str, object] = read_yaml(name).get("presets") or {"": None}
        for preset in presets:
            try:
                problems = absent(load_recipe(name, preset=preset or None))
            except VestigeError as error:
                problems = [str(error)]
            if problems:
                lacking[preset] = problems[0]
        good = [preset for preset in presets if preset not in lacking]
        told = f"can run: {', '.join(good) or 'nothing'}"
        if lacking:
            told += f"; cannot: {', '.join(lacking)}"
        mend = f"vestige validate {name} --preset {next(iter(lacking))}" if lacking else ""
        yield Fact("recipes", name, "ok" if good else "missing", told, mend)
