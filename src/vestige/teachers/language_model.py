"""Teachers that write texts: a language model in a folder, an endpoint, or any callable."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.core.writing import WritesTexts
from vestige.errors import TeacherError
from vestige.models.huggingface import need_transformers
from vestige.models.language_models import LanguageModel, Tokens
from vestige.models.prompts import Prompts, load_prompts
from vestige.teachers.endpoint import open_endpoint
from vestige.teachers.opened import OpenedTeacher, call_any
from vestige.teachers.writers import BlackBoxWriter, writer_of_callable

KINDS = ("lm", "endpoint")
TASK = "text"
# Where nothing is said of a text's length: longer ones are cut.
_BYTES = 1024
# How a run asks, and not whom: they may be changed when it is resumed.
DRIVING = (
    *("token_budget", "money_budget", "price_in", "price_out", "timeout_s", "retries"),
    *("backoff_s", "most_wait_s", "most_bytes", "key_variable", "environment_proxy"),
)


class FolderLanguageModel(LanguageModel):
    """A causal language model of transformers with its own tokenizer.

    Args:
        network: `...ForCausalLM`.
        tokenizer: of transformers.
        prompts: of the task.
        context: tokens that it may see; more than it can see are not used.
        calibrated: see `LanguageModel`.
        rows: likewise.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        prompts: Prompts,
        *,
        context: int = 512,
        calibrated: bool = False,
        rows: int = 32,
    ) -> None:
        limit = getattr(network.config, "max_position_embeddings", None) or context
        super().__init__(
            network, prompts, context=min(context, limit), calibrated=calibrated, rows=rows
        )
        self._tokens = _FolderTokens(tokenizer)

    def tokens(self) -> Tokens:
        """The tokenizer."""
        return self._tokens


class _FolderTokens:
    """A tokenizer of transformers as language models here use it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        first = tokenizer("a").input_ids[:1]
        begin = tokenizer.bos_token_id
        self._begin = [begin] if begin is not None and first == [begin] else []

    @property
    def begin(self) -> list[int]:
        return self._begin

    def encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False).input_ids
        return found

    def decode(self, tokens: list[list[int]]) -> list[str]:
        found: list[str] = self._tokenizer.batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return found

    def marks(self, mark: str, size: int) -> Tensor:
        found = torch.zeros(size, dtype=torch.bool)
        count = min(size, len(self._tokenizer))
        names = self._tokenizer.convert_ids_to_tokens(list(range(count)))
        found[:count] = torch.tensor([mark in (name or "") for name in names])
        end = self._tokenizer.eos_token_id
        if end is not None:
            found[end] = True
        return found


def open_writer(
    spec: Mapping[str, Any], *, input_spec: InputSpec | None, num_classes: int | None
) -> OpenedTeacher:
    """The teacher of a mapping with "lm", "endpoint", or "factory" and "prompts".

    Args:
        spec: "prompts" names a shipped task or a file; "args" are those of `FolderLanguageModel`,
            `open_endpoint`, or of the factory, which returns a callable from prompts to texts, or
            something with `generate`. "model" is the name that an endpoint knows.
        input_spec: of the texts that are judged; its length in bytes.
        num_classes: must be the number of labels.

    Raises:
        TeacherError: it cannot be opened, or the number of labels is another.
        MissingExtraError: a package is not installed.
        RecipeError: the prompts are wrong.
    """
    if not isinstance(spec.get("prompts"), str | Path):
        raise TeacherError(
            "got a teacher that writes texts without prompts, expected 'prompts': the name of a "
            "task or a .yaml file; add it"
        )
    if spec.get("weights") is not None:
        raise TeacherError(
            "got weights for a teacher that writes texts, expected none: a language model brings "
            "its own, in its folder; leave them out"
        )
    prompts, args = load_prompts(spec["prompts"]), dict(spec.get("args") or {})
    if input_spec is not None and input_spec.kind != "text":
        raise TeacherError(
            f"got {input_spec.kind} inputs for a teacher that writes texts, expected kind 'text'"
        )
    made: Any
    if "lm" in spec:
        made = _folder(Path(str(spec["lm"])).expanduser(), prompts, args)
    elif "endpoint" in spec:
        given = {**args, "model": str(spec.get("model") or "")}
        _check_arguments(open_endpoint, given, str(spec["endpoint"]))
        made = open_endpoint(str(spec["endpoint"]), prompts, **given)
    else:
        name = str(spec["factory"])
        built = call_any(name, args)
        made = built
        if not isinstance(built, WritesTexts):
            if not callable(built):
                raise TeacherError(
                    f"got {type(built).__name__} from factory '{name}', expected a callable from a "
                    "list of prompts to a list of texts; return that"
                )
            made = writer_of_callable(built, prompts, name=name)
    names = made.prompts.names
    count = max(2, len(names))
    if num_classes not in (None, count):
        raise TeacherError(
            f"got num_classes {num_classes} for the prompts '{prompts.name}', expected {count}: "
            f"{', '.join(names)}; leave it out or take other prompts"
        )
    spec_of_texts = input_spec or InputSpec.text(_BYTES)
    if isinstance(made, torch.nn.Module):
        made.eval()
    return OpenedTeacher(made, spec_of_texts, count, names if len(names) > 1 else (), task=TASK)


def _folder(folder: Path, prompts: Prompts, args: Mapping[str, Any]) -> LanguageModel:
    need_transformers("an 'lm' teacher")
    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"got the language model {folder}, expected a folder with config.json, "
            "model.safetensors and its tokenizer, as save_pretrained writes it; name that"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_arguments(FolderLanguageModel, args, str(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        network, info = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise TeacherError(
            f"got the language model {folder}, which cannot be loaded ({type(error).__name__}: "
            f"{first}), expected a causal language model with its tokenizer and weights as "
            "safetensors; save it again with save_pretrained"
        ) from error
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise TeacherError(
            f"got the language model {folder} without weights for {names}, expected all of them; "
            "take a model that was trained to continue texts"
        )
    return FolderLanguageModel(network, tokenizer, prompts, **args)


def driven_apart(teacher: Any) -> Any:
    """A teacher as a recipe names it, without what only says how it is asked."""
    if not isinstance(teacher, Mapping) or "prompts" not in teacher or "endpoint" not in teacher:
        return teacher
    args = {key: one for key, one in (teacher.get("args") or {}).items() if key not in DRIVING}
    return {**teacher, "args": args}


def _check_arguments(target: Any, args: Mapping[str, Any], name: str) -> None:
    taken = inspect.signature(target).parameters
    valid = [one for one in taken if taken[one].kind is inspect.Parameter.KEYWORD_ONLY]
    valid = [one for one in valid if one != "sleep"]
    if wrong := sorted(set(args) - set(valid)):
        raise TeacherError(
            f"got the arguments {', '.join(wrong)} for teacher '{name}', expected some of "
            f"{', '.join(valid)}; correct them"
        )


__all__ = ["BlackBoxWriter", "FolderLanguageModel", "driven_apart", "open_writer"]
