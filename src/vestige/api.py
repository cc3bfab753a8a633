"""The Python entry points: distill, load a teacher, list what there is."""

import datetime
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from vestige.core.protocols import Source, Task, Teacher
from vestige.core.types import InputSpec, Requires, count_parameters
from vestige.errors import RecipeError, ShapeError, TeacherError
from vestige.recipes.build import Job, build_method, build_plugins, input_card, variant_of
from vestige.recipes.catalog import METHODS, TASKS, describe_methods
from vestige.recipes.run import check_folder, run_job
from vestige.recipes.schema import explain
from vestige.sources.images import TensorSource
from vestige.teachers.loading import fingerprint, load_teacher
from vestige.teachers.white_box import WhiteBoxTeacher, check_finite
from vestige.training import runtime
from vestige.training.summary import (
    RealData,
    RunFacts,
)
from vestige.training.tracking import Callback
from vestige.training.trainer import Evaluate, Outcome, Trainer, TrainerConfig

__all__ = ["DistillReport", "distill", "list_methods", "load_teacher"]


@dataclass(frozen=True)
class DistillReport:
    """What `distill` hands back.

    Attributes:
        student: trained, in eval mode; the object that was handed in, unless the method's result is
            another network (an average of its weights, say).
        source: where the method's inputs came from (a generator), or None.
        pool: stored synthetic inputs, or None.
        summary: the contents of summary.json.
        outcome: scores over time, findings and samples.
    """

    student: nn.Module
    source: Any
    pool: Any
    summary: dict[str, Any]
    outcome: Outcome


def distill(
    teacher: nn.Module | Teacher | Sequence[nn.Module | Teacher],
    student: nn.Module,
    *,
    method: str = "dfad",
    spec: InputSpec,
    num_classes: int,
    task: str = "classification",
    config: Mapping[str, Any] | None = None,
    plugins: Sequence[str | tuple[str, Mapping[str, Any]]] = (),
    evaluate: tuple[Tensor, Tensor] | Evaluate | None = None,
    sources: Mapping[str, Source | Tensor] | None = None,
    budget: Mapping[str, float] | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> DistillReport:
    """Train `student` from `teacher` alone.

    Args:
        teacher: any module that returns logits, a tuple that starts with them, or an object with
            `logits`; it is frozen and put into eval mode. Or a teacher object, such as a black box
            with a budget; or several of either, for methods that take several.
        student: any such module; trained in place, nothing else of it is changed.
        method: a name of `list_methods`.
        spec: of one input of the teacher.
        num_classes: K, number of logits.
        task: what an input is and how an answer is judged.
        config: settings of the method; what is left out has the method's default.
        plugins: names, or (name, settings), outermost first.
        evaluate: (inputs, labels) in the teacher's normalised space, a callable from the student
            to metrics with "accuracy", or None. Used to report, never to choose.
        sources: inputs by the names that the method asks for; a tensor counts as foreign data.
        budget: "minutes" and "steps"; stops the run, bends no schedule.
        seed: of every stream of randomness.
        device: "auto", "cpu", "cuda" or "cuda:N".
        out: run folder; None keeps nothing on disk.
        resume: go on where a run in `out` stopped.
        callbacks: called with each event of the run.

    Raises:
        RecipeError: method, settings, plug-ins, sources, budget or folder are not valid.
        TeacherError: the teacher cannot serve the method, or is the student itself.
        ShapeError: teacher and student do not fit `spec` and `num_classes`.
    """
    chosen = METHODS.get(method)
    settings = _settings(chosen, config or {})
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder, resume=resume)
    where = runtime.device(device)
    handed = list(teacher) if isinstance(teacher, Sequence) else [teacher]
    networks = [one for one in handed if isinstance(one, nn.Module)]
    judged: Task = TASKS.get(task)(spec, num_classes)
    # First, so that lazy layers get their weights. A black box is not asked, since that may cost;
    # several teachers may know other classes.
    for network in networks:
        check_finite(network)
    for network in [student, *(networks if len(handed) == 1 else ())]:
        judged.check(network.to(where))
    if any(_memory(student) & _memory(network) for network in networks):
        raise TeacherError(
            "teacher and student share weights, expected two networks; make the student anew "
            "(copy.deepcopy if it is to start from the teacher)"
        )
    teachers = [_frozen(one, where) for one in handed]
    given = {name: _source(name, source, where) for name, source in (sources or {}).items()}
    _check_sources(method, chosen.requires, given)
    listed = [item if isinstance(item, tuple) else (item, {}) for item in plugins]
    named = dict(listed)
    if len(named) < len(listed):
        raise RecipeError(f"plugins: got {[name for name, _ in listed]}; name each one once")
    judge = _judge(judged, evaluate)
    built = build_method(method, settings, judged, teachers, student, given, seed)
    weights = ", ".join(fingerprint(network) for network in networks)
    trainer = Trainer(
        built,
        judged,
        teachers=teachers,
        student=student,
        plugins=build_plugins(named, chosen, judged, teachers),
        sources=given,
        evaluate=judge,
        out=folder,
        seed=seed,
        config=_trainer_config(budget or {}, device),
        identity={
            "method": method,
            "task": task,
            "config": settings.model_dump(mode="json"),
            "input": [spec.kind, list(spec.shape), list(spec.mean), list(spec.std)],
            "num_classes": num_classes,
            "teacher_fingerprint": weights,
        },
        callbacks=callbacks,
    )
    facts = RunFacts(
        method=method,
        plugins=tuple(named),
        teacher_score=None
        if judge is None or not networks
        else float(judge(networks[0])[judged.metric]),
        teacher_parameters=sum(count_parameters(network) for network in networks),
        teacher_fingerprint=weights,
        real_data=_real_data(evaluate, given),
        seed=seed,
        recipe_yaml=yaml.safe_dump(
            {"method": method, "config": settings.model_dump(mode="json"), "seed": seed},
            sort_keys=False,
        ),
        student_card={
            "class": f"{type(student).__module__}:{type(student).__qualname__}",
            "input": input_card(spec),
            "num_classes": num_classes,
        },
        command="vestige.distill(...)",
        variant=variant_of(built),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    outcome, summary = run_job(Job(trainer, judged, facts, (), student), folder, resume=resume)
    return DistillReport(
        outcome.network or student,
        getattr(built, "generator", None),
        getattr(built, "pool", None),
        summary,
        outcome,
    )


def list_methods() -> list[dict[str, Any]]:
    """One mapping per method: name, summary, paper, task kinds, access, BatchNorm and needs."""
    return describe_methods()


def _settings(method: Any, config: Mapping[str, Any]) -> Any:
    try:
        return method.Config.model_validate(dict(config))
    except ValidationError as error:
        problems = "\n".join(f"  - {line}" for line in explain(error, method.Config, "config"))
        raise RecipeError(f"the settings are not valid:\n{problems}") from None


def _trainer_config(budget: Mapping[str, float], device: str) -> TrainerConfig:
    unknown = sorted(set(budget) - {"minutes", "steps"})
    if unknown:
        raise RecipeError(f"budget: got {unknown}, expected 'minutes' and 'steps'")
    try:
        return TrainerConfig(
            device=device,
            minutes=budget.get("minutes"),
            # Not rounded: half a step is a mistake that pydantic names.
            max_steps=cast("int | None", budget.get("steps")),
        )
    except ValidationError as error:
        problems = "; ".join(explain(error, TrainerConfig, "budget"))
        raise RecipeError(problems) from None


def _memory(network: nn.Module) -> set[int]:
    """Where the weights and buffers of `network` lie; tensors may be two and share it."""
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in network.state_dict(keep_vars=True).values()
        if isinstance(tensor, Tensor) and tensor.numel()
    }


