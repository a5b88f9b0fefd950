"""Train a language model on a mixture of raw and instruction-augmented text. `python train.py
--help`
"""

from ipt.cli import COMMANDS

if __name__ == "__main__":
    COMMANDS["train"]()
