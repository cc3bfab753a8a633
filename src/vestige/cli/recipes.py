"""Commands that look at recipes without running them."""

import typer

from vestige.cli.options import PluginOption, PresetOption, RecipeArgument, SeedOption, SetOption
from vestige.cli.output import examples


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(
        epilog=examples(
            "vestige show dfad",
            "vestige show dfad --preset gpu",
            "vestige show kd --set config.rounds=3 --seed 1 > my-recipe.yaml",
        )
    )(show)
    app.command(
        epilog=examples(
            "vestige validate my-recipe.yaml",
            "vestige validate dfad --preset paper --set teacher.weights=resnet34.safetensors",
        )
    )(validate)


def show(
    recipe: RecipeArgument,
    preset: PresetOption = None,
    overrides: SetOption = None,
    plugins: PluginOption = None,
    seed: SeedOption = None,
) -> None:
    """Print the resolved recipe, every known default written out; it is a recipe itself."""
    import yaml

    from vestige.recipes.loading import load_recipe

    loaded = load_recipe(
        recipe, preset=preset, overrides=overrides or (), plugins=plugins or (), seed=seed
    )
    values = loaded.model_dump(mode="json")
    values["config"] = loaded.known_config()
    if len(values["config"]) < len(type(loaded.method_config()).model_fields):
        typer.echo(
            "# What is not in config is suggested by the method for the networks at hand, unless "
            "defaults is\n# published; the recipe.yaml of a run holds every setting."
        )
    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


def validate(
    recipe: RecipeArgument,
    preset: PresetOption = None,
    overrides: SetOption = None,
    plugins: PluginOption = None,
    seed: SeedOption = None,
) -> None:
    """Check a recipe and list all of its mistakes at once.

    What this machine lacks counts as a mistake: weights and data sets that are not there, factories
    that cannot be imported, extras that are not installed. Nothing is loaded, built or trained.
    """
    from vestige.errors import RecipeError
    from vestige.recipes.loading import find_problems, layered
    from vestige.recipes.mistakes import listed
    from vestige.recipes.presence import absent

    raw = layered(
        recipe, preset=preset, overrides=overrides or (), plugins=plugins or (), seed=seed
    )
    loaded, problems = find_problems(raw)
    if loaded is not None:
        problems.extend(absent(loaded))
    if problems:
        raise RecipeError(listed(problems))
    typer.echo(f"{recipe} is valid")
