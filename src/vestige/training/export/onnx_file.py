"""ONNX files, checked against the network that they came from."""

import copy
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core.types import InputSpec, Prediction
from vestige.errors import ExportError, MissingExtraError
from vestige.training.files import write_bytes

OPSET = 18
# Not 1 and not the size at which it was traced, so that a fixed batch size would be noticed.
_TRACED, _COMPARED = 2, (1, 3)
# Of the largest logit: convolutions sum thousands of float32 products in another order.
_TOLERANCE = 1e-3
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)


@dataclass(frozen=True)
class Written:
    """How a file compares: see `vestige.training.export.student.Exported`."""

    largest_difference: float
    opset: int
    checked_by: str


class _Answers(nn.Module):
    """From inputs, or from images in [0, 1], to logits alone."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: InputSpec, *, normalize: bool) -> None:
        super().__init__()
        self.network = network
        self.normalize = normalize and bool(spec.mean)
        if self.normalize:
            columns = (-1, *(1,) * (len(spec.shape) - 1))
            self.register_buffer("mean", torch.tensor(spec.mean).view(columns))
            self.register_buffer("std", torch.tensor(spec.std).view(columns))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.normalize:
            inputs = (inputs - self.mean) / self.std
        return Prediction.of(self.network(inputs)).logits


def write_onnx(
    network: nn.Module,
    spec: InputSpec,
    path: Path,
    *,
    normalize: bool,
    num_classes: int,
    classes: tuple[str, ...] = (),
) -> Written:
    """Write `network` in eval mode as ONNX, opset 18, with a free batch size.

    The input is called "images" where the file normalises, else "inputs", and the output "logits".
    What an input is stands in the file's metadata.

    Args:
        network: stays as it is; a copy on the CPU is traced.
        spec: of one input.
        path: written whole or not at all.
        normalize: take images in [0, 1].
        num_classes: for the metadata.
        classes: likewise.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: it takes texts, torch cannot express it, or the file's logits differ from
            torch's by more than 0.001 of the largest.
    """
    if spec.kind == "text":
        raise ExportError(
            "got a network of texts for ONNX, whose files take numbers and hold no tokenizer, "
            "expected one of images or other numbers; nothing was written. Export --to hub, whose "
            "folder 'transformers' other programs make ONNX of"
        )
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise MissingExtraError(
            "ONNX files need onnx and onnxscript, which are not installed; "
            "pip install 'vestige[export]'"
        )
    answers = _Answers(copy.deepcopy(network).cpu(), spec, normalize=normalize).eval()
    rng = torch.Generator().manual_seed(0)

    def inputs(rows: int) -> Tensor:
        images = torch.rand((rows, *spec.shape), generator=rng)
        return images if answers.normalize else spec.normalize(images)

    name = "images" if normalize else "inputs"
    model = _trace(answers, inputs(_TRACED), name)
    notes = {
        "input": "images in [0, 1]" if normalize else "normalised images: (image - mean) / std",
        "shape": str(list(spec.shape)),
        "mean": str(list(spec.mean)),
        "std": str(list(spec.std)),
        "normalisation": "inside" if answers.normalize else "outside" if spec.mean else "none",
        "num_classes": str(num_classes),
        "classes": "\n".join(classes),
    }
    if spec.kind != "image":
        notes["input"] = spec.kind
    for key, value in notes.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    difference, largest, checked_by = 0.0, 1.0, ""
    for rows in _COMPARED:
        example = inputs(rows)
        with torch.no_grad():
            expected = answers(example)
        found, checked_by = _run(model, name, example)
        if found.shape != expected.shape:
            raise ExportError(
                f"the ONNX file answers {rows} inputs with shape {tuple(found.shape)}, expected "
                f"{tuple(expected.shape)} as torch; make the forward take any batch size"
            )
        gap = float((found - expected).abs().max())
        difference = gap if math.isnan(gap) else max(difference, gap)
        largest = max(largest, float(expected.abs().max()))
    if not difference <= _TOLERANCE * largest:
        raise ExportError(
            f"the ONNX file's logits differ from torch's by up to {difference:.3g}, expected at "
            f"most {_TOLERANCE * largest:.3g}; nothing was written. A forward that draws or that "
            "branches on values cannot be exported: make it a function of its input"
        )
    write_bytes(path, model.SerializeToString())
    return Written(difference, OPSET, checked_by)


def _trace(network: nn.Module, example: Tensor, name: str) -> Any:
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[name],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},),
            )
    except _FAILURES as error:
        told = str(error).strip().splitlines()
        raise ExportError(
            f"torch cannot express {type(network.get_submodule('network')).__name__} as ONNX "
            f"({type(error).__name__}: {told[0] if told else ''}), expected a forward of tensor "
            "operations without branches on values; export to safetensors, or change the forward"
        ) from error
    if program is None:
        raise ExportError("torch returned no ONNX program, expected one; update torch")
    return program.model_proto


def _run(model: Any, name: str, example: Tensor) -> tuple[Tensor, str]:
    """The file's answers, by onnxruntime where it is installed, else by onnx itself."""
    given = {name: example.numpy()}
    if find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return torch.from_numpy(session.run(None, given)[0]), "onnxruntime"
    from onnx.reference import ReferenceEvaluator

    return torch.from_numpy(ReferenceEvaluator(model).run(None, given)[0]), "onnx.reference"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
