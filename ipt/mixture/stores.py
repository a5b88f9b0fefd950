"""Opening the token stores of a mixture."""

from collections.abc import Mapping
from pathlib import Path

from ipt.errors import UserError
from ipt.tokens.store import CACHE_GIB, TokenStore


def open_stores(
    folders: Mapping[str, str | Path], cache_gib: float = CACHE_GIB
) -> dict[str, TokenStore]:
    """The store of each source, at a path or an fsspec URL; of the latter at most `cache_gib` GiB
    each are kept on this machine.

    Raises UserError naming those that different tokenizers made, and what TokenStore raises.
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
