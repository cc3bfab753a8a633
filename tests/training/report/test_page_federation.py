"""The section of the page: from whatever federated.json holds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vestige.training.report.page import render
from vestige.training.report.page_federation import federation_view, size_of
from vestige.training.report.run_folder import read_run
from vestige.training.report.tables import result_figures

FOUND: dict[str, Any] = {
    "schema": 1,
    "protocol": 1,
    "engine": "in-process",
    "clients": 3,
    "holds": {
        "partition": "dirichlet-by-class",
        "alpha": 0.05,
        "share": 0.5,
        "classes": ["cat <b>", "dog"],
        "counts": [[300, 0], [100, 100], [0, 0]],
    },
    "rounds": [
        {"round": 0, "asked": 3, "answered": 2, "rejected": {"not_finite": 1}, "void": False,
         "bytes_down": 3000, "bytes_up": 2000, "seconds": 0.5},
        {"round": 1, "asked": 3, "answered": 1, "rejected": {"late": 2}, "void": True,
         "bytes_down": 3000, "bytes_up": 1000, "seconds": 0.7},
    ],
    "leaves": [{"kind": "train", "group": "model", "arrays": 10, "bytes": 106000}],
    "numbers": ["examples", "cross_entropy"],
    "clients_at_end": [
        {"partition": 0, "examples": 300, "test_examples": 50, "accuracy": 0.9,
         "balanced_accuracy": 0.8},
        {"partition": 1, "examples": 200, "test_examples": 40, "accuracy": 0.5,
         "balanced_accuracy": 0.5},
        {"partition": 2, "examples": 0, "test_examples": 0, "accuracy": None,
         "balanced_accuracy": None},
    ],
    "scores": {"mean": 0.7, "std": 0.2, "worst_decile": 0.5, "jain": 0.9245},
    "last_rounds": {"rounds": 10, "accuracy": 0.8125},
}  # fmt: skip


def folder(tmp_path: Path, found: object) -> Path:
    (tmp_path / "federated.json").write_text(json.dumps(found))
    return tmp_path


def text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " ").split())


def shown(tmp_path: Path, found: object) -> str:
    return text(render([read_run(folder(tmp_path, found))]))


def test_everything_is_told(tmp_path: Path) -> None:
    page = shown(tmp_path, FOUND)
    for told in (
        "3 clients, on the engine in-process. Examples were dealt out by dirichlet-by-class "
        "(alpha 0.05, share 0.5).",
        "Mean of clients 70.0 %",
        "Lowest tenth 50.0 %",
        "Spread 20.0 points",
        "Jain’s index 0.924",
        "Mean of the global network over the last 10 evaluations: test accuracy 81.2 %.",
        # Sizes 300, 200 and 0; the mix is that of the two that hold any.
        "500 examples, from 0 to 300 at a client, 200 in the middle. 1 client has none.",
        "some of 1.5 classes, as mixed as 1.5 in equal parts; its largest is 75.0 %",
        "cat &lt;b&gt;",
        "And as numbers: examples, cross entropy.",
        "train model 10 106 kB",
    ):
        assert told in page


def test_networks_of_the_clients_own_are_not_called_one_student(tmp_path: Path) -> None:
    summary = {
        "metric": "accuracy",
        "result": {"kind": "personal models", "path": "clients"},
        "student": {"score": 0.9, "best_score": 0.9, "parameters": 1200},
        "teacher": None,
        "diagnosis": [],
        "federated": {"clients": 3},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = shown(tmp_path, FOUND)
    assert "The clients’ own networks, 1.2k parameters each, reach 90.0 % test accuracy" in page
    assert "Mean of the clients’ own networks over the last 10 evaluations" in page
    for absent in ("A student", "Teacher –", "Diagnosis", "the global network"):
        assert absent not in page, absent
    figures = dict(result_figures(summary))
    assert figures["clients' mean accuracy, last step"] == "90.0 %"
    # One network for all is a student, and has no teacher either.
    (tmp_path / "summary.json").write_text(
        json.dumps({**summary, "result": {"kind": "global model", "path": "student.safetensors"}})
    )
    page = shown(tmp_path, FOUND)
    assert "A student with 1.2k parameters reaches 90.0 % test accuracy" in page
    assert "Mean of the global network" in page


def test_rounds_are_summed_and_not_listed(tmp_path: Path) -> None:
    page = shown(tmp_path, FOUND)
    assert "2 rounds, 1 of them void: too few answered, and all stayed as it was." in page
    for row in (
        "Clients asked 6 3 ",
        "Answers that counted 3 1.5 ",
        "Rejected: not finite 1 0.5 ",
        "Rejected: late 2 1 ",
        "Bytes to clients 6.0 kB 3.0 kB",
        "Bytes from clients 3.0 kB 1.5 kB",
        "Seconds 1.2 0.6 ",
    ):
        assert row in page
    long = shown(tmp_path, {**FOUND, "rounds": FOUND["rounds"] * 500})
    assert len(long) < len(page) + 40 and "1,000 rounds, 500 of them void" in long


def test_clients_that_fare_worst_are_named_with_what_they_hold(tmp_path: Path) -> None:
    # Client, accuracy, classes, examples, test examples; a client without a test part is none.
    view = federation_view(read_run(folder(tmp_path, FOUND)))
    assert view is not None
    rows = [
        [row["name"], *(row[key]["text"] for key in ("accuracy", "classes", "examples"))]
        for row in view["lowest"]
    ]
    assert rows == [["1", "50.0 %", "2", "200"], ["0", "90.0 %", "1", "300"]]
    assert "client, by rank" in shown(tmp_path, FOUND)


def test_many_clients_stay_one_page(tmp_path: Path) -> None:
    holds = {**FOUND["holds"], "counts": [[1 + n % 7, n % 3] for n in range(2000)]}
    ends = [{**FOUND["clients_at_end"][0], "partition": n} for n in range(2000)]
    page = render([read_run(folder(tmp_path, {**FOUND, "holds": holds, "clients_at_end": ends}))])
    assert "Each column is the mean of neighbours" in page and "<circle" not in page
    assert "Examples of a client, from most to least" in page
    assert len(page) < 300_000
    # Too many classes for a strip: a picture.
    holds = {**holds, "counts": [[n % 5 + k % 3 for k in range(40)] for n in range(60)]}
    page = render([read_run(folder(tmp_path, {**FOUND, "holds": holds}))])
    assert 'alt="Shares of the classes' in page and "data:image/png" in page


def test_clients_of_one_size_are_told_so(tmp_path: Path) -> None:
    holds = {**FOUND["holds"], "counts": [[n % 2 * 5, 5 - n % 2 * 5] for n in range(60)]}
    page = shown(tmp_path, {**FOUND, "holds": holds})
    assert "300 examples, 5 at each client." in page and "from most to least" not in page


@pytest.mark.parametrize("left_out", sorted(FOUND))
def test_any_part_may_be_missing(tmp_path: Path, left_out: str) -> None:
    page = shown(tmp_path, {key: value for key, value in FOUND.items() if key != left_out})
    assert "The clients" in page and "nan" not in page.lower().split()


@pytest.mark.parametrize("damaged", [[], {}, {"schema": 1, "clients": 3}, {"rounds": 3}, "x"])
def test_without_anything_to_show_there_is_no_section(tmp_path: Path, damaged: object) -> None:
    run = read_run(folder(tmp_path, damaged))
    assert federation_view(run) is None and "The clients" not in render([run])


def test_a_torn_file_is_noted(tmp_path: Path) -> None:
    (tmp_path / "federated.json").write_text(json.dumps(FOUND)[:100])
    page = text(render([read_run(tmp_path)]))
    assert "federated.json is damaged or cut off and was left out." in page
    assert "The clients" not in page


STRANGE: list[dict[str, Any]] = [
    {"holds": {"counts": [[1, 2], [3]]}},
    {"holds": {"counts": [["many"]], "classes": 4}},
    {"holds": {"counts": [[-1, 2]], "alpha": [1]}},
    {"holds": {"counts": [[1e308, 1e308], [1, 1]], "partition": {"a": 1}}},
    {"holds": [1]},
    {"rounds": [None, {"asked": "x", "rejected": [1], "void": "no"}, 7]},
    {"rounds": [{"rejected": {"<b>": None}}]},
    {"leaves": [3, {"kind": None}, {"kind": ["<b>"], "arrays": {}}], "numbers": [None, {}]},
    {"clients_at_end": [{"partition": "x", "accuracy": 0.5}, {"accuracy": 7}, 4]},
    {"clients_at_end": [{"partition": 10**400, "accuracy": 1}, {"partition": 99, "accuracy": 0}]},
    {"scores": {"mean": "high", "jain": 10**400}, "last_rounds": {"rounds": None, "accuracy": 1}},
    {"clients": None, "engine": ["<b>"], "last_rounds": {"rounds": 1, "accuracy": True}},
]


@pytest.mark.parametrize("strange", STRANGE, ids=range(len(STRANGE)))
def test_strange_values_are_unknown_and_not_an_error(
    tmp_path: Path, strange: dict[str, Any]
) -> None:
    page = render([read_run(folder(tmp_path, {**FOUND, **strange}))])
    assert "The clients" in page and "<b>" not in page


def test_an_arm_shows_its_clients_in_the_run_that_it_stands_for(tmp_path: Path) -> None:
    arm = tmp_path / "arms" / "best"
    arm.mkdir(parents=True)
    folder(arm, FOUND)
    details = [{"name": "best", "title": "Best", "headline": True}]
    (tmp_path / "summary.json").write_text(json.dumps({"arm_details": details}))
    assert "Mean of clients 70.0 %" in text(render([read_run(tmp_path)]))


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (106_000, "106 kB"), (2.5e9, "2.5 GB"),
     (float("nan"), "–")],
)  # fmt: skip
def test_sizes_as_people_read_them(size: float, told: str) -> None:
    assert size_of(size) == told
