"""`vestige federate`: clients who may not share data."""

import importlib.util
import json
import keyword
import os
import re
import sys
from importlib.machinery import PathFinder
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from vestige.cli.options import PresetOption
from vestige.cli.output import examples

# Files of the template that lie in the folder itself, and their names there; all others form the
# package.
_OUTER = {"pyproject.toml": "pyproject.toml", "README.md": "README.md", "gitignore": ".gitignore"}

app = typer.Typer(no_args_is_help=True, help="Clients who may not share data, on Flower.")


@app.callback()
def federate() -> None:
    """Clients who may not share data, on Flower."""


@app.command(
    epilog=examples(
        "vestige federate init my-clients",
        "vestige federate init /srv/wards --name ward_app",
        "vestige federate init my-clients --recipe my-recipe.yaml --preset gpu",
    )
)
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty folder.")],
    name: Annotated[
        str | None,
        typer.Option(help="Of the app and its Python package; made from DIR's name unless given."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="That the app runs: a name or a YAML file, with clients as source.")
    ] = "fedgen",
    preset: PresetOption = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write into a folder that holds something; the app's files are replaced.",
        ),
    ] = False,
) -> None:
    """Write a ready Flower app that runs a federated recipe between real machines."""
    from vestige.errors import RecipeError

    target = folder.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise RecipeError(f"DIR: {folder} is a file, expected a folder; name another")
    if target.is_dir() and not force and any(target.iterdir()):
        raise RecipeError(
            f"DIR: {folder} is not empty; name another, or add --force to write the app's files "
            "into it"
        )
    package = _package_name(name, target)
    given = {**_of_recipe(recipe, preset, package), **_of_folder(package, target)}
    count = given["clients"]
    for path, text in _rendered(given, package, target).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")
    typer.echo(f"{folder}: a Flower app with the package {package}. It runs as it is:")
    typer.echo(f"  cd {folder}")
    typer.echo("  export FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0")
    typer.echo(
        "  export FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"
    )
    typer.echo(f'  flwr run . local --stream --federation-config "num-supernodes={count}"')
    typer.echo(
        f"Then fill in load_data in {package}/client_app.py; README.md has the rest: your own "
        "networks, real clients, TLS."
    )
    if importlib.util.find_spec("flwr") is None:
        typer.echo("Flower is not installed here: pip install 'vestige[federated]'")


def _package_name(name: str | None, target: Path) -> str:
    """A name that Python and Flower take, and that hides no other package.

    Raises:
        RecipeError: `name`, or what the folder's name gives, is none.
    """
    from vestige.errors import RecipeError

    chosen = re.sub(r"\W+", "_", target.name.lower()).strip("_") if name is None else name
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", chosen) or keyword.iskeyword(chosen):
        raise RecipeError(
            f"--name: got {chosen!r}, expected up to 32 small letters, digits and _, starting "
            "with a letter, and no word of Python; choose one, for example --name my_clients"
        )
    if chosen in sys.stdlib_module_names or _is_installed(chosen, target):
        raise RecipeError(
            f"--name: got {chosen!r}, which is a package here already, and one of the two would "
            "hide the other; choose another, for example --name my_clients"
        )
    return chosen


def _is_installed(name: str, target: Path) -> bool:
    """Whether another package of this name can be imported, other than from the working folder."""
    here = {Path.cwd(), target}
    elsewhere = [path for path in sys.path if Path(path or os.curdir).resolve() not in here]
    return PathFinder.find_spec(name, elsewhere) is not None


def _of_recipe(name_or_path: str, preset: str | None, package: str) -> dict[str, Any]:
    """What the files of the app say of the recipe, whose network is now the app's own.

    Raises:
        RecipeError: the recipe has a mistake, no clients, or a network that is not known by a name.
    """
    import yaml

    from vestige.errors import RecipeError
    from vestige.recipes.deployment import source_name
    from vestige.recipes.loading import layered, validate

    raw = layered(name_or_path, preset=preset)
    chosen = validate(raw)
    clients = chosen.sources[source_name(chosen)]
    network = chosen.student
    if chosen.input is None or chosen.num_classes is None or clients.partition is None:
        raise RecipeError(
            f"--recipe: {name_or_path} lacks input, num_classes or the clients' partition, "
            "expected all three, since server and clients must agree on them; add them to it"
        )
    if network is None or network.name is None:
        raise RecipeError(
            f"--recipe: the student of {name_or_path} is made by a factory or missing, expected "
            "student.name; put your own network into model.py afterwards"
        )
    spec = chosen.input.spec()
    for unused in ("arms", "headline", "baseline", "reference"):
        raw.pop(unused, None)
    raw["student"] = {"factory": f"{package}.model:make_model"}
    network_args = "".join(f", {key}={value!r}" for key, value in network.args.items())
    return {
        "recipe": yaml.safe_dump(raw, sort_keys=False, allow_unicode=True).strip(),
        "method": chosen.method,
        "clients": clients.partition.clients,
        "network": network.name,
        "network_args": network_args,
        "shape": spec.shape,
        "kind": spec.kind,
        "num_classes": chosen.num_classes,
    }


def _of_folder(package: str, target: Path) -> dict[str, Any]:
    """What the files say of the app itself."""
    from vestige import __version__

    # A string of JSON is one of TOML, whatever characters a path holds.
    out = json.dumps(str(target / "results"), ensure_ascii=False)
    return {"name": package, "version": __version__, "out": out}


def _rendered(given: dict[str, Any], package: str, target: Path) -> dict[Path, str]:
    """The text of each file of the app."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    found = {}
    for template in files("vestige.federated").joinpath("template").iterdir():
        name = template.name.removesuffix(".j2")
        path = target / _OUTER[name] if name in _OUTER else target / package / name
        found[path] = environment.from_string(template.read_text(encoding="utf8")).render(given)
    return found
