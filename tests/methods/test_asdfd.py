"""AS-DFD's invariants: what crafting moves and what it leaves, and its four arms from one file."""

import copy
import functools
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers", reason="needs the extra [text]")

from vestige.core.texts import to_bytes
from vestige.core.types import Batch, InputSpec, Step, predict
from vestige.errors import RecipeError, TeacherError
from vestige.losses.distill import kl_divergence
from vestige.methods.asdfd import ASDFD, ASDFDConfig
from vestige.models.text import TextClassifier, bert
from vestige.sources.embeddings import Crafted, EmbeddingPrior
from vestige.sources.targets import even_targets
from vestige.tasks.text import Text
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.context import RunContext
from vestige.training.supervised import train_classifier
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.text(80)
TASK = Text(SPEC, 3)
TOPICS = ("ball goal team match", "court law judge trial", "star moon orbit rocket")
FILLING = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "on",
    "for",
    "with",
    "at",
    "by",
    "from",
    "it",
    "was",
    "is",
]
OFF = {"guess_steps": 0, "difficulty_steps": 0, "self_supervised_weight": 0.0}
SMALL = {"rounds": 2, "iterations": 2, "batch_size": 6, "length": 10}


def texts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Some words of a topic among others, with the topic's number."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    rows = []
    for label in labels.tolist():
        words = [*TOPICS[label].split(), *FILLING]
        weights = torch.tensor([2.0] * 4 + [1.0] * len(FILLING))
        chosen = torch.multinomial(weights, 8, replacement=True, generator=rng)
        rows.append(" ".join(words[number] for number in chosen.tolist()))
    return to_bytes(rows, SPEC.shape[0]), labels


@functools.cache
def trained() -> TextClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = bert(3, layers=2, width=16, heads=2, vocabulary=60, tokens=12)
    rows, labels = texts(360, seed=1)
    made.learn_vocabulary(rows)
    train_classifier(made, rows, labels, epochs=10, batch_size=24, lr=1e-2)
    return made


@pytest.fixture
def teacher() -> TextClassifier:
    return copy.deepcopy(trained())


class Recorder(RunContext):
    """A context that is run by hand."""

    def __init__(self) -> None:
        super().__init__(
            seed=0,
            device=torch.device("cpu"),
            plugins={},
            reduce=lambda params: None,
            on_loop=lambda name, n: 0,
            on_round=lambda: True,
        )


def make(teacher: TextClassifier, student: nn.Module | None = None, **settings: Any) -> ASDFD:
    torch.manual_seed(0)
    chosen = student or teacher.with_layers(layers=1)
    cfg = ASDFDConfig(**{**SMALL, **settings})
    return ASDFD(cfg, TASK, [WhiteBoxTeacher(teacher)], chosen, {})


def craft(method: ASDFD, ctx: RunContext | None = None) -> tuple[Crafted, list[Step]]:
    """One crafted batch, and the steps that led to it."""
    generator = method.craft(ctx or Recorder())
    steps = []
    while True:
        try:
            steps.append(next(generator))
        except StopIteration as stop:
            return stop.value, steps


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_crafting_moves_words_alone(teacher):
    method = make(teacher, shortest=6)
    before = state(teacher), state(method.student), state(method.head)
    found, _ = craft(method)
    assert all(weight.grad is None for weight in teacher.parameters())
    after = state(teacher), state(method.student), state(method.head)
    assert all(same(*pair) for pair in zip(before, after, strict=True))
    table = teacher.embeddings.weight
    begin, end, fill, _ = teacher.special_ids.tolist()
    ends = found.mask.sum(1) - 1
    assert len(set(ends.tolist())) > 1
    rows = torch.arange(len(ends))
    assert torch.equal(found.words[:, 0], table[begin].expand(len(ends), -1))
    assert torch.equal(found.words[rows, ends], table[end].expand(len(ends), -1))
    assert torch.equal(
        found.words[found.mask == 0], table[fill].expand(int((1 - found.mask).sum()), -1)
    )
    assert torch.equal(found.free.sum(1), ends - 1)


def test_noise_has_the_moments_of_the_teachers_words(teacher):
    table = teacher.table
    prior = EmbeddingPrior(table, teacher.special_ids, length=40)
    drawn = prior.draw(200, torch.Generator().manual_seed(0))
    noise = drawn.words[drawn.free]
    # 7,600 words of 16 values: the mean's own deviation is std / 350.
    assert float(noise.mean()) == pytest.approx(
        float(table.mean()), abs=4 * float(table.std()) / 340
    )
    assert float(noise.std()) == pytest.approx(float(table.std()), rel=0.02)


