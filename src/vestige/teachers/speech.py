"""Whisper networks of transformers, from a folder or the hub, behind [speech]."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import TeacherError
from vestige.models.speech import SpeechRecognizer
from vestige.models.whisper import whisper
from vestige.teachers.files import load_weights, read_weights
from vestige.teachers.opened import OpenedTeacher, check_asked

# Of our own, beside those of `from_pretrained`.
_OWN = ("language", "task", "max_tokens")
_UNNEEDED = ("transformers_version", "model_type", "architectures", "dtype", "torch_dtype")


def is_speech(config: Any) -> bool:
    """Whether a configuration of transformers is one of Whisper."""
    return getattr(config, "model_type", "") == "whisper"


def load_speech(
    name: str,
    where: str,
    config: Any,
    *,
    args: Mapping[str, Any],
    weights: Path | None = None,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
) -> OpenedTeacher:
    """A Whisper network with its front end, its tokenizer and its prompt.

    Args:
        name: for messages.
        where: folder, or a name on the hub.
        config: of it.
        args: "language" (a code such as "ar"; needed where it knows several), "task" ("transcribe"
            or "translate") and "max_tokens", the longest transcript with its prompt; others are of
            `from_pretrained`.
        weights: a file in place of the folder's own.
        input_spec: a shorter recording than its window.
        num_classes: must be the number of its tokens.

    Raises:
        TeacherError: a file is missing or does not fit, or the language is unknown.
    """
    local = Path(where).is_dir()
    given = {key: value for key, value in args.items() if key not in _OWN}
    hub: dict[str, Any] = {
        key: given[key] for key in ("revision", "token", "cache_dir") if key in given
    }
    front = _read(name, where, "preprocessor_config.json", hub, local=local, needed=True)
    generation = _read(name, where, "generation_config.json", hub, local=local, needed=False)
    rate, hop = int(front.get("sampling_rate", 16_000)), int(front.get("hop_length", 160))
    window = 2 * int(config.max_source_positions) * hop
    layers = {"encoder_layers": config.encoder_layers, "decoder_layers": config.decoder_layers}
    described = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key not in (*_UNNEEDED, *layers) and not key.startswith("_")
    }
    settings = {
        "sample_rate_hz": rate,
        "window_samples": window,
        # Where nothing is said there its defaults count, and these can change.
        "whisper": {
            **described,
            "vocab_size": config.vocab_size,
            "num_mel_bins": config.num_mel_bins,
            "max_source_positions": config.max_source_positions,
            "max_target_positions": config.max_target_positions,
            "d_model": config.d_model,
        },
        "hop_samples": hop,
        "n_fft": int(front.get("n_fft", 400)),
        "highest_hz": 8000.0,
        "prompt": _prompt(name, config, generation, args.get("language"), args.get("task")),
        "suppressed": _numbers(generation.get("suppress_tokens")),
        "suppressed_first": _numbers(generation.get("begin_suppress_tokens")),
        "max_tokens": args.get("max_tokens"),
    }
    own = InputSpec("audio", (window,), sample_rate_hz=rate)
    _check_spec(name, input_spec, own)
    check_asked(f"hf:{name}", input_spec, own, num_classes, int(config.vocab_size))
    module = whisper(own, int(config.vocab_size), **layers, published=settings)
    _fill(name, where, config, module, given, weights, local=local)
    module.set_vocabulary(_tokenizer(name, where, hub, local=local))
    return OpenedTeacher(
        module.eval(),
        input_spec or own,
        int(config.vocab_size),
        (),
        f"hf:{name}" if weights is None and not local else "",
        task="speech",
    )


def _prompt(
    name: str, config: Any, generation: Mapping[str, Any], language: object, task: object
) -> list[int]:
    """Start, language, task and the token against time stamps, as far as the network has them."""
    start = [int(config.decoder_start_token_id)]
    plain = generation.get("no_timestamps_token_id")
    last = [int(plain)] if plain is not None else []
    languages, tasks = generation.get("lang_to_id") or {}, generation.get("task_to_id") or {}
    language = language or generation.get("language")
    if not languages:
        if language or task:
            raise TeacherError(
                f"got language {language!r} and task {task!r} for teacher 'hf:{name}', which knows "
                "one language only; leave both out"
            )
        return [*start, *last]
    known = {str(key).strip("<|>"): int(value) for key, value in languages.items()}
    code = str(language or "").strip("<|>")
    if code not in known:
        listed = ", ".join(sorted(known)[:8])
        raise TeacherError(
            f"got language {language!r} for teacher 'hf:{name}', expected one of {listed}, ...; "
            "name the language of the recordings: args: {language: en}"
        )
    wanted = str(task or generation.get("task") or "transcribe")
    if wanted not in tasks:
        raise TeacherError(
            f"got task {wanted!r} for teacher 'hf:{name}', expected one of {', '.join(tasks)}"
        )
    return [*start, known[code], int(tasks[wanted]), *last]


def _numbers(found: object) -> list[int]:
    return [int(token) for token in found if token >= 0] if isinstance(found, Sequence) else []


def _check_spec(name: str, asked: InputSpec | None, own: InputSpec) -> None:
    if asked is None or asked.kind != "audio":
        return
    if asked.sample_rate_hz != own.sample_rate_hz or asked.shape[0] > own.shape[0]:
        raise TeacherError(
            f"got inputs of {asked.shape[0]} samples at {asked.sample_rate_hz} Hz for teacher "
            f"'hf:{name}', expected at most {own.shape[0]} at {own.sample_rate_hz} Hz; correct "
            "'input', recordings of other rates are resampled"
        )


def _read(
    name: str, where: str, file: str, hub: Mapping[str, Any], *, local: bool, needed: bool
) -> dict[str, Any]:
    """A JSON file of the folder; {} for one that need not be there and is not."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(
            where, file, local_files_only=local, _raise_exceptions_for_missing_entries=needed, **hub
        )
        found = {} if path is None else json.loads(Path(path).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"got teacher 'hf:{name}' without a readable {file} ({type(error).__name__}), expected "
            "config.json, model.safetensors, preprocessor_config.json and a tokenizer; save them "
            "there with save_pretrained"
        ) from error
    return found if isinstance(found, dict) else {}


