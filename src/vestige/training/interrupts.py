"""Ctrl-C and SIGTERM: a run says where it stopped, and several processes stop together."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from vestige.core import parallel
from vestige.errors import Interrupted, ProcessError


@contextmanager
def interruptible(message: Callable[[], Interrupted], noted: Callable[[], bool]) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into `Interrupted`, now or, if `noted` says so, when the run asks."""
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if not noted():
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    caught = [signal.SIGTERM, *([signal.SIGINT] if parallel.world() > 1 else [])]
    before = {number: signal.signal(number, stop) for number in caught} if main else {}
    try:
        yield
    except KeyboardInterrupt as error:
        raise message() from error
    except ProcessError as error:
        # The others were told to stop, too, and one was faster.
        if stopped:
            raise message() from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
