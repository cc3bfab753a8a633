"""Which rows are worth learning from: votes, thresholds, shares of a heap, and what is noted."""

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from vestige.core.rows import Selection
from vestige.core.types import Batch, InputSpec
from vestige.errors import ContractError, RecipeError
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.sources.selection import (
    ChosenBatches,
    InstanceSelector,
    Votes,
    mean_one,
    shuffled,
    top_shares,
    votes,
)

K = 4


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=rng(seed))


def sure(confidences: list[float], classes: list[int]) -> Tensor:
    """Logits whose softmax gives one class that probability and the others equal ones."""
    rows = torch.tensor(confidences)[:, None]
    probs = ((1 - rows) / (K - 1)).repeat(1, K)
    probs[torch.arange(len(rows)), torch.tensor(classes)] = rows[:, 0]
    return probs.log()


class Constant(nn.Module):
    """Answers with the inputs: whoever asks hands in the logits. Remembers how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.asked: list[tuple[bool, bool]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.asked.append((self.training, torch.is_grad_enabled()))
        return self.dropout(inputs)


def selector(**settings) -> InstanceSelector:
    return InstanceSelector(Constant(), K, **settings)


def batch(teacher: Tensor, student: Tensor | None = None, **extra: Tensor) -> Batch:
    return Batch(teacher if student is None else student, extra={"teacher": teacher, **extra})


def kept_rows(made: InstanceSelector, one: Batch) -> list[int]:
    rows = torch.arange(len(one))
    found = made.student_batch(Batch(one.inputs, extra={**one.extra, "place": rows}))
    return found.extra["place"].tolist()


# Votes


@pytest.mark.parametrize("score", ["confidence", "energy", "logit-norm"])
def test_at_the_ends_one_of_both_decides(score):
    teacher, student = draw(9, K), draw(9, K, seed=1)
    for share, seen, unseen in ((1.0, teacher, student), (0.0, student, teacher)):
        networks = {1.0: (seen, unseen), 0.0: (unseen, seen)}[share]
        found = votes(*networks, teacher_share=share, score=score)
        other = {1.0: (seen, -unseen), 0.0: (-unseen, seen)}[share]
        again = votes(*other, teacher_share=share, score=score)
        assert torch.equal(found.classes, seen.argmax(1))
        for name in ("classes", "confidence", "score"):
            assert torch.equal(getattr(found, name), getattr(again, name))


def test_votes_are_mixed_probabilities():
    teacher, student = draw(9, K), draw(9, K, seed=1)
    mixed = 0.7 * teacher.softmax(1) + 0.3 * student.softmax(1)
    found = votes(teacher, student, teacher_share=0.7)
    torch.testing.assert_close(found.confidence, mixed.max(1).values)
    assert torch.equal(found.classes, mixed.argmax(1))
    assert torch.equal(found.score, found.confidence)
    # In rows of which both are unsure, neither's own class need win.
    assert (found.classes != teacher.argmax(1)).any()


def test_other_scores_are_not_softmaxs():
    logits = torch.tensor([[9.0, 0, 0, 0], [90.0, 0, 0, 0], [99.0, 90, 90, 90]])
    energy = votes(logits, None, teacher_share=1.0, score="energy")
    expected = [math.log1p(sum(map(math.exp, row))) for row in logits.tolist()]
    assert energy.score.tolist() == pytest.approx(expected, rel=1e-5)
    norm = votes(logits, None, teacher_share=1.0, score="logit-norm")
    # Of (3/4, -1/4, -1/4, -1/4) times the gap.
    by_hand = [gap * math.sqrt(0.75) for gap in (9, 90, 9)]
    assert norm.score.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_no_gradient_flows_into_a_choice():
    teacher, student = draw(5, K).requires_grad_(), draw(5, K, seed=1).requires_grad_()
    for score in ("confidence", "energy", "logit-norm"):
        found = votes(teacher, student, teacher_share=0.5, score=score)
        assert not found.score.requires_grad
        assert not found.confidence.requires_grad
    made = selector()
    chosen = made.student_batch(batch(teacher))
    assert chosen.weights is not None
    assert not chosen.weights.requires_grad


def test_votes_that_make_no_sense_are_refused():
    logits = draw(2, K)
    with pytest.raises(RecipeError, match="got score 'softmax', expected"):
        votes(logits, None, teacher_share=1.0, score="softmax")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"got a teacher's share of 1.5"):
        votes(logits, logits, teacher_share=1.5)
    with pytest.raises(ContractError, match="no logits of a student whose vote counts"):
        votes(logits, None, teacher_share=0.9)


# Thresholds


@pytest.mark.parametrize("confidence", [1.2 / K + 1e-6, 0.5, 0.99])
def test_equal_confidences_are_all_kept(confidence):
    made = selector()
    classes = [row % K for row in range(40)]
    for _ in range(150):
        same = batch(sure([confidence] * 40, classes))
        assert len(made.student_batch(same)) == 40


def test_below_the_floor_none_is_kept_but_the_best_tenth():
    made = selector()
    confidences = torch.linspace(0.26, 0.29, 30).tolist()
    assert max(confidences) < 1.2 / K
    found = kept_rows(made, batch(sure(confidences, [0] * 30)))
    assert found == [27, 28, 29]


def test_a_batch_is_never_left_with_fewer_than_two_rows():
    made = selector()
    assert kept_rows(made, batch(sure([0.9, 0.26, 0.27, 0.28], [0, 1, 2, 3]))) == [0, 3]
    assert kept_rows(made, batch(sure([0.26], [1]))) == [0]


def test_each_class_has_its_own_threshold():
    made = selector(momentum=0.5)
    # Class 0 is always sure, class 1 never.
    for _ in range(10):
        made.student_batch(batch(sure([0.9] * 10 + [0.4] * 10, [0] * 10 + [1] * 10)))
    expected = torch.tensor([0.9, 0.4, 1 / K, 1 / K])
    torch.testing.assert_close(made.thresholds(), expected)
    found = kept_rows(made, batch(sure([0.8, 0.95, 0.5, 0.35], [0, 0, 1, 1])))
    assert found == [1, 2]


def test_a_threshold_counts_once_enough_rows_of_its_class_were_seen():
    made = selector(warm_rows=50)
    for _ in range(4):
        made.student_batch(batch(sure([0.9] * 12, [2] * 12)))
    assert torch.equal(made.thresholds(), torch.full((K,), 1 / K))
    made.student_batch(batch(sure([0.9, 0.9], [2, 2])))
    assert made.thresholds()[2].item() == pytest.approx(0.9, rel=1e-6)
    # Of a score with another range nothing is asked so far.
    assert not selector(score="energy").thresholds().any()


def test_a_threshold_is_the_mean_of_batches_and_later_an_exponential_one():
    made, plain = selector(momentum=0.75, warm_rows=0), []
    slow = 0.0
    for step in range(12):
        confidence = 0.4 + 0.04 * step
        made.student_batch(batch(sure([confidence, confidence], [1, 1])))
        plain.append(confidence)
        rate = max(1 / (step + 1), 0.25)
        slow += rate * (confidence - slow)
        if step < 4:
            assert slow == pytest.approx(sum(plain) / len(plain))
        assert made.thresholds()[1].item() == pytest.approx(slow, rel=1e-5)
    # The other classes were not touched.
    assert not made.thresholds()[[0, 2, 3]].any()


def test_to_be_surer_never_costs_a_row_its_place():
    made = selector(warm_rows=0)
    made.student_batch(batch(sure([0.5, 0.6, 0.7, 0.8], [0, 1, 2, 3])))
    confidences, classes = [0.3 + 0.03 * row for row in range(20)], [row % K for row in range(20)]
    for row in range(20):
        stays = []
        for added in (0.0, 0.01, 0.05, 0.1):
            changed = list(confidences)
            changed[row] += added
            found = made.look(batch(sure(changed, classes)))
            stays.append(bool(made.kept(found)[row]))
        assert stays == sorted(stays)


def test_a_stricter_selector_keeps_less():
    counts = []
    for strictness in (0.8, 1.0, 1.2):
        made = selector(strictness=strictness, warm_rows=0)
        rows = batch(draw(200, K))
        made.student_batch(rows)
        counts.append(len(made.student_batch(rows)))
    assert counts[0] > counts[1] > counts[2] > 0


def test_what_is_kept_is_decided_by_earlier_batches_alone():
    made = selector(warm_rows=0)
    found = made.look(batch(draw(30, K)))
    before = made.thresholds().clone()
    first = made.kept(found)
    assert torch.equal(made.thresholds(), before)
    assert torch.equal(made.kept(found), first)


def test_the_student_is_asked_in_eval_mode_without_gradient_and_only_if_it_counts():
    student = Constant()
    made = InstanceSelector(student, K)
    made.student_batch(batch(draw(6, K)))
    assert student.asked == []
    made.teacher_share = 0.5
    made.student_batch(batch(draw(6, K), draw(6, K, seed=1)))
    assert student.asked == [(False, False)]
    assert student.training
    assert student.dropout.training


# Weights


def test_kept_rows_weigh_by_their_score_with_mean_one():
    made = selector(warm_rows=0)
    confidences, classes = [0.9, 0.5, 0.26, 0.7, 0.27], [0, 1, 2, 3, 0]
    found = made.student_batch(batch(sure(confidences, classes)))
    assert found.weights is not None
    assert len(found) == 3
    wanted = torch.tensor([0.9, 0.5, 0.7]) / 0.7
    torch.testing.assert_close(found.weights, wanted)
    assert found.weights.sum().item() == pytest.approx(len(found), rel=1e-6)


def test_hard_weights_are_none_at_all():
    found = selector(soft=False).student_batch(batch(draw(20, K)))
    assert found.weights is None
    assert torch.equal(mean_one(torch.zeros(3)), torch.ones(3))


def test_weights_multiply_onto_those_of_others_and_rows_keep_what_belongs_to_them():
    made, features = selector(warm_rows=0), torch.arange(5.0)
    one = batch(sure([0.9, 0.26, 0.27, 0.45, 0.9], [0, 1, 2, 3, 0]), features=features)
    alone = made.student_batch(one)
    others = one.weighted(torch.tensor([2.0, 9.0, 9.0, -1.0, 0.0]))
    found = made.student_batch(others)
    assert found.weights is not None
    assert alone.weights is not None
    torch.testing.assert_close(found.weights, torch.tensor([2.0, -1.0, 0.0]) * alone.weights)
    assert torch.equal(found.extra["features"], torch.tensor([0.0, 3.0, 4.0]))
    assert torch.equal(found.extra["teacher"], one.extra["teacher"][[0, 3, 4]])
    # What was handed in stays whole.
    assert len(one) == 5
    assert one.weights is None


def test_looks_are_noted_by_row_number():
    made, record = selector(), Selection(9)
    rows = torch.tensor([8, 3, 3, 0])
    one = batch(sure([0.9, 0.26, 0.9, 0.27], [0, 1, 2, 3]), row=rows)
    found = made.student_batch(one, record)
    assert record.seen.tolist() == [1, 0, 0, 2, 0, 0, 0, 0, 1]
    assert record.kept.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert set(found.extra) == {"teacher"}


def test_state_is_all_there_is():
    made, other = selector(warm_rows=10), selector(warm_rows=10)
    for seed in range(5):
        made.student_batch(batch(draw(20, K, seed=seed)))
    other.load_state_dict(made.state_dict())
    following = batch(draw(20, K, seed=9))
    for _ in range(3):
        one, two = made.student_batch(following), other.student_batch(following)
        assert torch.equal(one.extra["teacher"], two.extra["teacher"])
    assert torch.equal(made.thresholds(), other.thresholds())


def test_a_batch_without_the_teachers_answers_is_refused():
    with pytest.raises(ContractError, match=r"expected its logits as extra\['teacher'\]"):
        selector().student_batch(Batch(draw(3, K)))


# Shares of a heap


def heap(scores: list[float], classes: list[int]) -> Votes:
    values = torch.tensor(scores)
    return Votes(torch.tensor(classes), values, values)


def test_of_each_class_the_best_part_is_kept():
    found = heap([0.9, 0.3, 0.5, 0.7, 0.8, 0.4, 0.6], [0, 0, 0, 2, 2, 2, 2])
    keep = top_shares(found, share=0.5)
    # Two of three, rounded up, and two of four.
    assert keep.tolist() == [True, False, True, True, True, False, False]
    assert top_shares(found, share=1.0).all()


def test_without_classes_the_best_part_of_all_is_kept():
    found = heap([0.9, 0.3, 0.5, 0.7, 0.8, 0.4, 0.6], [0, 0, 0, 2, 2, 2, 2])
    keep = top_shares(found, share=0.4, per_class=False)
    assert keep.nonzero()[:, 0].tolist() == [0, 3, 4]


def test_shares_agree_with_a_loop_over_classes():
    score, classes = torch.rand(300, generator=rng()), torch.randint(7, (300,), generator=rng(1))
    score[::3] = score[0]  # ties
    keep = top_shares(Votes(classes, score, score), share=0.3)
    for label in range(7):
        rows = (classes == label).nonzero()[:, 0].tolist()
        best = sorted(rows, key=lambda row: (-score[row].item(), row))
        wanted = best[: math.ceil(0.3 * len(rows))]
        assert sorted(wanted) == [row for row in rows if keep[row]]


def test_a_quota_keeps_classes_from_crowding_out_the_others():
    score = torch.rand(400, generator=rng())
    classes = torch.where(torch.arange(400) < 340, 0, 1 + torch.arange(400) % 3)
    found = Votes(classes, score, score)
    free = torch.bincount(classes[top_shares(found, share=0.5)])
    assert free.tolist() == [170, 10, 10, 10]
    # Half of 400 over 4 classes is 50, and one and a half times that 75.
    held = top_shares(found, share=0.5, quota=1.5)
    assert torch.bincount(classes[held]).tolist() == [75, 10, 10, 10]
    best = score[:340].topk(75).indices
    assert held[best].all()


def test_the_floor_holds_here_as_well_and_nothing_is_ever_empty():
    found = heap([0.9, 0.2, 0.8, 0.1], [0, 0, 1, 1])
    keep = top_shares(found, share=1.0, floor=0.3)
    assert keep.tolist() == [True, False, True, False]
    keep = top_shares(found, share=1.0, floor=0.95)
    assert keep.tolist() == [True, False, True, False]


@pytest.mark.parametrize(("share", "quota"), [(0.0, 0.0), (1.1, 0.0), (0.5, -1.0)])
def test_shares_that_are_none_are_refused(share, quota):
    with pytest.raises(RecipeError, match=r"expected a share in \(0, 1\]"):
        top_shares(heap([0.5], [0]), share=share, quota=quota)


def test_shuffled_rows_turn_up_equally_often():
    counts = torch.bincount(shuffled(7, 30, rng()), minlength=7)
    assert counts.sum() == 30
    assert set(counts.tolist()) == {4, 5}
    assert shuffled(7, 7, rng()).sort().values.tolist() == list(range(7))
    assert not torch.equal(shuffled(50, 50, rng()), shuffled(50, 50, rng(1)))


# Batches


def batches(rows: int = 40, size: int = 8, **settings) -> tuple[ChosenBatches, list[bool], Tensor]:
    """What is chosen of logits as inputs; whether each answer was for a batch that is kept."""
    logits, asked = draw(rows, K), []

    def answered(inputs: Tensor, generator: torch.Generator | None) -> Batch:
        asked.append(generator is not None)
        return Batch(inputs, extra={"teacher": inputs})

    source = TensorSource(logits, origin="foreign", name="heap")
    made = ChosenBatches(source, selector(**settings), answered, batch_size=size)
    return made, asked, logits


def test_without_selection_rows_are_those_that_the_source_draws():
    made, _, logits = batches()
    found = list(made.drawn(3, rng(5), select=False))
    source, again = TensorSource(logits, origin="foreign", name="heap"), rng(5)
    for one in found:
        assert torch.equal(one.inputs, source.draw(8, again))
        assert one.weights is None
    assert made.record.seen.sum() == made.record.kept.sum() == 24


def test_batches_are_cut_and_every_look_is_noted():
    made, _, logits = batches()
    found = list(made.drawn(20, rng(5)))
    assert made.record.seen.sum() == 160
    assert made.record.kept.sum() == sum(map(len, found)) < 160
    assert all(set(one.extra) == {"teacher"} for one in found)
    known = {tuple(row) for row in logits.tolist()}
    assert all(tuple(row) in known for one in found for row in one.inputs.tolist())


def test_an_epoch_looks_first_and_learns_from_the_best_alone():
    made, asked, logits = batches()
    found = list(made.best(5, 10, rng(5), lambda seen: top_shares(seen, share=0.5)))
    assert asked == [False] * 10 + [True] * 5
    assert [len(one) for one in found] == [8] * 5
    # 80 looks at 40 rows: each twice.
    assert made.record.seen.tolist() == [2] * 40
    taken = made.record.kept > 0
    learned = {tuple(row) for one in found for row in one.inputs.tolist()}
    assert learned <= {tuple(row) for row in logits[taken].tolist()}
    # 40 places for the rows that stay, whose looks count apart.
    assert len(learned) >= 15
    score, classes = logits.softmax(1).max(1)
    for label in range(K):
        inside, outside = score[taken & (classes == label)], score[~taken & (classes == label)]
        assert inside.min() > outside.max()
    for one in found:
        assert one.weights is not None
        torch.testing.assert_close(one.weights, mean_one(one.inputs.softmax(1).max(1).values))


def test_a_source_whose_rows_have_no_numbers_is_refused():
    with pytest.raises(RecipeError, match=r"got NoiseSource 'normal noise', whose rows have no"):
        ChosenBatches(
            NoiseSource(InputSpec.image(1, 4, 4)), selector(), lambda x, g: Batch(x), batch_size=4
        )


def test_a_batch_that_is_larger_than_the_heap_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        batches(rows=40, size=40)
        assert not caplog.records
        batches(rows=40, size=41)
    assert "batch_size is 41 and 'heap' holds 40 rows" in caplog.text
