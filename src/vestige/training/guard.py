"""Watch which files a method opens while it runs.

A method must work from the teacher alone. Real data comes in as a declared source; anything else
that is opened for reading while the method's own code runs is refused. Files opened below Python,
by compiled readers, raise no audit event and are not seen.
"""

import os
import re
import sys
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vestige.errors import RealDataError

# Code, not data: lazily imported modules and what the interpreter and linker read for them.
# Not .pth: `site` reads such files at start-up only, and people store tensors under that name.
_CODE = re.compile(
    r".+\.(py|pyc|pyi|pyd|dll|dylib|so(\.\d+)*)|python\d+\.zip|METADATA|entry_points\.txt"
)
# Other programs are not watched, so a method may start none but what torch compiles with.
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_COMPILERS = re.compile(r"(.+-)?(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|ld|nvcc|ptxas|lscpu)(-\d+)?")
_SYSTEM = ("/proc/", "/sys/", "/dev/")


# Told apart by identity: two watches may allow the same.
@dataclass(eq=False)
class Watch:
    """What is allowed while a method runs, and what was opened."""

    method: str
    allowed: tuple[Path, ...] = ()
    opened: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    active: bool = True


# An audit hook sees the whole process and cannot be removed; a stack, not a context variable, so
# that a thread which the method starts is watched as well.
_watches: list[Watch] = []
_hooks: list[bool] = []

# Threads that trackers started: they work on while the method runs.
_trusted: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if not _watches or not _watches[-1].active:
        return
    watch = _watches[-1]
    if event in _PROGRAMS and not _compiles(event, arguments) and not _is_trusted():
        watch.refused.append(f"{event} {arguments[0]!r}")
        raise RealDataError(
            f"{watch.method!r} started another program ({arguments[0]!r}) while it ran, which "
            "could read anything; do that before or after the run"
        )
    if event == "os.rename":
        _renamed(watch, arguments)
    if event != "open":
        return
    target, mode, flags = (*arguments, None, None, None)[:3]
    if not isinstance(target, str | bytes | os.PathLike):
        return
    path = os.path.realpath(os.fsdecode(target))
    if _writes(mode, flags):
        # What the method makes while it runs (shards of a pool, say) it may read again; what was
        # there before and is only added to is none of its making.
        if _empties(mode, flags) or not os.path.lexists(path):
            watch.made.add(path)
        return
    if path in watch.made or _is_code(path) or os.path.isdir(path):
        return
    if path.startswith((*_SYSTEM, *_compiler())):
        return
    if any(path == str(root) or path.startswith(f"{root}{os.sep}") for root in watch.allowed):
        watch.opened[path] += 1
        return
    if _is_trusted():
        return
    watch.refused.append(path)
    raise RealDataError(
        f"{watch.method!r} opened {path} while it ran, expected no file but those of its declared "
        "sources; hand real data in as a source of the recipe"
    )


def _is_trusted() -> bool:
    return threading.current_thread() in _trusted


def _told(watch: Watch) -> RealDataError:
    return RealDataError(
        f"{watch.method!r} tried to open {', '.join(sorted(set(watch.refused)))} while it ran, "
        "expected no file but those of its declared sources; hand real data in as a source"
    )


def _compiler() -> tuple[str, ...]:
    """Where torch's compiler keeps its templates and what it compiled."""
    torch = sys.modules.get("torch")
    home = os.path.dirname(os.path.realpath(str(torch.__file__))) if torch is not None else ""
    cache = os.path.join(os.path.realpath(tempfile.gettempdir()), "torchinductor_")
    return (f"{home}{os.sep}", cache) if home else (cache,)


def _writes(mode: object, flags: object) -> bool:
    """Whether nothing that was there before can be read through this opening."""
    if isinstance(mode, str):
        return "r" not in mode and "a+" not in mode.replace("b", "")
    if not isinstance(flags, int):
        return False
    new = flags & os.O_CREAT and flags & (os.O_EXCL | os.O_TRUNC)
    return bool(new) or (flags & os.O_ACCMODE) == os.O_WRONLY


def _empties(mode: object, flags: object) -> bool:
    """Whether an opening for writing leaves nothing of what was there."""
    if isinstance(mode, str):
        return "w" in mode or "x" in mode
    return isinstance(flags, int) and bool(flags & (os.O_EXCL | os.O_TRUNC))


def _renamed(watch: Watch, arguments: tuple[object, ...]) -> None:
    """A file keeps its maker under its new name, and the name loses its former file's."""
    source, target = (os.path.realpath(os.fsdecode(str(name))) for name in arguments[:2])
    if source in watch.made:
        watch.made.add(target)
    else:
        watch.made.discard(target)


def _compiles(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether a program that starts is a compiler, or one of torch's workers that compile."""
    if event != "subprocess.Popen":
        return False
    program, line = arguments[:2]
    if not isinstance(program, str) or not isinstance(line, list | tuple):
        return False
    worker = program == sys.executable and any("torch/_inductor/" in str(a) for a in line[1:2])
    return worker or _COMPILERS.fullmatch(os.path.basename(program)) is not None


def _is_code(path: str) -> bool:
    return _CODE.fullmatch(os.path.basename(path)) is not None


@contextmanager
def watching(method: str, allowed: tuple[Path, ...] = ()) -> Iterator[Watch]:
    """Refuse reads of undeclared files inside the block.

    Args:
        method: name for the message.
        allowed: files and folders of declared sources.
    """
    if not _hooks:
        sys.addaudithook(_audit)
        _hooks.append(True)
    watch = Watch(method, tuple(Path(os.path.realpath(path)) for path in allowed))
    _watches.append(watch)
    try:
        yield watch
    except RealDataError:
        raise
    except Exception as error:
        if watch.refused:
            raise _told(watch) from error
        raise
    finally:
        _watches.remove(watch)
    # Also where the method, or a thread of its own, swallowed the refusal.
    if watch.refused:
        raise _told(watch)


@contextmanager
def pausing() -> Iterator[None]:
    """Let the trainer read and write files in the middle of a watched block."""
    if not _watches:
        yield
        return
    watch = _watches[-1]
    before, watch.active = watch.active, False
    try:
        yield
    finally:
        watch.active = before


@contextmanager
def trusting() -> Iterator[None]:
    """`pausing` for other people's packages; threads that begin meanwhile may read later, too."""
    before = set(threading.enumerate())
    with pausing():
        try:
            yield
        finally:
            _trusted.update(set(threading.enumerate()) - before)
