"""Folders of transformers with a tokenizer are teachers of texts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vestige.core.texts import PAIR, to_bytes
from vestige.core.types import InputSpec
from vestige.errors import TeacherError
from vestige.models.text import TextClassifier
from vestige.teachers.loading import fingerprint, load_teacher, open_teacher

transformers = pytest.importorskip("transformers", reason="needs the extra [text]")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [text]")

TEXTS = ["the cat sat on the mat", "a dog", "dogs sat 12 times, quietly"]
NAMES = {0: "no", 1: "perhaps", 2: "yes"}
SIZES = {"vocab_size": 90, "max_position_embeddings": 20, "id2label": NAMES}
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def word_pieces(*, specials: bool = True) -> Any:
    from tokenizers.processors import TemplateProcessing

    trained = tokenizers.BertWordPieceTokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=80, show_progress=False)
    reader = trained._tokenizer
    if specials:
        numbers = [(one, reader.token_to_id(one)) for one in ("[CLS]", "[SEP]")]
        reader.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=numbers
        )
    roles = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "unk": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, **{f"{role}_token": one for role, one in roles.items()}
    )


def byte_pairs() -> Any:
    """As RoBERTa has it."""
    from tokenizers.processors import RobertaProcessing

    trained = tokenizers.ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(TEXTS, vocab_size=290, special_tokens=specials, show_progress=False)
    reader = trained._tokenizer
    reader.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    roles = {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>", "unk": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, **{f"{role}_token": one for role, one in roles.items()}
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT, a DistilBERT and a RoBERTa of a few hundred weights, as their users save them."""
    root = tmp_path_factory.mktemp("hub")
    distil = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 8}
    roberta = {**BERT, **SIZES, "vocab_size": 300, "max_position_embeddings": 42}
    for name, config, reader in (
        ("bert", transformers.BertConfig(**BERT, **SIZES), word_pieces()),
        ("distilbert", transformers.DistilBertConfig(**distil, **SIZES), word_pieces()),
        ("roberta", transformers.RobertaConfig(**roberta, type_vocab_size=1), byte_pairs()),
    ):
        torch.manual_seed(0)
        network = transformers.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for weight in network.parameters():
                weight.normal_(std=0.3)
        network.save_pretrained(root / name)
        reader.save_pretrained(root / name)
    return root


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A folder to spoil."""
    return shutil.copytree(saved / "bert", tmp_path / "bert")


@pytest.mark.parametrize(("kind", "tokens"), [("bert", 20), ("distilbert", 20), ("roberta", 40)])
def test_a_folder_says_everything_itself(saved: Path, kind: str, tokens: int) -> None:
    opened = open_teacher(f"hf:{saved / kind}")
    assert opened.classes == ("no", "perhaps", "yes")
    assert (opened.num_classes, opened.task) == (3, "text")
    assert opened.spec == InputSpec.text(8 * tokens)
    teacher = opened.module
    assert isinstance(teacher, TextClassifier) and not teacher.training
    assert teacher.tokens == tokens
    reader = transformers.AutoTokenizer.from_pretrained(saved / kind)
    known = [reader.cls_token_id, reader.sep_token_id, reader.pad_token_id, reader.mask_token_id]
    assert teacher.special_ids.tolist() == known


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_it_answers_as_transformers_does(saved: Path, kind: str) -> None:
    teacher = load_teacher(f"hf:{saved / kind}")
    reader = transformers.AutoTokenizer.from_pretrained(saved / kind)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(saved / kind).eval()
    given = reader(TEXTS, return_tensors="pt", padding=True)
    # Some tokenizers offer types to networks that take none.
    given = {name: one for name, one in given.items() if name in ("input_ids", "attention_mask")}
    expected = plain(**given).logits
    torch.testing.assert_close(teacher(to_bytes(TEXTS, 64)), expected, atol=1e-6, rtol=1e-5)
    pair = reader(*TEXTS[:2], return_tensors="pt")
    taken = teacher.encode(to_bytes([PAIR.join(TEXTS[:2])], 64))
    assert all(torch.equal(taken[name], pair[name]) for name in taken if name in pair)
    assert torch.equal(taken["input_ids"], pair["input_ids"])


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_the_longest_text_fits(saved: Path, kind: str) -> None:
    teacher = load_teacher(f"hf:{saved / kind}")
    rows = to_bytes(["cat " * 100], 400)
    assert teacher.encode(rows)["input_ids"].shape == (1, teacher.tokens)
    assert teacher(rows).isfinite().all()


def test_opening_a_folder_says_nothing(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_teacher(f"hf:{saved / 'bert'}")
    assert capfd.readouterr() == ("", "")


def test_students_of_a_folder_read_as_it_does(saved: Path) -> None:
    for kind in ("bert", "distilbert", "roberta"):
        teacher = load_teacher(f"hf:{saved / kind}")
        rows = to_bytes(TEXTS, 64)
        assert torch.equal(teacher.with_layers(layers=2).eval()(rows), teacher(rows))


def test_weights_from_another_file_keep_the_tokenizer(saved: Path, copied: Path) -> None:
    teacher = load_teacher(
        {"hf": str(saved / "bert"), "weights": str(copied / "model.safetensors")}
    )
    assert fingerprint(teacher) == fingerprint(load_teacher(f"hf:{saved / 'bert'}"))


def test_texts_of_another_length_may_be_asked_for_and_images_not(saved: Path) -> None:
    given = {"hf": str(saved / "bert"), "input": {"kind": "text", "shape": [32]}}
    assert open_teacher(given).spec == InputSpec.text(32)
    with pytest.raises(TeacherError, match="image inputs"):
        open_teacher(f"hf:{saved / 'bert'}", input_spec=InputSpec.image(1, 4, 4))
    with pytest.raises(TeacherError, match="num_classes 2"):
        open_teacher(f"hf:{saved / 'bert'}", num_classes=2)


def test_without_a_tokenizer_it_is_told_how_to_save_one(copied: Path) -> None:
    for one in copied.glob("*token*"):
        one.unlink()
    with pytest.raises(TeacherError, match=r"without a tokenizer .*tokenizer\.save_pretrained"):
        load_teacher(f"hf:{copied}")


def test_a_tokenizer_that_marks_no_begin_is_refused(copied: Path) -> None:
    word_pieces(specials=False).save_pretrained(copied)
    with pytest.raises(TeacherError, match=r"adds no \[CLS\] .*TemplateProcessing"):
        load_teacher(f"hf:{copied}")


def test_more_tokens_than_embeddings_are_refused(saved: Path, copied: Path) -> None:
    byte_pairs().save_pretrained(copied)
    with pytest.raises(TeacherError, match=r"tokenizer of \d+ tokens, expected at most 90"):
        load_teacher(f"hf:{copied}")


def test_a_network_without_a_trained_answer_is_refused(copied: Path) -> None:
    config = transformers.BertConfig(**BERT, **SIZES)
    transformers.BertModel(config).save_pretrained(copied)
    with pytest.raises(TeacherError, match=r"without weights for classifier\.bias"):
        load_teacher(f"hf:{copied}")


def test_classes_without_names_of_their_own_have_none(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (copied / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    opened = open_teacher(f"hf:{copied}")
    assert (opened.num_classes, opened.classes) == (3, ())
