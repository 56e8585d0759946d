"""The request to stop a run: by a signal, by a deadline, or by another process."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.worker.task import STOPPING


class Stop:
    """The request to stop a run.

    Args:
        after_s: seconds from now after which the run stops as by SIGTERM, or None.

    Attributes:
        signal: the signal that asked for it, or that another request counts as; None before.
    """

    def __init__(self, after_s: float | None = None):
        self.signal: int | None = None
        self._end_s = math.inf if after_s is None else time.monotonic() + after_s

    def ask(self) -> None:
        """Stop as by SIGTERM, unless a signal came before."""
        self.signal = self.signal or signal.SIGTERM

    def left_s(self) -> float:
        """Return the seconds until the deadline; infinite without one."""
        return max(0.0, self._end_s - time.monotonic())

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM; the second signal of a kind acts as usual.

        A closed terminal (SIGHUP, any number of times) counts as SIGTERM, except under nohup. Only
        the main thread handles signals: a driver in another thread gets none.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPPING}
        terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        nowhere = os.open(os.devnull, os.O_WRONLY)

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[signal.Signals(number)])

        def note_hangup(number: int, frame: FrameType | None) -> None:
            self.ask()
            for descriptor in terminals:  # writing to a closed terminal is an error
                os.dup2(nowhere, descriptor)

        for number in before:
            if number is not signal.SIGHUP:
                signal.signal(number, note)
            elif before[number] is not signal.SIG_IGN:
                signal.signal(number, note_hangup)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(nowhere)
