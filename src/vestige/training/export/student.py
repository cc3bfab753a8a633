"""Students in other forms: safetensors, ONNX, a folder for the Hugging Face hub."""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from vestige.core.protocols import SavesTransformers
from vestige.core.types import InputSpec
from vestige.errors import RecipeError, TeacherError
from vestige.teachers.files import load_weights, read_weights
from vestige.teachers.loading import load_teacher
from vestige.teachers.opened import read_input
from vestige.training.export.model_card import write_model_card
from vestige.training.export.onnx_file import write_onnx
from vestige.training.files import tensors_to_bytes, write_bytes, write_json
from vestige.training.report.run_folder import read_run

Form = Literal["safetensors", "onnx", "hub"]
CARD = "student.json"
TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: of the file, or of the folder of "hub".
        largest_difference: between logits of the ONNX file and of torch, absolute, over batches of
            1 and 3 random inputs; None for other forms.
        opset: of the ONNX file, None for other forms.
        checked_by: what computed the ONNX file's answers, "" for other forms.
    """

    path: Path
    largest_difference: float | None = None
    opset: int | None = None
    checked_by: str = ""


def export(
    what: str | Path | nn.Module,
    *,
    to: Form,
    out: str | Path | None = None,
    spec: InputSpec | None = None,
    num_classes: int | None = None,
    network: nn.Module | None = None,
    factory: str | None = None,
    normalize: bool = False,
) -> Exported:
    """Write a student for other programs; an existing file is replaced, nothing is uploaded.

    Args:
        what: a run folder, or a network such as `DistillReport.student`.
        to: "safetensors" writes student.safetensors and its card student.json; "onnx" writes
            student.onnx with a free batch size and compares it with torch; "hub" writes a folder
            with weights, card, samples and a model card, and needs a run folder; of texts it holds
            a folder "transformers", too, which that package opens by itself.
        out: folder to write into; a run folder's own "export" (or "hub") unless given. Needed for a
            network.
        spec: of one input; needed for a network, a run folder knows it.
        num_classes: K; likewise.
        network: for ONNX of a run whose student was handed in from Python: any network of its
            architecture. A copy of it gets the run's weights.
        factory: the same as "package.module:callable", called without arguments.
        normalize: for ONNX: take images in [0, 1] and normalise inside, by the spec's mean and std.

    Raises:
        RecipeError: the folder holds no student, or an argument is missing or has no effect.
        TeacherError: the student cannot be built from its card, or its weights do not fit.
        MissingExtraError: ONNX is asked for and its packages are not installed.
        ExportError: ONNX of texts, torch cannot express the network as ONNX, or the file computes
            something else.
    """
    if to not in get_args(Form):
        raise RecipeError(f"got to={to!r}, expected one of {', '.join(get_args(Form))}")
    if normalize and to != "onnx":
        raise RecipeError("normalize: only ONNX files can hold the normalisation; leave it out")
    if (network is not None or factory is not None) and (
        to != "onnx" or isinstance(what, nn.Module)
    ):
        raise RecipeError("network and factory: only ONNX of a run folder needs them; leave out")
    if isinstance(what, nn.Module):
        return _export_network(what, to, out, spec, num_classes, normalize=normalize)
    if spec is not None or num_classes is not None:
        raise RecipeError("spec and num_classes: a run folder knows its own; leave them out")
    run = Path(what).expanduser()
    card, weights = read_student(run)
    if to == "hub":
        folder = Path(out) if out is not None else run / "hub"
        _check_apart(folder, run)
        _write(folder, weights, card, "model.safetensors")
        write_model_card(folder, read_run(run), card, weights, transformers=_hand_on(folder, card))
        return Exported(folder)
    folder = Path(out) if out is not None else run / "export"
    _check_apart(folder, run)
    if to == "safetensors":
        return Exported(_write(folder, weights, card, "student.safetensors"))
    built = _built(run, card, weights, network, factory)
    return _onnx(built, folder, card, normalize=normalize)


def read_student(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and the weights in a run folder.

    Raises:
        RecipeError: there is no student in it.
        TeacherError: the weights are missing or damaged.
    """
    try:
        card = json.loads((run / CARD).read_text(encoding="utf8"))
        path = run / str(card["weights"])
        read_input(card["input"])
        int(card["num_classes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"got {run}, which holds no {CARD} that can be read ({error!r}), expected the folder "
            "of a finished run that trained a student; finish it with --resume"
        ) from error
    return dict(card), read_weights(path)


def _export_network(
    network: nn.Module,
    to: Form,
    out: str | Path | None,
    spec: InputSpec | None,
    num_classes: int | None,
    *,
    normalize: bool,
) -> Exported:
    if to == "hub":
        raise RecipeError(
            "to='hub' describes a run, expected its folder and got a network; call "
            "distill(..., out=FOLDER) and export FOLDER"
        )
    if out is None or spec is None or num_classes is None:
        raise RecipeError("out, spec and num_classes: a network does not know them; hand them in")
    sizes = dict(zip(("channels", "height", "width"), spec.shape, strict=False))
    shape = sizes if spec.kind == "image" else {"kind": spec.kind, "shape": list(spec.shape)}
    card = {
        "class": f"{type(network).__module__}:{type(network).__qualname__}",
        "input": {**shape, "mean": list(spec.mean), "std": list(spec.std)},
        "num_classes": num_classes,
    }
    if to == "safetensors":
        return Exported(_write(Path(out), network.state_dict(), card, "student.safetensors"))
    return _onnx(network, Path(out), card, normalize=normalize)


def _onnx(
    network: nn.Module, folder: Path, card: Mapping[str, Any], *, normalize: bool
) -> Exported:
    path = folder / "student.onnx"
    written = write_onnx(
        network,
        read_input(card["input"]),
        path,
        normalize=normalize,
        num_classes=int(card["num_classes"]),
        classes=tuple(map(str, card.get("classes") or ())),
    )
    return Exported(path, written.largest_difference, written.opset, written.checked_by)


def _write(folder: Path, weights: Mapping[str, Tensor], card: Mapping[str, Any], name: str) -> Path:
    """Weights, then the card, so that it never speaks of nothing."""
    write_bytes(folder / name, tensors_to_bytes(weights, {"format": "pt"}))
    write_json(folder / CARD, {"schema": 1, **card, "weights": name})
    return folder / name


def _hand_on(folder: Path, card: Mapping[str, Any]) -> str:
    """Write the student as transformers has it, where it knows how; the folder's name, or ""."""
    # Those of images are plain networks, which other programs build from the card.
    if card["input"].get("kind", "image") == "image" or not {"factory", "model"} & set(card):
        return ""
    network = load_teacher(folder / CARD)
    if not isinstance(network, SavesTransformers):
        return ""
    whole, part = folder / TRANSFORMERS, folder / f".{TRANSFORMERS}.part"
    shutil.rmtree(part, ignore_errors=True)
    network.save_transformers(part, tuple(map(str, card.get("classes") or ())))
    shutil.rmtree(whole, ignore_errors=True)
    part.rename(whole)
    return TRANSFORMERS


def _built(
    run: Path,
    card: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    network: nn.Module | None,
    factory: str | None,
) -> nn.Module:
    if network is not None and factory is not None:
        raise RecipeError("network and factory: got both, expected one of them; leave one out")
    if network is None and factory is None and not {"factory", "model", "smp"} & set(card):
        raise TeacherError(
            f"got the run {run}, whose student ({card.get('class', 'a network')}) was handed in "
            "from Python, so its card cannot build it; name what makes such a network "
            "(--factory package.module:callable), or in Python call vestige.export(report.student, "
            "to='onnx', spec=..., num_classes=..., out=...)"
        )
    if network is None and factory is None:
        return load_teacher(run / CARD)
    made = copy.deepcopy(network) if network is not None else load_teacher({"factory": factory})
    load_weights(made, weights, where=str(run))
    return made


def _check_apart(folder: Path, run: Path) -> None:
    if folder.resolve() == run.resolve():
        raise RecipeError(f"--out: {folder} is the run folder itself; name another folder")
