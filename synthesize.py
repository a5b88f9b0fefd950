"""Documents to instruction-response pairs. `python synthesize.py --help`"""

from ipt.cli import COMMANDS

if __name__ == "__main__":
    COMMANDS["synthesize"]()
