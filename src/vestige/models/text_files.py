"""Classifiers of texts as folders that transformers opens by itself."""

import inspect
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vestige.models.huggingface import need_transformers, without_bars
from vestige.models.word_pieces import SPECIAL


def save_transformers(classifier: Any, folder: Path, classes: Sequence[str] = ()) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    A network that reads the embeddings of a wider one gets embeddings of its own, which are those
    behind the projection: its answers stay the same, to rounding.

    Args:
        classifier: a `models.text.TextClassifier` with a tokenizer; stays as it is.
        folder: made where it is missing; files of these names are replaced.
        classes: names of the K classes, or () to keep what its configuration says.

    Raises:
        ContractError: it has no tokenizer yet.
        MissingExtraError: transformers is not installed.
    """
    need_transformers("a folder for transformers")
    described = classifier.described_tokenizer()
    network = _merged(classifier)
    if classes:
        network.config.id2label = dict(enumerate(classes))
        network.config.label2id = {name: number for number, name in enumerate(classes)}
    with without_bars():
        network.save_pretrained(folder)
    _reader_of(classifier, described).save_pretrained(folder)


def _merged(classifier: Any) -> Any:
    """The network of transformers alone, with embeddings of words of its own width."""
    network = deepcopy(classifier.network).cpu()
    if classifier.projection is not None:
        with torch.no_grad():
            words = classifier.wide.weight @ classifier.projection.weight.T
            own: nn.Embedding = network.get_input_embeddings()
            own.weight.copy_(words)
    return network


def _reader_of(classifier: Any, described: str) -> Any:
    """The tokenizer as transformers has it: with what each special token is for."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    reader = Tokenizer.from_str(described)
    roles = {
        f"{role}_token": reader.id_to_token(number)
        for role, number in zip(SPECIAL, classifier.special_ids.tolist(), strict=True)
        if number >= 0
    }
    # Of tokenizers of word pieces, words and byte pairs; of others the number would be needed.
    unknown = json.loads(described)["model"].get("unk_token")
    if unknown:
        roles["unk_token"] = unknown
    taken = inspect.signature(classifier.network.forward).parameters
    return PreTrainedTokenizerFast(
        tokenizer_object=reader,
        model_max_length=classifier.tokens,
        model_input_names=[
            name for name in ("input_ids", "token_type_ids", "attention_mask") if name in taken
        ],
        **roles,
    )
