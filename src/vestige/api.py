"""The Python entry points: distill, load a teacher, list what there is."""

import base64
import datetime
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from vestige.core import parallel
from vestige.core.protocols import Source, Task, Teacher
from vestige.core.types import InputSpec, Requires, count_parameters
from vestige.errors import RecipeError, ShapeError, TeacherError
from vestige.recipes.build import (
    Job,
    build_method,
    build_plugins,
    in_detail,
    in_pictures,
    variant_of,
)
from vestige.recipes.catalog import METHODS, PLUGINS, describe_methods
from vestige.recipes.leaks import Hashed, hashes_of_inputs, hashes_of_rows, leaks
from vestige.recipes.mistakes import explain
from vestige.recipes.run import check_folder, run_job
from vestige.recipes.settle import suggested
from vestige.recipes.sources import MADE_UP
from vestige.recipes.student import input_card
from vestige.recipes.tasks import make_task, task_card
from vestige.recipes.unlabelled import Opened, few_rows, open_given
from vestige.sources.images import TensorSource
from vestige.sources.stored import StoredImages
from vestige.teachers.loading import fingerprint, load_teacher
from vestige.teachers.white_box import WhiteBoxTeacher, check_finite
from vestige.training import runtime
from vestige.training.diagnosis import Finding
from vestige.training.inspection import notices
from vestige.training.moments import drawable
from vestige.training.outcome import Outcome
from vestige.training.pictures import contact_sheet, png
from vestige.training.pools import pool_of
from vestige.training.report.tables import metric_name
from vestige.training.summary import (
    RealData,
    RunFacts,
    tensors_fingerprint,
)
from vestige.training.tracking import Callback
from vestige.training.tracking.notebook import shown, table
from vestige.training.trainer import Evaluate, Trainer
from vestige.training.trainer_config import TrainerConfig

_SHOWN_SAMPLES = 32
__all__ = ["DistillReport", "distill", "list_methods", "load_teacher"]


