"""The files that a finished run leaves: summary, student, samples, report."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core import parallel
from vestige.core.protocols import Task
from vestige.core.types import count_parameters
from vestige.training import runtime
from vestige.training.diagnosis import Finding
from vestige.training.files import tensors_to_bytes, write_bytes, write_json, write_text
from vestige.training.moments import drawable
from vestige.training.outcome import Outcome
from vestige.training.pictures import answer_grid, contact_sheet, save_png, time_strip

_SHEET_COLUMNS, _SHEET_CLASSES, _SHEET_IMAGES = 10, 20, 30


@dataclass(frozen=True)
class RealData:
    """Real data that was read for a run.

    Attributes:
        name: of the set and its split.
        origin: "real", "foreign", ... as declared.
        by: which part of the program read it.
        purpose: what for: "evaluation", "distillation", "teacher training".
        images: how many were read.
        fingerprint: digest of their contents.
    """

    name: str
    origin: str
    by: str
    purpose: str
    images: int
    fingerprint: str


def tensors_fingerprint(*tensors: Tensor) -> str:
    """sha256 in hex of dtypes, shapes and bytes, whatever the device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run besides what its trainer measured.

    Attributes:
        method: name.
        plugins: names, outermost first.
        teacher_score: on the test split, computed in this run; None where nothing judges.
        teacher_parameters: number of weights.
        teacher_fingerprint: digest of the weights.
        variant: the method's options that are on, in words; "" is the method as published.
        teacher_trained_on: what the teacher's card says of its data, "" where there is no card.
        real_data: everything real that was read.
        seed: of the run.
        recipe_yaml: the resolved recipe.
        student_card: what is needed to build the student again.
        command: how to run it again.
        started: date and time, ISO 8601.
        sources: by name, what is known of those that images were decoded for: how many rows, what
            could not be decoded, of which parts a heap is.
    """

    method: str
    plugins: tuple[str, ...]
    teacher_score: float | None
    teacher_parameters: int
    teacher_fingerprint: str
    real_data: tuple[RealData, ...]
    seed: int
    recipe_yaml: str
    student_card: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    started: str = ""
    teacher_trained_on: str = ""
    variant: str = ""
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# Where a run's result lies in its folder, by kind; a network is the student.
_STUDENT = "student.safetensors"
_PATHS = {
    "pool": "pool",
    "texts": "synthetic.jsonl",
    "personal models": "clients",
    "ensemble": "ensemble.safetensors",
}


def write_start(out: Path, facts: RunFacts) -> None:
    """recipe.yaml and run.json, before the first step."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "recipe.yaml", facts.recipe_yaml)
    write_json(
        out / "run.json",
        {
            "schema": 1,
            "started": facts.started,
            "command": facts.command,
            "seed": facts.seed,
            "versions": runtime.versions(),
            "machine": runtime.machine(),
            "processes": parallel.world(),
            "teacher_fingerprint": facts.teacher_fingerprint,
            "teacher_trained_on": facts.teacher_trained_on,
            "real_data": [asdict(item) for item in facts.real_data],
            "sources": {name: dict(about) for name, about in facts.sources.items()},
        },
    )


def summarize(
    facts: RunFacts, outcome: Outcome, task: Task, student: nn.Module | None, device: torch.device
) -> dict[str, Any]:
    """summary.json, version 1; `score` is the last step's, `best_score` is told for comparison."""
    best = max if task.higher_is_better else min
    notes = [finding.as_dict() for finding in outcome.findings]
    if not outcome.complete:
        stopped = (
            f"the budget stopped the run at step {outcome.steps}; schedules were not shortened"
        )
        notes.append(
            asdict(Finding("stopped-by-budget", "warning", stopped, "resume with a larger budget"))
        )
    values = [scores[task.metric] for scores in outcome.scores if task.metric in scores]
    return {
        "schema": 1,
        "method": facts.method,
        "variant": facts.variant,
        "plugins": list(facts.plugins),
        "task": task.kind,
        "metric": task.metric,
        "input_kind": task.spec.kind,
        "teacher": {"score": facts.teacher_score, "parameters": facts.teacher_parameters}
        if facts.teacher_fingerprint
        else None,
        "student": None
        if student is None
        else {
            "score": values[-1] if values else None,
            "best_score": best(values) if values else None,
            "parameters": count_parameters(student),
        },
        "arms": {},
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 2),
        "peak_memory_mib": round(runtime.peak_memory_mib(device), 1),
        "teacher_queries": outcome.teacher_queries,
        # Rows, not calls, so that methods with batches of other sizes can be compared.
        "teacher_passes": {
            "forward": outcome.teacher_queries,
            "backward": outcome.teacher_gradients,
        },
        "retention": outcome.retention,
        "coverage": outcome.coverage,
        "real_data": [asdict(item) for item in facts.real_data],
        "seed": facts.seed,
        "device": str(device),
        "versions": runtime.versions(),
        "result": {
            "kind": outcome.result.kind,
            "path": _PATHS.get(outcome.result.kind, None if student is None else _STUDENT),
        },
        "complete": outcome.complete,
        "diagnosis": notes,
    }


