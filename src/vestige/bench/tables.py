"""Tables for people, generated from results and the registry."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """Every arm of every result as a Markdown table, with date, machine and command."""
    lines: list[str] = []
    for result in claims.values():
        machine = result["machine"]
        where = machine["gpu"] or f"{machine['processor']} with {machine['cores']} cores"
        lines += [
            f"`{result['command']}`, {result['date']}, {where}, torch "
            f"{result['versions']['torch']}, seeds {', '.join(map(str, result['seeds']))}:",
            "",
            "| data | arm | accuracy, each seed | mean | seconds |",
            "| --- | --- | --- | --- | --- |",
        ]
        for case, teacher in result["teachers"].items():
            lines.append(f"| {case} | teacher | {_percent(teacher['score'])} | | |")
        for name, arm in result["arms"].items():
            case, _, label = name.partition("/")
            scores = ", ".join(_percent(score) for score in arm["scores"])
            seconds = sum(arm["seconds"]) / len(arm["seconds"])
            lines.append(
                f"| {case} | {label} | {scores} | {_percent(arm['mean'])} | {seconds:.0f} |"
            )
        lines.append("")
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
    """Bring README.md and benchmarks/CLAIMS.md of a checkout up to date."""
    claims = read_claims(root / "benchmarks" / "claims")
    readme, page = root / "README.md", root / "benchmarks" / "CLAIMS.md"
    write_text(readme, generated(readme.read_text(encoding="utf8"), claims))
    write_text(page, claims_page(claims))
    return [readme, page]


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f} %"
