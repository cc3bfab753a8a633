"""Networks of texts: three ways in, one answer; their tokenizer; students made of them."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vestige.core.protocols import LearnsVocabulary, MakesStudents, SizedByState
from vestige.core.texts import PAIR, to_bytes
from vestige.core.types import InputSpec
from vestige.errors import ContractError, RecipeError, ShapeError
from vestige.models.factory import build_model
from vestige.models.text import SPECIAL, TextClassifier, bert, transformer
from vestige.teachers.loading import fingerprint

transformers = pytest.importorskip("transformers", reason="needs the extra [text]")

TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "Dogs and CATS 2024 sat on 7 mats, quietly",
    f"does the cat sit?{PAIR}the cat sat on the mat",
]
ROWS = to_bytes(TEXTS, 64)
TINY: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 16,
    },
    "distilbert": {
        "dim": 8,
        "n_layers": 4,
        "n_heads": 2,
        "hidden_dim": 12,
        "max_position_embeddings": 16,
    },
    "roberta": {
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        # Its places are counted from behind the number of the padding token.
        "max_position_embeddings": 17,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    },
}
KINDS = list(TINY)


def drawn(network: nn.Module) -> None:
    """Weights far from their small first values, so that differences show."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.5)


def made(kind: str = "bert", num_classes: int = 3) -> TextClassifier:
    config = {"model_type": kind, "vocab_size": 120, **TINY[kind]}
    network = transformer(num_classes, config=config, tokens=16)
    drawn(network)
    network.learn_vocabulary(ROWS)
    return network.eval()


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first: nn.Module, second: nn.Module) -> bool:
    return fingerprint(first) == fingerprint(second)


# Three ways in


@pytest.mark.parametrize("kind", KINDS)
def test_rows_tokens_embeddings_and_plain_transformers_give_one_answer(kind: str) -> None:
    network = made(kind)
    encoded = network.encode(ROWS)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert (mask == 0).any(), "texts of one length would not try the padding"
    told = network(ROWS)
    assert torch.equal(network(**encoded), told)
    assert torch.equal(network.network(**encoded).logits, told)
    rest = {name: one for name, one in encoded.items() if name != "input_ids"}
    words = network.embeddings(ids)
    torch.testing.assert_close(network(inputs_embeds=words, **rest), told, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_fills_up_and_the_other_texts_of_a_batch_do_not_matter(kind: str) -> None:
    network = made(kind)
    alone = torch.cat([network(ROWS[row : row + 1]) for row in range(len(ROWS))])
    torch.testing.assert_close(alone, network(ROWS), atol=1e-5, rtol=1e-4)


def test_the_second_of_a_pair_has_another_type() -> None:
    network = made()
    encoded = network.encode(ROWS)
    types, ids = encoded["token_type_ids"], encoded["input_ids"]
    assert types[:3].sum() == 0
    first_end = int((ids[3] == network.special_ids[SPECIAL.index("sep")]).nonzero()[0])
    inside = encoded["attention_mask"][3].bool()
    assert types[3, : first_end + 1].sum() == 0
    assert types[3, first_end + 1 :][inside[first_end + 1 :]].all()
    without = {name: one for name, one in encoded.items() if name != "token_type_ids"}
    differs = (network(**without) != network(**encoded)).any(1)
    assert differs.tolist() == [False, False, False, True]
    assert "token_type_ids" not in made("distilbert").encode(ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_embeddings_handed_in(kind: str) -> None:
    network = made(kind)
    encoded = network.encode(ROWS)
    words = network.embeddings(encoded["input_ids"]).detach().requires_grad_()
    network(inputs_embeds=words, attention_mask=encoded["attention_mask"]).square().sum().backward()
    assert words.grad is not None
    inside = encoded["attention_mask"].bool()
    assert (words.grad[inside].abs().sum(-1) > 0).all()
    assert words.grad[~inside].abs().max() == 0


def test_one_way_in_at_a_time() -> None:
    network = made()
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ShapeError, match="expected one of them"):
        network()
    with pytest.raises(ShapeError, match="expected one of them"):
        network(ROWS, input_ids=ids)


# The tokenizer


def test_a_text_begins_and_ends_with_its_tokens_and_long_ones_are_cut() -> None:
    network = made()
    cls, sep, pad, mask = network.special_ids.tolist()
    assert len({cls, sep, pad, mask}) == 4
    long = to_bytes(["cat " * 30, f"{'cat ' * 30}{PAIR}{'dog ' * 30}"], 256)
    for rows in (ROWS, long):
        encoded = network.encode(rows)
        assert encoded["input_ids"].shape[1] <= network.tokens
        for ids, inside in zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True):
            assert (ids[0], ids[inside][-1]) == (cls, sep)
            assert (ids[~inside] == pad).all()
    assert network.words(network.encode(ROWS[1:2])["input_ids"][0]) == [
        "[CLS]",
        "a",
        "dog",
        "[SEP]",
    ]
    assert network.encode(to_bytes([""], 8))["input_ids"].tolist() == [[cls, sep]]


