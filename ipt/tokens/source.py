"""A finished token store as a source of the mixture."""

from typing import NamedTuple

from ipt.config import SourceConfig
from ipt.errors import MissingFileError, UserError
from ipt.tokens.encode import tokenizer_fingerprint
from ipt.tokens.store import TokenStore

KIND = "store"  # of mixture.sources.NAME.kind


class GivenStore(NamedTuple):
    """A store that a user names; like a stage, it has a place and a digest."""

    folder: str  # path or URL
    digest: str


def given_store(name: str, config: SourceConfig, model: str, cache_gib: float) -> GivenStore:
    """The store of a source, checked as `open_source` does."""
    return GivenStore(config.path, open_source(name, config, model, cache_gib).digest)


def open_source(name: str, config: SourceConfig, model: str, cache_gib: float) -> TokenStore:
    """The store that `mixture.sources.NAME.path` names, a path or a URL.

    Raises a one-line error if there is none, if it is not whole, or if `model` has another
    tokenizer than it was made with.
    """
    from ipt.models import load_tokenizer

    key = f"mixture.sources.{name}.path={config.path}"
    if not config.path:
        raise UserError(f"{key}: name the folder or URL of a token store")
    try:
        store = TokenStore.open(config.path, cache_gib)
    except MissingFileError as error:
        raise MissingFileError(f"{key}: {error}") from None
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    wanted = tokenizer_fingerprint(load_tokenizer(model))
    if store.fingerprint != wanted:
        raise UserError(
            f"{key} was made with tokenizer {store.fingerprint}, but that of model={model} is "
            f"{wanted}: tokenise its texts again"
        )
    return store


def check_ids(name: str, config: SourceConfig, vocabulary: int, cache_gib: float) -> None:
    """Check that a model with `vocabulary` embeddings has one for every token of a source's store.

    Reads the tokens of a store on this machine; those of a very large or remote one are checked as
    they are trained on (ipt.mixture.batches). Raises UserError.
    """
    store = TokenStore.open(config.path, cache_gib)
    if (largest := store.largest_id()) >= vocabulary:
        raise UserError(
            f"mixture.sources.{name}.path={config.path}: the store holds the token {largest}, and "
            "the"
            f" model has {vocabulary} embeddings: tokenise its texts with the model's tokenizer"
        )
