"""The heartbeat of a run's driver, in a thread of its own, however busy the driver is.

So a driver that waits for a slow storage does not count as dead. The thread also reads requests of
other processes, and ends when another driver has taken the run over.
"""

from __future__ import annotations

import threading

from pipeline.running.record import HEARTBEAT_S, RunRecord
from pipeline.store.store import Store


class Heartbeat:
    """Beats from `start` to the end of its context.

    Args:
        store: where the run is.
        record: of the run; this process claims it before the start.

    Attributes:
        asked_to_stop: whether another process has asked the driver to stop.
    """

    def __init__(self, store: Store, record: RunRecord):
        self._store = store
        self._record = record
        self._ending = threading.Event()
        self._error: Exception | None = None
        # A daemon: a request that hangs does not keep an ending process alive.
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self.asked_to_stop = False

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(HEARTBEAT_S)

    def start(self) -> None:
        """Begin; the first beat is due later, because the claim of a run was one."""
        self._thread.start()

    def check(self) -> None:
        """Raise once the error that ended the thread: a `TakenOver`, or the storage's."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        try:
            while not self._ending.wait(HEARTBEAT_S):
                self._record.require_own(self._store)
                self.asked_to_stop = self._record.asked_to_stop(self._store)
                self._record.beat(self._store)
        except Exception as error:  # any error of the storage belongs to the driver's thread
            self._error = error
