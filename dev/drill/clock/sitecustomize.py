"""Shifts time.time() in the middle of a run. Python imports this module at startup if its folder is
on PYTHONPATH.

DRILL_CLOCK_JUMP is the shift in hours, DRILL_CLOCK_AFTER the number of seconds before the shift.
time.monotonic() is unchanged, as when the clock of a machine is set. datetime.now() is unchanged
too, because C extensions need the real class.
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
