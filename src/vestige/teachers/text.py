"""Text classifiers of transformers: a folder's network with its tokenizer inside."""

from pathlib import Path
from typing import Any, cast

from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import TeacherError
from vestige.models.text import TextClassifier

# Where nothing says how long its texts may be.
_TOKENS = 512
_BYTES_PER_TOKEN = 8


def is_text(config: Any) -> bool:
    """Whether transformers has a sequence classifier of this type of configuration."""
    from transformers import AutoModelForSequenceClassification

    return type(config) in AutoModelForSequenceClassification._model_mapping


def with_tokenizer(name: str, where: str, network: nn.Module) -> TextClassifier:
    """The network with the tokenizer that lies beside it.

    Args:
        name: of the teacher, for messages.
        where: folder, or name on the hub or in its cache.
        network: a sequence classifier.

    Raises:
        TeacherError: there is no tokenizer, it is none that can be kept, or it does not mark where
            a text begins and ends though it knows how to.
    """
    from transformers import AutoTokenizer

    try:
        reader = AutoTokenizer.from_pretrained(
            where, local_files_only=Path(where).is_dir(), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _no_tokenizer(
            name, f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        ) from error
    backend = getattr(reader, "backend_tokenizer", None)
    config = cast(Any, network).config
    # Where its files are missing, transformers makes one that knows its special tokens alone.
    if backend is None or set(backend.get_vocab()) <= set(reader.all_special_tokens):
        raise _no_tokenizer(name, "it knows no word, or is written in Python alone")
    if len(reader) > config.vocab_size:
        raise TeacherError(
            f"got teacher 'hf:{name}' with a tokenizer of {len(reader)} tokens, expected at most "
            f"{config.vocab_size} as the network has embeddings; save the tokenizer that it was "
            "trained with"
        )
    _check_specials(name, reader)
    made = TextClassifier(network, tokens=_tokens(reader, network))
    made.keep_tokenizer(
        backend.to_str(),
        cls=reader.cls_token_id,
        sep=reader.sep_token_id,
        pad=reader.pad_token_id,
        mask=reader.mask_token_id,
    )
    return made


def spec_of(classifier: TextClassifier) -> InputSpec:
    """Texts long enough to fill the network."""
    return InputSpec.text(_BYTES_PER_TOKEN * classifier.tokens)


def _tokens(reader: Any, network: nn.Module) -> int:
    """Most tokens of an input; a tokenizer that does not know says a huge number."""
    most = min(int(reader.model_max_length), _TOKENS)
    places = getattr(cast(Any, network).config, "max_position_embeddings", None)
    if isinstance(places, int) and places > 0:
        most = min(most, places - _places_taken(network))
    return most


def _places_taken(network: nn.Module) -> int:
    """RoBERTa and its kin count places from behind the number of the padding token."""
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _check_specials(name: str, reader: Any) -> None:
    """Networks with a token for the whole text read their answer there."""
    if reader.cls_token_id is None:
        return
    ids = reader("a b")["input_ids"]
    ends = reader.sep_token_id is None or ids[-1] == reader.sep_token_id
    if not ids or ids[0] != reader.cls_token_id or not ends:
        raise TeacherError(
            f"got teacher 'hf:{name}' whose tokenizer adds no {reader.cls_token} and "
            f"{reader.sep_token} to a text (it gives {reader.convert_ids_to_tokens(ids)}), "
            "expected both, since the network answers at the first; add a post-processor "
            "(tokenizers.processors.TemplateProcessing) and save it again"
        )


def _no_tokenizer(name: str, why: str) -> TeacherError:
    return TeacherError(
        f"got teacher 'hf:{name}' without a tokenizer ({why}), expected tokenizer.json beside "
        "config.json and model.safetensors; save it there with tokenizer.save_pretrained"
    )
