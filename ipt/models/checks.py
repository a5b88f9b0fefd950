"""Checks that the weight files of a model or adapter match its config.

They compare configs with the headers of safetensors files on the meta device and read no weights.
Hub models are checked only if they are in the local cache. `ipt.models.load_model` checks every
model again when it loads it.
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

# Buffers stored by older versions of transformers, which are now computed from the config.
OLD_BUFFERS = re.compile(r"(\.masked_bias|rotary_emb\.inv_freq)$")
# Parts of a checkpoint that do not contribute to the logits of the language model.
OTHER_PARTS = re.compile(
    r"(^|\.)(vis(ion|ual)|image|audio|speech|multi_modal|mtp|v_head|score)\w*\."
)

FLOAT = (
    "F"  # in safetensors' names of all floating-point types: F32, BF16, F8_E4M3, and of no other
)

logger = logging.getLogger(__name__)


def check_weights(source: str) -> None:
    """Check that the weights in the folder `source` are exactly those that its config describes.

    transformers itself resolves tied weights, converted mixtures of experts and ignored names.
    Raises UserError that names the first weight that is missing, unexpected or of a wrong shape.
    Does nothing for a hub model that is not in the local cache.
    """
    folder = local_folder(source)
    if folder is None:
        return
    if not Path(source).is_dir():
        try:
            weight_files(folder)
        except UserError:  # only a part of the hub's files is in the cache
            return
    _check_weights(folder, _state_of(folder))


def check_loaded(source: str, model: "PreTrainedModel", info: Mapping[str, Any]) -> None:
    """Raises UserError unless every weight of `model` was loaded from its files.

    `info` is the loading info that transformers returns with `output_loading_info=True`.
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
            f"model={source}: weight {name} has shape {list(stored)} in the files, but config.json "
            f"implies {list(wanted)}: one of the two belongs to another model"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.pre_quantized:
        _check_unexpected(source, model, info["unexpected_keys"])
    _check_still_tied(source, model)


def check_adapter(source: str, adapter: str) -> None:
    """Check that a LoRA adapter's weights are exactly those that its config adds to `source`.

    Raises UserError that names the first weight that is missing, unexpected or of a wrong shape.
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
    """The local folder of a model; None for a hub model that is not in the local cache."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith("embedded:"):
        return None  # built by ipt itself
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(source, "config.json")
    except ValueError:  # not a valid name of a hub model
        return None
    return Path(found).parent if isinstance(found, str) else None


def meta_model(config: "PretrainedConfig", source: str) -> "PreTrainedModel":
    """The causal LM of a config on the meta device. Raises UserError if there is none."""
    import torch
    from transformers import AutoModelForCausalLM

    no_model = "transformers cannot build a language model from config.json"
    with readable(f"model={source}", no_model), torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(config)


