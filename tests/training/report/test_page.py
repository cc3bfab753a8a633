"""The page says what the run folder says, holds everything in itself and survives damage."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from vestige.training.pictures import save_png
from vestige.training.report import write_report
from vestige.training.report.page_classes import classes_view
from vestige.training.report.page_compare import comparison_view, differing_keys, not_comparable
from vestige.training.report.page_run import run_view
from vestige.training.report.run_folder import read_run
from vestige.training.report.tables import (
    arm_rows,
    arms_table,
    format_size,
    interval_95,
    result_figures,
    result_table,
)

HOSTILE = "<script>alert('x')</script>"
EVALUATION = {"name": "digits/test", "origin": "real", "by": "evaluation", "purpose": "evaluation",
              "images": 360, "fingerprint": "f" * 64}  # fmt: skip
TRAINING = {"name": "digits/train", "origin": "real", "by": "real", "purpose": "training",
            "images": 1437, "fingerprint": "e" * 64}  # fmt: skip


class _Page(HTMLParser):
    """Elements, exact numbers and visible text of a page; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[float, str]] = []
        self.text = ""
        self._open: list[str] = []
        self._value: str | None = None
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)
        if tag == "data":
            self._value = dict(attrs)["value"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            return
        if self._value is not None:
            self.numbers.append((float(self._value), data))
            self._value = None
        self.text += data.replace("\u00a0", " ")


def _lines(score: float) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for round_ in range(6):
        step = 2 * round_ + 2
        for offset, role in ((1, "source"), (0, "student")):
            lines.append({"kind": "step", "step": step - offset, "role": role, "loop": "train",
                          "round": round_, "seconds": 0.1 * step, "total": 1.0 / step,
                          "terms": {"disagreement": 1.0 / step, "bn": 2.0}})  # fmt: skip
        lines.append({"kind": "round", "loop": "train", "round": round_, "step": step,
                      "seconds": 0.1, "agreement": 0.5 + 0.05 * round_, "classes": [3, 5, 8],
                      "train_eval_agreement": 0.9})  # fmt: skip
        lines.append({"kind": "evaluation", "step": step, "round": round_,
                      "scores": {"accuracy": score * (round_ + 1) / 6, "loss": 0.4}})  # fmt: skip
    return lines


def _evaluation(classes: int, score: float) -> dict[str, Any]:
    """As the task of classification writes it: class i of the student has score - i / 1000."""
    per_class = [max(0.0, score - index / 1000) for index in range(classes)]
    small = classes <= 20
    counts = [[7 if row == column else 1 for column in range(classes)] for row in range(classes)]
    return {
        "schema": 1, "task": "classification", "metric": "accuracy", "step": 1800,
        "classes": [f"kind {index}" for index in range(classes)],
        "inputs": 360, "inputs_per_class": [360 // classes] * classes,
        "student": {"accuracy": score, "per_class": per_class},
        "teacher": {"accuracy": 0.9944, "per_class": [0.9944] * classes},
        "agreement": {"share": 0.9306, "both_right": 331, "student_alone_right": 4,
                      "teacher_alone_right": 21, "same_wrong": 3, "different_wrong": 1},
        "confusion": {"student": counts, "teacher": counts} if small else None,
        "confused": [{"class": 2, "taken_for": 1, "count": 17}],
    }  # fmt: skip


def _dense(score: float) -> dict[str, Any]:
    """As the task of segmentation writes it; class 3 is nowhere."""
    counts = [[40_000, 900, 100, 0], [500, 5_000, 0, 0], [0, 20, 480, 0], [0, 0, 0, 0]]
    return {
        "schema": 1, "task": "segmentation", "metric": "miou", "step": 1800,
        "classes": ["sky", HOSTILE, "car", "sign"],
        "inputs": 12, "pixels": 47_000, "pixels_per_class": [41_000, 5_500, 500, 0],
        "student": {"miou": score, "pixel_accuracy": 0.9677, "per_class": [0.9, 0.7, 0.4, None]},
        "teacher": {"miou": 0.91, "pixel_accuracy": 0.99, "per_class": [0.99, 0.9, 0.84, None]},
        "agreement": {"share": 0.9625},
        "confusion": {"student": counts, "teacher": counts},
    }  # fmt: skip


def _write_dense(folder: Path, *, score: float = 0.6675) -> Path:
    run = _write_run(
        folder,
        score=score,
        answers=True,
        metric="miou",
        task="segmentation",
        teacher={"score": 0.91},
    )
    (run / "evaluation.json").write_text(json.dumps(_dense(score)))
    lines = (run / "metrics.jsonl").read_text().replace('"accuracy"', '"miou"')
    (run / "metrics.jsonl").write_text(lines)
    return run


def _write_run(
    folder: Path, *, score: float = 0.9312, classes: int = 3, answers: bool = False, **changes: Any
) -> Path:
    folder.mkdir(parents=True)
    summary = {
        "schema": 1, "method": "dfad", "plugins": [], "task": "classification",
        "metric": "accuracy", "teacher": {"score": 0.9944, "parameters": 24106},
        "student": {"score": score, "best_score": score + 0.01, "parameters": 3626},
        "arms": {}, "steps": 1800, "seconds": 27.43, "peak_memory_mib": 412.0,
        "teacher_queries": 115200, "teacher_passes": {"forward": 115200, "backward": 19200},
        "images_made": 96000, "real_data": [EVALUATION], "seed": 0, "device": "cpu",
        "versions": {"torch": "2.13.0"}, "result": {"kind": "student", "path": "s.safetensors"},
        "diagnosis": [{"code": "few-classes", "level": "warning",
                       "message": "the inputs cover few classes", "knob": "raise bn_weight"}],
        **changes,
    }  # fmt: skip
    record = {
        "versions": {"torch": "2.13.0"}, "seed": 0,
        "teacher_fingerprint": "a" * 64, "teacher_trained_on": "digits/train, by its card",
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2},
        "real_data": summary["real_data"], "command": "vestige run dfad", "started": "2026-11-20",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text("method: dfad\nbn_weight: 1.0\n")
    lines = "".join(json.dumps(line) + "\n" for line in _lines(score))
    (folder / "metrics.jsonl").write_text(lines)
    save_png(np.full((4, 4, 3), 7, np.uint8), folder / "samples.png")
    save_png(np.full((3, 5, 3), 9, np.uint8), folder / "samples-over-time.png")
    if answers:
        save_png(np.full((6, 9, 3), 11, np.uint8), folder / "answers.png")
    (folder / "evaluation.json").write_text(json.dumps(_evaluation(classes, score)))
    return folder


def _write_demo(folder: Path) -> Path:
    details = [
        {"name": name, "title": title, "score": score, "gap_closed": gap, "seconds": seconds,
         "images_made": 9600, "real_images_read": read, "data_free": read == 0,
         "teacher_passes": {"forward": 11520, "backward": 1920},
         "headline": headline}
        for name, title, score, gap, seconds, read, headline in [
            ("noise", "KD on noise", 0.2811, 0.0, 21.31, 0, False),
            ("dfad-bn", "DFAD with BN-statistics term", 0.9683, 0.9634, 27.42, 0, True),
            ("real", "KD on real data", 0.9737, None, 19.93, 1437, False),
        ]
    ]  # fmt: skip
    arms = {item["name"]: item["score"] for item in details}
    _write_run(folder, score=0.9683, arms=arms, arm_details=details,
               real_data=[EVALUATION, TRAINING])  # fmt: skip
    (folder / "metrics.jsonl").unlink()
    for item in details:
        records = [EVALUATION, TRAINING] if item["name"] == "real" else [EVALUATION]
        _write_run(folder / "arms" / item["name"], score=item["score"], real_data=records)
    return folder


def _page(folders: list[Path], out: Path) -> _Page:
    return _Page(write_report(folders, out).read_text(encoding="utf-8"))


def test_numbers_of_a_run_are_those_of_its_summary(tmp_path: Path) -> None:
    page = _page([_write_run(tmp_path / "run")], tmp_path / "report.html")
    assert ("student with 3.6k parameters reaches 93.1 % test accuracy; its teacher has 99.4 %; "
            "no real image was read to train it.") in page.text  # fmt: skip
    assert {(0.9312, "93.1 %"), (0.9944, "99.4 %"), (3626.0, "3.6k"), (27.43, "27.4")} <= set(
        page.numbers
    )
    for needed in ("115,200", "412 MiB", "vestige run dfad", "bn_weight: 1.0", "a" * 64,
                   "raise bn_weight", "the inputs cover few classes", "1 warning"):  # fmt: skip
        assert needed in page.text


@pytest.mark.parametrize(
    ("kind", "one", "several"),
    [
        ("image", "image", "images"),
        ("text", "text", "texts"),
        ("audio", "recording", "recordings"),
        ("table", "input", "inputs"),
    ],
)
def test_inputs_are_called_what_they_are(tmp_path: Path, kind: str, one: str, several: str) -> None:
    run = _write_run(tmp_path / "run", input_kind=kind)
    text = _page([run], tmp_path / "report.html").text
    assert f"no real {one} was read to train it" in text
    assert f"Real {several} read" in text
    assert "image" not in text or kind == "image"
    summary = json.loads((run / "summary.json").read_text())
    assert dict(result_figures(summary))[f"{several} made"] == "96,000"
    # Beside a run of images there is no word for both.
    two = [run, _write_run(tmp_path / "other")]
    beside = _page(two, tmp_path / "two.html").text
    assert f"{'Images' if kind == 'image' else 'Inputs'} made" in beside


def test_arms_are_shown_with_the_headline_first(tmp_path: Path) -> None:
    page = _page([_write_demo(tmp_path / "demo")], tmp_path / "report.html")
    assert "reaches 96.8 % test accuracy" in page.text
    assert "no real image was read to train it" in page.text
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    exact = {value for value, _ in page.numbers}
    for item in summary["arm_details"]:
        assert {item["score"], item["seconds"], item["real_images_read"]} <= exact
        assert {item["images_made"], *item["teacher_passes"].values()} <= exact
    assert page.text.index("DFAD with BN-statistics term") < page.text.index("KD on noise")
    assert "Inside DFAD with BN-statistics term" in page.text
    assert "not complete" not in page.text
    # The run's own picture and findings are those of its headline arm, and all arms here agree.
    assert page.text.count("raise bn_weight") == len(summary["arm_details"])
    # Beside it only the strip over time.
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_methods_that_are_compared_show_their_sheets_side_by_side(tmp_path: Path) -> None:
    demo = _write_demo(tmp_path / "demo")
    for index, arm in enumerate(sorted((demo / "arms").iterdir())):
        save_png(np.full((4, 4, 3), index, np.uint8), arm / "samples.png")
    apart = _page([demo], tmp_path / "apart.html")
    assert not any(attributes.get("class") == "gallery" for _, attributes in apart.tags)
    summary = json.loads((demo / "summary.json").read_text())
    (demo / "summary.json").write_text(json.dumps({**summary, "note": "2 methods, one teacher."}))
    page = _page([demo], tmp_path / "report.html")
    assert "2 methods, one teacher." in page.text
    assert any(attributes.get("class") == "gallery" for _, attributes in page.tags)
    uris = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    for arm in (demo / "arms").iterdir():
        data = base64.b64encode((arm / "samples.png").read_bytes()).decode()
        assert uris.count(f"data:image/png;base64,{data}") == 1


@pytest.mark.parametrize("records", [[TRAINING], ["digits"], [{"name": "x"}]])
def test_data_that_may_have_trained_the_student_forbids_the_claim(
    tmp_path: Path, records: list[Any]
) -> None:
    page = _page([_write_run(tmp_path / "run", real_data=records)], tmp_path / "report.html")
    assert "no real image" not in page.text


def test_a_headline_arm_whose_own_record_disagrees_is_not_called_data_free(tmp_path: Path) -> None:
    demo = _write_demo(tmp_path / "demo")
    (demo / "arms" / "dfad-bn" / "run.json").write_text(json.dumps({"real_data": [TRAINING]}))
    assert "no real image" not in _page([demo], tmp_path / "report.html").text


def test_the_page_holds_everything_in_itself(tmp_path: Path) -> None:
    demo = _write_demo(tmp_path / "demo")
    target = write_report([demo], tmp_path / "report.html")
    html = target.read_text(encoding="utf-8")
    page = _Page(html)
    assert not {"script", "link", "iframe", "object", "use"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:image/png;base64,", "#")), tag
    assert "@import" not in html and "url(" not in html and "http://" not in html
    samples = (demo / "samples.png").read_bytes()
    assert base64.b64encode(samples).decode() in html
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    demo = _write_demo(tmp_path / "demo")
    summary = json.loads((demo / "summary.json").read_text())
    summary |= {"method": HOSTILE, "device": HOSTILE, "metric": "accuracy",
                "diagnosis": [{"code": HOSTILE, "level": HOSTILE, "message": HOSTILE,
                               "knob": HOSTILE}],
                "real_data": [{**TRAINING, "name": HOSTILE, "by": HOSTILE, "purpose": HOSTILE,
                               "fingerprint": HOSTILE}]}  # fmt: skip
    for item in summary["arm_details"]:
        item["title"] = HOSTILE
    (demo / "summary.json").write_text(json.dumps(summary))
    (demo / "recipe.yaml").write_text(f"a: {HOSTILE}\n{HOSTILE}: 1\n")
    evaluation = _evaluation(3, 0.5) | {"classes": [HOSTILE] * 3}
    for folder in (demo, demo / "arms" / "dfad-bn"):
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (demo / "run.json").write_text(json.dumps({"command": HOSTILE, "versions": {HOSTILE: HOSTILE}}))
    line = {"kind": "step", "step": 1, "role": HOSTILE, "terms": {HOSTILE: 1.0, "b": 2.0}}
    (demo / "arms" / "dfad-bn" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for folders in ([demo], [demo, _write_run(tmp_path / HOSTILE.replace("/", ""))]):
        html = write_report(folders, tmp_path / "report.html").read_text(encoding="utf-8")
        assert "<script" not in html.lower() and "&lt;script&gt;" in html
        _Page(html)
        # Class names reach the page: in the table of classes and in the confusion matrix.
        assert html.count("&lt;script&gt;") > 20


def test_an_arm_named_like_a_tag_is_listed(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", arms={"<script>": 0.5})
    html = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in html and "<script>" not in html


@pytest.mark.parametrize(
    "name", ["summary.json", "run.json", "recipe.yaml", "metrics.jsonl", "samples.png"]
)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    run = _write_run(tmp_path / "run")
    (run / name).unlink()
    assert f"{name} is missing." in _page([run], tmp_path / "report.html").text


@pytest.mark.parametrize(
    "name",
    [
        *("summary.json", "run.json", "metrics.jsonl", "samples.png"),
        *("evaluation.json", "samples-over-time.png", "answers.png"),
    ],
)
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, name: str) -> None:
    run = _write_run(tmp_path / "run", answers=True)
    (run / name).write_bytes((run / name).read_bytes()[:-9])
    assert re.search(f"{name}.*cut off", _page([run], tmp_path / "report.html").text)


def test_a_truncated_last_line_costs_only_that_line(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    whole = read_run(run).metrics
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-9])
    found = read_run(run)
    assert found.metrics == whole[:-1]
    assert found.notes == [
        f"metrics.jsonl: 1 line is damaged or cut off; {len(whole) - 1} were read."
    ]


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\xff\xfe\x00", b"[" * 100_000])
def test_any_bytes_in_any_file_still_give_a_page(tmp_path: Path, content: bytes) -> None:
    run = _write_run(tmp_path / "run")
    for path in run.iterdir():
        path.write_bytes(content)
    assert "not complete" in _page([run], tmp_path / "report.html").text


def test_wrong_types_everywhere_still_give_a_page(tmp_path: Path) -> None:
    for index, wrong in enumerate([None, 3, "x", [1], {"a": [1]}, True, float("nan"), "\ud800"]):
        run = _write_run(tmp_path / f"run{index}")
        for name in ("summary.json", "run.json", "evaluation.json"):
            keys = [*json.loads((run / name).read_text()), "arm_details", *_dense(0.5), "colours"]
            (run / name).write_text(json.dumps(dict.fromkeys(keys, wrong)))
        if isinstance(wrong, dict):
            nested = {key: {inner: [wrong, "x"] for inner in ("per_class", "student", "share")}
                      for key in _evaluation(3, 0.5)}  # fmt: skip
            (run / "evaluation.json").write_text(json.dumps(nested | {"classes": [wrong]}))
        lines = [dict.fromkeys(line, wrong) | {"kind": line["kind"]} for line in _lines(0.5)] + [
            {"kind": "round", "round": 1, "classes": [wrong, wrong], "agreement": wrong}
        ]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        _page([run], tmp_path / "report.html")
        _page([run, run], tmp_path / "report.html")


def test_empty_and_absent_folders_still_give_a_page(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    page = _page([tmp_path / "empty", tmp_path / "absent"], tmp_path / "report.html")
    assert "The folder does not exist." in page.text and "summary.json is missing." in page.text
    assert "no summary yet" in page.text and "no real image" not in page.text
    with pytest.raises(ValueError, match="expected at least one"):
        write_report([], tmp_path / "report.html")


def test_nan_is_left_out_of_the_charts_and_said(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text().replace('"bn": 2.0', '"bn": NaN', 2)
    (run / "metrics.jsonl").write_text(text.replace('"bn": 2.0', '"bn": null', 1))
    summary = json.loads((run / "summary.json").read_text())
    summary["student"]["score"] = float("nan")
    (run / "summary.json").write_text(json.dumps(summary))
    html = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no score yet" in html
    assert html.count('class="broken"') == 3 and "values were not finite" in html
    assert not re.search(r'(?:[ "ML])(nan|inf)\b', html)


def test_rounds_where_something_was_not_measured_are_no_mistake(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    text = text.replace('"train_eval_agreement": 0.9', '"train_eval_agreement": null', 3)
    (run / "metrics.jsonl").write_text(text)
    html = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not finite" not in html


def test_steps_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    before = write_report([run], tmp_path / "a.html").read_text(encoding="utf-8")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + text)
    assert write_report([run], tmp_path / "b.html").read_text(encoding="utf-8") == before


def test_several_folders_are_compared(tmp_path: Path) -> None:
    folders = [
        _write_run(tmp_path / "a" / "cmi", score=0.9123),
        _write_run(tmp_path / "b" / "cmi", score=0.8456),
        _write_demo(tmp_path / "demo"),
    ]
    page = _page(folders, tmp_path / "report.html")
    assert "3 runs side by side, by test accuracy" in page.text
    assert "not comparable" not in page.text
    assert "cmi (1)" in page.text and "cmi (2)" in page.text
    assert {(0.9123, "91.2 %"), (0.8456, "84.6 %"), (0.9683, "96.8 %")} <= set(page.numbers)
    anchors = {attributes.get("id") for _, attributes in page.tags}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {f"#run-{index}" for index in range(3)} <= set(links)
    assert {str(link)[1:] for link in links} <= anchors


def _differ(page: _Page) -> str:
    """The part of a page that tells what differs between the recipes."""
    return page.text.split("What differs in their recipes")[1].split("Learning")[0]


def test_settings_that_differ_are_listed_and_equal_ones_are_not(tmp_path: Path) -> None:
    folders = [_write_run(tmp_path / name) for name in "ab"]
    (folders[0] / "recipe.yaml").write_text(
        "method: dfad\nconfig: {rounds: 12, student_lr: 0.004}\nplugins: [{name: abd}]\n"
    )
    (folders[1] / "recipe.yaml").write_text(
        "method: dfad\nconfig: {rounds: 12, student_lr: 0.002, clip: 1.5}\nplugins: []\n"
    )
    told = _differ(_page(folders, tmp_path / "report.html"))
    for needed in ("config.student_lr", "0.004", "0.002", "config.clip", "1.5", "plugins", "abd"):
        assert needed in told
    assert "rounds" not in told and "method" not in told
    arms = "shared: {rounds: 12, clip: 2}\nconfig: {clip: 1.5}\narms: {}"
    assert differing_keys([arms, "config: {clip: 1.5, rounds: 12}\narms: {}"]) == []
    assert differing_keys(["a: 0\nb: 1.5", "a: 0.0\nb: 1.50"]) == []
    assert differing_keys(["a: 1", "a: true"]) == [("a", ["1", "true"])]
    assert differing_keys(["a: 1\nb: {c: 2}", "b: {c: 2}\na: 1"]) == []
    same = _differ(_page([folders[0], folders[0]], tmp_path / "report.html"))
    assert "all settings are the same" in same


def test_a_recipe_that_is_a_trap_costs_nothing() -> None:
    laughs = "".join(
        f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]\n" for level in range(1, 20)
    )
    circle = "a: &a {b: *a}\n"
    for trap in ("l0: &l0 lol\n" + laughs, circle, "a: &a [*a]\n", "[" * 5000, "a: [", "- 1\n"):
        assert len(differing_keys([trap, "x: 1"])) < 10_000


def test_runs_of_other_teachers_or_data_are_marked_and_left_out_of_the_charts(
    tmp_path: Path,
) -> None:
    def changed(name: str, **record: Any) -> Path:
        run = _write_run(tmp_path / name)
        for file in ("run.json", "summary.json"):
            told = json.loads((run / file).read_text()) | record
            (run / file).write_text(json.dumps(told))
        return run

    first, same = _write_run(tmp_path / "first"), _write_run(tmp_path / "same")
    other_data = [{**EVALUATION, "fingerprint": "0" * 64}]
    cases = {
        "another teacher than first": changed("teacher", teacher_fingerprint="b" * 64),
        "other test data than first": changed("data", real_data=other_data),
        "that its test data are those of first is not recorded": changed("none", real_data=[]),
        "judged by mIoU, first by accuracy": _write_run(tmp_path / "metric", metric="miou"),
    }
    for reason, run in cases.items():
        found, where = [read_run(path) for path in (run, first)], run.name
        assert reason in not_comparable(found[0], found[1], "first")
        page = _page([first, same, run], tmp_path / "report.html")
        assert "not comparable" in page.text and reason in page.text
        assert f"speak of something else: {where}." in page.text
    assert not_comparable(read_run(same), read_run(first), "first") == []


def test_common_curves_stand_over_student_steps_and_seconds(tmp_path: Path) -> None:
    runs = [_write_run(tmp_path / name) for name in "ab"]
    text = _page(runs, tmp_path / "report.html").text
    # Without a count of the student's own steps, all steps; seconds are those of the same round.
    assert "Test accuracy over steps" in text and "Test accuracy over seconds" in text
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["kind"] == "evaluation":
                line["student_steps"] = line["step"] // 2
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "Test accuracy over student steps" in _page(runs, tmp_path / "report.html").text


def test_numbers_by_class_are_those_of_evaluation_json(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    found = json.loads((run / "evaluation.json").read_text())
    page = _page([run], tmp_path / "report.html")
    exact = {value for value, _ in page.numbers}
    counts = {key: value for key, value in found["agreement"].items() if key != "share"}
    assert sum(counts.values()) == found["inputs"]
    assert {*found["student"]["per_class"], *counts.values(), 0.9306, 360.0} <= exact
    for needed in ("kind 0", "kind 2", "What the student answers, by true class",
                   "Teacher right, student wrong", "93.1 % of the test inputs"):  # fmt: skip
        assert needed in page.text
    assert "kind 1 taken for kind 2: 1" in page.text and "kind 1, right: 7" in page.text


def test_a_run_is_told_in_its_own_metric(tmp_path: Path) -> None:
    page = _page([_write_dense(tmp_path / "run")], tmp_path / "report.html")
    assert "reaches 66.8 % test mIoU; its teacher has 91.0 %" in page.text
    assert "Test mIoU over steps" in page.text and "test mIoU, last step" in page.text
    assert "ccuracy by class" not in page.text and "miou" not in page.text.replace("- miou", "")
    other = _page([_write_run(tmp_path / "other")], tmp_path / "other.html")
    assert "IoU" not in other.text and "pixel" not in other.text


def test_a_run_that_was_cut_off_is_known_by_the_metric_it_wrote(tmp_path: Path) -> None:
    run = _write_dense(tmp_path / "run")
    for name in ("summary.json", "evaluation.json"):
        (run / name).unlink()
    assert "Test mIoU over steps" in _page([run], tmp_path / "report.html").text


def test_answers_at_every_pixel_are_told_class_by_class(tmp_path: Path) -> None:
    page = _page([_write_dense(tmp_path / "run")], tmp_path / "report.html")
    evaluation = _dense(0.6675)
    assert "IoU by class" in page.text and "Over all classes" in page.text
    for who in ("student", "teacher"):
        for value in (*evaluation[who]["per_class"][:3], evaluation[who]["pixel_accuracy"]):
            assert (value, f"{100 * value:.1f} %") in page.numbers
    shares = [count / 47_000 for count in evaluation["pixels_per_class"]]
    assert {share for share, _ in page.numbers} >= set(shares)
    assert (47_000, "47,000") in page.numbers
    assert "in percent of its pixels" in page.text
    assert "same class for 96.2 % of the test pixels" in page.text
    # None of the counts that classification has.
    assert "Both right" not in page.text and "Inputs" not in page.text.replace("Inputs at", "")
    assert not [tag for tag, _ in page.tags if tag == "script"] and HOSTILE in page.text
    # Pixels are of unequal classes in real data, too, and no sheet has rows by class.
    assert "Even columns are good" not in page.text and "counted in pixels" in page.text
    assert "class that the teacher gives it" not in page.text
    alts = [str(attributes["alt"]) for tag, attributes in page.tags if tag == "img"]
    assert not [alt for alt in alts if "each class" in alt or "teacher’s class" in alt]


def test_answers_are_shown_and_of_arms_the_headlines_first(tmp_path: Path) -> None:
    single = _page([_write_dense(tmp_path / "run")], tmp_path / "report.html")
    assert "What each says" in single.text
    shown = [attributes for tag, attributes in single.tags if tag == "img"]
    assert sum("what the networks answer" in str(one["alt"]) for one in shown) == 1
    demo = _write_demo(tmp_path / "demo")
    for index, name in enumerate(("noise", "dfad-bn", "real")):
        save_png(np.full((6, 9, 3), index, np.uint8), demo / "arms" / name / "answers.png")
    found = run_view(read_run(demo), name="demo", anchor="a")["answers"]
    first = base64.b64encode((demo / "arms/dfad-bn/answers.png").read_bytes()).decode()
    assert found[0]["uri"].endswith(first) and len(found) == 3
    assert len({one["title"] for one in found}) == 3
    page = _page([demo], tmp_path / "demo.html")
    answered = [one for one in page.tags if "what the networks answer" in str(one[1].get("alt"))]
    assert len(answered) == 3 and all(page.text.count(one["title"]) > 1 for one in found)
    none = _page([_write_run(tmp_path / "none")], tmp_path / "none.html")
    assert "What each says" not in none.text


def test_answers_of_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [_write_dense(tmp_path / "one"), _write_dense(tmp_path / "two", score=0.5)]
    found = comparison_view([read_run(run) for run in runs], ["one", "two"])
    assert [one["title"] for one in found["answers"]] == ["one", "two"]
    assert found["classes"]["title"] == "IoU by class" and found["heading"] == "mIoU"
    page = _page(runs, tmp_path / "report.html")
    assert "2 runs side by side, by test mIoU" in page.text
    mixed = _page([runs[0], _write_run(tmp_path / "three")], tmp_path / "mixed.html")
    assert "not comparable" in mixed.text and "judged by accuracy, one by mIoU" in mixed.text


@pytest.mark.parametrize(
    "told",
    [
        {"unknown": {"deep": [1]}, "colours": "red"},
        {"student": {"per_class": [0.5, 0.25]}, "colours": ["red;}", "#00ff7F"]},
        {"student": {"score": 0.5, "per_class": [0.5, None]}, "pixels_per_class": [3]},
        {"student": [1], "agreement": {"share": 0.5, "of": "tea"}},
        {"student": {"miou": "x", "per_class": [0.5]}, "pixels_per_class": ["a"], "pixels": "b"},
        {"agreement": 3, "confusion": {"student": [[1, 2]]}, "pixels_per_class": {"a": 1}},
        {"student": {"miou": 0.5, "per_class": [0.1]}, "pixels_per_class": [0], "pixels": 0},
    ],
)
def test_an_evaluation_of_any_task_still_gives_a_page(tmp_path: Path, told: dict) -> None:
    run = _write_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps({"schema": 1, **told}))
    html = write_report([run, run], tmp_path / "report.html").read_text(encoding="utf-8")
    _Page(html)
    assert "red;" not in html
    assert ("background:#00ff7F" in html) is ("#00ff7F" in str(told))


@pytest.mark.parametrize(("classes", "shown"), [(2, 2), (10, 10), (20, 20), (100, 15), (1000, 15)])
def test_many_classes_are_cut_to_the_lowest_and_the_highest(
    tmp_path: Path, classes: int, shown: int
) -> None:
    run = _write_run(tmp_path / "run", classes=classes)
    target = write_report([run], tmp_path / "report.html")
    page = _Page(target.read_text(encoding="utf-8"))
    rows = classes_view(read_run(run))
    assert rows is not None and sum(len(group) for _, group in rows["groups"]) == shown
    assert ("from lowest to highest" in page.text) is (classes > 20)
    assert ("by true class" in page.text) is (classes <= 20)
    assert ("most frequent mistakes" in page.text) is (classes > 20)
    lowest = rows["groups"][0][1][0]["name"]
    # The student's accuracy falls with the number of the class.
    assert lowest == (f"kind {min(classes - 1, 932)}" if classes > 20 else "kind 0")
    assert target.stat().st_size < 400_000


def test_a_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    step = {"kind": "step", "role": "student", "loop": "l", "terms": {"a": 1.5}, "total": 4.0}
    round_ = {"kind": "round", "loop": "l", "agreement": 0.5, "classes": [1] * 1000}
    lines = [step | {"step": index} for index in range(1, 100_001)]
    lines += [round_ | {"round": index, "step": 100 * index} for index in range(1, 301)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert write_report([run], tmp_path / "report.html").stat().st_size < 3_000_000


def test_an_accuracy_comes_with_its_interval() -> None:
    # By hand: Wilson's centre and reach for 8 of 10 at z = 1.959964.
    low, high = interval_95(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert interval_95(1.0, 100)[1] == 1.0 and interval_95(0.0, 100)[0] == 0.0
    assert all(math.isnan(end) for end in interval_95(0.5, math.nan))
    wide, narrow = (interval_95(0.5, count) for count in (100, 10_000))
    assert wide[1] - wide[0] == pytest.approx(10 * (narrow[1] - narrow[0]), rel=0.02)


def test_the_interval_is_shown_for_accuracy_and_for_nothing_else(tmp_path: Path) -> None:
    low, high = interval_95(0.9312, 360)
    text = _page([_write_run(tmp_path / "a")], tmp_path / "a.html").text
    assert f"{100 * low:.1f} to {100 * high:.1f} % (95 %, 360 test inputs)" in text
    other = _page([_write_run(tmp_path / "b", metric="miou")], tmp_path / "b.html").text
    assert "(95 %" not in other


def test_a_run_that_its_budget_stopped_says_so(tmp_path: Path) -> None:
    stopped = _write_run(tmp_path / "stopped", complete=False)
    text = _page([stopped], tmp_path / "report.html").text
    assert "This run was stopped by its budget at step 1,800" in text
    whole = _write_run(tmp_path / "whole", complete=True)
    assert "budget" not in _page([whole], tmp_path / "report.html").text
    assert "stopped by its budget" in _page([whole, stopped], tmp_path / "report.html").text


def test_the_best_step_is_told_apart_from_the_result(tmp_path: Path) -> None:
    page = _page([_write_run(tmp_path / "run", score=0.5)], tmp_path / "report.html")
    assert "reaches 50.0 % test accuracy" in page.text
    assert (0.51, "51.0 %") in page.numbers and "picked on the test set, not a result" in page.text


def test_no_finding_is_not_the_same_as_nothing_measured(tmp_path: Path) -> None:
    well = _write_run(tmp_path / "well", diagnosis=[])
    assert "Nothing suspicious in 6 rounds" in _page([well], tmp_path / "report.html").text
    lines = (well / "metrics.jsonl").read_text().splitlines(keepends=True)
    (well / "metrics.jsonl").write_text("".join(lines[:6]))
    assert "too few to judge" in _page([well], tmp_path / "report.html").text
    (well / "metrics.jsonl").write_text("")
    assert "Nothing was measured" in _page([well], tmp_path / "report.html").text


def test_pictures_are_described_and_tables_have_headings(tmp_path: Path) -> None:
    page = _page([_write_demo(tmp_path / "a"), _write_run(tmp_path / "b")], tmp_path / "r.html")
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("role") == "img"


def test_where_the_teacher_comes_from_is_told(tmp_path: Path) -> None:
    text = _page([_write_run(tmp_path / "run")], tmp_path / "report.html").text
    assert "Teacher trained on, by its card" in text and "digits/train, by its card" in text
    assert "Teacher fingerprint" in text


def test_a_folder_as_target_gets_the_usual_name(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    assert write_report([run], run) == run / "report.html"


def _printed(table: Any) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_terminal_tables_hold_the_same_numbers(tmp_path: Path) -> None:
    demo = _write_demo(tmp_path / "demo")
    summary = json.loads((demo / "summary.json").read_text())
    text = _printed(arms_table(summary))
    for needed in ("96.8 %", "96.3 %", "27.4", "1,437", "teacher 99.4 %, 24.1k parameters",
                   "11,520 + 1,920", "9,600"):  # fmt: skip
        assert needed in text
    assert [row.name for row in arm_rows(summary)] == ["noise", "dfad-bn", "real"]
    single = _printed(result_table(summary))
    for needed in ("115,200", "19,200", "96,000", "digits/train", "3.6k"):
        assert needed in single


def test_terminal_tables_take_names_literally_and_an_empty_summary() -> None:
    text = _printed(arms_table({"metric": "accuracy", "arms": {"[red]x[/nope]": 0.5}}))
    assert "[red]x[/nope]" in text and "50.0 %" in text
    _printed(result_table({}))


def test_sizes_are_short() -> None:
    assert [format_size(value) for value in (812, 3626, 24000, 11_173_962, 138e6)] == [
        "812", "3.6k", "24k", "11.2M", "138M",
    ]  # fmt: skip
