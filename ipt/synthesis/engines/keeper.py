"""No engine outlives its run.

When a process that runs vLLM is killed (kill -9, out of memory), vLLM's own processes stay and hold
their memory, on a GPU all of it, so that the next run could not start. A keeper is a tiny shell
process that waits for the end of this one, however it comes, and then ends what carries its mark.
Every process that is started in between carries it: the mark is an environment variable. vLLM's
sockets, which stay even when it ends as it should, go with it.
"""

import os
import subprocess
import tempfile
from uuid import uuid4

MARK = "IPT_ENGINE"
# Standard input ends when the process that holds its other end does. Python's resource tracker is
# spared: it ends by itself and first frees the shared memory that the killed ones leave behind.
# Where there is no /proc, nothing is found and nothing happens.
SCRIPT = """
cat > /dev/null
for process in /proc/[0-9]*; do
    if grep -qzxF -e "$1" "$process/environ" 2> /dev/null && ! grep -q resource_tracker "$process/cmdline" 2> /dev/null; then
        kill -9 "${process#/proc/}" 2> /dev/null
    fi
done
rm -rf -- "$2"
"""


class ProcessReaper:
    """From its making on, processes that this one starts end with it; `close` ends those that are
    left, and the keeper.

    The folder `scratch` is removed thereafter.
    """

    def __init__(self) -> None:
        mark = uuid4().hex
        self.scratch = tempfile.mkdtemp(prefix="ipt-engine-")
        command = ["sh", "-c", SCRIPT, "sh", f"{MARK}={mark}", self.scratch]
        unmarked = {
            name: value for name, value in os.environ.items() if name != MARK
        }  # another engine's keeper must spare this one
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=unmarked,
            start_new_session=True,
        )
        os.environ[MARK] = mark

    def close(self) -> None:
        os.environ.pop(MARK, None)
        self._process.communicate()