def read_config(source: str) -> "PretrainedConfig":
    """The config of a folder or hub name. Raises UserError if transformers does not accept it."""
    from transformers import AutoConfig

    with readable(f"model={source}", "transformers does not accept config.json"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars."""
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
    """Convert the exceptions that libraries raise for a user's file to UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {problem}: {_one_line(error)}") from error


def _state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time of the files that the check depends on."""
    paths = [path for kind in ("*.json", "*.safetensors", "*.bin") for path in folder.glob(kind)]
    found = [(path, path.stat()) for path in sorted(paths) if path.exists()]
    return tuple((path.name, status.st_size, status.st_mtime_ns) for path, status in found)


@lru_cache(maxsize=16)  # each arm of an experiment checks the same model
def _check_weights(folder: Path, state: tuple[tuple[str, int, int], ...]) -> None:
    stored = _read_shapes(weight_files(folder))
    config = read_config(str(folder))
    model = meta_model(config, str(folder))
    if getattr(config, "quantization_config", None) is not None:
        return  # quantised weights have other names and shapes, which are checked on loading
    _check_loadable(str(folder), model, stored)
    _check_floats(str(folder), model, stored)
    _check_tied_values(str(folder), model, stored)


def _read_shapes(files: list[Path]) -> dict[str, Stored]:
    """The tensors in weight files. Those of .bin files are unpickled with `weights_only` on the
    meta device.
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
                f"{file}: {odd} is not a tensor: save only the model's state_dict, preferably with "
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
    except RuntimeError as error:  # a weight for a conversion is missing or has a wrong shape
        _check_stored_names(source, model, stored)
        raise UserError(f"model={source}: the weights do not fit: {_one_line(error)}") from error
    check_loaded(source, loaded, info)


def _check_floats(source: str, model: "PreTrainedModel", stored: Mapping[str, Stored]) -> None:
    """Raises UserError for integers in place of floating-point weights: these are quantised weights
    without their scales.
    """
    for name, parameter in model.named_parameters():
        if name in stored and parameter.is_floating_point() and FLOAT not in stored[name].dtype:
            raise UserError(
                f"model={source}: weight {name} is stored as {stored[name].dtype}, expected "
                "floating-point numbers: the weights are quantised, but config.json has no "
                "quantization_config: copy the config that belongs to them"
            )


def _check_stored_names(source: str, model: Any, stored: Mapping[str, Stored]) -> None:
    """Compare stored names and shapes with those that transformers would save for `model`."""
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
                f"model={source}: weight {name} has shape {list(stored[name].shape)} in the files, "
                f"but config.json implies {list(value.shape)}: one of the two belongs to another "
                "model"
            )


def _missing(source: str, missing: list[str], unexpected: Iterable[str]) -> str:
    """The error message for missing weights, with the name that the first one has instead."""
    first, others = missing[0], sorted(unexpected)
    renamed = next((name for name in others if name.endswith(f".{first}")), None)
    message = f"model={source}: weight {first} is missing from the files ({len(missing)} in total)"
    if renamed:
        return f"{message}; they contain {renamed}: remove that prefix from the names"
    if others:
        other = "the weights belong to another model or class"
        return f"{message}; they contain {others[0]} instead: {other}"
    return f"{message}: copy all weight files, or correct config.json"


def _check_unexpected(source: str, model: "PreTrainedModel", names: Iterable[str]) -> None:
    """Raises UserError for weights that the model does not have. Those of parts other than the
    language model are only logged.
    """
    buffers = {name for name, _ in model.named_buffers()}
    unexpected = [
        name for name in sorted(names) if name not in buffers and not OLD_BUFFERS.search(name)
    ]
    inside = [name for name in unexpected if not OTHER_PARTS.search(name)]
    if inside:
        raise UserError(
            f"model={source}: the files contain {inside[0]}, which {type(model).__name__} of "
            f"config.json does not have ({len(inside)} such weights): correct config.json, or "
            "remove them if the model does not need them"
        )
    if unexpected:
        logger.warning(
            "model=%s: ignoring %d weights of other parts, such as %s",
            source,
            len(unexpected),
            unexpected[0],
        )


def _check_still_tied(source: str, model: "PreTrainedModel") -> None:
    """Raises UserError if transformers has untied weights because the files contain different
    values for them.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, origin in wanted.items():
        if target not in tied:
            raise UserError(_untied(source, target, origin))


def _check_tied_values(source: str, model: "PreTrainedModel", stored: Mapping[str, Stored]) -> None:
    """Raises UserError for tied weights that are stored twice with different values."""
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():
        both = target in stored and origin in stored  # a .bin file holds one tensor by two names
        if both and stored[target].file.suffix != ".bin" and not _equal(target, origin, stored):
            raise UserError(_untied(source, target, origin))


def _untied(source: str, target: str, origin: str) -> str:
    return (
        f"model={source}: config.json ties {target} to {origin}, but the files contain different "
        "values for them: set tie_word_embeddings to false in config.json"
    )


def _equal(left: str, right: str, stored: Mapping[str, Stored]) -> bool:
    """Whether two stored tensors are equal. Reads a thousand rows at a time."""
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
