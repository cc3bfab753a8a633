"""A method that opens data it was not given is caught, whatever it opens it with."""

import gzip
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from vestige.core.types import Batch, InputSpec
from vestige.errors import RealDataError
from vestige.methods.kd import KD, KDConfig
from vestige.recipes.build import build_method
from vestige.recipes.catalog import METHODS
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training import guard
from vestige.training.guard import pausing
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig


@contextmanager
def watching(*arguments):
    """The library's, but a refusal that a test caught inside is not told again at its end."""
    with guard.watching(*arguments) as watch:
        try:
            yield watch
        finally:
            watch.refused.clear()


def test_a_refusal_that_was_swallowed_is_told_at_the_end(tmp_path):
    secret = tmp_path / "images.npy"
    secret.write_bytes(b"1")
    told = pytest.raises(RealDataError, match=r"'peeker' tried to open .*images\.npy")
    with told, guard.watching("peeker"), suppress(OSError):
        secret.read_bytes()
    # Also where the swallowed refusal led to another error.
    with told, guard.watching("peeker"):
        try:
            secret.read_bytes()
        except OSError as error:
            raise ValueError("the file is damaged") from error


@pytest.mark.parametrize(
    "start",
    [
        lambda path: subprocess.check_output(["cat", path]),
        lambda path: os.system(f"cat {path}"),
    ],
    ids=["subprocess", "os.system"],
)
def test_other_programs_are_refused(start, tmp_path):
    told = pytest.raises(RealDataError, match="started another program")
    with told, guard.watching("peeker"):
        start(str(tmp_path / "images.npy"))


def test_what_was_there_before_is_not_made_by_adding_to_it(tmp_path):
    secret, other = tmp_path / "images.npy", tmp_path / "other.npy"
    secret.write_bytes(b"1")
    told = pytest.raises(RealDataError, match=r"opened .*images\.npy")
    with told, guard.watching("peeker"):
        open(secret, "ab").close()
        secret.read_bytes()
    told = pytest.raises(RealDataError, match=r"opened .*images\.npy")
    with told, guard.watching("peeker"):
        os.close(os.open(secret, os.O_WRONLY))
        secret.read_bytes()
    told = pytest.raises(RealDataError, match=r"opened .*other\.npy")
    with told, guard.watching("peeker"):
        other.write_bytes(b"2")
        os.replace(secret, other)
        other.read_bytes()


def test_a_file_made_under_another_name_may_be_read_again(tmp_path):
    with guard.watching("maker"):
        (tmp_path / "partial").write_bytes(b"1")
        os.replace(tmp_path / "partial", tmp_path / "whole")
        assert (tmp_path / "whole").read_bytes() == b"1"


@pytest.mark.parametrize(
    "line", [["cat", "torch/_inductor/x"], ["cat", "/data/gcc"], ["cat", "ld"]]
)
def test_an_argument_that_names_a_compiler_makes_none(line):
    told = pytest.raises(RealDataError, match="started another program")
    with told, guard.watching("peeker"):
        subprocess.run(line, check=False)


def test_compilers_may_be_started():
    with guard.watching("maker"):
        assert guard._compiles("subprocess.Popen", ("/usr/bin/g++-12", ["g++-12", "-v"]))
        worker = f"{sys.prefix}/torch/_inductor/compile_worker/__main__.py"
        assert guard._compiles("subprocess.Popen", (sys.executable, [sys.executable, worker]))
    assert not guard._compiles("os.system", (b"gcc",))


def test_what_was_made_meanwhile_may_be_read_again(tmp_path):
    shard = tmp_path / "shard.npy"
    with guard.watching("maker"):
        np.save(shard, np.arange(3))
        assert np.load(shard, mmap_mode="r")[2] == 2


_NUMBER = count()


@pytest.fixture
def data(tmp_path) -> Path:
    """A file of real data."""
    path = tmp_path / "secret" / "images.npy"
    path.parent.mkdir()
    np.save(path, np.ones((2, 1, 8, 8), dtype=np.float32))
    return path


class OwnPath(type(pathlib.Path())):
    """A path of somebody's own."""


def opened(path: Any, mode: str) -> Any:
    with open(path, mode) as stream:
        return stream.read()


def by_descriptor(path: Path, flags: int) -> bytes:
    descriptor = os.open(path, flags)
    try:
        return os.read(descriptor, 10)
    finally:
        os.close(descriptor)


