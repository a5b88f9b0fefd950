"""Whether a folder holds the weights of the model that its config describes, or an adapter's.

This is found from configs and the headers of safetensors files, on the meta device; no weights are
read. A hub's model is checked here only once its files are in the local cache, and every model once
more when it is loaded (`ipt.models.load_model`).
"""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipt.errors import UserError
from ipt.models.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Stored,
    check_adapter_files,
    check_pickled,
    read_header,
    read_headers,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Buffers that older versions of transformers stored, and that are computed from the config now.
OLD_BUFFERS = re.compile(r"(\.masked_bias|rotary_emb\.inv_freq)$")
# Parts next to the language model that a checkpoint may hold: they take no part in its logits.
OTHER_PARTS = re.compile(
    r"(^|\.)(vis(ion|ual)|image|audio|speech|multi_modal|mtp|v_head|score)\w*\."
)

FLOAT = (
    "F"  # in safetensors' names of all floating-point types: F32, BF16, F8_E4M3, and of no other
)

logger = logging.getLogger(__name__)


def check_weights(source: str) -> None:
    """Check that the folder `source` holds exactly the weights of the model that its config
    describes.

    Tied weights, conversions of mixtures of experts and names that transformers ignores are taken
    into account by transformers itself. Raises UserError that names the first weight that is
    missing, unexpected or of another shape. Does nothing for a hub's model that is not in the local
    cache.
    """
    folder = local_folder(source)
    if folder is None:
        return
    if not Path(source).is_dir():
        try:
            weight_files(folder)
        except UserError:  # only some of a hub's files are here so far
            return
    _check_weights(folder, _state_of(folder))


def check_loaded(source: str, model: "PreTrainedModel", info: Mapping[str, Any]) -> None:
    """Raise UserError unless every weight of `model` came from its files.

    `info` is what transformers' `output_loading_info=True` returns.
    """
    missing = [name for name in model.state_dict() if name in info["missing_keys"]]
    missing += sorted(set(info["missing_keys"]) - set(missing))
    if info["error_msgs"]:
        raise UserError(f"model={source}: {_one_line(info['error_msgs'][0])}")
    if missing:
        raise UserError(_missing(source, missing, info["unexpected_keys"]))
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        raise UserError(
            f"model={source}: weight {name} has the shape {list(stored)} in the files, and"
            f" config.json makes it {list(wanted)}: one of them is of another model"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.pre_quantized:
        _check_unexpected(source, model, info["unexpected_keys"])
    _check_still_tied(source, model)


def check_adapter(source: str, adapter: str) -> None:
    """Check that a LoRA adapter's weights are exactly those that its config adds to the model
    `source`.

    Raises UserError that names the first weight that is missing, unexpected or of another shape.
    """
    check_adapter_files(Path(adapter))
    if local_folder(source) is None:
        return
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    with readable(f"adapter={adapter}", ADAPTER_CONFIG):
        settings = PeftConfig.from_pretrained(adapter)
    settings.inference_mode = True
    with (
        readable(f"adapter={adapter}", f"the adapter does not fit model={source}"),
        warnings.catch_warnings(),
    ):
        # the model has another name here than where the adapter was trained
        warnings.simplefilter("ignore")
        model = meta_model(read_config(source), source)
        wrapped = get_peft_model(model, settings, low_cpu_mem_usage=True)
    wanted = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()
    }
    _check_same(adapter, source, wanted, read_header(Path(adapter) / ADAPTER_WEIGHTS))


def local_folder(source: str) -> Path | None:
    """The folder of a model on this machine, or None for a hub's that is not in the local cache."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith("embedded:"):
        return None  # made by ipt itself
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(source, "config.json")
    except ValueError:  # not a name that a hub can have
        return None
    return Path(found).parent if isinstance(found, str) else None


def meta_model(config: "PretrainedConfig", source: str) -> "PreTrainedModel":
    """The causal language model of a config on the meta device. Raises UserError if there is none."""
    import torch
    from transformers import AutoModelForCausalLM

    no_model = "config.json describes no language model that transformers can build"
    with readable(f"model={source}", no_model), torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(config)


def read_config(source: str) -> "PretrainedConfig":
    """The config of a folder or hub name. Raises UserError if transformers does not accept it."""
    from transformers import AutoConfig

    with readable(f"model={source}", "config.json is not accepted"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def readable(what: str, problem: str) -> Iterator[None]:
    """Turn what libraries raise for a user's file into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {problem}: {_one_line(error)}") from error


