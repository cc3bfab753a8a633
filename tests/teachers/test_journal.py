"""A run that is killed and resumed pays for each question once, and ends as if nothing happened."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vestige
from vestige.core.protocols import KeepsAnswers
from vestige.core.types import InputSpec
from vestige.errors import Interrupted, QueryBudgetExceeded
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.teachers.ensemble import BlackBoxEnsemble
from vestige.teachers.journal import Journal
from vestige.teachers.loading import fingerprint

SPEC = InputSpec.image(1, 8, 8)
FIRST, SECOND, ANSWER = torch.zeros(3, 2), torch.ones(3, 2), torch.tensor([[1.0, 2.0]])


class Api:
    """Counts what it is really asked, and may be stopped like a process that is killed."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.network[1].reset_parameters()
        self.rows, self.stop_at = 0, stop_at

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.stop_at is not None and self.rows >= self.stop_at:
            raise KeyboardInterrupt
        self.rows += len(inputs)
        return self.network(inputs)


def test_a_question_is_known_at_its_place_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a", resume=False)
    journal.ask(0, 3, FIRST)
    assert journal.find(0, FIRST) is None  # asked, not answered
    journal.answered(0, FIRST, ANSWER)
    again = Journal(tmp_path / "a", resume=True)
    assert torch.equal(again.find(0, FIRST), ANSWER)
    assert again.find(3, FIRST) is None and again.find(0, SECOND) is None
    assert again.find(0, FIRST.double()) is None
    assert Journal(tmp_path / "a", resume=False).find(0, FIRST) is None


def test_what_was_paid_in_vain_is_told_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a", resume=False)
    for queries in (0, 3, 6):
        journal.ask(queries, 3, FIRST)
    assert (journal.lost(3), journal.lost(3), journal.lost(0)) == (6, 0, 3)


@pytest.mark.parametrize("cut", [1, 60, 100])
def test_a_record_that_a_kill_cut_off_hides_nothing_else(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path / "a", resume=False)
    for queries, question in ((0, FIRST), (3, SECOND)):
        journal.ask(queries, 3, question)
        journal.answered(queries, question, ANSWER)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-cut])
    again = Journal(tmp_path / "a", resume=True)
    assert torch.equal(again.find(0, FIRST), ANSWER)
    assert again.find(3, SECOND) is None
    assert again.lost(3) == 3  # that it was asked is known from the record before
    again.ask(3, 3, SECOND)
    again.answered(3, SECOND, ANSWER)
    assert torch.equal(Journal(tmp_path / "a", resume=True).find(3, SECOND), ANSWER)


def test_it_keeps_what_two_checkpoints_need(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a", resume=False)
    sizes = []
    for index in range(6):
        journal.ask(3 * index, 3, FIRST)
        journal.answered(3 * index, FIRST, ANSWER)
        journal.checkpointed(3 * (index + 1))
        sizes.append((tmp_path / "a").stat().st_size)
    assert len(set(sizes[1:])) == 1  # it does not grow
    again = Journal(tmp_path / "a", resume=True)
    known = [index for index in range(6) if again.find(3 * index, FIRST) is not None]
    assert known == [5]  # asked since the checkpoint before the last


def distill(api: Api, out: Path, *, resume: bool = False, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        # Dropout and BatchNorm: state that a resumed run must find as it was.
        student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        student.extend([nn.Dropout(0.2), nn.Linear(72, 3)])
    teacher = changes.pop("teacher", None) or BlackBoxTeacher(api, **changes)
    return vestige.distill(
        teacher,
        student,
        method="kd",
        spec=SPEC,
        num_classes=3,
        config={"rounds": 3, "iterations": 5, "batch_size": 4},
        sources={"inputs": torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))},
        out=out,
        resume=resume,
        device="cpu",
        progress=False,
    )


def test_a_killed_run_asks_nothing_twice_and_ends_the_same(tmp_path: Path) -> None:
    whole = Api()
    expected = distill(whole, tmp_path / "whole")
    assert whole.rows == expected.summary["teacher_queries"]
    stopped = Api(stop_at=whole.rows // 2)
    with pytest.raises(Interrupted):
        distill(stopped, tmp_path / "run")
    resumed = Api()
    report = distill(resumed, tmp_path / "run", resume=True)
    assert fingerprint(report.student) == fingerprint(expected.student)
    assert stopped.rows + resumed.rows == whole.rows
    # The batch of 4 that was on its way when the run was stopped may have been charged.
    assert report.summary["teacher_queries"] == whole.rows + 4
    assert 0 < resumed.rows < whole.rows - whole.rows // 3


def test_a_run_that_computes_something_else_is_charged_for_both(tmp_path: Path) -> None:
    api = Api()
    teacher = BlackBoxTeacher(api)
    assert isinstance(teacher, KeepsAnswers)
    teacher.keep_answers(tmp_path / "a", resume=False)
    teacher.checkpointed()
    for value in (1.0, 2.0):
        teacher(torch.full((4, 1, 8, 8), value))
    resumed = BlackBoxTeacher(api)
    resumed.keep_answers(tmp_path / "a", resume=True)
    resumed(torch.full((4, 1, 8, 8), 1.0))
    assert (api.rows, resumed.queries) == (8, 4)
    resumed(torch.full((4, 1, 8, 8), 2.5))
    assert (api.rows, resumed.queries) == (12, 12)


def test_a_spent_budget_keeps_the_checkpoint_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    whole = Api()
    expected = distill(whole, tmp_path / "whole")
    short = Api()
    with pytest.raises(QueryBudgetExceeded, match=r"are used; .* last checkpoint, at step \d+"):
        distill(short, tmp_path / "run", budget=whole.rows // 2 + 1)
    resumed = Api()
    report = distill(resumed, tmp_path / "run", resume=True, budget=whole.rows)
    assert fingerprint(report.student) == fingerprint(expected.student)
    assert short.rows + resumed.rows == whole.rows


def test_members_of_an_ensemble_have_a_file_each(tmp_path: Path) -> None:
    apis = [Api(), Api()]

    def ensemble() -> BlackBoxEnsemble:
        return BlackBoxEnsemble([BlackBoxTeacher(api) for api in apis])

    expected = distill(apis[0], tmp_path / "whole", teacher=ensemble())
    rows = apis[0].rows
    assert expected.summary["teacher_queries"] == 2 * rows
    apis = [Api(), Api(stop_at=rows // 2)]
    with pytest.raises(Interrupted):
        distill(apis[0], tmp_path / "run", teacher=ensemble())
    apis[1].stop_at = None
    report = distill(apis[0], tmp_path / "run", resume=True, teacher=ensemble())
    assert fingerprint(report.student) == fingerprint(expected.student)
    assert [api.rows for api in apis] == [rows, rows]