def _tokenizer(name: str, where: str, hub: Mapping[str, Any], *, local: bool) -> str:
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(where, local_files_only=local, **hub)
        return str(made.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TeacherError(
            f"got teacher 'hf:{name}' without a tokenizer that can be read "
            f"({type(error).__name__}), expected tokenizer.json, or vocab.json and merges.txt; "
            "save it there with save_pretrained"
        ) from error


def _fill(
    name: str,
    where: str,
    config: Any,
    module: SpeechRecognizer,
    args: Mapping[str, Any],
    weights: Path | None,
    *,
    local: bool,
) -> None:
    """Weights of a folder, or of a file in the names of transformers or in ours."""
    if weights is not None:
        found = read_weights(weights)
        inner: nn.Module = module.network
        load_weights(inner if "vocabulary" not in found else module, found, where=str(weights))
        return
    from transformers import WhisperForConditionalGeneration

    try:
        made, info = WhisperForConditionalGeneration.from_pretrained(
            where,
            config=config,
            use_safetensors=True,
            local_files_only=local,
            output_loading_info=True,
            dtype="float32",
            **args,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise TeacherError(
            f"got teacher 'hf:{name}', which cannot be loaded ({type(error).__name__}: {first}), "
            "expected model.safetensors in a folder, in the local cache or on the hub"
        ) from error
    if info["missing_keys"]:
        raise TeacherError(
            f"got teacher 'hf:{name}' without weights for "
            f"{', '.join(sorted(info['missing_keys'])[:5])}, expected all of them"
        )
    module.network.load_state_dict(made.state_dict())