def _state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the files that decide whether the weights fit."""
    paths = [path for kind in ("*.json", "*.safetensors", "*.bin") for path in folder.glob(kind)]
    found = [(path, path.stat()) for path in sorted(paths) if path.exists()]
    return tuple((path.name, status.st_size, status.st_mtime_ns) for path, status in found)


@lru_cache(maxsize=16)  # an experiment with arms checks the same model for each of them
def _check_weights(folder: Path, state: tuple[tuple[str, int, int], ...]) -> None:
    stored = _read_shapes(weight_files(folder))
    config = read_config(str(folder))
    model = meta_model(config, str(folder))
    if getattr(config, "quantization_config", None) is not None:
        return  # quantised weights have names and shapes of their own, which loading checks
    _check_loadable(str(folder), model, stored)
    _check_floats(str(folder), model, stored)
    _check_tied_values(str(folder), model, stored)


def _read_shapes(files: list[Path]) -> dict[str, Stored]:
    """The tensors in weight files. Those of .bin files are unpickled as plain tensors, and not
    read.
    """
    if files[0].suffix != ".bin":
        return read_headers(files)
    from transformers.modeling_utils import load_state_dict

    stored: dict[str, Stored] = {}
    for file in files:
        check_pickled(file)
        with readable(f"{file}", "these weights cannot be loaded safely (weights_only)"):
            state = load_state_dict(str(file), map_location="meta", weights_only=True)
        odd = next((name for name, value in state.items() if not hasattr(value, "shape")), None)
        if odd is not None:
            raise UserError(
                f"{file}: {odd} is no tensor: save the model's state_dict alone, best with "
                "save_pretrained"
            )
        for name, value in state.items():
            kind = FLOAT if value.is_floating_point() else str(value.dtype)
            stored[name] = Stored(tuple(value.shape), file, kind)
    return stored


def _check_loadable(source: str, model: "PreTrainedModel", stored: Mapping[str, Stored]) -> None:
    """Let transformers load tensors of the stored names and shapes on the meta device."""
    import torch

    state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    model_class: Any = type(model)
    try:
        with quiet():
            loaded, info = model_class.from_pretrained(
                None,
                config=model.config,
                state_dict=state,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except RuntimeError as error:  # a conversion lacks a weight, or their shapes do not fit
        _check_stored_names(source, model, stored)
        raise UserError(f"model={source}: the weights do not fit: {_one_line(error)}") from error
    check_loaded(source, loaded, info)


def _check_floats(source: str, model: "PreTrainedModel", stored: Mapping[str, Stored]) -> None:
    """Integers where the model has real numbers are quantised weights, which mean nothing without
    their scales.
    """
    for name, parameter in model.named_parameters():
        if name in stored and parameter.is_floating_point() and FLOAT not in stored[name].dtype:
            raise UserError(
                f"model={source}: weight {name} is stored as {stored[name].dtype}, expected "
                "floating-point numbers: the weights"
                " are quantised, and config.json has no quantization_config: copy the config that "
                "belongs to them"
            )


def _check_stored_names(source: str, model: Any, stored: Mapping[str, Stored]) -> None:
    """Compare stored names and shapes with those that transformers would write for `model`."""
    from transformers.core_model_loading import revert_weight_conversion

    wanted = revert_weight_conversion(model, dict(model.state_dict()))
    for tied in model.all_tied_weights_keys:
        if tied not in stored:
            wanted.pop(tied, None)
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise UserError(_missing(source, missing, stored.keys() - wanted.keys()))
    for name, value in wanted.items():
        if stored[name].shape != tuple(value.shape):
            raise UserError(
                f"model={source}: weight {name} has the shape {list(stored[name].shape)} in the"
                f" files, and config.json makes it {list(value.shape)}: one of them is of another"
                " model"
            )


def _missing(source: str, missing: list[str], unexpected: Iterable[str]) -> str:
    """The message for weights that are missing, with the name that the first one has instead."""
    first, others = missing[0], sorted(unexpected)
    renamed = next((name for name in others if name.endswith(f".{first}")), None)
    message = f"model={source}: weight {first} is missing from the files ({len(missing)} in all)"
    if renamed:
        return f"{message}; they have {renamed}: rename the weights, without that prefix"
    if others:
        return f"{message}; {others[0]} is there instead: the weights are of another model or class"
    return f"{message}: copy all weight files, or correct config.json"


def _check_unexpected(source: str, model: "PreTrainedModel", names: Iterable[str]) -> None:
    """Weights that the model has no place for: parts next to the language model are only logged."""
    buffers = {name for name, _ in model.named_buffers()}
    unexpected = [
        name for name in sorted(names) if name not in buffers and not OLD_BUFFERS.search(name)
    ]
    inside = [name for name in unexpected if not OTHER_PARTS.search(name)]
    if inside:
        raise UserError(
            f"model={source}: the files hold {inside[0]}, for which {type(model).__name__} of"
            f" config.json has no place ({len(inside)} such weights): correct config.json, or "
            "remove"
            " them if the model does not need them"
        )
    if unexpected:
        logger.warning(
            "model=%s: %d weights of other parts are not used, such as %s",
            source,
            len(unexpected),
            unexpected[0],
        )


def _check_still_tied(source: str, model: "PreTrainedModel") -> None:
    """transformers unties weights that the config ties if the files hold both with different
    values.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, origin in wanted.items():
        if target not in tied:
            raise UserError(_untied(source, target, origin))


