"""Calls that are made one after another on a thread of their own, so that whoever asks for them
never waits.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any


class Relay:
    """Makes the calls it is sent, in order. After the first one that fails it makes no more; nor
    more than `capacity` at once wait.

    `error` is what failed, `lost` counts the calls that were not made.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self.error: Exception | None = None
        self.lost = 0
        self._calls: queue.Queue[Callable[[], Any]] = queue.Queue(capacity)
        self._idle = threading.Condition()
        self._open = 0
        threading.Thread(target=self._work, daemon=True).start()

    def send(self, call: Callable[[], Any]) -> None:
        """Returns at once."""
        with self._idle:
            try:
                self._calls.put_nowait(call)
                self._open += 1
            except queue.Full:
                self.lost += 1

    def wait(self, seconds: float) -> bool:
        """Whether all calls are done, at the latest after so many seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: self._open == 0, seconds)

    @property
    def missing(self) -> int:
        """Calls that were not made, or not yet."""
        return self.lost + self._open

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            try:
                if self.error is None:
                    call()
            except (
                Exception
            ) as error:  # whatever it is, it must not reach those who do the real work
                self.error = error
            with self._idle:
                self.lost += self.error is not None
                self._open -= 1
                self._idle.notify_all()
