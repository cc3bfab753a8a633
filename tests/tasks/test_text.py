"""Texts are judged by accuracy, and what was made of them can be read."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from vestige.core.protocols import ReadsInputs
from vestige.core.texts import PAIR, to_bytes, to_texts
from vestige.core.types import InputSpec
from vestige.errors import ShapeError, TeacherError, VestigeError
from vestige.tasks.text import Text, nearest_words

SPEC = InputSpec.text(24)
TEXTS = [f"word {number}" for number in range(6)]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
WORDS = ["[PAD]", "cat", "sit", "##ting", "dog"]


class Told(nn.Module):
    """Answers a text by a table; what is not in it is class 0."""

    def __init__(self, *answers: int, num_classes: int = 3) -> None:
        super().__init__()
        self.answers = dict(zip(TEXTS, answers, strict=False))
        self.num_classes = num_classes

    def forward(self, rows: Tensor) -> Tensor:
        numbers = torch.tensor([self.answers.get(text, 0) for text in to_texts(rows)])
        return 2.0 * nn.functional.one_hot(numbers, self.num_classes)


class Reader:
    """What `readings` needs of a teacher."""

    def __init__(self) -> None:
        self.table = torch.eye(5) * torch.tensor([1.0, 5, 0.1, 1, 2])[:, None]
        self.special_ids = torch.tensor([-1, -1, 0, -1])

    def words(self, ids: Tensor) -> list[str]:
        return [WORDS[number] for number in ids.tolist()]


@pytest.fixture
def task() -> Text:
    return Text(SPEC, 3)


def rows(texts: list[str] = TEXTS) -> Tensor:
    return to_bytes(texts, 24)


def test_accuracy_is_the_share_of_right_answers_whatever_the_batches(task: Text) -> None:
    for batch_size in (1, 4, 512):
        scores = task.evaluate(Told(0, 1, 2, 0, 2, 1), (rows(), LABELS), batch_size=batch_size)
        assert scores["accuracy"] == 4 / 6
    assert (task.kind, task.metric) == ("text", "accuracy")


def test_mistakes_are_shown_with_those_first_that_the_teacher_gets_right(task: Text) -> None:
    student, teacher = Told(1, 1, 0, 1, 1, 0), Told(2, 1, 2, 0, 1, 1)
    told = task.details(student, teacher, (rows(), LABELS))
    assert [one["text"] for one in told["texts"]] == ["word 2", "word 3", "word 0", "word 5"]
    assert told["texts"][0] == {"text": "word 2", "truth": 2, "student": 0, "teacher": 2}
    assert told["texts"][2] == {"text": "word 0", "truth": 0, "student": 1, "teacher": 2}
    assert told["student"]["accuracy"] == 2 / 6
    alone = task.details(student, None, (rows(), LABELS))
    assert [one["text"] for one in alone["texts"]] == ["word 0", "word 2", "word 3", "word 5"]
    assert all(one["teacher"] is None for one in alone["texts"])


def test_at_most_twelve_mistakes_are_shown_and_none_where_there_are_none(task: Text) -> None:
    many = rows([f"a {number}" for number in range(30)])
    told = task.details(Told(), None, (many, torch.ones(30, dtype=torch.int64)))
    assert [one["text"] for one in told["texts"]] == [f"a {number}" for number in range(12)]
    right = task.details(Told(0, 1, 2, 0, 1, 2), None, (rows(), LABELS))
    assert right["texts"] == []


def test_the_two_texts_of_a_pair_are_shown_apart(task: Text) -> None:
    pair = rows([f"one{PAIR}two"])
    told = task.details(Told(), None, (pair, torch.tensor([1])))
    assert told["texts"][0]["text"] == "one | two"
    assert task.readings(pair, None) == ["one | two"]


def test_ids_are_read_without_what_fills_up_and_with_pieces_joined(task: Text) -> None:
    ids = torch.tensor([[1, 2, 3, 0], [4, 4, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    told = task.readings({"input_ids": ids, "attention_mask": mask}, Reader())
    assert told == ["cat sitting", "dog dog cat sit"]


def test_embeddings_are_read_as_the_token_that_points_the_same_way(task: Text) -> None:
    # Nearer to "cat" by distance, but along "sit", whose own embedding is short.
    words = torch.tensor([[[0.0, 3.0, 4.0, 0, 0], [0, 0, 0, 0.1, 0], [0, 0, 0, 0, 9.0]]])
    inputs = {"inputs_embeds": words, "attention_mask": torch.tensor([[1, 1, 0]])}
    assert task.readings(inputs, Reader()) == ["sitting"]


def test_nearest_words_are_those_of_a_slow_search() -> None:
    reader = SimpleNamespace(table=torch.randn(30, 4))
    words = torch.randn(7, 3, 4)
    table = reader.table
    slow = [
        [int(torch.cosine_similarity(word[None], table).argmax()) for word in text]
        for text in words
    ]
    for count in (1, 3, 64):
        assert nearest_words(words, reader, rows=count).tolist() == slow
    assert torch.equal(nearest_words(table[None] * 3, reader)[0], torch.arange(30))


def test_a_task_of_texts_reads_inputs(task: Text) -> None:
    assert isinstance(task, ReadsInputs)


def test_networks_are_asked_for_two_texts_before_a_run(task: Text) -> None:
    model = Told().train()
    task.check(model)
    assert model.training
    with pytest.raises(ShapeError, match=r"logits of shape \(2, 4\)"):
        task.check(Told(num_classes=4))
    with pytest.raises(VestigeError):
        task.check(nn.Linear(24, 3))

    class Broken(Told):
        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows) * torch.nan

    with pytest.raises(TeacherError, match="finite"):
        task.check(Broken())


def test_only_texts_are_judged(task: Text) -> None:
    for spec in (InputSpec.image(1, 4, 4), InputSpec("text", (4, 4))):
        with pytest.raises(ShapeError, match=r"InputSpec\.text"):
            Text(spec, 3)
    with pytest.raises(ShapeError, match="expected"):
        task.evaluate(Told(), (to_bytes(TEXTS, 12), LABELS))
