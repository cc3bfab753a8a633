"""Round time over the time of the passes that the algorithm cannot avoid."""

import datetime
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vestige.bench.claims import commit
from vestige.core.protocols import Context, Method
from vestige.core.types import Step
from vestige.errors import RecipeError
from vestige.recipes.build import build
from vestige.recipes.checks import explain
from vestige.recipes.loading import load_recipe, validate
from vestige.training import runtime
from vestige.training.files import write_json
from vestige.training.passes import Measured, PassRecorder, PassTimer, timed_networks
from vestige.training.tracking import Event
from vestige.training.trainer import Trainer

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "floors"
# Long enough for a GPU to be kept busy, short enough for a neighbour to disturb both sides.
_SLICE_S = 0.2


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Case(_Strict):
    """One setting.

    Attributes:
        recipe: shipped name or file.
        preset: of it; None takes its default.
        overrides: as for `--set`.
        target: the largest ratio that is accepted.
    """

    recipe: str
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    target: float = Field(1.10, gt=0)


class Definition(_Strict):
    """What is timed.

    Attributes:
        cases: settings by name.
    """

    cases: dict[str, Case] = Field(min_length=1)


def known_floors() -> list[str]:
    """Names of the benchmarks that can be run."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_floor(name_or_path: str | Path) -> Definition:
    """The cases of a benchmark, shipped or in a YAML file.

    Raises:
        RecipeError: there is none of this name, or it is not valid.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"got floor {str(name_or_path)!r}, expected a YAML file or one of "
            f"{', '.join(known_floors())}"
        )
    try:
        return Definition(**yaml.safe_load(path.read_text(encoding="utf8")))
    except (TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"got {path}, expected a mapping with 'cases': {error}") from error
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, Definition, path.stem))) from None


def run_floor(
    name: str,
    *,
    repeats: int = 5,
    cases: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    out: Path,
    echo: Callable[[str], object] = logger.info,
) -> Path:
    """Time all cases and write their JSON.

    Args:
        name: one of `known_floors`, or a YAML file.
        repeats: measured rounds of a case; medians are reported.
        cases: a subset.
        overrides: as for `--set`, for every case, for example `trainer.device=cuda`.
        out: folder that gets NAME.json.
        echo: gets a line per case.

    Returns:
        The file that was written.

    Raises:
        RecipeError: no such benchmark or case, or a recipe is not valid.
    """
    definition = load_floor(name)
    if strange := sorted({*(cases or ())} - {*definition.cases}):
        raise RecipeError(f"got cases {strange}, expected some of {', '.join(definition.cases)}")
    found = []
    for label, case in definition.cases.items():
        if cases is not None and label not in cases:
            continue
        result = {"name": label, **time_case(case, repeats=repeats, overrides=overrides)}
        found.append(result)
        echo(
            f"{label}: round {result['round_seconds']:.3f} s / floor "
            f"{result['floor_seconds']:.3f} s = {result['ratio']:.3f} (target {case.target:.2f})"
        )
    chosen = "".join(f" --set {override}" for override in overrides)
    path = out / f"{Path(name).stem}.json"
    write_json(
        path,
        {
            "schema": 1,
            "cases": found,
            "machine": runtime.machine(),
            "versions": runtime.versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "command": f"vestige bench floor {name} --repeats {repeats}{chosen}",
        },
    )
    return path


