"""What is told to whoever follows a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something happened in a run; what `data` holds depends on `kind`.

    | kind | when | data |
    | --- | --- | --- |
    | `start` | before the first step | `resumed`: bool; `step`: steps already done |
    | `step` | every `log_every` steps | `step`; `terms`: of the losses, `{role: {name: float}}` |
    | `evaluation` | after a round, if judged | `step`; `scores`: by name; `metric`: what counts |
    | `round` | after each round | `loop`: name; `round`: finished; `rounds`: of the loop; `step`; |
    | | | `seconds`: of the run; `agreement`: with the teacher on fresh inputs, or None |
    | `warning` | when something is noticed | `message` |
    | `end` | after the last step | `step`; `seconds` |

    Steps count over the whole run, its earlier parts included. A callback is called between two
    steps, with the state of all random generators kept; what it raises ends the run.
    """

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


Callback = Callable[[Event], None]
