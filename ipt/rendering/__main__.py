"""`python -m ipt.rendering preview FILE [KEY=VALUE ...]`: shows how pairs will be rendered."""

import argparse
from pathlib import Path

from ipt.cli import exit_on_user_error
from ipt.config import compose_config
from ipt.console import make_console, use_utf8
from ipt.rendering.preview import preview


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ipt.rendering", description="Print renderings of pairs, coloured by part."
    )
    parser.add_argument("command", choices=["preview"])
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="pairs: .parquet, .jsonl, .jsonl.gz, or the folder of a synthesis",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="as rendering=stitched rendering.versions=2 seed=1",
    )
    parser.add_argument(
        "-n", "--number", type=int, default=3, help="chains of documents (default: 3)"
    )
    arguments = parser.parse_intermixed_args()
    with exit_on_user_error():
        config = compose_config("synthesize", arguments.settings)
        preview(arguments.file, config.rendering, config.seed, arguments.number, make_console())


if __name__ == "__main__":
    use_utf8()
    main()
