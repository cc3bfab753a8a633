"""One entry of QUEUE.md, in slices: `python benchmarks/gpu/run.py NAME --minutes 9`.

Call it again until it leaves with 0: each call goes on where the one before stopped. Needs no
installation, only a checkout and the packages that vestige imports.

Codes: 0 finished and as wanted, 1 finished and less than wanted, or failed, 2 something is missing,
130 the slice is over and there is more to do.
"""

import argparse
import datetime
import importlib.util
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "jaxtyping": "jaxtyping",
    "torchmetrics": "torchmetrics",
    "sklearn": "scikit-learn",
}
DONE, LESS_THAN_WANTED, MISSING, MORE_TO_DO = 0, 1, 2, 130
# A slice ends with an evaluation and a checkpoint.
RESERVE_MINUTES = 0.5
# Less is not worth starting for, and a run that starts must get a round done.
LEAST_MINUTES = 0.1


def main(arguments: list[str] | None = None) -> int:
    """Run a slice; returns the exit code."""
    options = _options(arguments)
    missing = [name for module, name in NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        return _tell(f"missing packages; pip install {' '.join(missing)}", MISSING)
    if not importlib.util.find_spec("vestige"):
        sys.path.insert(0, str(ROOT / "src"))

    import yaml

    from vestige.errors import (
        CheckpointError,
        DataError,
        Interrupted,
        RecipeError,
        TeacherError,
        VestigeError,
    )

    os.chdir(ROOT)
    entries = yaml.safe_load(options.entries.read_text(encoding="utf8"))
    if options.name not in entries:
        return _tell(f"got {options.name!r}, expected one of {', '.join(entries)}", MISSING)
    entry = entries[options.name]
    try:
        _check_device(entry, options)
        result = _floors(entry, options) if "floor" in entry else _runs(entry, options)
    except Interrupted as error:
        return _tell(f"{error}; call again to go on", MORE_TO_DO)
    except (DataError, RecipeError, TeacherError, CheckpointError) as error:
        return _tell(str(error), MISSING)
    except VestigeError as error:
        return _tell(str(error), LESS_THAN_WANTED)
    except KeyboardInterrupt:
        return _tell("stopped; call again to go on", MORE_TO_DO)
    return _finish(entry, result, options)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("name", help="an entry of QUEUE.md")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this slice")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or, to try it out, cpu")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="state of runs")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets NAME.json")
    parser.add_argument("--entries", type=Path, default=FOLDER / "entries.yaml")
    options = parser.parse_args(arguments)
    options.until = time.monotonic() + 60 * options.minutes
    for key in ("work", "out", "entries"):
        setattr(options, key, getattr(options, key).resolve())
    options.work = options.work / options.name
    return options


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _check_device(entry: dict[str, Any], options: argparse.Namespace) -> None:
    """Before minutes are spent: is the device there, and is the data?"""
    from vestige.recipes.catalog import DATA
    from vestige.recipes.loading import load_recipe
    from vestige.recipes.teacher_schema import load_teacher_recipe
    from vestige.training import runtime

    runtime.device(options.device)
    if "teacher" in entry:
        recipe = load_recipe(entry["recipe"], preset=entry.get("preset"))
        teacher = load_teacher_recipe(entry["teacher"])
        sets = DATA.get(teacher.input.spec().kind)
        for name in {teacher.data, recipe.data} - {None}:
            sets.open(name, "test")
            sets.open(name, "train")


def _left(options: argparse.Namespace) -> float:
    """Minutes of this slice that may still be used.

    Raises:
        Interrupted: there are none.
    """
    from vestige.errors import Interrupted

    left = (options.until - time.monotonic()) / 60 - RESERVE_MINUTES
    if left < LEAST_MINUTES:
        raise Interrupted("the slice is over")
    return left


