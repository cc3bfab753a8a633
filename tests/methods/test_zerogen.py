"""ZeroGen: what is written, what is kept, what is learned, and that a kill loses nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ngram import TOPICS, NGram, made_up
from torch import nn
from torch.nn import functional as F

from vestige.core.texts import to_bytes, to_texts
from vestige.core.types import Batch, InputSpec
from vestige.core.writing import Written
from vestige.errors import ContractError, DataError, RecipeError
from vestige.methods.zerogen import ZeroGen, ZeroGenConfig
from vestige.models.prompts import load_prompts, read_prompts
from vestige.models.word_models import BiLSTM, TfidfLinear
from vestige.recipes.build import build_method
from vestige.sources.images import TensorSource
from vestige.tasks.text import Text
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.text(256)
ROWS = made_up(240)
TEST = made_up(80, seed=1)
DATA = to_bytes([text for text, _ in TEST], 256), torch.tensor([label for _, label in TEST])
SMALL = {"samples": 80, "round_texts": 32, "epochs": 3, "student_lr": 0.05}
ABOUT = read_prompts(
    {
        "context": 'Topic: "',
        "prompt": '<L> news about "<C>": "',
        "zero_shot": '<L> news: "<X>"',
        "per_context": 4,
        "context_new_tokens": 3,
        "min_words": 3,
        "labels": {name: {} for name in TOPICS},
    },
    "about",
)
PAIRS = read_prompts(
    {
        "kind": "pair",
        "prompt": '"<C>" <L>: "',
        "per_context": 2,
        "min_words": 2,
        "debias": True,
        "labels": {name: {} for name in TOPICS},
    },
    "pairs",
)


class Fixed(NGram):
    """Writes what it is given, one text after another, whatever it is asked."""

    def __init__(self, texts: list[str], prompts: Any = None) -> None:
        super().__init__(ROWS, prompts)
        self.texts, self.at = texts, 0

    def _text(self, prompt: str, sampling: Any, rng: Any) -> Written:
        self.at += 1
        return Written(self.texts[(self.at - 1) % len(self.texts)])


class Killed(RuntimeError):
    """Stands for a kill."""


def contexts() -> TensorSource:
    rows = to_bytes([f"Paris in {1900 + n} met Rome. Tokyo did not." for n in range(9)], 256)
    return TensorSource(rows, origin="foreign", name="contexts")


def build(teacher: Any = None, student: Any = "linear", **given: Any) -> ZeroGen:
    torch.manual_seed(0)
    sources = given.pop("sources", {})
    cfg = ZeroGenConfig(**{**SMALL, **given})
    network = TfidfLinear(4) if student == "linear" else student
    task = Text(SPEC, max(2, len((teacher or NGram(ROWS)).prompts.names)))
    return build_method("zerogen", cfg, task, [teacher or NGram(ROWS)], network, sources, 0)


def trainer(method: ZeroGen, out: Path | None = None, **given: Any) -> Trainer:
    return Trainer(
        method,
        Text(SPEC, 4),
        teachers=[method.teacher],
        student=method.student,
        out=out,
        seed=0,
        config=TrainerConfig(device="cpu", log_every=1),
        **given,
    )


def accuracy(method: ZeroGen) -> float:
    trainer(method).run()
    return Text(SPEC, 4).evaluate(method.student, DATA)["accuracy"]


def texts_of(method: ZeroGen) -> list[str]:
    return [json.dumps(line) for line in method.records()]


def test_a_student_learns_from_what_a_teacher_writes():
    method = build(epochs=8)
    assert accuracy(method) > 0.9
    assert [method.pool.count(name) >= 20 for name in TOPICS] == [True] * 4
    assert method.choice.labels.bincount().tolist() == [20] * 4
    assert method.result().object is method.student
    assert method.teacher.queries == sum(map(method.pool.asked, TOPICS))


@pytest.mark.parametrize("arm", [{"shuffle_labels": True}, {"label_in_prompt": False}])
def test_without_the_label_nothing_is_learned(arm):
    assert accuracy(build(samples=200, epochs=4, **arm)) < 0.55


def test_labels_that_are_shuffled_are_as_many_of_each():
    method = build(shuffle_labels=True)
    trainer(method).run()
    assert method.choice.labels.bincount().tolist() == [20] * 4
    names = [method.pool.records[place].label for place in method.choice.places.tolist()]
    given = [list(TOPICS)[label] for label in method.choice.labels.tolist()]
    assert names != given


def test_the_same_seed_writes_the_same_and_another_does_not():
    runs = []
    for seed in (0, 0, 1):
        method = build()
        one = trainer(method)
        one.ctx.rng.manual_seed(seed)
        one.run()
        runs.append(texts_of(method))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("student", ["linear", "bilstm"])
@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_killed_run_goes_on_to_the_same_texts_and_weights(tmp_path, after, student):
    def network() -> nn.Module:
        torch.manual_seed(0)
        return TfidfLinear(4) if student == "linear" else BiLSTM(4, embedding=8, hidden=8)

    whole = build(student=network())
    trainer(whole, tmp_path / "whole").run()
    seen = [0]

    def kill(event: Any) -> None:
        seen[0] += event.kind == "round"
        if event.kind == "round" and seen[0] == after:
            raise Killed

    with pytest.raises(Killed):
        trainer(build(student=network()), tmp_path / "cut", callbacks=[kill]).run()
    resumed = build(student=network())
    trainer(resumed, tmp_path / "cut").run(resume=True)
    assert texts_of(resumed) == texts_of(whole)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


def test_duplicates_are_dropped_over_the_whole_run():
    unique = [f'text number {n} of the topic with words enough to be kept"' for n in range(40)]
    method = build(Fixed([*unique, *unique]), samples=40, rounds=20)
    trainer(method).run()
    kept = [record.text for record in method.pool.records]
    assert len(kept) == len(set(kept)) == 40
    assert method.pool.counts()["duplicate"] > 0


def test_texts_are_cleaned_once_and_unfiltered_ones_are_as_many():
    raw = ['ten words are needed here or it goes away too" rest', "short", 'no end" x']
    method = build(Fixed(raw), samples=4, rounds=3, held_share=0)
    with pytest.raises(DataError, match=r"no texts of the label .*too-short \d+"):
        trainer(method).run()
    assert [record.text for record in method.pool.records] == [raw[0].partition('"')[0]]
    loose = build(Fixed(raw), samples=8, clean=False, held_share=0)
    trainer(loose).run()
    assert len(loose.choice) == 8
    assert {"short", "no end"} <= {record.text for record in loose.pool.records}


def test_an_lm_that_never_closes_the_quote_is_an_error_before_training():
    method = build(Fixed(["words without any end " * 5]), rounds=2)
    told = r"all of \d+ were dropped \(no-end \d+\), .* ask for more new_tokens"
    with pytest.raises(DataError, match=told):
        trainer(method).run()
    assert not method.student.vocabulary.numbers


@pytest.mark.parametrize("prompts", [None, load_prompts("squad")])
def test_a_label_of_which_nothing_comes_is_not_asked_for_forever(prompts):
    teacher = Fixed(["words without any end " * 5], prompts)
    given = {} if prompts is None else {"student": None, "sources": {"contexts": contexts()}}
    method = build(teacher, samples=4000, rounds=100_000, round_texts=400, **given)
    with pytest.raises(DataError, match=r"all of [\d,]+ were dropped"):
        trainer(method).run()
    assert all(2000 <= method.pool.asked(name) < 5000 for name in method.names)


def test_a_teacher_that_knows_few_texts_stops_when_there_are_no_more(caplog):
    class Few(NGram):
        """Ten texts of each label."""

        def _text(self, prompt: str, sampling: Any, rng: Any) -> Written:
            number = int(torch.randint(10, (), generator=rng))
            return Written(f'{number} is what it says about {prompt[:-3]} and nothing else"')

    method = build(Few(ROWS), samples=4000, rounds=100_000, round_texts=800, epochs=1)
    trainer(method).run()
    assert len(method.choice) == 40
    assert "expected 1000; the student sees fewer of it" in caplog.text


def test_contexts_are_written_first_each_once_and_all_labels_use_them():
    teacher = NGram(ROWS, ABOUT)
    method = build(teacher, contexts=5)
    trainer(method).run()
    written = [record.text for record in method.contexts.records]
    assert len(written) == len(set(written)) >= 5
    assert teacher.asked[0] == 'Topic: "'
    about = {name: {r.context for r in method.pool.records if r.label == name} for name in TOPICS}
    assert all(found and found <= set(written) for found in about.values())
    assert method.record_card()["contexts"]["kept"] == len(written)


def test_pairs_are_given_texts_with_written_ones():
    teacher = NGram(ROWS, PAIRS)
    method = build(
        teacher, sources={"contexts": contexts()}, debias_decay=0, samples=16, round_texts=16
    )
    trainer(method).run()
    row = to_texts(method.choice.rows(method.pool, 256))[0]
    first, _, second = row.partition("\x1f")
    assert first.startswith("Paris") and second
    assert method.writer.sampling.debias_decay == 0
    with pytest.raises(RecipeError, match=r"sources\.contexts"):
        build(NGram(ROWS, PAIRS))


def test_questions_are_written_for_answers_in_a_passage():
    questions = [
        "Who met the other one in that year? I",
        "Did Paris meet anyone at all there?",
        "no",
    ]
    teacher = Fixed(questions, load_prompts("squad"))
    method = build(teacher, student=None, sources={"contexts": contexts()}, samples=20, rounds=4)
    result = trainer(method).run().result
    assert result.kind == "texts" and len(method.pool) > 5
    for line in method.records():
        start = line["answer_start"]
        assert line["C"][start : start + len(line["answer"])] == line["answer"]
        assert line["X"].endswith("?") and line["answer"].lower() not in line["X"].lower()
    assert {"no-question-mark", "holds-answer"} <= set(method.pool.counts())
    with pytest.raises(RecipeError, match="leave the student out"):
        build(teacher, sources={"contexts": contexts()})


def test_the_loss_is_the_cross_entropy_of_the_label_or_of_soft_targets():
    method = build()
    trainer(method).run()
    rows, labels = DATA
    logits = method.student(rows)
    hard = method.cross_entropy(method.student, Batch(rows, labels)).total
    assert hard.item() == pytest.approx(F.cross_entropy(logits, labels).item())
    soft = torch.softmax(torch.randn(len(rows), 4), 1)
    batch = Batch(rows, labels, extra={"targets": soft})
    slow = -(soft * logits.log_softmax(1)).sum(1).mean()
    assert method.cross_entropy(method.student, batch).total.item() == pytest.approx(slow.item())


def test_soft_labels_need_a_teacher_that_judges():
    with pytest.raises(RecipeError, match="soft_labels"):
        build(soft_labels=0.5)


def test_the_best_epoch_is_what_is_left():
    method = build(epochs=6, student_lr=0.3, held_share=0.3)
    seen: list[tuple[tuple[float, ...], dict[str, torch.Tensor]]] = []
    judged = method.choice.judged

    def spy(student: nn.Module, rows: torch.Tensor) -> tuple[float, ...]:
        score = judged(student, rows)
        seen.append((score, {k: v.clone() for k, v in student.state_dict().items()}))
        return score

    method.choice.judged = spy
    trainer(method).run()
    best = max(range(len(seen)), key=lambda at: (seen[at][0], -at))
    for name, value in method.student.state_dict().items():
        assert torch.equal(value, seen[best][1][name])


def test_patience_ends_training():
    method = build(epochs=50, patience=2, student_lr=0.5)
    outcome = trainer(method).run()
    per_epoch = -(-int((~method.choice.held).sum()) // method.cfg.batch_size)
    assert outcome.steps < 50 * per_epoch and outcome.complete


def test_a_second_training_learns_from_what_the_first_believed():
    method = build(keep_fraction=0.5, epochs=4)
    assert accuracy(method) > 0.6
    assert method.choice.labels.bincount().tolist() == [10] * 4
    assert method.variant() == "confidence filter"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"student": None}, "expected one that learns from texts"),
        ({"samples": 2}, "a text of each"),
        ({"teacher": nn.Linear(1, 1)}, "writes no texts"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(given, told):
    with pytest.raises((RecipeError, AttributeError), match=told):
        if "teacher" in given:
            from vestige.teachers.white_box import WhiteBoxTeacher

            task = Text(SPEC, 4)
            ZeroGen(ZeroGenConfig(), task, [WhiteBoxTeacher(given["teacher"])], TfidfLinear(4), {})
        build(**given)


def test_another_number_of_labels_than_classes_is_told():
    with pytest.raises(RecipeError, match=r"4 labels .* for 3 classes"):
        build_method(
            "zerogen", ZeroGenConfig(), Text(SPEC, 3), [NGram(ROWS)], TfidfLinear(3), {}, 0
        )


def test_records_say_where_they_come_from():
    method = build(record_seed=7)
    trainer(method).run()
    line = next(iter(method.records()))
    assert set(line) == {"C", "X", "Y", "prompt_id", "seed", "logprob"}
    assert line["Y"] in TOPICS and line["seed"] == 7 and line["logprob"] == -1.0
    card = method.record_card()
    counts = card["counts"]
    assert all(
        one["asked"] == one["kept"] + sum(one["dropped"].values()) for one in counts.values()
    )
    assert card["learned_from"] == 80 and card["held_back"] == 8
    json.dumps(dict(card))


def test_texts_are_asked_for_only_where_they_are_missing():
    class Lame(NGram):
        """One label fails now and then."""

        def _text(self, prompt: str, sampling: Any, rng: Any) -> Written:
            good = super()._text(prompt, sampling, rng)
            bad = "Sports" in prompt and float(torch.rand((), generator=rng)) < 0.7
            return Written("cut off") if bad else good

    method = build(Lame(ROWS), rounds=60)
    trainer(method).run()
    asked = {name: method.pool.asked(name) for name in TOPICS}
    assert asked["sports"] > 1.5 * asked["world"]
    assert method.choice.labels.bincount().tolist() == [20] * 4


def test_texts_before_they_are_chosen_are_the_result():
    method = build()
    assert method.result().kind == "texts"
    with pytest.raises((ContractError, DataError)):
        method.writer.prompts.per_context and method.choice.choose(
            method.pool, method.names, each=1, held_share=0
        )
