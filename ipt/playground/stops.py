"""Stop flags: one for each open page."""

from threading import Event, Lock


class Stops:
    """Flags by session. Work for a session checks its flag."""

    def __init__(self) -> None:
        self._events: dict[str | None, Event] = {}
        self._lock = Lock()

    def begin(self, session: str | None) -> Event:
        """A new flag, not set."""
        with self._lock:
            self._events[session] = Event()
            return self._events[session]

    def stop(self, session: str | None) -> None:
        """Set the flag, if there is one."""
        with self._lock:
            if session in self._events:
                self._events.pop(session).set()

    def stop_all(self) -> None:
        for session in list(self._events):
            self.stop(session)
