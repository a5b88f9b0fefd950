"""`python -m ipt COMMAND [KEY=VALUE ...]`: the commands of the package, for a checkout and for an
installed wheel alike.
"""

import sys

from ipt.cli import COMMANDS
from ipt.console import use_utf8


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        print(
            f"usage: python -m ipt {{{','.join(COMMANDS)}}} [KEY=VALUE ...] [--help] [--cfg job]",
            file=sys.stderr,
        )
        sys.exit(0 if command in ("-h", "--help") else 1)
    sys.argv = [f"ipt {command}", *sys.argv[2:]]
    COMMANDS[command]()


if __name__ == "__main__":
    use_utf8()
    main()
