"""The package transformers, imported when it is first needed, and without remarks of others."""

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from vestige.errors import MissingExtraError

# transformers imports torchao where it is installed, which then tells of each GPU kernel of its own
# that this machine has not. Nobody who trains a classifier of texts asked for one.
_TALKATIVE = ("torchao", "torch.utils._pytree")
# What makes it import torchao.
_MODULE = "transformers.modeling_utils"


def need_transformers(what: str, *, extra: str = "text") -> None:
    """Import transformers, so that importing from it afterwards is silent.

    Args:
        what: that needs it, for the message: "a transformer for texts".
        extra: that brings it.

    Raises:
        MissingExtraError: it is not installed.
    """
    if find_spec("transformers") is None:
        raise MissingExtraError(
            f"got {what}, but transformers is not installed; pip install 'vestige[{extra}]'"
        )
    if _MODULE in sys.modules:
        return
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        importlib.import_module(_MODULE)
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """Reading and writing weights of transformers without its progress bars."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()
