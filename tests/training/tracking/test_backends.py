"""Each tracker with its real package and no network, read back through the package's own reader.

TensorBoard is in the test environment; the others pull in what contradicts it and have one of
their own: `make test-track`.
"""

import copy
import json
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from vestige.core.types import InputSpec
from vestige.methods.kd import KD, KDConfig
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.tracking import Event
from vestige.training.tracking.metrics import read_metrics, scalars_of
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
ROUNDS, ITERATIONS = 4, 3
STEPS = ROUNDS * ITERATIONS
OTHERS = ("trackio", "wandb", "mlflow")
EVERY = ("tensorboard", *(pytest.param(name, marks=pytest.mark.optional) for name in OTHERS))


class Found:
    """What a tracker's own reader finds: numbers as {name: [(step, value)]}, the rest as it is."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.pictures: list[int] = []
        self.config: str = ""
        self.notes: str = ""
        self.summary: str = ""
        self.runs = 0

    def add(self, name: str, step: int, value: float) -> None:
        self.scalars.setdefault(name, []).append((step, value))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, no settings of the person who runs the tests, no store of theirs."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_INET and address[0] not in ("127.0.0.1", "localhost"):
            raise AssertionError(f"{address} was called")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def store(monkeypatch, tmp_path) -> Path:
    """Where Trackio keeps everything; it reads the variable when it is imported."""
    folder = tmp_path / "trackio-store"
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def read_tensorboard(out: Path, store: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = Found()
    for folder in (out / "trackers/tensorboard").iterdir():
        found.runs += 1
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                found.add(name, event.step, event.value)
        found.pictures = [event.step for event in events.Images("samples")]

        def text(name: str, events: Any = events) -> str:
            known = name in events.Tags()["tensors"]
            said = events.Tensors(name) if known else []
            return "\n".join(x.decode() for e in said for x in e.tensor_proto.string_val)

        found.config = text("config/text_summary")
        found.notes = text("notes/text_summary")
        found.summary = text("summary/text_summary")
    return found


def read_trackio(out: Path, store: Path) -> Found:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    found = Found()
    for run in trackio.Api().runs("vestige"):
        found.runs += 1
        found.config = json.dumps(run.config)
        found.notes = json.dumps(run.alerts(), default=str)
        for row in SQLiteStorage.get_logs("vestige", run.name):
            for name, value in row.items():
                if name == "samples":
                    found.pictures.append(row["step"])
                elif name.startswith("summary/"):
                    found.summary += f'"{name}": {value}\n'
                elif name not in ("step", "timestamp"):
                    found.add(name, row["step"], value)
    return found


def wandb_records(data: bytes) -> Iterator[Any]:
    """Records of an offline run: blocks of 32 KiB, each part behind checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2

    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def read_wandb(out: Path, store: Path) -> Found:
    found = Found()
    ids = set()
    for folder in sorted((out / "trackers/wandb").glob("offline-run-*")):
        (file,) = folder.glob("run-*.wandb")
        for record in wandb_records(file.read_bytes()):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                found.config = str(record.run.config)
            elif kind == "history":
                step = int(record.history.step.num)
                items = {i.key or "/".join(i.nested_key): i for i in record.history.item}
                found.pictures += [step] * ("samples/path" in items)
                for name, item in items.items():
                    if not name.startswith(("_", "samples/")):
                        found.add(name, step, json.loads(item.value_json))
            elif kind == "summary":
                for item in record.summary.update:
                    if item.key == "notes":
                        found.notes += item.value_json
                    elif not item.nested_key:
                        found.summary += f'"{item.key}": {item.value_json}\n'
    found.runs = len(ids)
    return found


def read_mlflow(out: Path, store: Path) -> Found:
    from mlflow.tracking import MlflowClient

    found = Found()
    client = MlflowClient(tracking_uri=f"sqlite:///{out.resolve()}/trackers/mlflow.db")
    experiment = client.get_experiment_by_name("vestige")
    for run in client.search_runs([experiment.experiment_id]):
        found.runs += 1
        assert run.info.status == "FINISHED"
        for name in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, name):
                found.add(name, metric.step, metric.value)
        found.config = str(run.data.params)
        found.notes = str(run.data.tags)
        folder = out / "trackers/mlflow-files" / run.info.run_id / "artifacts"
        found.pictures = sorted(int(path.stem) for path in (folder / "samples").iterdir())
        found.summary = (folder / "summary.json").read_text()
    return found


READERS: Mapping[str, Callable[[Path, Path], Found]] = {
    "tensorboard": read_tensorboard,
    "trackio": read_trackio,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
}


