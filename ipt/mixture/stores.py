"""Opens the token stores of a mixture."""

from collections.abc import Mapping
from pathlib import Path

from ipt.errors import UserError
from ipt.tokens.store import CACHE_GIB, TokenStore


def open_stores(
    folders: Mapping[str, str | Path], cache_gib: float = CACHE_GIB
) -> dict[str, TokenStore]:
    """The store of each source, from a path or an fsspec URL. At most `cache_gib` GiB of each
    remote store are kept on this machine.

    Raises UserError with the names of stores made by different tokenizers, and the errors of
    TokenStore.
    """
    stores = {name: TokenStore.open(folder, cache_gib) for name, folder in folders.items()}
    if len({store.fingerprint for store in stores.values()}) > 1:
        found = ", ".join(
            f"{name} with {store.fingerprint} ({folders[name]})" for name, store in stores.items()
        )
        raise UserError(
            f"the token stores were made with different tokenizers: {found}; tokenise them again "
            "with one"
        )
    return stores
