"""Data-free knowledge distillation: teach a student from a trained network alone.

`vestige.distill(teacher, student, method="dfad", spec=..., num_classes=...)` is the main entry.
Names are imported when they are used, so that `import vestige` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige.api import DistillReport, distill, list_methods, load_teacher
    from vestige.core.types import InputSpec
    from vestige.recipes.examples import load_examples
    from vestige.recipes.schema import Recipe
    from vestige.teachers.loading import open_teacher
    from vestige.training.export.student import export
    from vestige.training.trainer import Trainer

__version__ = "0.1.0"
_HOMES = {
    "DistillReport": "vestige.api",
    "distill": "vestige.api",
    "list_methods": "vestige.api",
    "load_examples": "vestige.recipes.examples",
    "load_teacher": "vestige.api",
    "open_teacher": "vestige.teachers.loading",
    "export": "vestige.training.export.student",
    "InputSpec": "vestige.core.types",
    "Recipe": "vestige.recipes.schema",
    "Trainer": "vestige.training.trainer",
}
__all__ = [
    "DistillReport",
    "InputSpec",
    "Recipe",
    "Trainer",
    "__version__",
    "distill",
    "export",
    "list_methods",
    "load_examples",
    "load_teacher",
    "open_teacher",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vestige' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
