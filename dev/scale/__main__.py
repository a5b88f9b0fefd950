"""Time and memory of each package of ipt by the size of the text, and hundreds of simulated ranks.

    python -m dev.scale packages
    python -m dev.scale packages --sizes 1 4 16 --only corpus tokens
    python -m dev.scale memory
    python -m dev.scale ranks
    python -m dev.scale network

`packages` runs each package alone on texts of 4, 16 and 64 MB and prints seconds and memory per MB.
`memory` prints the bytes kept per document, file or shard, and how much text fills 64 GiB with
them. `ranks` simulates 512 ranks in one process: data order, a plan of 1 T tokens, the shards of an
8B model, a checkpoint and its resume on 64 ranks. `network` derives memory and network traffic of
an 8B model on 8 to 512 GPUs; nothing of it is measured.

All seconds are CPU time of one core, so other work on the machine does not add to them. The results
are in docs/scale.md.
"""

import argparse

from rich.console import Console

from dev.scale import memory, packages


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=170)
    if arguments.what == "packages":
        console.print(packages.measure_packages(arguments.sizes, arguments.only))
    elif arguments.what == "memory":
        console.print(memory.measure_memory(arguments.units))
    elif arguments.what == "ranks":
        from dev.scale import ranks

        console.print(ranks.measure_ranks(arguments.world, arguments.resumed))
    else:
        from dev.scale import network

        console.print(network.network_table())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m dev.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    of_packages = commands.add_parser("packages")
    of_packages.add_argument(
        "--sizes",
        type=float,
        nargs="+",
        default=[4, 16, 64],
        help="megabytes, at least three sizes",
    )
    names = list(packages.PACKAGES)
    of_packages.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="PACKAGE",
        help=f"some of: {'; '.join(names)}",
    )
    of_memory = commands.add_parser("memory")
    of_memory.add_argument(
        "--units", type=int, default=100_000, help="documents; files and shards: a fiftieth of it"
    )
    of_ranks = commands.add_parser("ranks")
    of_ranks.add_argument("--world", type=int, default=512, help="number of ranks")
    of_ranks.add_argument(
        "--resumed", type=int, default=64, help="number of ranks that resume from the checkpoint"
    )
    commands.add_parser("network")
    return parser.parse_args()


if __name__ == "__main__":
    main()
