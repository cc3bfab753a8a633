"""The README of a folder for the Hugging Face hub: what a student is, from what, and how good."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from vestige.training.export.usage import in_torch, inputs_of, load_of, with_transformers
from vestige.training.files import write_bytes, write_text
from vestige.training.report.run_folder import RunFolder
from vestige.training.report.tables import metric_name

# Of a card, what says best which network it is.
_NAMES = ("model", "factory", "smp", "class")
# Kinds of tasks on images, as the Hub names them.
_PIPELINES = {"classification": "image-classification", "segmentation": "image-segmentation"}
_TEXT_PIPELINES = {"text": "text-classification"}
_PAGE = """\
---
{front}---

# {title}

{student} with {parameters} parameters, distilled from a teacher by **{method}** with vestige.
{learned}
{stopped}
## Teacher

{teacher}

## Scores

{scores}

## Real data that was read

{data}

## How it was made

{making}

## How to use it

With vestige, from a copy of this folder:

```python
import vestige

network = vestige.load_teacher({load})
```

{other}:

```python
{plain}
```

{inputs}
{classes}{pictures}"""


def write_model_card(
    folder: Path,
    run: RunFolder,
    card: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    transformers: str = "",
) -> None:
    """README.md and, where the run has them, samples.png and answers.png.

    Args:
        folder: beside the weights `model.safetensors` and the card `student.json`.
        run: what is told of; where a file of it is missing, the page says so.
        card: contents of the run's student.json.
        weights: of the student.
        transformers: the folder in it that transformers opens, or "".
    """
    if run.samples is not None:
        write_bytes(folder / "samples.png", run.samples)
    if run.answers is not None:
        write_bytes(folder / "answers.png", run.answers)
    write_text(folder / "README.md", render(run, card, weights, transformers=transformers))


def render(
    run: RunFolder,
    card: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    transformers: str = "",
) -> str:
    """The page as Markdown with front matter."""
    summary = run.summary
    method = str(summary.get("method", "an unknown method"))
    variant = f" ({summary['variant']})" if summary.get("variant") else ""
    student = next((str(card[key]) for key in _NAMES if card.get(key)), "A network")
    known = summary.get("student") or {}
    counted = known.get("parameters") or sum(value.numel() for value in weights.values())
    learned = "No real data was read to train it: it learned from the teacher alone."
    if "real_data" not in summary:
        learned = "What real data was read to train it is not known."
    elif not _data_free(summary):
        learned = "It learned from the teacher's answers to real data, which is listed below."
    stopped = "" if summary.get("complete", True) else "\nA budget stopped the run early.\n"
    return _PAGE.format(
        front=yaml.safe_dump(_front(summary, card, method), sort_keys=False, allow_unicode=True),
        title=run.name,
        student=f"`{student}`",
        parameters=f"{counted:,}",
        method=f"{method}{variant}",
        learned=learned,
        stopped=stopped,
        teacher=_teacher(run),
        scores=_scores(summary),
        data=_data(summary),
        making=_making(run),
        load=load_of(card),
        other="With transformers alone" if transformers else "In plain PyTorch",
        plain=with_transformers(transformers) if transformers else in_torch(card),
        inputs=inputs_of(card),
        classes=_classes(card, str(summary.get("task"))),
        pictures="".join(
            f"\n{told}:\n\n![{what}]({file})\n"
            for told, what, file, data in (
                ("What it answers to test inputs", "answers", "answers.png", run.answers),
                ("What it learned from", "synthetic inputs", "samples.png", run.samples),
            )
            if data is not None
        ),
    )


def _front(summary: Mapping[str, Any], card: Mapping[str, Any], method: str) -> dict[str, Any]:
    tags = ["knowledge-distillation", "vestige", method, *summary.get("plugins", ())]
    if _data_free(summary):
        tags.insert(1, "data-free")
    front: dict[str, Any] = {"library_name": "vestige", "tags": tags}
    kind = card.get("input", {}).get("kind", "image")
    pipelines = {"image": _PIPELINES, "text": _TEXT_PIPELINES}.get(kind, {})
    pipeline = pipelines.get(str(summary.get("task")))
    if pipeline:
        front["pipeline_tag"] = pipeline
    score = (summary.get("student") or {}).get("score")
    judged = [one for one in summary.get("real_data", ()) if one["purpose"] == "evaluation"]
    if score is not None and judged and pipeline:
        name, _, split = str(judged[0]["name"]).partition("/")
        front["model-index"] = [
            {
                "name": str(card.get("model") or "student"),
                "results": [
                    {
                        "task": {"type": pipeline},
                        "dataset": {"name": name, "type": name, "split": split or "test"},
                        "metrics": [{"type": str(summary["metric"]), "value": score}],
                    }
                ],
            }
        ]
    return front


def _data_free(summary: Mapping[str, Any]) -> bool:
    """Whether the run says what it read, and nothing of it was read to train."""
    read = summary.get("real_data")
    return read is not None and all(one["purpose"] == "evaluation" for one in read)


def _teacher(run: RunFolder) -> str:
    recipe = yaml.safe_load(run.recipe) if run.recipe else None
    named = recipe.get("teacher") if isinstance(recipe, dict) else None
    more = recipe.get("more_teachers") or () if isinstance(recipe, dict) else ()
    name = "; ".join(_plain_text(one) for one in (named, *more) if one)
    trained = run.record.get("teacher_trained_on")
    facts = run.summary.get("teacher") or {}
    lines = [
        f"- Name: {name or 'a network that was handed in from Python'}",
        f"- Fingerprint of its weights (sha256): `{run.record.get('teacher_fingerprint') or '-'}`",
        f"- Trained on: {trained or 'not known, the teacher has no card'}",
        f"- Parameters: {facts.get('parameters') or 0:,}",
        f"- Rows that it was asked: {run.summary.get('teacher_queries', 0):,}",
    ]
    return "\n".join(lines)


def _scores(summary: Mapping[str, Any]) -> str:
    student, metric = summary.get("student") or {}, summary.get("metric", "score")
    if student.get("score") is None:
        return "The run was not judged on real data."
    rows = [
        f"| | {metric_name(str(metric))} |",
        "| --- | --- |",
        f"| student, after the last step | **{student['score']:.4f}** |",
        f"| student, best of all evaluations | {student['best_score']:.4f} |",
    ]
    teacher = (summary.get("teacher") or {}).get("score")
    if teacher is not None:
        rows.append(f"| teacher | {teacher:.4f} |")
    rows.append(
        "\nThe weights here are those after the last step. The best score is shown for comparison "
        "only: no weights were chosen on test data."
    )
    return "\n".join(rows)


def _data(summary: Mapping[str, Any]) -> str:
    read = summary.get("real_data")
    if read is None:
        return "Not known: the run's summary.json is missing."
    if not read:
        return "None."
    rows = ["| set | origin | read by | for | inputs | fingerprint |", "| --- " * 6 + "|"]
    rows += [
        f"| {one['name']} | {one['origin']} | {one['by']} | {one['purpose']} | {one['images']:,} | "
        f"`{one['fingerprint'][:12] or '-'}` |"
        for one in read
    ]
    return "\n".join(rows)


def _making(run: RunFolder) -> str:
    summary = run.summary
    versions = ", ".join(f"{k} {v}" for k, v in (summary.get("versions") or {}).items())
    plugins = ", ".join(summary.get("plugins") or ()) or "none"
    return "\n".join(
        [
            f"- Command: `{run.record.get('command') or '-'}`",
            f"- Plug-ins: {plugins}",
            f"- Steps: {summary.get('steps', 0):,}",
            f"- Seed: {summary.get('seed', '-')}",
            f"- Versions: {versions or '-'}",
        ]
    )


def _classes(card: Mapping[str, Any], task: str) -> str:
    names = card.get("classes") or ()
    listed = ", ".join(map(str, names)) if names else "their names are not known"
    where = " at every pixel" if task == "segmentation" else ""
    return f"Answers are logits of {card['num_classes']} classes{where}: {listed}.\n"


def _plain_text(teacher: Any) -> str:
    return teacher if isinstance(teacher, str) else json.dumps(teacher, ensure_ascii=False)
