"""A run that is killed by SIGKILL at any moment and resumed ends bit-identical, on a CPU."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("kill_driver.py")
FRESH, CONTINUED = 10, 10


@dataclass
class Ended:
    """How one process ended: its exit code (negative: a signal), and what it printed on the way."""

    code: int
    started_at: int | None
    done: dict | None
    seconds: float


class Driver:
    """Starts runs, each a process of its own, and kills them."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, folder: Path, *, kill_after: float | None = None, inside: str = "") -> Ended:
        """One process in `folder`, killed so many seconds after it was ready."""
        self.process.stdin.write(f"{folder} {inside}\n")
        pid, ready, started, done = 0, 0.0, None, None
        for line in self.process.stdout:
            word, _, rest = line.strip().partition(" ")
            if word == "pid":
                pid = int(rest)
            elif word == "ready":
                started, ready = int(rest), time.perf_counter()
            elif word == "done":
                done = json.loads(rest)
            elif word == "ended":
                return Ended(int(rest), started, done, time.perf_counter() - ready)
            # The order of "pid" and "ready" is not fixed: two processes write them.
            if pid and started is not None and done is None and kill_after is not None:
                time.sleep(max(0.0, kill_after - (time.perf_counter() - ready)))
                # The number is still its own: the driver waits for it with the next request.
                os.kill(pid, signal.SIGKILL)
                kill_after = None
        raise AssertionError("the driver ended")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The uninterrupted run; the second of two, since the first one warms up caches."""
    folder = tmp_path_factory.mktemp("whole")
    first, second = (driver.run(folder / str(number)) for number in range(2))
    assert first.code == second.code == 0
    assert first.done == second.done, "two uninterrupted runs differ"
    return second


def finish(driver: Driver, folder: Path) -> Ended:
    ended = driver.run(folder)
    assert ended.code == 0
    return ended


def steps_of(folder: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["role"]) for row in rows if row["kind"] == "step"]


def test_kills_at_20_random_moments_leave_no_trace(driver: Driver, whole: Ended, tmp_path: Path):
    rng = random.Random(20)
    kills, resumed_from = 0, set()
    # Spread over the whole of a run, one kill and one resume each.
    for index in range(FRESH):
        folder = tmp_path / f"fresh-{index}"
        moment = (index + rng.random()) / FRESH * 0.9 * whole.seconds
        killed = driver.run(folder, kill_after=moment)
        kills += killed.code == -signal.SIGKILL
        ended = finish(driver, folder)
        resumed_from.add(ended.started_at)
        assert ended.done == whole.done, f"killed after {moment:.3f} s, from {ended.started_at}"
    # And runs that are killed again and again, so that what one resume breaks shows in the next.
    number = 0
    while kills < FRESH + CONTINUED and number < 20:
        folder, code = tmp_path / f"continued-{number}", -signal.SIGKILL
        while code == -signal.SIGKILL:
            wanted = kills < FRESH + CONTINUED
            moment = rng.uniform(0.02, 0.4) * whole.seconds if wanted else None
            ended = driver.run(folder, kill_after=moment)
            code = ended.code
            kills += code == -signal.SIGKILL
        assert code == 0
        # A process that ended just before it was killed has said so itself.
        assert finish(driver, folder).done == whole.done
        number += 1
    assert kills >= FRESH + CONTINUED
    assert len(resumed_from) > 3, "the kills fell on one moment"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [1, 2, 7])
def test_a_kill_while_a_checkpoint_is_written_leaves_no_trace(
    driver: Driver, whole: Ended, tmp_path: Path, call: str, number: int
):
    killed = driver.run(tmp_path / "run", inside=f"{call} {number}")
    assert killed.code == -signal.SIGKILL
    partial = list((tmp_path / "run").rglob(".*.partial"))
    assert len(partial) == 1, "the kill did not fall between writing and renaming"
    ended = finish(driver, tmp_path / "run")
    assert ended.done == whole.done
    if number > 2:
        assert ended.started_at > 0


def test_killed_runs_have_the_metrics_of_a_whole_one(driver: Driver, whole: Ended, tmp_path: Path):
    finish(driver, tmp_path / "whole")
    driver.run(tmp_path / "killed", kill_after=0.5 * whole.seconds)
    finish(driver, tmp_path / "killed")
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")


def test_a_process_of_its_own_resumes_what_another_one_left(whole: Ended, tmp_path: Path):
    """As users do it: a new interpreter for each start."""
    command = [sys.executable, str(DRIVER), str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert first.stdout.readline() == "ready 0\n"
    # Its first steps import what the driver of many runs has imported before.
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run/checkpoints").glob("00000003-*")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    first.kill()
    first.wait()
    assert "done" not in first.stdout.read()
    second = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    ready, done = second.stdout.splitlines()
    assert int(ready.split()[1]) >= 48
    assert json.loads(done.partition(" ")[2]) == whole.done
