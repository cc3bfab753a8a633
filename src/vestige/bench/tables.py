"""Tables for people, generated from results and the registry."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vestige.bench.scale import scale_page
from vestige.bench.speed import speed_page
from vestige.recipes.catalog import describe_methods
from vestige.training.files import write_text


def read_claims(folder: Path) -> dict[str, dict[str, Any]]:
    """All committed results by name."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf8"))
        for path in sorted(folder.glob("*.json"))
    }


def method_table() -> str:
    """The registry as a Markdown table."""
    rows = ["| method | paper | access | needs |", "| --- | --- | --- | --- |"]
    for method in describe_methods():
        needs = ", ".join(method["needs"]) or "nothing but the teacher"
        rows.append(f"| `{method['name']}` | {method['paper']} | {method['access']} | {needs} |")
    return "\n".join(rows)


def results_table(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """Every arm of every result as a Markdown table, with date, machine and command.

    What an arm cost: seconds (mean over the seeds), rows through the teacher forward and backward
    to its inputs, and images made for the student; empty where an earlier version did not count.
    """
    lines: list[str] = []
    for result in claims.values():
        machine = result["machine"]
        where = machine["gpu"] or f"{machine['processor']} with {machine['cores']} cores"
        lines += [
            f"`{result['command']}`, {result['date']}, {where}, torch "
            f"{result['versions']['torch']}, seeds {', '.join(map(str, result['seeds']))}:",
            "",
            "| data | arm | accuracy, each seed | mean | seconds | teacher rows | back | images |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for case, teacher in result["teachers"].items():
            if teacher is not None:
                lines.append(f"| {case} | teacher | {_percent(teacher['score'])} | | | | | |")
        for name, arm in result["arms"].items():
            case, _, label = name.partition("/")
            scores = ", ".join(_percent(score) for score in arm["scores"])
            seconds = sum(arm["seconds"]) / len(arm["seconds"])
            back = arm.get("teacher_backward_passes")
            # Before rows back were counted, what only moved a generator counted as images made.
            cost = [arm["teacher_passes"], back, None if back is None else arm["images"]]
            counts = " | ".join("" if count is None else f"{count:,}" for count in cost)
            lines.append(
                f"| {case} | {label} | {scores} | {_percent(arm['mean'])} | {seconds:.0f} | "
                f"{counts} |"
            )
        lines += ["", *_measures(result["arms"])]
    return "\n".join(lines).rstrip()


def claims_page(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """CLAIMS.md: each claim with its verdict and what failed, then the figures."""
    lines = [
        "# Claims",
        "",
        "Generated from `benchmarks/claims/*.json` by `vestige bench tables`. Scores are those of "
        "the last step on the test split; a claim holds if it holds on every seed.",
    ]
    for name, result in claims.items():
        lines += ["", f"## {name}", ""]
        for claim in [result, *result["further_claims"]]:
            lines.append(f"- **{claim['verdict']}**: {claim['claim']}")
            if claim["failures"]:
                lines.append(f"  Failures: {claim['failures']}.")
        if result["tried"]:
            lines += ["", "What was tried:", "", *(f"- {item}" for item in result["tried"])]
        lines += ["", results_table({name: result})]
    return "\n".join(lines) + "\n"


def floor_table(result: Mapping[str, Any]) -> str:
    """One floor benchmark as Markdown: rounds, floors and their ratio, then the passes."""
    machine = result["machine"]
    lines = [
        f"`{result['command']}`, {result['date']}, {machine['gpu'] or machine['processor']} with "
        f"{machine['cores']} cores, torch {result['versions']['torch']}:",
        "",
        "| case | threads | round, s | floor, s | ratio | target |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in result["cases"]:
        lines.append(
            f"| {case['name']} | {case['threads']} | {case['round_seconds']:.3f} | "
            f"{case['floor_seconds']:.3f} | {case['ratio']:.3f} | {case['target']:.2f} |"
        )
    lines += ["", "| case | pass | count in a round | one, ms |", "| --- | --- | --- | --- |"]
    for case in result["cases"]:
        for name, item in case["passes"].items():
            lines.append(
                f"| {case['name']} | {name} | {item['count']:g} | {1000 * item['seconds']:.2f} |"
            )
    return "\n".join(lines)


def floor_page(floors: Mapping[str, Mapping[str, Any]]) -> str:
    """FLOOR.md: every floor benchmark."""
    lines = [
        "# Floor",
        "",
        "Generated from `benchmarks/floor/*.json` by `vestige bench tables`. The floor is the time "
        "of the passes that the algorithm cannot avoid, timed in the same process, in turn with "
        "the rounds; medians over the measured rounds.",
    ]
    for name, result in floors.items():
        lines += ["", f"## {name}", "", floor_table(result)]
    return "\n".join(lines) + "\n"


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between the marks of `name` replaced.

    Raises:
        ValueError: the marks are not there.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the marks {start} and {end} are missing")
    return pattern.sub(lambda _: f"{start}\n{content}\n{end}", text)


def generated(readme: str, claims: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with its generated tables."""
    text = fill(readme, "methods", method_table())
    for name in re.findall(r"<!-- results (\S+) -->", text):
        if name in claims:
            text = fill(text, f"results {name}", results_table({name: claims[name]}))
    return text


def write_tables(root: Path) -> list[Path]:
    """Bring README.md and benchmarks/{CLAIMS,FLOOR,SCALE,SPEED}.md of a checkout up to date."""
    folder = root / "benchmarks"
    claims, floors = read_claims(folder / "claims"), read_claims(folder / "floor")
    scales, speeds = read_claims(folder / "scale"), read_claims(folder / "speed")
    readme = root / "README.md"
    pages = {
        readme: generated(readme.read_text(encoding="utf8"), claims),
        folder / "CLAIMS.md": claims_page(claims),
        # No page about nothing, in a checkout where nothing was measured yet.
        **({folder / "FLOOR.md": floor_page(floors)} if floors else {}),
        **({folder / "SCALE.md": scale_page(scales)} if scales else {}),
        **({folder / "SPEED.md": speed_page(speeds)} if speeds else {}),
    }
    for path, text in pages.items():
        write_text(path, text)
    return list(pages)


def _measures(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What else was measured, each seed of each arm that has it, and an empty line; or nothing."""
    having = {name: arm.get("measures", {}) for name, arm in arms.items()}
    places = list(dict.fromkeys(key for found in having.values() for key in found))
    if not places:
        return []
    lines = [
        f"| data | arm | {' | '.join(f'`{place}`' for place in places)} |",
        f"| --- | --- |{' --- |' * len(places)}",
    ]
    for name, found in having.items():
        if found:
            case, _, label = name.partition("/")
            told = (", ".join(map(_short, found.get(key, ()))) for key in places)
            lines.append(f"| {case} | {label} | {' | '.join(told)} |")
    return [*lines, ""]


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f} %"