def test_another_process_learns_the_same_tokenizer_and_says_nothing() -> None:
    code = (
        "from vestige.core.texts import to_bytes\n"
        "from vestige.models.text import bert\n"
        "m = bert(2, layers=1, width=4, vocabulary=90, tokens=8)\n"
        "m.learn_vocabulary(to_bytes(['the cat sat on the mat', 'a dog sat', '12 dogs'], 64))\n"
        "print(m.described_tokenizer())\n"
    )
    # Hashes of texts differ between processes, and with them the order of sets and maps.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = bert(2, layers=1, width=4, vocabulary=90, tokens=8)
    here.learn_vocabulary(to_bytes(["the cat sat on the mat", "a dog sat", "12 dogs"], 64))
    # Transformers is imported there, which has much to say.
    assert (done.stdout, done.stderr) == (f"{here.described_tokenizer()}\n", "")


def test_the_size_of_the_vocabulary_is_that_of_the_network() -> None:
    network = made()
    known = json.loads(network.described_tokenizer())["model"]["vocab"]
    assert 5 < len(known) <= network.embeddings.num_embeddings
    assert sorted(known.values()) == list(range(len(known)))


def test_the_tokenizer_travels_with_the_weights(tmp_path: Path) -> None:
    network = made()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    fresh = made()
    drawn(fresh)
    fresh.learn_vocabulary(to_bytes(["quite other words here"], 64))
    fresh.encode(ROWS)  # So that a tokenizer that was kept from before would be noticed.
    assert len(fresh.tokenizer) != len(network.tokenizer)
    untaught = transformer(
        3, config={"model_type": "bert", "vocab_size": 120, **TINY["bert"]}, tokens=16
    ).eval()
    for other in (fresh, untaught):
        other.load_state_dict(load_file(tmp_path / "w.safetensors"))
        assert same(other, network)
        assert torch.equal(other(ROWS), network(ROWS))
    copied = copy.deepcopy(network)
    assert torch.equal(copied(ROWS), network(ROWS))
    copied.learn_vocabulary(to_bytes(["quite other words here"], 64))
    assert torch.equal(fresh(ROWS), network(ROWS))


def test_a_network_inside_another_takes_the_size_of_its_tokenizer_too() -> None:
    outer = nn.Sequential(nn.Identity(), made())
    other = nn.Sequential(nn.Identity(), made())
    other[1].learn_vocabulary(to_bytes(["quite other words here"], 64))
    other.load_state_dict(outer.state_dict())
    assert torch.equal(other(ROWS), outer(ROWS))


