"""`vestige evaluate` and `vestige export`: what a run left, judged again and handed on."""

import json
import math
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vestige.cli.output import console, examples

if TYPE_CHECKING:
    from vestige.recipes.evaluate import Judged

_MOST_CLASSES = 20


class Split(StrEnum):
    """Part of a data set."""

    train = "train"
    select = "select"
    test = "test"


class To(StrEnum):
    """Form of an export."""

    safetensors = "safetensors"
    onnx = "onnx"
    hub = "hub"


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(
        epilog=examples(
            "vestige evaluate runs/dfad-seed0",
            "vestige evaluate runs/dfad-seed0 --data my-pictures --split test",
            "vestige evaluate builtin:digits-convnet --data digits --json",
            "vestige evaluate '{timm: resnet18, weights: mine.safetensors, num_classes: 10}' "
            "--data test.npz",
        )
    )(evaluate)
    app.command(
        epilog=examples(
            "vestige export runs/dfad-seed0 --to onnx --normalize",
            "vestige export runs/dfad-seed0 --to hub --out my-student",
            "vestige export runs/mine --to onnx --factory my_package.nets:make",
        )
    )(export)


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run folder, a card (.json), weights beside a card, a teacher's name such as "
            "builtin:NAME, recipe:NAME, timm:NAME or hf:NAME, or a mapping in YAML.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Name or folder of a set, an .npz file, or a folder of pictures by class; the "
            "run's own set unless given."
        ),
    ] = None,
    split: Annotated[
        Split | None,
        typer.Option(
            help="Part of the set; test unless given, and all of a folder of pictures by class "
            "that has no splits."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Judge a network on real data: its scores, each class, agreement with its teacher."""
    from vestige.recipes.evaluate import evaluate as judge

    found = judge(target, data=data, split=split and split.value, device=device)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
        return
    _show(found)


def export(
    run: Annotated[Path, typer.Argument(help="A run folder that holds a student.")],
    to: Annotated[To, typer.Option(help="What to write.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder; RUN/export or RUN/hub unless given.")
    ] = None,
    normalize: Annotated[
        bool,
        typer.Option("--normalize", help="ONNX: take images in [0, 1] and normalise inside."),
    ] = False,
    factory: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="ONNX of a student that was handed in from Python: what makes such a network.",
        ),
    ] = None,
) -> None:
    """Write the student for other programs, with its card; nothing is uploaded."""
    from vestige.training.export.student import export as write

    done = write(run, to=to.value, out=out, normalize=normalize, factory=factory)
    if to is To.onnx:
        typer.echo(
            f"{done.path}: opset {done.opset}, any batch size; logits differ from torch's by at "
            f"most {done.largest_difference:.2g} ({done.checked_by})"
        )
    elif to is To.hub:
        held = ", ".join(sorted(one.name for one in done.path.iterdir()))
        typer.echo(f"{done.path}: {held}")
        typer.echo(f"read README.md, add a license, then: hf upload ORG/NAME {done.path}")
    else:
        typer.echo(f"{done.path}, with {done.path.with_name('student.json').name}")


def _show(found: "Judged") -> None:
    from rich.markup import escape

    from vestige.training.report.tables import is_share, mapping, metric_name, number

    def told(name: str, value: float) -> str:
        return f"{metric_name(name)} {f'{value:.2%}' if is_share(name) else f'{value:.4f}'}"

    screen = console()
    screen.print(
        f"[bold]{escape(found.name)}[/]  {found.parameters:,} parameters, fingerprint "
        f"{found.fingerprint[:12]}",
        highlight=False,
    )
    scores = ", ".join(told(name, value) for name, value in found.scores.items())
    screen.print(f"{escape(found.data)}, {found.inputs:,} inputs: {scores}", highlight=False)
    share = number(mapping(found.details.get("agreement")).get("share"))
    if math.isfinite(share):
        taught = number(mapping(found.details.get("teacher")).get(found.metric))
        known = f", {told(found.metric, taught)}" if math.isfinite(taught) else ""
        of = " of the pixels" if "pixels" in found.details else ""
        screen.print(
            f"agrees with its teacher ({escape(found.teacher)}{known}) on {share:.2%}{of}",
            highlight=False,
        )
    if classes := _classes(found):
        screen.print(classes)


def _classes(found: "Judged") -> Any:
    """The worst classes first where not all can be shown; None where nothing is known of them."""
    from rich.table import Table
    from rich.text import Text

    from vestige.training.report.tables import (
        class_score,
        format_count,
        mapping,
        number,
        sequence,
    )

    details = found.details
    own, taught = (
        [number(value) for value in sequence(mapping(details.get(who)).get("per_class"))]
        for who in ("student", "teacher")
    )
    rows = [label for label, value in enumerate(own) if math.isfinite(value)]
    if not rows:
        return None
    title = None
    if len(rows) > _MOST_CLASSES:
        title = f"the {_MOST_CLASSES} weakest of {len(rows)} classes; --json has all"
        rows = sorted(rows, key=lambda label: own[label])[:_MOST_CLASSES]
    counted = next((what for what in ("inputs", "pixels") if f"{what}_per_class" in details), "")
    counts = sequence(details.get(f"{counted}_per_class"))
    columns = ["class", *([counted] if counts else []), class_score(details)]
    columns += ["teacher"] if taught else []
    table = Table(*columns, title=title, header_style="bold")
    for label in rows:
        name = found.classes[label] if label < len(found.classes) else str(label)
        shares = [one[label] for one in (own, taught) if label < len(one)]
        table.add_row(
            Text(name),
            *([format_count(number(counts[label]))] if label < len(counts) else []),
            *(f"{share:.1%}" if math.isfinite(share) else "-" for share in shares),
        )
    return table
