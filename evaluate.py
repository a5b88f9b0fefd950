"""Score a model on tasks, or talk to it. `python evaluate.py --help`, `python evaluate.py chat
--help`
"""

import sys

from ipt.cli import COMMANDS

if __name__ == "__main__":
    command = "chat" if sys.argv[1:2] == ["chat"] else "evaluate"
    if command == "chat":
        del sys.argv[1]
    COMMANDS[command]()
