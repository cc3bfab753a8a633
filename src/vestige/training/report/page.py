"""One self-contained HTML page about one or several runs.

`run_folder.read_run` takes whatever a run folder holds, `page_run` and `page_compare` turn it into
text, charts and pictures, and `templates/report.html.j2` lays them out. A run that was cut off has
a page, too, which says what is missing.
"""

from collections.abc import Sequence
from pathlib import Path

from vestige.training.files import write_bytes
from vestige.training.report.page_compare import comparison_view
from vestige.training.report.page_run import run_view
from vestige.training.report.run_folder import RunFolder, read_run

_TEMPLATES = Path(__file__).with_name("templates")


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about the runs in `folders`; several are compared.

    Args:
        folders: run folders; any file in them may be missing or cut off.
        out: file to write, or a folder that gets `report.html`.

    Returns:
        The file that was written.

    Raises:
        ValueError: no folder was given.
    """
    if not folders:
        raise ValueError("got no run folder, expected at least one; name the folders to report on")
    target = out / "report.html" if out.is_dir() else out
    page = render([read_run(Path(folder)) for folder in folders])
    # Lone surrogates are valid in JSON and not in UTF-8.
    write_bytes(target, page.encode("utf-8", errors="replace"))
    return target


def render(runs: Sequence[RunFolder]) -> str:
    """The page about `runs` as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = _unique([run.name for run in runs])
    views = [
        run_view(run, name=name, anchor=f"run-{index}")
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    return environment.get_template("report.html.j2").render(
        runs=views, comparison=comparison_view(runs, names) if len(runs) > 1 else None
    )


def _unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
