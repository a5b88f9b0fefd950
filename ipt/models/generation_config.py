"""Load the generation_config.json of a model without the entries that transformers rejects.

Published models combine, for example, sampling flags with `do_sample: false`. transformers refuses
to save such a config, so an export would fail after training.
"""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipt.models.files import read_object

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
# accepted first, since other entries depend on them
FIRST = ("do_sample", "num_beams", "num_return_sequences", "return_dict_in_generate")

logger = logging.getLogger(__name__)


def load_generation_config(source: str) -> "GenerationConfig | None":
    """The generation config of a folder or hub name; None if the model has none.

    Entries that transformers rejects are dropped and logged.
    """
    from transformers.utils import cached_file

    path = cached_file(
        source,
        FILE,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    config, dropped = accepted(read_object(Path(path)))
    if dropped:
        _log_dropped(str(path), ", ".join(dropped))
    return config


def accepted(values: Mapping[str, Any]) -> "tuple[GenerationConfig, list[str]]":
    """A config of the values that transformers accepts together, and the names of the others."""
    whole = _valid(values)
    if whole is not None:
        return whole, []
    kept: dict[str, Any] = {}
    dropped = []
    for name in sorted(values, key=lambda name: (name not in FIRST, name)):
        if _valid({**kept, name: values[name]}) is None:
            dropped.append(name)
        else:
            kept[name] = values[name]
    config = _valid(kept)
    assert config is not None
    return config, dropped


def _valid(values: Mapping[str, Any]) -> "GenerationConfig | None":
    """The config of `values` if transformers can save it, else None."""
    from transformers import GenerationConfig
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        config = GenerationConfig.from_dict(dict(values))
        config.validate(strict=True)
        config.to_json_string(use_diff=True)
    except Exception:  # wrong types raise various exceptions
        return None
    finally:
        transformers_logging.set_verbosity(verbosity)
    return config


@cache  # logs once per process
def _log_dropped(path: str, names: str) -> None:
    logger.warning(
        "%s: dropping entries that transformers does not accept together with the others: %s",
        path,
        names,
    )
