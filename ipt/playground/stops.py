"""Who wants to stop: one flag for each open page."""

from threading import Event, Lock


class Stops:
    """Flags by the name of a session. Whoever works for a session looks at its flag."""

    def __init__(self) -> None:
        self._events: dict[str | None, Event] = {}
        self._lock = Lock()

    def begin(self, session: str | None) -> Event:
        """A new flag, not raised."""
        with self._lock:
            self._events[session] = Event()
            return self._events[session]

    def stop(self, session: str | None) -> None:
        """Raise the flag, if there is one."""
        with self._lock:
            if session in self._events:
                self._events.pop(session).set()

    def stop_all(self) -> None:
        for session in list(self._events):
            self.stop(session)
