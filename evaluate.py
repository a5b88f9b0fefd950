"""Score a model on tasks. `python evaluate.py --help`"""

from ipt.experiment.commands import COMMANDS

if __name__ == "__main__":
    COMMANDS["evaluate"]()