@dataclass(frozen=True, repr=False)
class DistillReport:
    """What `distill` hands back.

    Attributes:
        student: trained, in eval mode; the object that was handed in, unless the method's result is
            another network (an average of its weights, say).
        source: where the method's inputs came from (a generator), or None.
        pool: the `Pool` of images that the method gathered, or None; `draw`, `draw_of` a class,
            hand it to another `distill` as a source, or write it with `save_pool`.
        summary: the contents of summary.json.
        outcome: scores over time, findings and samples.
        spec: of the inputs, so that samples can be drawn.
    """

    student: nn.Module
    source: Any
    pool: Any
    summary: dict[str, Any]
    outcome: Outcome
    spec: InputSpec | None = None

    def __repr__(self) -> str:
        """Method, scores, steps and findings in one line, without the networks."""
        facts = ", ".join(f"{name}={value}" for name, value in self._facts())
        return f"DistillReport({facts})"

    def _repr_html_(self) -> str:
        """The same as a table, with the latest inputs; a notebook calls this."""
        rows = self._facts()
        notes = [(one["code"], f"{one['message']}: {one['knob']}") for one in self._diagnosis()]
        return table([*rows, *notes]) + self._pictures()

    def _facts(self) -> list[tuple[str, str]]:
        summary, student = self.summary, self.summary["student"] or {}
        variant = f" ({summary['variant']})" if summary["variant"] else ""
        metric = metric_name(summary["metric"])
        facts = [("method", f"{summary['method']}{variant}")]
        taught, learned = (summary["teacher"] or {}).get("score"), student.get("score")
        for name, score in (("teacher", taught), ("student", learned)):
            if score is not None:
                facts.append((f"{name} {metric}", f"{score:.4g}"))
        if taught is not None and learned is not None:
            facts.append(("gap", f"{taught - learned:.4g}"))
        facts.append(("steps", f"{summary['steps']:,}"))
        facts.append(("seconds", f"{summary['seconds']:.0f}"))
        if not summary["complete"]:
            facts.append(("complete", "no"))
        codes = ", ".join(one["code"] for one in self._diagnosis())
        facts.append(("diagnosis", codes or "nothing noticed"))
        return facts

    def _diagnosis(self) -> list[dict[str, str]]:
        return list(self.summary["diagnosis"])

    def _pictures(self) -> str:
        if self.outcome.samples is None or self.spec is None or not drawable(self.spec):
            return ""
        inputs, _ = self.outcome.samples
        if not isinstance(inputs, Tensor):
            return ""
        images = self.spec.denormalize(inputs[:_SHOWN_SAMPLES].float())
        scale = max(1, 64 // images.shape[-1])
        sheet = contact_sheet(images, columns=8, scale=scale)
        encoded = base64.b64encode(png(sheet)).decode()
        return f'<img alt="latest inputs" src="data:image/png;base64,{encoded}">'


@runtime.with_processes
def distill(
    teacher: nn.Module | Teacher | Sequence[nn.Module | Teacher],
    student: nn.Module,
    *,
    method: str | type = "dfad",
    spec: InputSpec,
    num_classes: int,
    task: str = "classification",
    task_config: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    plugins: Sequence[str | type | tuple[str | type, Mapping[str, Any]]] = (),
    evaluate: tuple[Tensor, Tensor] | Evaluate | None = None,
    sources: Mapping[str, Source | Tensor | NDArray[Any] | str | Path] | None = None,
    budget: Mapping[str, float] | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    defaults: Literal["suggested", "published"] = "suggested",
    progress: bool | None = None,
    track: Sequence[str] = (),
    trainer: Mapping[str, Any] | None = None,
) -> DistillReport:
    """Train `student` from `teacher` alone.

    With nothing but the networks, the input spec and the number of classes it takes settings that
    the method suggests for them, and runs for minutes where networks are small. Before the first
    step it looks whether the spec's normalisation is the teacher's; afterwards it says whether the
    run learned, without data (`report.summary["diagnosis"]`).

    Example, cut short by `config`; leave that out for a student that is any good:

        >>> import torch, vestige
        >>> teacher = vestige.load_teacher("builtin:digits-convnet")
        >>> student = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 6, 3, stride=2, padding=1),
        ...     torch.nn.BatchNorm2d(6),
        ...     torch.nn.ReLU(),
        ...     torch.nn.Flatten(),
        ...     torch.nn.Linear(6 * 8 * 8, 10),
        ... )
        >>> report = vestige.distill(
        ...     teacher,
        ...     student,
        ...     spec=vestige.InputSpec.image(1, 16, 16, mean=[0.3], std=[0.32]),
        ...     num_classes=10,
        ...     config={"rounds": 2, "iterations": 2},
        ...     device="cpu",
        ... )
        >>> report.student is student, report.summary["steps"], report.summary["real_data"]
        (True, 24, [])
        >>> report.source(torch.randn(5, 100)).shape  # the generator that made its inputs
        torch.Size([5, 1, 16, 16])

    In a script that torchrun started, its processes train together; see "Several processes" in
    docs/architecture.md. All get the same report.

    Args:
        teacher: any module that returns logits, a tuple that starts with them, or an object with
            `logits`; it is frozen and put into eval mode. Or a teacher object, such as a black box
            with a budget; or several of either, for methods that take several.
        student: any such module; trained in place, nothing else of it is changed.
        method: a name of `list_methods`, or a method's class.
        spec: of one input of the teacher.
        num_classes: K, number of logits.
        task: what an input is and how an answer is judged: "classification" or "segmentation".
        task_config: settings of the task, for example {"ignore_index": 255}.
        config: settings of the method; what is left out is chosen as `defaults` says. All of them
            stand in the run's recipe.yaml.
        plugins: names or classes, or (name or class, settings), outermost first.
        evaluate: (inputs, labels) in the teacher's normalised space, of texts rows of bytes (see
            `vestige.core.texts`), a callable from the student
            to metrics with the task's own ("accuracy", "miou"), or None. Used to report, never to
            choose.
        sources: inputs by the names that the method asks for: a tensor of normalised inputs, images
            as a uint8 array (N, H, W) or (N, H, W, C), the path of a folder of pictures or of an
            .npz or .npy file, or a source; all but the last count as foreign data.
        budget: "minutes" and "steps"; stops the run, bends no schedule.
        seed: of every stream of randomness.
        device: "auto", "cpu", "cuda" or "cuda:N".
        out: run folder; None keeps nothing on disk.
        resume: go on where a run in `out` stopped.
        callbacks: called with each event of the run; see `vestige.training.tracking.Event`.
        defaults: "suggested" asks the method for settings that suit these networks and inputs,
            for a run of minutes on two cores where networks are small; "published" takes the
            paper's.
        progress: show how far the run is: a live table in a notebook, a bar on a terminal. None
            does so where there is one or the other.
        track: trackers that follow the run: "tensorboard", "trackio", "wandb", "mlflow". Each
            needs its package and `out`; none needs a network.
        trainer: how the run is driven, by the names of `TrainerConfig`: "precision", "compile",
            "channels_last", "threads", "log_every", "evaluate_every" and others.

    Returns:
        The student with what is known of the run; shown as a table in a notebook.

    Raises:
        RecipeError: method, settings, plug-ins, sources, budget or folder are not valid.
        TeacherError: the teacher cannot serve the method, or is the student itself.
        ShapeError: teacher and student do not fit `spec` and `num_classes`.
    """
    chosen, method_name = METHODS.get(method), METHODS.name_of(method)
    _settings(chosen, config or {})
    driven = _trainer_config(budget or {}, device, track, trainer or {})
    _check_choices(seed, defaults)
    folder = None if out is None else Path(out)
    if folder is not None:
        parallel.first(partial(check_folder, folder, resume=resume))
    where = runtime.device(device)
    handed = list(teacher) if isinstance(teacher, Sequence) else [teacher]
    networks = [one for one in handed if isinstance(one, nn.Module)]
    judged = make_task(task, spec, num_classes, task_config)
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
    opened = {
        name: open_given(name, handed_in, spec, seed, where)
        for name, handed_in in (sources or {}).items()
        if isinstance(handed_in, str | Path | np.ndarray)
    }
    given = {
        name: opened[name].source if name in opened else _source(name, source, where)
        for name, source in (sources or {}).items()
    }
    _check_sources(method_name, chosen.requires, given)
    wrapped = _listed(plugins)
    judge = _judge(judged, evaluate)
    known = suggested(method, judged, teachers, student) if defaults == "suggested" else {}
    settings = _settings(chosen, {**known, **(config or {})})
    built = build_method(method, settings, judged, teachers, student, given, seed)
    weights = ", ".join(fingerprint(network) for network in networks)
    score = None
    if judge is not None and networks:
        score = float(judge(networks[0])[judged.metric])
    leaked, overlaps = _leaks(given, evaluate, spec)
    run = Trainer(
        built,
        judged,
        teachers=teachers,
        student=student,
        plugins=build_plugins(wrapped, chosen, judged, teachers),
        sources=given,
        evaluate=judge,
        out=folder,
        seed=seed,
        config=driven,
        identity={
            "method": method_name,
            "task": task,
            **({"task_config": dict(task_config)} if task_config else {}),
            "config": settings.model_dump(mode="json"),
            "input": [spec.kind, list(spec.shape), list(spec.mean), list(spec.std)],
            "num_classes": num_classes,
            "teacher_fingerprint": weights,
            # Tensors only: another object is asked by `draw` alone and may have no contents.
            "sources": {
                name: _digest(source)
                for name, source in (sources or {}).items()
                if isinstance(source, Tensor)
            }
            | {name: one.read[0].fingerprint for name, one in opened.items()},
        },
        callbacks=callbacks,
        noticed=[
            *notices(networks, judged, evaluate[0] if isinstance(evaluate, tuple) else None, score),
            *leaked,
            *few_rows(given, settings),
        ],
    )
    facts = RunFacts(
        method=method_name,
        plugins=tuple(run.plugins),
        teacher_score=score,
        teacher_parameters=sum(count_parameters(network) for network in networks),
        teacher_fingerprint=weights,
        real_data=_real_data(evaluate, given, opened),
        sources={
            name: {**(opened[name].about if name in opened else {}), **overlaps.get(name, {})}
            for name in given
            if name in opened or name in overlaps
        },
        seed=seed,
        recipe_yaml=yaml.safe_dump(
            {"method": method_name, "config": settings.model_dump(mode="json"), "seed": seed},
            sort_keys=False,
        ),
        student_card={
            "class": f"{type(student).__module__}:{type(student).__qualname__}",
            "input": input_card(spec),
            "num_classes": num_classes,
            **task_card(task, task_config or {}),
        },
        command="vestige.distill(...)",
        variant=variant_of(built),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    details, answers = None, None
    if isinstance(evaluate, tuple):
        # A black box is no network here: asking it would cost, and count, queries.
        alone = networks[0] if len(handed) == len(networks) == 1 else None
        details = in_detail(judged, alone, evaluate)
        answers = in_pictures(judged, alone, evaluate)
    job = Job(run, judged, facts, (), student, details, answers)
    with shown(progress if parallel.rank() == 0 else False) as watching:
        run.callbacks.extend(watching)
        outcome, summary = run_job(job, folder, resume=resume)
    return DistillReport(
        outcome.network or student,
        getattr(built, "generator", None),
        pool_of(built.parts()),
        summary,
        outcome,
        spec,
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


def _listed(
    plugins: Sequence[str | type | tuple[str | type, Mapping[str, Any]]],
) -> dict[str | type, Mapping[str, Any]]:
    pairs = [item if isinstance(item, tuple) else (item, {}) for item in plugins]
    names = [PLUGINS.name_of(plugin) for plugin, _ in pairs]
    if len(set(names)) < len(names):
        raise RecipeError(f"plugins: got {names}; name each one once")
    return dict(pairs)


def _trainer_config(
    budget: Mapping[str, float], device: str, track: Sequence[str], more: Mapping[str, Any]
) -> TrainerConfig:
    unknown = sorted(set(budget) - {"minutes", "steps"})
    if unknown:
        raise RecipeError(f"budget: got {unknown}, expected 'minutes' and 'steps'")
    twice = sorted({"device", "minutes", "max_steps", "track"} & set(more))
    if twice:
        raise RecipeError(
            f"trainer: got {twice}, which distill takes as device, budget and track; hand them in "
            "there"
        )
    try:
        return TrainerConfig(
            device=device,
            minutes=budget.get("minutes"),
            # Not rounded: half a step is a mistake that pydantic names.
            max_steps=cast("int | None", budget.get("steps")),
            track=cast("tuple[str, ...]", track),
            **more,
        )
    except ValidationError as error:
        handed = any(problem["loc"][:1] and problem["loc"][0] in more for problem in error.errors())
        where = "trainer" if handed else "budget"
        problems = "; ".join(explain(error, TrainerConfig, where))
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


def _source(name: str, source: Any, device: Any) -> Source:
    if isinstance(source, Tensor):
        return TensorSource(source.to(device), origin="foreign", name=name)
    if not hasattr(source, "draw"):
        raise RecipeError(
            f"sources.{name}: got {type(source).__name__}, expected a tensor of inputs, a uint8 "
            "array of images, a path, or an object with draw(count, rng); convert it to one"
        )
    given: Source = source
    return given


def _leaks(
    given: Mapping[str, Source], evaluate: object, spec: InputSpec
) -> tuple[list[Finding], dict[str, dict[str, Any]]]:
    """`leaks` of what was handed in as images; a source of another kind is not read."""
    if not isinstance(evaluate, tuple):
        return [], {}
    hashed: dict[str, Hashed] = {}
    for name, source in given.items():
        if isinstance(source, StoredImages) and source.hashes is not None:
            hashed[name] = partial(getattr, source, "hashes")
        elif isinstance(source, StoredImages | TensorSource):
            hashed[name] = partial(hashes_of_rows, source, spec)
    return leaks(hashed, partial(hashes_of_inputs, evaluate[0], spec))


def _check_sources(method: str, requires: Requires, given: Mapping[str, Source]) -> None:
    allowed = {*requires.sources, *requires.optional_sources}
    strange = sorted(set(given) - allowed)
    if strange:
        raise RecipeError(
            f"sources: got {strange}, {method!r} takes {sorted(allowed) or 'none'}; leave them out"
        )


def _check_choices(seed: int, defaults: str) -> None:
    # A bool is an int to Python, and True a mistake for a seed.
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise RecipeError(f"seed: got {seed!r}, expected a whole number of at least 0; take 0")
    if defaults not in ("suggested", "published"):
        raise RecipeError(
            f"defaults: got {defaults!r}, expected 'suggested' or 'published'; take the first "
            "where nobody tuned the method for these networks"
        )


def _digest(tensor: Tensor) -> str:
    holder = nn.Module()
    holder.register_buffer("inputs", tensor)
    return fingerprint(holder)


def _judge(task: Task, evaluate: tuple[Tensor, Tensor] | Evaluate | None) -> Evaluate | None:
    if evaluate is None or callable(evaluate):
        return _checked(task, evaluate) if callable(evaluate) else None
    inputs, labels = evaluate
    if len(inputs) != len(labels):
        raise ShapeError(f"evaluate: got {len(inputs)} inputs and {len(labels)} labels")
    if not inputs.is_floating_point() and task.spec.kind != "text":
        raise ShapeError(
            f"evaluate: got inputs of {inputs.dtype}, expected floating-point inputs in the "
            "teacher's normalised space; hand in spec.normalize(inputs / 255) for bytes"
        )
    return lambda model: task.evaluate(model, (inputs, labels))


def _state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, v) for n, v in model.state_dict().items() if isinstance(v, Tensor)]


def _bytes(value: Tensor) -> Tensor:
    # NaN is not equal to itself, and what was there before is not evaluate's doing.
    return value.contiguous().flatten().view(torch.uint8)


def _checked(task: Task, evaluate: Evaluate) -> Evaluate:
    def judge(model: nn.Module) -> Mapping[str, float]:
        before = {name: value.clone() for name, value in _state(model)}
        scores: Any = evaluate(model)
        changed = [
            name
            for name, value in _state(model)
            if name not in before or not torch.equal(_bytes(value), _bytes(before.pop(name)))
        ]
        if changed or before:
            raise RecipeError(
                f"evaluate changed {[*changed, *before][0]!r} of the network that it judges, "
                "expected it to be left as it is; put it into eval mode and use torch.no_grad()"
            )
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
    evaluate: tuple[Tensor, Tensor] | Callable[..., Any] | None,
    sources: Mapping[str, Source],
    opened: Mapping[str, Opened],
) -> tuple[RealData, ...]:
    read = []
    if isinstance(evaluate, tuple):
        digest = tensors_fingerprint(*evaluate)
        count = len(evaluate[0])
        read.append(RealData("evaluate", "real", "evaluation", "evaluation", count, digest))
    elif evaluate is not None:
        read.append(RealData("evaluate", "real", "evaluation", "evaluation", 0, ""))
    for name, source in sources.items():
        if source.origin not in MADE_UP:
            count = len(source) if isinstance(source, Sized) else 0
            digest = opened[name].read[0].fingerprint if name in opened else ""
            read.append(RealData(name, source.origin, "method", "distillation", count, digest))
    return tuple(read)
