"""The commands in the README and in docs/, as a reader would copy them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTS = re.compile(r"(?:\$ )?((?:python|torchrun|make|ipt|benchmarks/\S+\.sh)\b.*)")
SCRIPT = re.compile(r"(\w+)\.py")


@dataclass(frozen=True)
class Documented:
    """A command of a page, without the shell's prompt and comments."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.stem}: {' '.join(self.words)}"

    @property
    def program(self) -> tuple[str, ...]:
        """What is run, and its arguments: without `python` or `torchrun` and its options."""
        words = self.words[1:]
        while words and words[0].startswith("--"):
            words = words[1:]
        return words

    @property
    def command(self) -> str:
        """Name of the command of ours that takes a config, or "" if it is none."""
        program = self.program
        if self.words[0] not in ("python", "torchrun") or not program:
            return ""
        script = SCRIPT.fullmatch(program[0])
        if script and "/" not in program[0]:
            chat = len(program) > 1 and program[1] == "chat"
            return (
                "chat"
                if chat
                else {"synthesize": "synthesize", "train": "train", "evaluate": "evaluate"}[
                    script[1]
                ]
            )
        if program[:2] == ("-m", "ipt") and program[2] in (
            "reproduce",
            "playground",
            "synthesize",
            "train",
            "evaluate",
            "chat",
        ):
            return program[2]
        return ""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments of `command`: overrides, and Hydra's options."""
        skipped = 3 if self.program[:2] == ("-m", "ipt") else 1
        return self.program[skipped + (self.program[skipped : skipped + 1] == ("chat",)) :]


def documented_commands() -> Iterator[Documented]:
    """Every command in a code block, in the order of the pages."""
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in ("", "sh", "bash", "console"):
                yield from _commands(page, block)


def _commands(page: Path, block: str) -> Iterator[Documented]:
    for line in re.sub(r"[ \t]*\\\n\s*", " ", _without_comments_before_breaks(block)).splitlines():
        found = STARTS.fullmatch(line)
        if found:
            yield Documented(page, tuple(shlex.split(found[1], comments=True)))


def _without_comments_before_breaks(block: str) -> str:
    """A comment at the end of a line must not swallow the line's continuation."""
    return re.sub(r"\\[ \t]+#.*$", r"\\", block, flags=re.MULTILINE)


def tutorial_files() -> dict[str, str]:
    """The YAML files that the tutorial has its reader write: path -> content."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = [block for language, block in FENCE.findall(page) if language == "yaml"]
    recipe = next(block for block in blocks if block.startswith("# @package _global_"))
    task = next(block for block in blocks if block.startswith("kind:"))
    return {"books/experiment/handbook.yaml": recipe, "books/terms.yaml": task}
