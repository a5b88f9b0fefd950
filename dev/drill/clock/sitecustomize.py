"""A clock that is set anew in the middle of a run. Python imports this by itself where its folder
is on PYTHONPATH.

DRILL_CLOCK_JUMP: hours; DRILL_CLOCK_AFTER: seconds until then. time.monotonic() goes on as it does
when a machine's clock is set. datetime.now() keeps the machine's time: extensions in C need the
real class.
"""

import os
import time

_time, _time_ns = time.time, time.time_ns
_jump = 3600 * float(os.environ.get("DRILL_CLOCK_JUMP", 0))
_moment = time.monotonic() + float(os.environ.get("DRILL_CLOCK_AFTER", 0))


def _shift() -> float:
    return _jump if time.monotonic() >= _moment else 0.0


time.time = lambda: _time() + _shift()
time.time_ns = lambda: _time_ns() + int(_shift() * 1e9)
