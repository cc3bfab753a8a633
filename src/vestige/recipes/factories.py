"""What users make by callables of their own."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from vestige.errors import RecipeError


def call(key: str, factory: str, args: Mapping[str, Any]) -> Any:
    """What the user's own "package.module:callable" makes."""
    where, _, attribute = factory.partition(":")
    try:
        return getattr(import_module(where), attribute)(**args)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{key}: got {factory!r}, expected 'package.module:callable' that takes "
            f"{sorted(args) or 'no arguments'}; {error}"
        ) from error
