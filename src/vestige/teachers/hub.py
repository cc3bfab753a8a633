"""Classifiers of transformers, from a folder or the Hugging Face hub, behind [text]."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import TeacherError
from vestige.models.huggingface import need_transformers, without_bars
from vestige.teachers.files import load_weights, read_weights
from vestige.teachers.opened import OpenedTeacher, check_args, check_asked
from vestige.teachers.speech import is_speech, load_speech
from vestige.teachers.text import is_text, spec_of, with_tokenizer

_REFUSED = ("trust_remote_code", "use_safetensors", "weights_only", "local_files_only")
_PROCESSOR = "preprocessor_config.json"


def load_hub(
    name: str,
    *,
    args: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
) -> OpenedTeacher:
    """A classifier or a speech recogniser in eval mode; weights are read as safetensors only.

    Args:
        name: "ORG/NAME" on the hub or in its local cache, or a folder with config.json.
        args: of `from_pretrained`, for example `revision`; of Whisper networks see `load_speech`.
        weights: a file for `read_weights` in place of the folder's own.
        input_spec: in place of what the image processor's configuration says, or of the length of
            texts; channels must be the model's.
        num_classes: must be the model's.

    Raises:
        MissingExtraError: transformers is not installed.
        TeacherError: no such model, no network, no classifier, weights that are no safetensors or
            do not fit, another number of channels or classes, texts without a tokenizer.
    """
    need_transformers("an 'hf:' teacher")
    where = _where(name)
    given = dict(args or {})
    check_args(f"hf:{name}", list(given), _REFUSED)
    config, processor = _configs(name, where, given)
    if is_speech(config):
        return load_speech(
            name,
            where,
            config,
            args=given,
            weights=weights,
            input_spec=input_spec,
            num_classes=num_classes,
        )
    if weights is None:
        module = _build(name, where, config, given)
    else:
        module = _filled(name, config, weights)
    own = input_spec_of(config.to_dict(), processor)
    if not _is_image(config):
        module = with_tokenizer(name, where, module)
        own = spec_of(module)
    count = int(config.num_labels)
    check_asked(f"hf:{name}", input_spec, own, num_classes, count)
    labels = {int(key): str(value) for key, value in (config.id2label or {}).items()}
    named = len(labels) == count and not all(v.startswith("LABEL_") for v in labels.values())
    return OpenedTeacher(
        module.eval(),
        input_spec or own,
        count,
        tuple(labels[index] for index in range(count)) if named else (),
        f"hf:{name}" if weights is None and not Path(where).is_dir() else "",
        task="" if _is_image(config) else "text",
    )


def input_spec_of(config: Mapping[str, Any], processor: Mapping[str, Any]) -> InputSpec | None:
    """What a model's and its image processor's configurations say of its inputs.

    Args:
        config: of the model; `num_channels` and `image_size` are read.
        processor: of the image processor. Its rescaling is folded into mean and std, which here
            are of values in [0, 1].

    Returns:
        None where no size is given.
    """
    size = processor.get("crop_size") if processor.get("do_center_crop") else None
    sides = _sides(size or processor.get("size") or config.get("image_size"))
    if sides is None:
        return None
    factor = float(processor.get("rescale_factor", 1 / 255)) * 255
    if processor.get("do_rescale") is False:
        factor = 255.0
    mean, std = processor.get("image_mean") or [], processor.get("image_std") or []
    normalized = bool(processor.get("do_normalize", True) and mean and std)
    channels = int(config.get("num_channels") or (len(mean) if normalized else 3))
    if not normalized:
        mean, std = [0.0] * channels, [1.0] * channels
        if factor == 1:
            return InputSpec.image(channels, *sides)
    return InputSpec.image(
        channels,
        *sides,
        mean=tuple(float(value) / factor for value in mean),
        std=tuple(float(value) / factor for value in std),
    )


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        if isinstance(edge, int):
            return edge, edge
        if {"height", "width"} <= set(size):
            return int(size["height"]), int(size["width"])
    return None


def _where(name: str) -> str:
    """A folder as an absolute path, so that it is never taken for a name on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or name.startswith(("~", ".")) or name.count("/") > 1:
        raise TeacherError(
            f"got teacher 'hf:{name}', but there is no such folder; expected a folder with "
            "config.json and model.safetensors, or ORG/NAME"
        )
    return name


def _configs(name: str, where: str, args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig
    from transformers.image_processing_base import ImageProcessingMixin

    local = Path(where).is_dir()
    given = {key: args[key] for key in ("revision", "token", "cache_dir") if key in args}
    try:
        config = AutoConfig.from_pretrained(
            where, local_files_only=local, trust_remote_code=False, **given
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unreachable(name, error) from error
    if local and not (Path(where) / _PROCESSOR).is_file():
        return config, {}
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(
            where, local_files_only=local, **given
        )
    except (OSError, ValueError) as error:
        raise _unreachable(name, error) from error
    return config, dict(processor)


def _is_image(config: Any) -> bool:
    from transformers import AutoModelForImageClassification

    return type(config) in AutoModelForImageClassification._model_mapping


def _class_for(name: str, config: Any) -> Any:
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    if _is_image(config):
        return AutoModelForImageClassification._model_mapping[type(config)]
    if is_text(config):
        return AutoModelForSequenceClassification._model_mapping[type(config)]
    raise TeacherError(
        f"got teacher 'hf:{name}' of type '{config.model_type}', which transformers has no "
        "classifier of images or texts for; expected such a model, others are loaded by a "
        "'factory' of your own"
    )


def _filled(name: str, config: Any, path: Path) -> nn.Module:
    """The network of `config` with weights from a file, in its own names or in those on the hub."""
    known = _class_for(name, config)
    weights = read_weights(path)
    module: nn.Module = known(config)
    if set(weights) != set(module.state_dict()):
        # Files on the hub keep the names of older versions, which only this translates.
        with without_bars():
            converted, info = known.from_pretrained(
                None, config=config, state_dict=dict(weights), output_loading_info=True
            )
        if not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            made: nn.Module = converted
            return made
    load_weights(module, weights, where=str(path))
    return module


def _build(name: str, where: str, config: Any, args: Mapping[str, Any]) -> nn.Module:
    made: nn.Module
    try:
        with without_bars():
            made, info = _class_for(name, config).from_pretrained(
                where,
                config=config,
                use_safetensors=True,
                local_files_only=Path(where).is_dir(),
                output_loading_info=True,
                **args,
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise _unreachable(name, error) from error
    if info["missing_keys"]:
        # transformers draws them at random and only warns: a headless backbone would teach noise.
        names = sorted(info["missing_keys"])
        raise TeacherError(
            f"got teacher 'hf:{name}' without weights for {', '.join(names[:5])}, expected all of "
            "them; take a model that was trained to classify"
        )
    return made


def _unreachable(name: str, error: Exception) -> TeacherError:
    first = str(error).strip().splitlines()
    return TeacherError(
        f"got teacher 'hf:{name}', which cannot be loaded ({type(error).__name__}: "
        f"{first[0] if first else ''}), expected config.json and model.safetensors in a folder, in "
        "the local cache or on the hub; where there is no network, download the folder elsewhere "
        "and name it as hf:FOLDER"
    )