def write_student(out: Path, student: nn.Module, card: Mapping[str, Any]) -> None:
    """student.safetensors and student.json; the card last, so that it never speaks of nothing."""
    write_bytes(out / "student.safetensors", tensors_to_bytes(student.state_dict()))
    write_json(out / "student.json", {"schema": 1, **card, "weights": "student.safetensors"})


def write_details(
    out: Path, details: Mapping[str, Any], outcome: Outcome, task: Task, classes: Sequence[str]
) -> None:
    """evaluation.json, schema 1: what the task tells about the student at the last step."""
    write_json(
        out / "evaluation.json",
        {
            "schema": 1,
            "task": task.kind,
            "metric": task.metric,
            "step": outcome.steps,
            "classes": list(classes),
            **details,
        },
    )


def write_answers(out: Path, columns: Mapping[str, Tensor]) -> bool:
    """answers.png: what a task draws of the answers to test inputs, see `ShowsAnswers`.

    Returns:
        False if there is nothing to show.
    """
    if not columns or not all(len(images) for images in columns.values()):
        return False
    save_png(answer_grid(columns), out / "answers.png")
    return True


def write_samples_over_time(out: Path, outcome: Outcome, classes: Sequence[str]) -> bool:
    """samples-over-time.png: one column per moment, the teacher's class, if any, under each input.

    Returns:
        False if there is nothing to show.
    """
    if not outcome.moments:
        return False
    loops = {moment.loop for moment in outcome.moments}
    columns = [
        (
            f"round {one.round}" if len(loops) == 1 else f"{one.loop} {one.round}",
            one.images,
            [_class_name(int(label), classes) for label in one.classes],
        )
        for one in outcome.moments
    ]
    if any(name for *_, names in columns for name in names):
        strip = time_strip(columns)
    else:
        rows = min(len(images) for _, images, _ in columns)
        strip = answer_grid({heading: images[:rows] / 255 for heading, images, _ in columns})
    save_png(strip, out / "samples-over-time.png")
    return True


def write_samples(out: Path, outcome: Outcome, task: Task, classes: Sequence[str]) -> bool:
    """samples.png: the latest inputs, one row per class that the teacher saw in them.

    At most 10 images of each of the 20 classes with the most images; where there is no class for a
    whole input, the latest 30.

    Returns:
        False if there is nothing to show.
    """
    if outcome.samples is None or not drawable(task.spec):
        return False
    inputs, answers = outcome.samples
    if not isinstance(inputs, Tensor):
        return False
    answers = answers.cpu()
    if bool((answers < 0).any()):
        latest = task.spec.denormalize(inputs[-_SHEET_IMAGES:].float().cpu())
        scale = max(1, 64 // latest.shape[-1])
        save_png(contact_sheet(latest, columns=_SHEET_COLUMNS, scale=scale), out / "samples.png")
        return True
    counts = torch.bincount(answers, minlength=task.num_classes)
    shown = counts.argsort(descending=True, stable=True)[:_SHEET_CLASSES].sort().values
    index = torch.cat([(answers == label).nonzero()[:, 0][:_SHEET_COLUMNS] for label in shown])
    images = task.spec.denormalize(inputs[index.to(inputs.device)].float().cpu())
    names = [_class_name(int(label), classes) for label in answers[index]]
    scale = max(1, 64 // images.shape[-1])
    sheet = contact_sheet(images, columns=_SHEET_COLUMNS, scale=scale, labels=names)
    save_png(sheet, out / "samples.png")
    return True


def _class_name(label: int, classes: Sequence[str]) -> str:
    if label < 0:
        return ""
    return classes[label] if label < len(classes) else str(label)
