"""`python -m ipt.tokens show|verify|add STORE`: look at a token store, check its hashes, make or
extend one.
"""

import argparse
from pathlib import Path

from rich.table import Table

from ipt.cli import exit_on_user_error
from ipt.config import TokensConfig
from ipt.console import console, use_utf8
from ipt.errors import UserError
from ipt.places import check_writable
from ipt.tokens.store import TokenStore
from ipt.tokens.tokenize import add_texts, check_tokens

SHOWN = 20  # shards in the table of `show`


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with exit_on_user_error():
        {"show": _show, "verify": _verify, "add": _add}[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ipt.tokens", description="Token stores; STORE is a folder or an fsspec URL."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print what a store holds")
    show.add_argument(
        "--document", type=int, help="print this document too, decoded if --model is given"
    )
    verify = commands.add_parser(
        "verify", help="read all files and compare them with the hashes in the indices"
    )
    add = commands.add_parser(
        "add", help="make a store of texts, or add them to one; goes on after an interruption"
    )
    for command in (show, verify, add):
        command.add_argument("store", metavar="STORE")
    show.add_argument("--model", help="folder, hub name or embedded:NAME with the tokenizer")
    add.add_argument(
        "texts",
        metavar="TEXTS",
        type=Path,
        help="folder of *.parquet with a column text, such as a corpus stage writes",
    )
    add.add_argument(
        "--model", required=True, help="folder, hub name or embedded:NAME with the tokenizer"
    )
    add.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin documents with BOS (default: as the tokenizer does)",
    )
    add.add_argument(
        "--eos", action=argparse.BooleanOptionalAction, default=True, help="end documents with EOS"
    )
    add.add_argument("--workers", type=int, help="processes (default: one for each core)")
    add.add_argument(
        "--shard-tokens",
        type=int,
        default=TokensConfig.shard_tokens,
        help="rough size of a shard (default: %(default)s)",
    )
    return parser


def _show(options: argparse.Namespace) -> None:
    store = TokenStore.open(options.store)
    document = (
        None if options.document is None else _document(store, options.document, options.model)
    )
    table = Table(
        "shard", "documents", "tokens", "bytes", title=store.location, title_justify="left"
    )
    for index in store.indices[:SHOWN]:
        size = sum(file["bytes"] for file in index.files.values())
        table.add_row(
            index.shard + (" (masked)" if index.has_loss_mask else ""),
            f"{index.n_docs:,}",
            f"{index.n_tokens:,}",
            f"{size:,}",
        )
    if len(store.indices) > SHOWN:
        table.add_row(f"{len(store.indices) - SHOWN:,} more")
    console.print(table)
    origin = store.indices[0].origin
    print(f"documents    {len(store):,}")
    print(f"tokens       {store.n_tokens:,}")
    print(f"tokenizer    {store.fingerprint}")
    print(f"BOS, EOS     {origin.bos}, {origin.eos}")
    print(f"digest       {store.digest}")
    if document is not None:
        print(document)


def _document(store: TokenStore, number: int, model: str | None) -> str:
    if not 0 <= number < len(store):
        raise UserError(
            f"{store.location} has {len(store)} documents, there is no document {number}: give "
            "--document a number from 0"
        )
    tokens = store.tokens(number)
    if model is None:
        return " ".join(map(str, tokens.tolist()))
    from ipt.models import load_tokenizer
    from ipt.tokens.encode import tokenizer_fingerprint

    tokenizer = load_tokenizer(model)
    if (found := tokenizer_fingerprint(tokenizer)) != store.fingerprint:
        raise UserError(
            f"--model {model} has tokenizer {found}, the store was made with {store.fingerprint}"
        )
    return str(tokenizer.decode(tokens))


def _verify(options: argparse.Namespace) -> None:
    store = TokenStore.open(options.store)
    store.verify()
    print(f"{store.location}: {len(store.indices):,} shards, all as they were written")


def _add(options: argparse.Namespace) -> None:
    if "://" in options.store:
        raise UserError(
            f"{options.store}: a store is made in a folder on this machine, and then copied"
        )
    config = TokensConfig(
        bos=options.bos, eos=options.eos, shard_tokens=options.shard_tokens, workers=options.workers
    )
    check_tokens(config)
    check_writable("STORE", Path(options.store))
    stats = add_texts(config, options.texts, options.model, Path(options.store))
    print(
        f"{options.store}: {stats['documents']:,} documents, {stats['tokens']:,} tokens in "
        f"{stats['shards']:,} shards"
    )


if __name__ == "__main__":
    use_utf8()
    main()
