"""How a student in a folder for the hub is loaded and asked, as code to copy."""

from collections.abc import Mapping
from typing import Any

_TRANSFORMERS = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

reader = AutoTokenizer.from_pretrained("{folder}")
network = AutoModelForSequenceClassification.from_pretrained("{folder}").eval()
logits = network(**reader(["some text"], return_tensors="pt")).logits"""


def with_transformers(folder: str) -> str:
    """How transformers opens a folder of texts' student by itself."""
    return _TRANSFORMERS.format(folder=folder)


def load_of(card: Mapping[str, Any]) -> str:
    """What `vestige.load_teacher` is called with."""
    if {"factory", "model", "smp"} & set(card):
        return '"student.json"'
    return '{"factory": "your_package.module:make_network", "weights": "model.safetensors"}'


def in_torch(card: Mapping[str, Any]) -> str:
    """How the network is built and filled by hand."""
    args = ", ".join(f"{key}={value!r}" for key, value in (card.get("args") or {}).items())
    lines = ["from safetensors.torch import load_file"]
    if card.get("factory"):
        module, _, attribute = str(card["factory"]).partition(":")
        lines += [f"from {module} import {attribute}", "", f"network = {attribute}({args})"]
    elif card.get("model"):
        args = f", {args}" if args else ""
        lines += [
            "from vestige import InputSpec",
            "from vestige.models.factory import build_model  # plain torch.nn modules",
            "",
            f"spec = {_spec(card['input'])}",
            f"network = build_model({card['model']!r}, spec, {card['num_classes']}{args})",
        ]
    elif card.get("smp"):
        architecture, _, encoder = str(card["smp"]).partition("/")
        given: dict[str, Any] = {"encoder_name": encoder} if encoder else {}
        given |= {"encoder_weights": None, "classes": card["num_classes"]}
        given |= {"in_channels": card["input"]["channels"], **(card.get("args") or {})}
        args = "".join(f", {key}={value!r}" for key, value in given.items())
        lines += [
            "import segmentation_models_pytorch as smp",
            "",
            f"network = smp.create_model({architecture!r}{args})",
        ]
    else:
        made = str(card.get("class", "your_package:Network")).rpartition(":")[2]
        lines += ["", f"network = {made}(...)  # the class that was handed in"]
    lines += ['network.load_state_dict(load_file("model.safetensors"))', "network.eval()"]
    return "\n".join(lines)


def inputs_of(card: Mapping[str, Any]) -> str:
    """What it takes, in a sentence."""
    given = card["input"]
    shape = given.get("shape") or [given.get(key) for key in ("channels", "height", "width")]
    size = ", ".join(map(str, shape))
    if given.get("kind") == "text":
        return (
            f"To vestige inputs are texts as rows (B, {size}) of UTF-8 bytes, see "
            "`vestige.core.texts.to_bytes`; the tokenizer is inside."
        )
    if given.get("kind") not in (None, "image"):
        return f"Inputs are (B, {size}), of the kind '{given['kind']}'."
    if not given.get("mean"):
        return f"Inputs are (B, {size}), for images with values in [0, 1]."
    return (
        f"Inputs are (B, {size}): images in [0, 1], minus {given['mean']}, divided by "
        f"{given['std']} per channel."
    )


def _spec(given: Mapping[str, Any]) -> str:
    kind = given.get("kind", "image")
    if kind == "image" and "channels" in given:
        return f"InputSpec.image({given['channels']}, {given['height']}, {given['width']})"
    rate = given.get("sample_rate_hz")
    more = f", sample_rate_hz={rate}" if rate else ""
    return f"InputSpec({kind!r}, {tuple(given['shape'])}{more})"