def with_dots(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


READERS: dict[str, Callable[[Path], Any]] = {
    "numpy": np.load,
    "numpy mapped": lambda path: np.load(path, mmap_mode="r"),
    "fromfile": lambda path: np.fromfile(path, dtype=np.uint8),
    "open": lambda path: opened(path, "rb"),
    "open as text": lambda path: opened(path, "r"),
    "open for both": lambda path: opened(path, "r+b"),
    "append and read": lambda path: opened(path, "a+b"),
    "bytes path": lambda path: opened(os.fsencode(path), "rb"),
    "relative": lambda path: opened(os.path.relpath(path), "rb"),
    "dots": lambda path: opened(with_dots(path), "rb"),
    "os.open": lambda path: by_descriptor(path, os.O_RDONLY),
    "os.open for both": lambda path: by_descriptor(path, os.O_RDWR),
    "os.open for both, creating": lambda path: by_descriptor(path, os.O_RDWR | os.O_CREAT),
    "pathlib": lambda path: path.read_bytes(),
    "a subclass of Path": lambda path: OwnPath(path).read_bytes(),
    "gzip": lambda path: gzip.GzipFile(path).close(),
    "torch": lambda path: torch.load(path, weights_only=True),
}


@pytest.mark.parametrize("reader", READERS)
def test_reading_is_refused_with_the_name_of_method_and_file(data, reader):
    with watching("peeker"), pytest.raises(RealDataError, match=r"'peeker' opened .*images\.npy"):
        READERS[reader](data)


@pytest.mark.parametrize("name", ["data.pth", "data.pt", "data.npz", "x.so.npz", "METADATA.csv"])
def test_names_that_resemble_code_are_data_all_the_same(data, name):
    other = data.with_name(name)
    other.write_bytes(data.read_bytes())
    with watching("peeker"), pytest.raises(RealDataError):
        other.read_bytes()


def test_built_in_data_of_libraries_is_data():
    load_digits()  # its lazy imports are done
    with watching("peeker"), pytest.raises(RealDataError, match="digits"):
        load_digits()


def test_a_thread_of_the_method_is_watched_as_well(data):
    caught: list[BaseException] = []

    def peek() -> None:
        try:
            np.load(data)
        except RealDataError as error:
            caught.append(error)

    with watching("peeker"):
        thread = threading.Thread(target=peek)
        thread.start()
        thread.join()
    assert len(caught) == 1


def test_a_thread_of_a_tracker_may_read_later(data):
    ready, read = threading.Event(), []

    def work() -> None:
        ready.wait()
        read.append(data.read_bytes())

    with guard.watching("x"):
        with guard.trusting():
            thread = threading.Thread(target=work)
            thread.start()
        ready.set()
        thread.join(5)
    assert len(read) == 1


def test_a_thread_that_began_beside_the_tracker_is_watched(data):
    begin, caught = threading.Event(), []

    def read() -> None:
        begin.wait()
        try:
            data.read_bytes()
        except RealDataError as error:
            caught.append(error)

    thread = threading.Thread(target=read)
    with pytest.raises(RealDataError, match="tried to open"), guard.watching("x"):
        thread.start()
        with guard.trusting():
            pass
        begin.set()
        thread.join(5)
    assert len(caught) == 1


def test_writing_is_allowed(tmp_path):
    with watching("writer"):
        np.save(tmp_path / "made.npy", np.ones(3))
        (tmp_path / "made.txt").write_text("x")
        with open(tmp_path / "made.txt", "a") as stream:
            stream.write("y")
        with open(tmp_path / "both.bin", "w+b") as stream:
            stream.write(b"z")
            stream.seek(0)
            assert stream.read() == b"z"
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        os.close(os.open(tmp_path / "new", flags))
    assert (tmp_path / "made.txt").read_text() == "xy"


def test_code_may_be_imported(tmp_path, monkeypatch):
    name = f"imported_{next(_NUMBER)}"
    (tmp_path / f"{name}.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    with watching("importer"):
        assert __import__(name).value == 7
    assert name in sys.modules


@pytest.mark.parametrize("declared", ["file", "folder", "through a link"])
def test_declared_files_may_be_read(data, tmp_path, declared):
    paths = {"file": data, "folder": data.parent, "through a link": tmp_path / "link"}
    (tmp_path / "link").symlink_to(data.parent)
    with watching("reader", (paths[declared],)) as watch:
        assert np.load(data).shape == (2, 1, 8, 8)
        assert np.load(tmp_path / "link" / data.name).shape == (2, 1, 8, 8)
    assert watch.opened == {os.path.realpath(data): 2}


def test_neighbours_of_declared_files_may_not(data, tmp_path):
    beside = tmp_path / "secret2"
    beside.mkdir()
    for path in (beside / "images.npy", tmp_path / "secret.npy"):
        path.write_bytes(data.read_bytes())
        with watching("reader", (data.parent,)), pytest.raises(RealDataError):
            np.load(path)


def test_a_link_in_a_declared_folder_leads_nowhere(data, tmp_path):
    declared = tmp_path / "declared"
    declared.mkdir()
    (declared / "link.npy").symlink_to(data)
    with watching("reader", (declared,)), pytest.raises(RealDataError, match="secret"):
        np.load(declared / "link.npy")


def test_pausing_lets_the_trainer_read_and_watching_goes_on(data):
    with watching("method"):
        with pausing():
            assert len(data.read_bytes()) > 0
            with pausing():
                data.read_bytes()
            data.read_bytes()
        with pytest.raises(RealDataError):
            data.read_bytes()
        with pytest.raises(ZeroDivisionError), pausing():
            raise ZeroDivisionError
        with pytest.raises(RealDataError):
            data.read_bytes()


def test_outside_of_the_block_nothing_is_watched(data):
    with pausing():
        data.read_bytes()
    with pytest.raises(ZeroDivisionError), watching("method"):
        raise ZeroDivisionError
    data.read_bytes()


def test_nested_watches_are_told_apart(data):
    with watching("same") as outer:
        with watching("same") as inner:
            assert inner is not outer
        with pausing():
            assert not outer.active
            data.read_bytes()
        with pytest.raises(RealDataError):
            data.read_bytes()


# A cheating method, run for real


def peeking(where: str, path: Path) -> type:
    """KD that reads a file which it was not given."""

    class Peeker(KD):
        def __init__(self, *args: Any) -> None:
            if where == "init":
                np.load(path)
            super().__init__(*args)

        def run(self, ctx):
            if where == "set-up":
                np.load(path)
            for number, step in enumerate(super().run(ctx)):
                if where == "run" and number == 4:
                    np.load(path)
                yield step

        def imitation(self, student, batch: Batch):
            if where == "loss":
                np.load(path)
            return super().imitation(student, batch)

        def result(self):
            if where == "result":
                np.load(path)
            return super().result()

    return Peeker


SPEC = InputSpec.image(1, 8, 8)
CONFIG = KDConfig(rounds=3, iterations=2, batch_size=4)


def run(method: type, teacher: Any, student: Any, out: Path | None, source: Any = None) -> Trainer:
    task, teachers = Classification(SPEC, 3), [WhiteBoxTeacher(teacher)]
    sources = {"inputs": source or NoiseSource(SPEC)}
    made = method(CONFIG, task, teachers, student, sources)
    trainer = Trainer(
        made,
        task,
        teachers=teachers,
        student=student,
        sources=sources,
        out=out,
        config=TrainerConfig(device="cpu"),
    )
    trainer.run()
    return trainer


@pytest.mark.parametrize("where", ["set-up", "run", "loss", "result"])
def test_a_cheating_method_is_caught_by_the_trainer(
    where, data, tiny_teacher, tiny_student, tmp_path
):
    with pytest.raises(RealDataError, match=r"'Peeker' opened .*images\.npy"):
        run(peeking(where, data), tiny_teacher, tiny_student, tmp_path / "run")
    data.read_bytes()


def test_an_honest_method_is_not(tiny_teacher, tiny_student, tmp_path):
    trainer = run(peeking("nowhere", tmp_path), tiny_teacher, tiny_student, tmp_path / "run")
    assert trainer.ctx.progress.steps == 6


def test_a_method_that_cheats_while_it_is_built_is_caught(
    data, tiny_teacher, tiny_student, monkeypatch
):
    classes = {"honest": peeking("nowhere", data), "peeker": peeking("init", data)}
    monkeypatch.setattr(METHODS, "get", classes.__getitem__)
    rest = (
        CONFIG,
        Classification(SPEC, 3),
        [WhiteBoxTeacher(tiny_teacher)],
        tiny_student,
        {"inputs": NoiseSource(SPEC)},
        0,
    )
    assert isinstance(build_method("honest", *rest), KD)
    with pytest.raises(RealDataError, match=r"'peeker' opened .*images\.npy"):
        build_method("peeker", *rest)


def test_a_declared_source_may_read_its_file_while_the_method_runs(
    data, tiny_teacher, tiny_student, tmp_path
):
    class Lazy(NoiseSource):
        def __init__(self, paths: tuple[Path, ...]) -> None:
            super().__init__(SPEC)
            self.paths = paths

        def draw(self, count: int, rng: torch.Generator) -> torch.Tensor:
            return torch.from_numpy(np.load(data))[torch.randint(2, (count,), generator=rng)]

    run(KD, tiny_teacher, tiny_student, None, Lazy((data,)))
    with pytest.raises(RealDataError):
        run(KD, tiny_teacher, tiny_student, None, Lazy(()))