def _check_tied_values(source: str, model: "PreTrainedModel", stored: Mapping[str, Stored]) -> None:
    """Tied weights that are stored twice must be equal."""
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():
        both = target in stored and origin in stored  # a .bin file holds one tensor by two names
        if both and stored[target].file.suffix != ".bin" and not _equal(target, origin, stored):
            raise UserError(_untied(source, target, origin))


def _untied(source: str, target: str, origin: str) -> str:
    return (
        f"model={source}: config.json ties {target} to {origin}, but the files hold both with"
        " different values: set tie_word_embeddings to false in config.json"
    )


def _equal(left: str, right: str, stored: Mapping[str, Stored]) -> bool:
    """Whether two stored tensors are the same; reads them a thousand rows at a time."""
    import torch
    from safetensors import safe_open

    if stored[left].shape != stored[right].shape:
        return False
    with safe_open(stored[left].file, "pt") as first, safe_open(stored[right].file, "pt") as second:
        one, other = first.get_slice(left), second.get_slice(right)
        for start in range(0, stored[left].shape[0], 1000):
            if not torch.equal(one[start : start + 1000], other[start : start + 1000]):
                return False
    return True


def _check_same(
    adapter: str, source: str, wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]
) -> None:
    """Compare the names and shapes of an adapter with those that PEFT adds to the model."""
    for name, shape in wanted.items():
        if name not in stored:
            raise UserError(
                f"adapter={adapter}: weight {name} is missing from {ADAPTER_WEIGHTS}: the adapter "
                f"is not whole, or not of model={source}"
            )
        if stored[name].shape != shape:
            raise UserError(
                f"adapter={adapter}: weight {name} has the shape {list(stored[name].shape)}, and"
                f" model={source} needs {list(shape)}: the adapter is of another model"
            )
    # PEFT stores whole embedding layers with an adapter that grew or trained them.
    unexpected = sorted(name for name in stored if name not in wanted and not _is_embedding(name))
    if unexpected:
        raise UserError(
            f"adapter={adapter}: model={source} has no place for {unexpected[0]}"
            f" ({len(unexpected)} such weights): the adapter is of another model"
        )


def _is_embedding(name: str) -> bool:
    return re.search(r"(embed_tokens|lm_head|wte|embed_in|embed_out)\.weight$", name) is not None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]