def time_case(case: Case, *, repeats: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run rounds of a case as users run them, and its passes in between.

    Raises:
        RecipeError: the recipe is not valid, or its method's passes cannot be timed.
    """
    recipe = load_recipe(case.recipe, preset=case.preset, overrides=(*case.overrides, *overrides))
    job = build(recipe)
    # As it was settled: settings may have been suggested for these networks.
    settings = validate(yaml.safe_load(job.facts.recipe_yaml)).method_config()
    watch = _Interleaved(job.trainer, job.trainer.method.passes(settings), repeats)
    try:
        job.trainer.run()
    except _Enough:
        return watch.result(case.target)
    finally:
        watch.recorder.close()
    if watch.missing:
        raise RecipeError(
            f"got the passes {', '.join(watch.missing)} of networks that no step called, expected "
            f"some of {', '.join(watch.recorder.networks)}; correct the method's passes()"
        )
    raise RecipeError(
        f"the recipe has {len(watch.rounds)} rounds to measure, expected {repeats} and one to warm "
        "up; raise its number of rounds or lower --repeats"
    )


class _Enough(Exception):
    """Ends a run whose rounds were measured."""


class _Paced:
    """A method that calls `pause` between two of its steps, when the trainer has done its part."""

    def __init__(self, method: Method, pause: Callable[[], None]) -> None:
        self._method = method
        self._pause = pause

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def run(self, ctx: Context) -> Iterator[Step]:
        for step in self._method.run(ctx):
            yield step
            self._pause()


class _Interleaved:
    """Times rounds of a trainer, and within them, a fifth of a second in turn, their passes.

    So whatever else the machine does meets both alike. The first round in which all networks take
    part warms up, and shows what they are fed with; loops before it are left out.
    """

    def __init__(self, trainer: Trainer, passes: Mapping[str, float], repeats: int) -> None:
        self.repeats = repeats
        self.device = trainer.device
        self.passes = dict(passes)
        self.recorder = PassRecorder(
            timed_networks(trainer.method.parts(), trainer.teachers, trainer.student)
        )
        self.rounds: list[float] = []
        self.floors: list[Measured] = []
        self.missing: list[str] = []
        self.threads = torch.get_num_threads()
        self._timer: PassTimer | None = None
        self._since = 0.0
        self._round = self._passes = 0.0
        trainer.method = cast("Method", _Paced(trainer.method, self._between_steps))
        trainer.callbacks.append(self._on_event)

    def _between_steps(self) -> None:
        if self._timer is not None and time.perf_counter() - self._since > _SLICE_S:
            self._time_passes(self._timer)

    def _time_passes(self, timer: PassTimer) -> None:
        """Stop the round's clock until the passes had as much time as the round."""
        self._round += self._now() - self._since
        start = self._now()
        while self._passes < self._round:
            timer.cycle()
            now = self._now()
            self._passes += now - start
            start = now
        self._since = self._now()

    def _on_event(self, event: Event) -> None:
        if event.kind == "start":
            self.recorder.__enter__()
        elif event.kind == "round" and self._timer is None:
            self.missing = self.recorder.missing(self.passes)
            if self.missing:
                self.recorder.forget()
            else:
                self._timer = self._warm_up()
        elif event.kind == "round" and self._timer is not None:
            self._round += self._now() - self._since
            # In a round too short for a slice nothing was timed yet.
            found = self._timer.take() if self._passes else self._once(self._timer)
            self.rounds.append(self._round)
            self.floors.append(found)
            if len(self.rounds) == self.repeats:
                raise _Enough
        if event.kind == "round":
            self._round = self._passes = 0.0
            self._since = self._now()

    @staticmethod
    def _once(timer: PassTimer) -> Measured:
        timer.cycle()
        return timer.take()

    def _warm_up(self) -> PassTimer:
        self.recorder.close()
        self.threads = torch.get_num_threads()
        timer = PassTimer(self.recorder, self.passes, self.device)
        self._once(timer)
        return timer

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def result(self, target: float) -> dict[str, Any]:
        """What goes into the file."""
        each = {
            name: median(found.seconds[name] for found in self.floors)
            for name in self.floors[0].seconds
        }
        floors = [found.total(self.passes) for found in self.floors]
        round_seconds, floor_seconds = median(self.rounds), median(floors)
        return {
            "shapes": {
                name: [call.shapes for call in calls]
                for name, calls in self.recorder.calls.items()
                if calls
            },
            "device": self.device.type,
            "threads": self.threads,
            "round_seconds": round_seconds,
            "floor_seconds": floor_seconds,
            "ratio": round_seconds / floor_seconds,
            "ratios": [a / b for a, b in zip(self.rounds, floors, strict=True)],
            "target": target,
            "passes": {
                name: {"count": count, "seconds": each[name]}
                for name, count in self.passes.items()
                if name in each
            },
        }
