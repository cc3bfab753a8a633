"""What the diagnosis says about runs that learn and about runs that do not."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from vestige.core import modes
from vestige.core.types import Loss, Prediction
from vestige.methods.dfad import DFADConfig
from vestige.methods.kd import KDConfig
from vestige.training.diagnosis import Diagnosis, RoundRecord, train_eval_agreement

CLASSES = 10


def diagnosed(records: list[RoundRecord]) -> Diagnosis:
    diagnosis = Diagnosis(CLASSES)
    diagnosis.records = records
    return diagnosis


def codes(records: list[RoundRecord]) -> set[str]:
    return {finding.code for finding in diagnosed(records).findings()}


def even(total: int = 5000) -> tuple[int, ...]:
    return (total // CLASSES,) * CLASSES


def mostly(label: int, total: int = 512) -> tuple[int, ...]:
    """421 of 512 answers in one class: what issue 2 measured of a collapsed generator."""
    top = int(0.82 * total)
    return tuple(top if k == label else (total - top) // (CLASSES - 1) for k in range(CLASSES))


def healthy(count: int = 20) -> list[RoundRecord]:
    """Noisy, as real runs are, and rising in the first quarter."""
    rng = torch.Generator().manual_seed(0)
    records = []
    for index in range(count):
        answers = torch.randint(CLASSES, (2000,), generator=rng)
        agreement = min(0.9, 0.2 + 0.2 * index) + 0.03 * float(torch.randn((), generator=rng))
        counts = torch.bincount(answers, minlength=CLASSES).tolist()
        records.append(RoundRecord(agreement, tuple(counts), 0.97))
    return records


# What is counted


def test_updates_that_only_replay_tell_no_agreement():
    answers = Prediction(torch.eye(CLASSES)[[1, 2]])
    wrong = Prediction(torch.eye(CLASSES)[[3, 3]])

    def update(student: Prediction, fresh: list[bool] | None) -> Loss:
        rows = None if fresh is None else torch.tensor(fresh)
        return Loss({}, torch.zeros(()), torch.zeros(2, 1), answers, student, rows)

    diagnosis = Diagnosis(CLASSES)
    for student, fresh in ((answers, None), (wrong, [False, False]), (answers, [True, False])):
        diagnosis.observe(update(student, fresh))
    record = diagnosis.end_round(None)
    assert record is not None and record.agreement == 1.0
    assert sum(record.classes) == 3
    # A round of nothing else has nothing to say, and leaves nothing for the next.
    diagnosis.observe(update(wrong, [False, False]))
    assert diagnosis.end_round(None) is None
    assert diagnosis.records == [record]
    diagnosis.observe(update(wrong, None))
    record = diagnosis.end_round(None)
    assert record is not None and record.agreement == 0.0


def test_rows_that_are_replayed_are_not_counted():
    new, old = torch.eye(CLASSES)[[1, 2]], torch.eye(CLASSES)[[3, 3]]
    teacher = torch.cat([new, old])
    # Right on one of the two new rows, and on all that were seen before.
    student = torch.cat([new.flip(0)[:1], new[1:], old])
    fresh = torch.tensor([True, True, False, False])
    diagnosis = Diagnosis(CLASSES)
    loss = Loss({}, torch.zeros(()), None, Prediction(teacher), Prediction(student), fresh=fresh)
    diagnosis.observe(loss)
    diagnosis.observe(loss.detach())
    record = diagnosis.end_round(None)
    assert record.agreement == 0.5
    assert record.classes == (0, 2, 2, 0, 0, 0, 0, 0, 0, 0)


# Whole runs


def test_a_healthy_run_is_not_disturbed():
    assert codes(healthy()) == set()


def test_a_small_sample_of_an_even_source_is_not_called_collapsed_or_wandering():
    # Unevenness by chance: 32 inputs in 10 classes.
    rng = torch.Generator().manual_seed(1)
    for _ in range(20):
        records = [
            RoundRecord(
                0.9,
                tuple(
                    torch.bincount(
                        torch.randint(CLASSES, (32,), generator=rng), minlength=CLASSES
                    ).tolist()
                ),
                0.97,
            )
            for _ in range(12)
        ]
        assert codes(records) == set()


def test_a_source_that_is_stuck_in_one_class_is_named():
    records = [RoundRecord(0.95, mostly(4), 0.97)] * 12
    assert codes(records) == {"few-classes"}
    (finding,) = diagnosed(records).findings()
    assert "most often class 4" in finding.message
    assert re.search(r"about \d\.\d of 10 classes", finding.message)


def test_the_collapse_trap_of_issue_2_is_named():
    # The generator moves from class to class and agreement swings: 0.89, 0.53, 0.09, 0.68.
    labels, agreements = (4, 7, 2, 9), (0.89, 0.53, 0.09, 0.68)
    records = [
        RoundRecord(agreements[index % 4], mostly(labels[index % 4]), 0.97) for index in range(16)
    ]
    assert codes(records) == {"few-classes", "wandering-source", "swinging-agreement"}


def test_a_source_that_wanders_over_all_classes_in_time_is_still_wandering():
    # On average over the run it is even; only round to round it is not.
    records = [RoundRecord(0.9, mostly(index % CLASSES), 0.97) for index in range(20)]
    assert "wandering-source" in codes(records)


def test_swinging_agreement_alone_is_named():
    records = [RoundRecord((0.9, 0.6)[index % 2], even(), 0.97) for index in range(12)]
    assert codes(records) == {"swinging-agreement"}
    (finding,) = diagnosed(records).findings()
    assert "60%" in finding.message
    assert "90%" in finding.message


def test_a_student_that_does_not_follow_is_named():
    assert codes([RoundRecord(0.2, even(), 0.97)] * 12) == {"low-agreement"}


def test_batchnorm_statistics_that_do_not_fit_are_named():
    assert codes([RoundRecord(0.9, even(), 0.3)] * 12) == {"modes-differ"}
    assert codes([RoundRecord(0.9, even(), None)] * 12) == set()


def test_the_start_of_a_run_is_not_held_against_it():
    early = [RoundRecord(0.1, mostly(index), 0.1) for index in range(4)]
    assert codes([*early, *healthy(20)[4:]]) == set()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_run_too_short_to_judge_is_not_judged(count):
    assert codes([RoundRecord(0.0, mostly(1), 0.0)] * count) == set()


def bad_runs() -> list[list[RoundRecord]]:
    return [
        [RoundRecord((0.9, 0.1)[index % 2], mostly(index % 10), 0.3) for index in range(12)],
        [RoundRecord(0.1, even(), 0.97)] * 12,
    ]


def test_every_finding_says_which_knob_to_turn_and_the_knob_exists():
    found = {f.code: f for records in bad_runs() for f in diagnosed(records).findings()}
    assert len(found) == 5
    for finding in found.values():
        named = re.findall(r"config\.(\w+)", finding.knob)
        assert named
        assert set(named) <= set(DFADConfig.model_fields)
        assert finding.level == "warning"
        assert finding.as_dict() == {
            "code": finding.code,
            "level": finding.level,
            "message": finding.message,
            "knob": finding.knob,
        }


def test_only_knobs_that_the_method_has_are_named():
    for records in bad_runs():
        for finding in diagnosed(records).findings(KDConfig.model_fields):
            named = re.findall(r"config\.(\w+)", finding.knob)
            assert set(named) <= set(KDConfig.model_fields)
            assert finding.knob


# What is collected


def update(teacher: list[int], student: list[int], classes: int = CLASSES) -> Loss:
    def logits(labels: list[int]) -> Prediction:
        return Prediction(torch.nn.functional.one_hot(torch.tensor(labels), classes).float())

    inputs = torch.zeros(len(teacher), 1, 8, 8)
    return Loss({}, torch.zeros(()), inputs, logits(teacher), logits(student))


def test_a_round_counts_answers_and_agreement():
    diagnosis = Diagnosis(CLASSES)
    diagnosis.observe(update([0, 1, 2, 2], [0, 1, 2, 3]))
    diagnosis.observe(update([9, 9, 9, 2], [9, 0, 0, 0]))
    record = diagnosis.end_round(None)
    assert record == RoundRecord((3 / 4 + 1 / 4) / 2, (1, 1, 3, 0, 0, 0, 0, 0, 0, 3))
    assert diagnosis.records == [record]
    diagnosis.observe(update([5], [5]))
    assert diagnosis.end_round(None) == RoundRecord(1.0, (0, 0, 0, 0, 0, 1, 0, 0, 0, 0))
    assert diagnosis.end_round(None) is None


def test_dense_answers_are_counted_per_pixel():
    diagnosis = Diagnosis(3)
    teacher, student = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    teacher[:, 2] = 1
    student[0, 2] = 1
    student[1, 1] = 1
    loss = Loss({}, torch.zeros(()), None, Prediction(teacher), Prediction(student))
    diagnosis.observe(loss)
    assert diagnosis.end_round(None) == RoundRecord(0.5, (0, 0, 32))


def test_pixels_need_not_be_of_all_classes_and_a_checkpoint_remembers_it():
    def ran(*, dense: bool) -> Diagnosis:
        diagnosis = Diagnosis(CLASSES)
        shape = (1000, CLASSES, 1, 1) if dense else (1000, CLASSES)
        answers = torch.zeros(shape)
        answers[:, 3] = 1
        for _ in range(8):
            both = Prediction(answers)
            diagnosis.observe(Loss({}, torch.zeros(()), torch.zeros(1000, 1), both, both))
            diagnosis.end_round(None)
        return diagnosis

    assert [finding.code for finding in ran(dense=False).findings()] == ["few-classes"]
    assert ran(dense=True).findings() == []
    again = Diagnosis(CLASSES)
    again.load_state_dict(ran(dense=True).state_dict())
    assert again.findings() == []
    # One from before there were such answers.
    again.load_state_dict({"records": ran(dense=False).state_dict()["records"]})
    assert [finding.code for finding in again.findings()] == ["few-classes"]


def test_what_is_no_classification_is_left_alone():
    diagnosis = Diagnosis(CLASSES)
    diagnosis.observe(Loss({}, torch.zeros(())))
    diagnosis.observe(update([0, 1], [0, 1], classes=7))
    assert diagnosis.end_round(None) is None
    assert diagnosis.records == []


def test_records_come_back_from_a_checkpoint():
    diagnosis, other = diagnosed(healthy()), Diagnosis(CLASSES)
    other.observe(update([1], [1]))
    other.load_state_dict(diagnosis.state_dict())
    assert other.records == diagnosis.records
    assert other.end_round(None) is None


# Train against eval mode


class Parity(nn.Module):
    """Says class 0 in train mode; in eval mode class 1 for the inputs above 0."""

    def forward(self, inputs: Tensor) -> Tensor:
        first = torch.ones(len(inputs))
        second = torch.zeros(len(inputs)) if self.training else 2 * (inputs[:, 0] > 0).float()
        return torch.stack([first, second], 1)


def test_agreement_is_the_share_of_equal_classes():
    inputs = torch.tensor([[-1.0], [-1.0], [-1.0], [2.0]])
    assert train_eval_agreement(Parity(), inputs) == 0.75


def test_unfit_running_statistics_show(tiny_student):
    inputs = torch.randn(256, 1, 8, 8)
    fit = copy.deepcopy(tiny_student).train()
    fit[1].momentum = 1.0
    fit(inputs)
    # The running variance is the unbiased one; a few rows lie on a border.
    assert train_eval_agreement(fit, inputs) > 0.98
    fit[1].running_mean += 20
    assert train_eval_agreement(fit, inputs) < 0.8


@pytest.mark.parametrize("frozen", [False, True])
def test_measuring_changes_nothing(dropout_student, frozen):
    dropout_student.train()
    if frozen:
        dropout_student[1].eval()
    before = copy.deepcopy(dropout_student.state_dict())
    flags, chance = modes.flags(dropout_student), torch.get_rng_state()
    train_eval_agreement(dropout_student, 5 + torch.ones(16, 1, 8, 8))
    after = dropout_student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes.flags(dropout_student) == flags
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(parameter.grad is None for parameter in dropout_student.parameters())


def test_flags_come_back_after_an_error(tiny_student):
    tiny_student.train()
    tiny_student[1].eval()
    flags = modes.flags(tiny_student)
    with pytest.raises(RuntimeError):
        train_eval_agreement(tiny_student, torch.zeros(2, 5, 8, 8))
    assert modes.flags(tiny_student) == flags


def test_coverage_is_over_the_whole_run():
    assert diagnosed([]).coverage() is None
    spread = diagnosed([RoundRecord(0.5, even())]).coverage()
    assert spread == pytest.approx({"largest": 0.1, "effective": 10.0})
    # Two rounds of one class each are an even half of two classes.
    single = [
        RoundRecord(0.5, tuple(100 * (k == label) for k in range(CLASSES))) for label in (3, 7)
    ]
    assert diagnosed(single).coverage() == pytest.approx({"largest": 0.5, "effective": 2.0})
