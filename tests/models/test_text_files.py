"""A folder that transformers opens by itself answers as the network did."""

from pathlib import Path

import pytest
import torch
from torch import nn

from vestige.core.texts import PAIR, as_pair, to_bytes
from vestige.errors import ContractError
from vestige.models.text import TextClassifier, bert, transformer
from vestige.teachers.loading import open_teacher

transformers = pytest.importorskip("transformers", reason="needs the extra [text]")

TEXTS = ["the cat sat", "a dog", f"is it a dog?{PAIR}It was a cat 7", "cat " * 40]
ROWS = to_bytes(TEXTS, 256)


def drawn(network: TextClassifier) -> TextClassifier:
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.3)
    return network.eval()


def made(kind: str) -> TextClassifier:
    if kind == "bert":
        network = bert(3, layers=2, width=8, vocabulary=80, tokens=16)
    else:
        sizes = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 8, "vocab_size": 80}
        config = {"model_type": "distilbert", "max_position_embeddings": 16, **sizes}
        network = transformer(3, config=config, tokens=16)
    network.learn_vocabulary(ROWS)
    return drawn(network)


def logits_of(folder: Path) -> tuple[torch.Tensor, nn.Module]:
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pairs = [as_pair(text) for text in TEXTS]
    rows = [
        reader(*(one for one in pair if one is not None), truncation=True, return_tensors="pt")
        for pair in pairs
    ]
    return torch.cat([network(**row).logits for row in rows]), network


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("width", [None, 4])
def test_the_folder_answers_as_the_network(kind: str, width: int | None, tmp_path: Path) -> None:
    network = drawn(made(kind).with_layers(layers=1, width=width))
    expected = network(ROWS)
    network.save_transformers(tmp_path, ["no", "maybe", "yes"])
    found, opened = logits_of(tmp_path)
    # Merging the projection into the embeddings adds the same products in another order.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert opened.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert opened.config.label2id["yes"] == 2
    assert opened.config.hidden_size == (width or 8)
    assert torch.equal(network(ROWS), expected)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path)
    special = [reader.cls_token_id, reader.sep_token_id, reader.pad_token_id, reader.mask_token_id]
    assert special == network.special_ids.tolist()
    assert (reader.unk_token, reader.model_max_length) == ("[UNK]", 16)


def test_the_folder_can_teach_again(tmp_path: Path) -> None:
    network = made("bert")
    network.save_transformers(tmp_path, ["no", "maybe", "yes"])
    opened = open_teacher(f"hf:{tmp_path}")
    assert opened.classes == ("no", "maybe", "yes")
    assert torch.equal(opened.module(ROWS), network(ROWS))


def test_the_pipeline_of_transformers_names_the_classes(tmp_path: Path) -> None:
    network = made("bert")
    network.save_transformers(tmp_path, ["no", "maybe", "yes"])
    told = transformers.pipeline("text-classification", model=str(tmp_path))("a dog")
    names = ["no", "maybe", "yes"]
    assert told[0]["label"] == names[int(network(ROWS)[1].argmax())]


def test_without_a_tokenizer_nothing_is_written(tmp_path: Path) -> None:
    network = bert(2, layers=1, width=4, vocabulary=20, tokens=8)
    with pytest.raises(ContractError, match="learn_vocabulary"):
        network.save_transformers(tmp_path / "out")
    assert not (tmp_path / "out").exists()
