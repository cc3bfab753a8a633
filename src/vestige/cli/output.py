"""How commands talk: examples in the help, tables for people and for pipes."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# A table is as wide as what it holds; folded rows are of no use to grep.
_PIPE_COLUMNS = 1000


def examples(*commands: str) -> str:
    """The epilog of a command's help, one line per command that can be copied."""
    return "\n\n".join(["Examples:", *(f"- `{command}`" for command in commands)])


def console(*, stderr: bool = False) -> "Console":
    """Where to print: in colours on a terminal, in plain unfolded lines anywhere else."""
    from rich.console import Console

    piped = not (sys.stderr if stderr else sys.stdout).isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, width=_PIPE_COLUMNS if piped else None)