def _runs(entry: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The teacher, then the student of every seed."""
    from vestige.recipes.teacher import train_teacher
    from vestige.recipes.teacher_schema import load_teacher_recipe

    recipe = load_teacher_recipe(entry["teacher"])
    recipe = recipe.model_copy(
        update={
            "device": options.device if recipe.device == "auto" else recipe.device,
            "training": recipe.training.model_copy(update=entry.get("training", {})),
        }
    )
    weights = options.work / "teacher" / f"{recipe.name}.safetensors"
    # The path is part of what a resumed run must find again, wherever the checkout lies by then.
    shown = weights.relative_to(ROOT) if weights.is_relative_to(ROOT) else weights
    _, card = train_teacher(
        recipe,
        weights.parent,
        resume=True,
        # A finished one is only read.
        minutes=None if weights.with_suffix(".json").is_file() else _left(options),
        on_epoch=lambda epoch, loss: _say(f"teacher: epoch {epoch}, loss {loss:.4f}"),
    )
    metric, score = card.measured
    _say(f"teacher: test {metric} {score:.4f}")
    overrides = [
        f"teacher={json.dumps({'model': card.model, 'args': card.args})}",
        f"teacher.weights={json.dumps(str(shown))}",
        f"input={json.dumps(card.input.model_dump(mode='json'))}",
        f"num_classes={card.num_classes}",
        f"trainer.device={options.device}",
        *entry.get("overrides", []),
    ]
    summaries = [_run(entry, overrides, seed, options) for seed in entry["seeds"]]
    return {
        "teacher": {
            "score": score,
            "parameters": card.parameters,
            "recipe_sha256": card.recipe_sha256,
            "weights_fingerprint": card.weights_fingerprint,
        },
        "runs": [
            {
                "seed": summary["seed"],
                "score": summary["student"]["score"],
                "best_score": summary["student"]["best_score"],
                "parameters": summary["student"]["parameters"],
                "share_of_teacher": _goodness(metric, summary["student"]["score"])
                / _goodness(metric, score),
                "seconds": summary["seconds"],
                "steps": summary["steps"],
                "teacher_queries": summary["teacher_queries"],
                "peak_memory_mib": summary["peak_memory_mib"],
                "diagnosis": [finding["code"] for finding in summary["diagnosis"]],
            }
            for summary in summaries
        ],
        "metric": summaries[0]["metric"],
    }


def _run(
    entry: dict[str, Any], overrides: list[str], seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One student; what is finished is read."""
    from vestige.errors import Interrupted
    from vestige.recipes.loading import load_recipe
    from vestige.recipes.run import run_recipe
    from vestige.training.checkpoint import CheckpointStore

    out = options.work / f"seed{seed}"
    done = out / "summary.json"
    if done.is_file():
        summary: dict[str, Any] = json.loads(done.read_text(encoding="utf8"))
        if summary["complete"]:
            return summary
    # The run's own clock counts earlier slices, too.
    saved = CheckpointStore(out / "checkpoints").load()
    spent = 0.0 if saved is None else float(saved["seconds"]) / 60
    del saved
    recipe = load_recipe(
        entry["recipe"],
        preset=entry.get("preset"),
        overrides=[*_replacing(overrides), f"trainer.minutes={spent + _left(options)}"],
        seed=seed,
    )
    resume = out.is_dir() and any(out.iterdir())
    summary = run_recipe(recipe, out, resume=resume, command=_command(), report=False)
    _say(f"seed {seed}: {summary['steps']} steps, score {summary['student']['score']}")
    if not summary["complete"]:
        raise Interrupted(f"seed {seed} stopped after {summary['steps']} steps")
    return summary


def _replacing(overrides: list[str]) -> list[str]:
    """Mappings take the place of the recipe's, they are not merged into it."""
    dropped = [f"{key}='!drop'" for key in ("teacher", "input", "num_classes")]
    return [*dropped, *overrides]


def _floors(entry: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Every variant of a floor benchmark; each is kept, so that slices add up."""
    from vestige.bench.floor import load_floor, run_floor

    found = []
    for variant, overrides in entry["variants"].items():
        for case in load_floor(entry["floor"]).cases:
            folder = options.work / variant / case
            path = folder / f"{Path(entry['floor']).stem}.json"
            if not path.is_file():
                _left(options)
                chosen = [f"trainer.device={options.device}", *overrides]
                run_floor(entry["floor"], cases=[case], overrides=chosen, out=folder, echo=_say)
            (measured,) = json.loads(path.read_text(encoding="utf8"))["cases"]
            found.append({"variant": variant, **measured})
    return {"cases": found}


def _finish(entry: dict[str, Any], result: dict[str, Any], options: argparse.Namespace) -> int:
    """Write NAME.json; a result that is less than wanted is written, too."""
    from vestige.bench.claims import commit
    from vestige.training import runtime
    from vestige.training.files import write_json

    wanted = entry["wanted"]
    short = []
    if "teacher" in result and (
        _goodness(result["metric"], result["teacher"]["score"]) < wanted["teacher_score"]
    ):
        short.append(f"teacher {result['teacher']['score']:.4f}")
    for run in result.get("runs", []):
        if run["share_of_teacher"] < wanted["share_of_teacher"]:
            short.append(f"seed {run['seed']}: {run['share_of_teacher']:.1%} of the teacher")
    for case in result.get("cases", []):
        if case["ratio"] > wanted["ratio"]:
            short.append(f"{case['variant']}, {case['name']}: ratio {case['ratio']:.3f}")
    path = options.out / f"{options.name}.json"
    write_json(
        path,
        {
            "schema": 1,
            "name": options.name,
            "entry": entry,
            **result,
            "wanted": wanted,
            "reached": not short,
            "failures": "; ".join(short),
            "machine": runtime.machine(),
            "versions": runtime.versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "command": _command(),
        },
    )
    told = "as wanted" if not short else f"less than wanted ({'; '.join(short)})"
    return _tell(f"{path}: {told}", LESS_THAN_WANTED if short else DONE)


def _goodness(metric: str, score: float) -> float:
    """A score of which more is better: of the words that are wrong, those that are right."""
    return 1 - score if metric == "wer" else score


def _command() -> str:
    return shlex.join(["python", "benchmarks/gpu/run.py", *sys.argv[1:]])


def _tell(message: str, code: int) -> int:
    sys.stderr.write(f"gpu: {message}\n")
    return code


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