def test_a_tokenizer_of_another_dtype_is_refused() -> None:
    network = made()
    state = {**network.state_dict(), "tokenizer": torch.zeros(2, 2, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="size mismatch for tokenizer"):
        network.load_state_dict(state)


def test_without_a_tokenizer_texts_are_refused_and_tokens_are_not() -> None:
    network = bert(2, layers=1, width=4, vocabulary=20, tokens=8)
    with pytest.raises(ContractError, match="learn_vocabulary"):
        network(ROWS)
    assert network(input_ids=torch.ones(1, 3, dtype=torch.int64)).shape == (1, 2)


def test_the_contracts_hold() -> None:
    network = made()
    assert isinstance(network, LearnsVocabulary)
    assert isinstance(network, MakesStudents)
    assert isinstance(network, SizedByState)


# Students


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_all_layers_is_the_teacher(kind: str) -> None:
    network = made(kind)
    before = fingerprint(network)
    student = network.with_layers(layers=4).eval()
    assert torch.equal(student(ROWS), network(ROWS))
    drawn(student)
    assert fingerprint(network) == before, "they share weights"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "choose", "numbers"),
    [(2, "spaced", (0, 3)), (3, "spaced", (0, 1, 3)), (1, "spaced", (3,)), (2, "first", (0, 1))],
)
def test_the_layers_are_those_that_were_chosen(
    kind: str, layers: int, choose: Any, numbers: tuple[int, ...]
) -> None:
    network = made(kind)
    student = network.with_layers(layers=layers, choose=choose)
    assert len(student.layers) == layers
    for own, number in zip(student.layers, numbers, strict=True):
        assert same(own, network.layers[number])
        assert not any(same(own, network.layers[other]) for other in {0, 1, 2, 3} - {number})
    listed = [name for name in state_of(student) if ".layer." in name]
    rest = {name: one for name, one in state_of(student).items() if name not in listed}
    assert any("classifier" in name for name in rest) and any("embedd" in name for name in rest)
    assert all(torch.equal(one, network.state_dict()[name]) for name, one in rest.items())


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_embeddings_alone_everything_else_is_drawn(kind: str) -> None:
    network = made(kind)
    student = network.with_layers(layers=2, start="embeddings")
    for name, value in student.state_dict().items():
        kept = name in network.state_dict() and torch.equal(value, network.state_dict()[name])
        assert kept == (".embeddings." in name or name in ("tokenizer", "special_ids")), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_student_reads_the_teachers_embeddings(kind: str) -> None:
    network = made(kind)
    student = network.with_layers(layers=2, width=4).eval()
    drawn(student.projection)
    assert torch.equal(student.embeddings.weight, network.embeddings.weight)
    assert student.width == 4
    assert heads_of(student) == 1, "a head keeps its width of 4"
    encoded = student.encode(ROWS)
    ids = encoded.pop("input_ids")
    told = student(ROWS)
    words = network.embeddings(ids)
    torch.testing.assert_close(student(inputs_embeds=words, **encoded), told, atol=1e-6, rtol=1e-5)
    again = student.with_layers(layers=1).eval()
    assert torch.equal(again.projection.weight, student.projection.weight)
    assert torch.equal(again.embeddings.weight, network.embeddings.weight)
    assert len(again.layers) == 1 and again(ROWS).shape == (4, 3)


def heads_of(network: TextClassifier) -> int:
    return int(network.network.config.num_attention_heads)


def test_a_narrower_student_trains_what_reads_and_what_is_read() -> None:
    student = made().with_layers(layers=1, width=4)
    student(ROWS).sum().backward()
    assert student.projection.weight.grad.abs().sum() > 0
    assert student.embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "args",
    [
        {"layers": 2},
        {"layers": 3, "start": "embeddings"},
        {"layers": 2, "width": 4, "heads": 2, "feed_forward": 6},
    ],
)
def test_the_card_builds_the_student_again(kind: str, args: dict[str, Any]) -> None:
    student = made(kind).with_layers(**args).eval()
    card = json.loads(json.dumps(student.network_card()))
    again = build_model(card["model"], InputSpec.text(64), 3, **card["args"]).eval()
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(ROWS), student(ROWS))
    assert again.network_card() == student.network_card()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"layers": 5}, "expected 1 to 4"),
        ({"layers": 0}, "expected 1 to 4"),
        ({"layers": 2, "heads": 2}, "without width"),
        ({"layers": 2, "width": 5, "heads": 2}, "do not fit"),
        ({"layers": 2, "choose": "last"}, "expected 'spaced' or 'first'"),
        ({"layers": 2, "start": "nothing"}, "expected 'layers' or 'embeddings'"),
        ({"layers": 2, "width": 4, "choose": "first"}, "starts from no layer"),
    ],
)
def test_students_that_cannot_be_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        made().with_layers(**args)


# Builders


def test_sizes_of_a_bert_are_those_asked_for() -> None:
    network = bert(5, layers=2, width=8, heads=4, vocabulary=30, tokens=12, dropout=0.3)
    config = network.network.config
    assert (config.num_labels, config.vocab_size, config.hidden_size) == (5, 30, 8)
    assert (config.intermediate_size, config.num_attention_heads) == (32, 4)
    assert (len(network.layers), network.tokens, network.width) == (2, 12, 8)
    assert {one.p for one in network.modules() if isinstance(one, nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "bret"},
        {"model_type": "vit"},
        {"model_type": "bert", "hidden_size": 7, "num_attention_heads": 2},
    ],
)
def test_configurations_without_a_classifier_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="makes no sequence classifier"):
        transformer(2, config=config, tokens=8)


def test_names_of_classes_in_a_configuration_stay_where_they_are_as_many() -> None:
    named = {"model_type": "bert", "vocab_size": 9, **TINY["bert"], "id2label": {0: "a", 1: "b"}}
    kept = transformer(2, config=named, tokens=8).network.config
    assert kept.id2label == {0: "a", 1: "b"}
    assert transformer(3, config=named, tokens=8).network.config.num_labels == 3
