"""What a run tells TensorBoard, Trackio, Weights & Biases and MLflow, each in its own words.

Every one of them works without a network unless its user has set it up otherwise. Packages are
imported when a run starts.
"""

import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_PROJECT = "vestige"
# Limits of MLflow's stores.
_LONGEST_VALUE, _LARGEST_BATCH = 6000, 100


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker must know to begin.

    Attributes:
        id: of the run in the tracker; the same when a run is resumed.
        name: that people see.
        folder: where the tracker may keep its files.
        config: the resolved recipe.
        resumed: whether the tracker has seen a part of the run before.
        step: the last optimizer step that the tracker knows of, -1 for none.
    """

    id: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    resumed: bool = False
    step: int = -1


class Tracker(Protocol):
    """Steps are the optimizer steps of the run and never go back."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""
        ...

    def picture(self, step: int, picture: NDArray[np.uint8]) -> None:
        """A sample sheet, (height, width, 3)."""
        ...

    def note(self, step: int, text: str) -> None:
        """A warning or a finding of the diagnosis."""
        ...

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        """The contents of summary.json."""
        ...

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir FOLDER`.

    On a resumed run TensorBoard hides what it was told after the last known step.
    """

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.step + 1 if run.resumed else None
        make: Any = SummaryWriter
        self._writer = make(log_dir=str(run.folder / "tensorboard" / run.id), purge_step=purge)
        if not run.resumed:
            self._writer.add_text("config", _block(run.config), 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, picture: NDArray[np.uint8]) -> None:
        self._writer.add_image("samples", picture, step, dataformats="HWC")

    def note(self, step: int, text: str) -> None:
        self._writer.add_text("notes", text, step)

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        self._writer.add_text("summary", _block(values), step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Trackio:
    """Trackio's own store, `$TRACKIO_DIR` or its cache folder: `trackio show --project vestige`."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._package: Any = trackio
        with _silent():
            # Without its readings of the machine: they are threads, and no part of the run.
            self._run = self._package.init(
                project=_PROJECT,
                name=f"{run.name}-{run.id}",
                config=_plain(run.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, picture: NDArray[np.uint8]) -> None:
        self._run.log({"samples": self._package.Image(picture)}, step=step)

    def note(self, step: int, text: str) -> None:
        with _silent():
            self._run.alert(title="vestige", text=f"step {step}: {text}")

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        # It keeps numbers by step only.
        self._run.log({f"summary/{name}": x for name, x in _numbers(values).items()}, step=step)

    def close(self, *, failed: bool) -> None:
        with _silent():
            self._package.finish()


class Wandb:
    """Weights & Biases, offline unless `WANDB_MODE` or a stored login says otherwise.

    An offline run lies in the run folder; a resumed one adds a second folder of the same id.
    `wandb sync FOLDER/trackers/wandb/*run-*` sends them in order of time and makes one run of them.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._package: Any = wandb
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode = os.environ.get("WANDB_MODE") or ("online" if self._logged_in() else "offline")
        if mode in ("online", "shared") and not self._logged_in():
            # Its own way out is a question on the terminal.
            raise RuntimeError(
                f"WANDB_MODE is {mode!r} and there is no login; run `wandb login`, set "
                "WANDB_API_KEY, or unset WANDB_MODE to work offline"
            )
        self._run = self._package.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.id,
            name=os.environ.get("WANDB_NAME", run.name),
            dir=str(run.folder),
            config=_plain(run.config),
            mode=mode,
            resume="allow" if run.resumed and mode != "offline" else None,
            # Its console would stand between the run and the progress bar.
            settings=self._package.Settings(console="off", silent=True, disable_git=True),
        )
        self._notes: list[str] = []
        if mode == "offline":
            logger.info("wandb is offline; `wandb sync %s/wandb/*run-*` sends the run", run.folder)

    def _logged_in(self) -> bool:
        with _silent():
            return bool(os.environ.get("WANDB_API_KEY") or self._package.login(prompt=False))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, picture: NDArray[np.uint8]) -> None:
        self._run.log({"samples": self._package.Image(picture)}, step=step)

    def note(self, step: int, text: str) -> None:
        self._notes.append(f"step {step}: {text}")
        self._run.summary["notes"] = list(self._notes)

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.summary.update(_plain(values))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class MLflow:
    """A database in the run folder, or what `MLFLOW_TRACKING_URI` names.

    `mlflow ui --backend-store-uri sqlite:///FOLDER/trackers/mlflow.db` shows it.
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._notes = Metric, 0
        own = os.environ.get("MLFLOW_TRACKING_URI")
        run.folder.mkdir(parents=True, exist_ok=True)
        database = run.folder.resolve() / "mlflow.db"
        self._client: Any = MlflowClient(tracking_uri=own or f"sqlite:///{database}")
        mark = run.folder / "mlflow-run.json"
        if run.resumed and mark.is_file():
            self._id = str(json.loads(mark.read_text(encoding="utf8"))["run"])
            self._client.update_run(self._id, status="RUNNING")
            return
        files = None if own else (run.folder.resolve() / "mlflow-files").as_uri()
        known = self._client.get_experiment_by_name(_PROJECT)
        experiment = (
            self._client.create_experiment(_PROJECT, artifact_location=files)
            if known is None
            else known.experiment_id
        )
        self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
        mark.write_text(json.dumps({"run": self._id}), encoding="utf8")
        settings = [
            Param(name, str(value)[:_LONGEST_VALUE])
            for name, value in _flat(_plain(run.config)).items()
        ]
        for first in range(0, len(settings), _LARGEST_BATCH):
            self._client.log_batch(self._id, params=settings[first : first + _LARGEST_BATCH])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, picture: NDArray[np.uint8]) -> None:
        self._client.log_image(self._id, picture, artifact_file=f"samples/{step:09d}.png")

    def note(self, step: int, text: str) -> None:
        # A resumed run that says the same at the same step says it once.
        self._notes += 1
        self._client.set_tag(self._id, f"note.{step:09d}.{self._notes}", text)

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        self._client.log_dict(self._id, _plain(values), "summary.json")

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Any]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": MLflow,
}


@contextlib.contextmanager
def _silent() -> Any:
    """Some packages greet their user, in the middle of a progress bar."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can say of it."""
    return dict(json.loads(json.dumps(values, default=str)))


def _block(values: Mapping[str, Any]) -> str:
    text = json.dumps(_plain(values), indent=2, ensure_ascii=False)
    # Markdown shows lines that are indented by four spaces as they are.
    return "\n".join(f"    {line}" for line in text.splitlines())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    flat = _flat(_plain(values))
    return {k: float(v) for k, v in flat.items() if isinstance(v, bool | int | float)}
