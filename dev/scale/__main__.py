"""Cost and limits of each room by the size of the text, and hundreds of ranks in one process.
docs/scale.md says what came out.

    python -m dev.scale rooms                     # seconds and memory a megabyte, for 4, 16 and 64 MB
    python -m dev.scale rooms --sizes 1 4 16 --rooms corpus tokens
    python -m dev.scale held                      # bytes that stay in memory, and the text that fills 64 GiB with them
    python -m dev.scale ranks                     # 512 ranks: order, plan of 1 T tokens, slices of 8B, a checkpoint, resume on 64
    python -m dev.scale network                   # memory and network of 8B on 8 to 512 GPUs; derived, not measured

Seconds are those of one core (CPU time), so that what else the machine does does not lengthen them.
"""

import argparse

from rich.console import Console

from dev.scale import held, rooms


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=170)
    if arguments.what == "rooms":
        console.print(rooms.measure_rooms(arguments.sizes, arguments.rooms))
    elif arguments.what == "held":
        console.print(held.measure_held(arguments.units))
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
    of_rooms = commands.add_parser("rooms")
    of_rooms.add_argument(
        "--sizes", type=float, nargs="+", default=[4, 16, 64], help="megabytes, three or more"
    )
    of_rooms.add_argument("--rooms", nargs="+", choices=rooms.ROOMS, default=list(rooms.ROOMS))
    of_held = commands.add_parser("held")
    of_held.add_argument(
        "--units", type=int, default=100_000, help="documents; of files a fiftieth"
    )
    of_ranks = commands.add_parser("ranks")
    of_ranks.add_argument("--world", type=int, default=512)
    of_ranks.add_argument(
        "--resumed", type=int, default=64, help="ranks that go on from the checkpoint"
    )
    commands.add_parser("network")
    return parser.parse_args()


if __name__ == "__main__":
    main()