def test_guessing_makes_the_teacher_sure_of_targets_that_are_even(teacher):
    method = make(
        teacher, guess_steps=25, guess_lr=1.0, difficulty_steps=0, batch_size=30, confidence=1.0
    )
    found, steps = craft(method)
    losses = [float(step.loss.total) for step in steps]
    assert losses[-1] < losses[0]
    first = steps[0].loss.teacher.logits.argmax(1)
    answers = predict(method.asked, {"inputs_embeds": found.words, "attention_mask": found.mask})
    counts = torch.bincount(answers.logits.argmax(1), minlength=3)
    # Drawn as 10 of each class: almost all of them are what they were meant to be.
    assert counts.min() >= 9
    assert torch.bincount(first, minlength=3).max() > counts.max()


def test_small_plain_steps_of_guessing_lower_the_loss_every_time(teacher):
    method = make(teacher, **{**OFF, "batch_size": 12})
    drawn = method.prior.draw(12, torch.Generator().manual_seed(0))
    words = drawn.words.clone().requires_grad_()
    targets = even_targets(12, 3, torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = method.guess(
            method.asked, Batch(extra={"words": words, "mask": drawn.mask, "targets": targets})
        )
        losses.append(float(loss.total))
        (gradient,) = torch.autograd.grad(loss.total, words)
        words = (words - 0.02 * gradient).detach().requires_grad_()
    assert all(late < early for early, late in pairwise(losses))


def test_targets_are_even():
    targets = even_targets(11, 4, torch.Generator().manual_seed(3))
    assert sorted(torch.bincount(targets, minlength=4).tolist()) == [2, 3, 3, 3]
    other = even_targets(11, 4, torch.Generator().manual_seed(4))
    assert not torch.equal(targets, other)


def test_texts_that_the_teacher_is_sure_of_are_left_alone(teacher):
    method = make(teacher, guess_steps=12, guess_lr=1.0, difficulty_steps=0, confidence=0.5)
    eager = make(teacher, guess_steps=12, guess_lr=1.0, difficulty_steps=0, confidence=1.0)
    held, free = craft(method)[0], craft(eager)[0]
    start = method.prior.draw(6, Recorder().rng).words
    assert (held.words - start).norm() < (free.words - start).norm()


def test_words_are_no_longer_than_the_teachers(teacher):
    method = make(
        teacher, guess_steps=10, guess_lr=5.0, difficulty_steps=0, longest_norm=0.5, confidence=1.0
    )
    found, _ = craft(method)
    bound = teacher.table.norm(dim=1).quantile(0.5)
    assert found.words[found.free].norm(dim=1).max() <= bound * (1 + 1e-6)


def test_one_step_of_the_adversary_raises_what_it_is_about(teacher):
    method = make(teacher, **{**OFF, "difficulty_steps": 1, "difficulty_lr": 1e-3})
    modes = {name: one.training for name, one in method.student.named_modules()}
    drawn = method.prior.draw(6, torch.Generator().manual_seed(0))
    masked = method.prior.choose_masked(drawn, 0.0, torch.Generator().manual_seed(1))
    words = drawn.words.clone().requires_grad_()
    texts = Crafted(words, drawn.free, drawn.mask)
    before = method.difficulty(texts, masked)
    (gradient,) = torch.autograd.grad(before.total, words)
    length = gradient.norm(dim=2, keepdim=True).clamp_min(1e-8)
    moved = Crafted(words + 1e-3 * method.scale * gradient / length, drawn.free, drawn.mask)
    assert method.difficulty(moved, masked).total > before.total
    assert modes == {name: one.training for name, one in method.student.named_modules()}


def test_each_step_of_the_adversary_has_one_length_and_spares_what_is_pinned(teacher):
    method = make(teacher, **{**OFF, "difficulty_steps": 1, "difficulty_lr": 0.2}, shortest=5)
    start = method.prior.draw(6, Recorder().rng)
    found, steps = craft(method)
    assert len(steps) == 1
    moved = (found.words - start.words).norm(dim=2)
    assert torch.equal(moved[~found.free], torch.zeros(int((~found.free).sum())))
    expected = torch.full_like(moved[found.free], 0.2 * method.scale)
    assert torch.allclose(moved[found.free], expected, rtol=1e-4)


def test_the_students_own_loss_falls_and_does_not_move_the_words(teacher):
    method = make(teacher, student_lr=1e-2)
    found, _ = craft(method)
    masked = method.prior.choose_masked(found, 0.0, torch.Generator().manual_seed(1))
    words = found.words.clone().requires_grad_()
    inputs = {"inputs_embeds": words.detach(), "attention_mask": found.mask}
    batch = Batch(inputs=inputs, extra={"masked": masked})
    method.student.eval()
    moved = [*method.learned, *method.head.parameters()]
    optimizer = torch.optim.SGD(moved, 1e-2)
    first = method.imitation(method.student, batch)
    first.total.backward()
    optimizer.step()
    again = method.imitation(method.student, batch)
    assert again.total < first.total
    assert again.terms["self_supervised"] < first.terms["self_supervised"]
    assert words.grad is None


def test_the_masked_pass_changes_nothing_of_the_other(teacher):
    method = make(teacher)
    method.student.eval()
    found, _ = craft(method)
    masked = method.prior.choose_masked(found, 0.0, torch.Generator().manual_seed(1))
    inputs = {"inputs_embeds": found.words, "attention_mask": found.mask}
    both = method.imitation(method.student, Batch(inputs=inputs, extra={"masked": masked}))
    alone = method.imitation(method.student, Batch(inputs=inputs))
    # One matrix product over twice the rows may round otherwise.
    assert torch.allclose(both.student.logits, alone.student.logits, atol=1e-5)
    hidden = method.student.network.base_model(
        inputs_embeds=method.blanked(found.words, masked), attention_mask=found.mask
    ).last_hidden_state
    guessed = method.head(hidden)[masked]
    slow = (guessed - found.words[masked]).square().sum(1).mean()
    assert float(both.terms["self_supervised"].detach()) == pytest.approx(
        float(slow.detach()), rel=1e-4
    )
    assert torch.allclose(
        both.total, both.terms["distillation"] + 0.1 * both.terms["self_supervised"]
    )


def test_only_words_are_masked(teacher):
    prior = EmbeddingPrior(teacher.embeddings.weight, teacher.special_ids, length=12, shortest=4)
    rng = torch.Generator().manual_seed(0)
    drawn = prior.draw(200, rng)
    one = prior.choose_masked(drawn, 0.0, rng)
    assert not (one & ~drawn.free).any()
    assert torch.equal(one.sum(1), torch.ones(200, dtype=torch.long))
    some = prior.choose_masked(drawn, 0.4, rng)
    assert not (some & ~drawn.free).any()
    assert some.any(1).all()
    assert float(some.sum() / drawn.free.sum()) == pytest.approx(0.45, abs=0.1)


def test_without_steps_it_is_kd_on_noise_or_on_random_tokens(teacher):
    """The four arms are one file: what is left is the KL on what was drawn."""
    student = teacher.with_layers(layers=1)
    for prior in ("normal", "tokens"):
        method = make(teacher, copy.deepcopy(student), prior=prior, **OFF)
        found, steps = craft(method)
        assert not steps
        drawn = method.prior.draw(6, Recorder().rng)
        assert torch.equal(found.words, drawn.words)
        if prior == "tokens":
            table = teacher.table
            nearest = torch.cdist(found.words[found.free], table).min(1)
            assert float(nearest.values.max()) < 1e-3
            assert not set(nearest.indices.tolist()) & set(teacher.special_ids.tolist())
        inputs = {"inputs_embeds": found.words, "attention_mask": found.mask}
        method.student.eval()
        loss = method.imitation(method.student, Batch(inputs=inputs))
        expected = kl_divergence(
            method.student(**inputs), predict(method.teacher, inputs).logits
        ).mean()
        assert set(loss.terms) == {"distillation"}
        assert torch.allclose(loss.total, expected)


def test_a_student_of_all_layers_has_nothing_to_learn(teacher):
    method = make(teacher, teacher.with_layers(layers=2), **OFF)
    method.student.eval()
    found, _ = craft(method)
    inputs = {"inputs_embeds": found.words, "attention_mask": found.mask}
    loss = method.imitation(method.student, Batch(inputs=inputs))
    loss.total.backward()
    assert abs(float(loss.total)) < 1e-6
    largest = max(float(w.grad.abs().max()) for w in method.learned if w.grad is not None)
    assert largest < 1e-5


def test_a_run_leaves_the_words_of_the_student_and_teaches_the_rest(teacher):
    rows, labels = texts(120, seed=9)
    fresh = teacher.with_layers(layers=1, start="embeddings")
    method = make(
        teacher, fresh, rounds=4, iterations=40, batch_size=24, student_lr=1e-2, guess_steps=3
    )
    words = fresh.embeddings.weight.detach().clone()
    poor = TASK.evaluate(fresh, (rows, labels))["accuracy"]
    run = Trainer(
        method,
        TASK,
        teachers=[method.teacher],
        student=fresh,
        evaluate=lambda model: TASK.evaluate(model, (rows, labels)),
        config=TrainerConfig(threads=1),
    )
    outcome = run.run()
    good = outcome.scores[-1]["accuracy"]
    taught = TASK.evaluate(teacher, (rows, labels))["accuracy"]
    assert taught > 0.9
    assert good > max(0.6, poor + 0.1)
    assert torch.equal(fresh.embeddings.weight, words)
    inputs, answers = outcome.samples
    assert inputs["inputs_embeds"].shape[1:] == (10, 16)
    read = TASK.readings(inputs, teacher)
    assert len(read) == len(answers)
    known = {*" ".join(TOPICS).split(), *FILLING}
    assert not any("[CLS]" in one or "[SEP]" in one for one in read)
    assert len({word for one in read for word in one.split()} & known) > 5


def test_passes_are_what_hooks_count(teacher):
    method = make(teacher, iterations=3, rounds=1, guess_steps=2, difficulty_steps=1)
    asked = {"teacher": 0, "student": 0}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            asked[name] += len(output) // method.cfg.batch_size

        return hook

    handles = [
        teacher.register_forward_hook(count("teacher"), with_kwargs=True),
        method.student.register_forward_hook(count("student"), with_kwargs=True),
    ]
    for _ in method.run(Recorder()):
        pass
    for handle in handles:
        handle.remove()
    told = method.passes(method.cfg)
    assert told["teacher_forward"] == asked["teacher"] == 3 * (2 + 1)
    assert told["student_forward"] == asked["student"] == 3 * (1 + 2)


def test_variants_are_told(teacher):
    assert make(teacher).variant() == ""
    assert make(teacher, **OFF, prior="tokens").variant() == (
        "no guessing, no adversary, no self-supervision, random tokens"
    )


def test_a_student_with_words_of_its_own_is_refused(teacher):
    stranger = bert(3, layers=1, width=16, heads=2, vocabulary=60, tokens=12)
    with pytest.raises(RecipeError, match="do not have the teacher's embeddings"):
        make(teacher, stranger)
    with pytest.raises(RecipeError, match="layers-of-teacher"):
        make(teacher, nn.Linear(2, 3))


def test_a_teacher_that_is_no_transformer_is_refused(teacher):
    with pytest.raises(TeacherError, match="expected a transformer for texts"):
        ASDFD(ASDFDConfig(), TASK, [WhiteBoxTeacher(nn.Linear(2, 3))], teacher, {})


def test_a_tokenizer_without_a_mask_is_refused_unless_nothing_is_masked(teacher):
    special = teacher.special_ids.clone()
    teacher.special_ids[3] = -1
    student = teacher.with_layers(layers=1)
    with pytest.raises(TeacherError, match="no token that masks a word"):
        make(teacher, student)
    make(teacher, student, difficulty_steps=0, self_supervised_weight=0)
    teacher.special_ids.copy_(special)


def test_a_narrower_student_reads_the_teachers_words(teacher):
    student = teacher.with_layers(layers=1, width=8, heads=2)
    method = make(teacher, student)
    found, _ = craft(method)
    answer = predict(student, {"inputs_embeds": found.words, "attention_mask": found.mask})
    assert answer.logits.shape == (6, 3)
    assert any(one is student.projection.weight for one in method.learned)
    assert math.isfinite(float(F.cross_entropy(answer.logits, torch.zeros(6).long()).detach()))


def test_texts_need_room_for_a_word(teacher):
    with pytest.raises(RecipeError, match="expected at least 3"):
        make(teacher, length=8, shortest=9)