def trainer(nets: Any, out: Path, track: tuple[str, ...], **given: Any) -> Trainer:
    teacher, student = (copy.deepcopy(net) for net in nets)
    task, teachers = Classification(SPEC, 3), [WhiteBoxTeacher(teacher)]
    sources = {"inputs": NoiseSource(SPEC)}
    cfg = KDConfig(rounds=ROUNDS, iterations=ITERATIONS, batch_size=8)
    return Trainer(
        KD(cfg, task, teachers, student, sources),
        task,
        teachers=teachers,
        student=student,
        sources=sources,
        out=out,
        evaluate=lambda net: {"accuracy": 0.25},
        config=TrainerConfig(device="cpu", log_every=1, track=track, minutes=1e6),
        identity={"rounds": ROUNDS, "nested": {"marker": "a-setting"}},
        **given,
    )


class Killed(Exception):
    pass


def die(event: Event) -> None:
    if event.kind == "step" and event.data["step"] == 8:
        raise Killed


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_was_killed_and_resumed_is_whole_in_the_tracker(
    name, tiny_teacher, dropout_student, tmp_path, offline, store
):
    pytest.importorskip(name, reason=f"needs {name}: make test-track")
    nets, out = (tiny_teacher, dropout_student), tmp_path / "run"
    with pytest.raises(Killed):
        trainer(nets, out, (name,), callbacks=[die]).run()
    made = trainer(nets, out, (name,))
    with made.trackers:
        made.run(resume=True)
        made.trackers.note(STEPS, "a finding")
        made.trackers.summary({"steps": STEPS, "student": {"score": 0.25}, "complete": True})
    # A tracker that failed would have been left out with a warning.
    state = json.loads((out / "trackers/state.json").read_text())
    assert state[name]["step"] == STEPS

    found = READERS[name](out, store)
    rows = read_metrics(out / "metrics.jsonl")
    expected: dict[str, list[tuple[int, float]]] = {}
    for step in range(1, STEPS + 1):
        for key, value in scalars_of([row for row in rows if row["step"] == step]).items():
            expected.setdefault(key, []).append((step, value))
    assert found.runs == 1
    assert set(found.scalars) == set(expected)
    for key, values in expected.items():
        assert [step for step, _ in found.scalars[key]] == [step for step, _ in values], key
        assert [v for _, v in found.scalars[key]] == pytest.approx([v for _, v in values], rel=1e-6)
    assert found.pictures == [3, 6, 9, 12]
    assert "a-setting" in found.config
    assert "a finding" in found.notes
    assert "0.25" in found.summary

    # And nothing of it bent the run.
    plain = trainer(nets, tmp_path / "plain", ())
    plain.run()
    other = plain.student.state_dict()
    assert all(torch.equal(v, other[n]) for n, v in made.student.state_dict().items())


def test_tensorboard_hides_what_was_sent_and_not_noted(
    tiny_teacher, dropout_student, tmp_path, offline, store
):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'vestige[track]'")
    nets, out = (tiny_teacher, dropout_student), tmp_path / "run"
    with pytest.raises(Killed):
        trainer(nets, out, ("tensorboard",), callbacks=[die]).run()
    # As if the process had been killed after the second round was sent.
    state = json.loads((out / "trackers/state.json").read_text())
    assert state["tensorboard"]["step"] == 6
    state["tensorboard"]["step"] = 3
    (out / "trackers/state.json").write_text(json.dumps(state))
    trainer(nets, out, ("tensorboard",)).run(resume=True)
    found = read_tensorboard(out, store)
    assert [step for step, _ in found.scalars["student/total"]] == list(range(1, STEPS + 1))


@pytest.mark.optional
def test_wandb_that_is_told_to_be_online_without_a_login_asks_nothing(
    tiny_teacher, dropout_student, tmp_path, offline, monkeypatch, caplog
):
    pytest.importorskip("wandb", reason="needs wandb: make test-track")
    monkeypatch.setenv("WANDB_MODE", "online")
    made = trainer((tiny_teacher, dropout_student), tmp_path / "run", ("wandb",))
    assert made.run().steps == STEPS
    assert "there is no login; run `wandb login`" in caplog.text


@pytest.mark.optional
def test_wandb_that_is_disabled_writes_nothing(
    tiny_teacher, dropout_student, tmp_path, offline, monkeypatch, caplog
):
    pytest.importorskip("wandb", reason="needs wandb: make test-track")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trainer((tiny_teacher, dropout_student), tmp_path / "run", ("wandb",)).run()
    assert "failed" not in caplog.text
    assert not list((tmp_path / "run/trackers").glob("wandb/*run-*"))


@pytest.mark.optional
def test_mlflow_uses_the_store_that_its_user_named(
    tiny_teacher, dropout_student, tmp_path, offline, monkeypatch, caplog
):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: make test-track")
    uri = f"sqlite:///{tmp_path}/own.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    trainer((tiny_teacher, dropout_student), tmp_path / "run", ("mlflow",)).run()
    assert "failed" not in caplog.text
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("vestige").experiment_id])
    assert run.data.metrics["test/accuracy"] == 0.25
    assert not (tmp_path / "run/trackers/mlflow.db").exists()