def _frozen(teacher: nn.Module | Teacher, device: Any) -> Teacher:
    if isinstance(teacher, WhiteBoxTeacher) or not isinstance(teacher, nn.Module):
        return teacher
    return WhiteBoxTeacher(teacher.to(device))


def _source(name: str, source: Source | Tensor, device: Any) -> Source:
    if not isinstance(source, Tensor) and not hasattr(source, "draw"):
        raise RecipeError(
            f"sources.{name}: got {type(source).__name__}, expected a tensor of inputs or an "
            "object with draw(count, rng); convert arrays by torch.from_numpy"
        )
    if isinstance(source, Tensor):
        return TensorSource(source.to(device), origin="foreign", name=name)
    return source


def _check_sources(method: str, requires: Requires, given: Mapping[str, Source]) -> None:
    allowed = {*requires.sources, *requires.optional_sources}
    strange = sorted(set(given) - allowed)
    if strange:
        raise RecipeError(
            f"sources: got {strange}, {method!r} takes {sorted(allowed) or 'none'}; leave them out"
        )


def _judge(task: Task, evaluate: tuple[Tensor, Tensor] | Evaluate | None) -> Evaluate | None:
    if evaluate is None or callable(evaluate):
        return _checked(task, evaluate) if callable(evaluate) else None
    inputs, labels = evaluate
    if len(inputs) != len(labels):
        raise ShapeError(f"evaluate: got {len(inputs)} inputs and {len(labels)} labels")
    return lambda model: task.evaluate(model, (inputs, labels))


def _checked(task: Task, evaluate: Evaluate) -> Evaluate:
    def judge(model: nn.Module) -> Mapping[str, float]:
        scores: Any = evaluate(model)
        if not isinstance(scores, Mapping) or task.metric not in scores:
            raise RecipeError(
                f"evaluate returned {scores!r}, expected a mapping with {task.metric!r}"
            )
        try:
            plain = {str(name): float(value) for name, value in scores.items()}
        except (TypeError, ValueError) as error:
            raise RecipeError(f"evaluate returned {scores!r}, expected numbers: {error}") from error
        if not all(math.isfinite(value) for value in plain.values()):
            raise RecipeError(f"evaluate returned {plain}, expected finite numbers")
        return plain

    return judge


def _real_data(
    evaluate: tuple[Tensor, Tensor] | Callable[..., Any] | None, sources: Mapping[str, Source]
) -> tuple[RealData, ...]:
    read = []
    if isinstance(evaluate, tuple):
        read.append(RealData("evaluate", "real", "evaluation", "evaluation", len(evaluate[0]), ""))
    elif evaluate is not None:
        read.append(RealData("evaluate", "real", "evaluation", "evaluation", 0, ""))
    for name, source in sources.items():
        if source.origin not in ("noise", "generator"):
            count = len(source) if isinstance(source, Sized) else 0
            read.append(RealData(name, source.origin, "method", "distillation", count, ""))
    return tuple(read)
