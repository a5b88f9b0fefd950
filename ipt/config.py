"""Typed configuration. A misspelt key, a wrong type or an unknown choice fails while Hydra composes
the config, before any model is loaded.

Each group of `conf/` has one dataclass here; `Config` is the config of every command.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ipt.arguments import plain_arguments
from ipt.errors import UserError
from ipt.places import expanded
from ipt.renamed import new_name

# Metadata of keys. PLAIN: on the command line the value is taken as typed, commas and brackets
# included. PATH: the same, and `~` is expanded to the home folder. PATHS: a list of paths.
PLAIN, PATH = {"plain": True}, {"plain": True, "path": True}
PATHS = {"path": True}
# INPUT: the stage's key depends on what the key refers to, such as the content of files, and not on
# its value.
INPUT = {"in_key": False}
ATTN_IMPLEMENTATIONS = (
    "auto",
    "packed",
    "sdpa",
    "eager",
    "varlen",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)


def choice(
    default: str | None,
    *others: str | None,
    renamed: dict[str, str] | None = None,
    in_key: bool = True,
) -> Any:
    """A key that takes one of these values. `renamed`: values of earlier versions -> new values.

    `in_key=False`: as `runtime`.
    """
    metadata = {"choices": (default, *others), "renamed": renamed or {}, "in_key": in_key}
    return field(default=default, metadata=metadata)


def runtime(default: Any, **metadata: Any) -> Any:
    """A key that does not affect the result, only where, when and how fast it is computed.

    It is not part of cache keys, so it may change between a run and its continuation.
    """
    return field(default=default, metadata={**metadata, "in_key": False})


@dataclass
class CorpusConfig:
    """Where raw documents come from, and which of them are held out from training."""

    # auto: files if `path` is set, hub if `dataset` is set, else ontology
    kind: str = choice("auto", "files", "hub", "ontology")
    # files: a .parquet, .jsonl, .ndjson, .json or .txt file (or .gz, .zst of one), a folder or a
    # glob of them; paths or fsspec URLs
    path: str | None = field(default=None, metadata=PATH)
    # hub: name of the dataset
    dataset: str | None = None
    # hub: configuration of the dataset
    subset: str | None = None
    # hub: split of the dataset
    split: str = "train"
    # column with the text
    text_field: str = "text"
    # files, hub: Jinja template that builds the text from all fields of a row; empty: text_field
    template: str = field(default="", metadata=PLAIN)
    # column with the id; null: a hash of file and row
    id_field: str | None = None
    # fraction of the documents (ontology: of the terms) that is never trained on
    held_out_fraction: float = 0.05
    # files, hub: a field such as `chapter`: documents with the same value are held out together,
    # documents without it never; null: each document on its own
    held_out_by: str | None = None
    # maximum number of training documents (ontology: of pages); null: all
    max_documents: int | None = None
    # files, hub: drop shorter documents
    min_characters: int = 0
    # files, hub: drop longer documents; null: none
    max_characters: int | None = None
    # files, hub: keep only documents in these languages, such as [en, de]; empty: all
    languages: list[str] = field(default_factory=list)
    # minimum probability of the detected language
    language_probability: float = 0.5
    # files, hub: documents with a text that occurred before
    exact_duplicates: str = choice("keep", "remove")
    # files, hub: remove documents with this Jaccard similarity to an earlier one, such as 0.8;
    # null: keep
    near_duplicates: float | None = None
    # ontology: which ontologies
    ontologies: list[str] = field(default_factory=lambda: ["MONDO", "UBERON", "CL"])
    # ontology: questions per task and split
    questions: int = 100
    # documents that share an n-gram with an item of an evaluation task; null: do not check
    overlap: str | None = choice(None, "report", "remove")

    def __post_init__(self) -> None:
        if self.kind == "auto":
            self.kind = "files" if self.path else "hub" if self.dataset else "ontology"


@dataclass
class DecontaminationConfig:
    """What `corpus.overlap` and `filters.overlap` search for: n-grams of words that also occur in
    items of evaluation tasks.
    """

    # tasks and groups of tasks; empty: the tasks of the run
    tasks: list[str] = field(default_factory=list, metadata=PATHS)
    # consecutive words
    ngram: int = 13


def chat_template_kwargs() -> dict[str, Any]:
    """Variables of chat templates: no reasoning before the answer, and no date of the day."""
    return {"enable_thinking": False, "date_string": "01 Jan 2026"}


@dataclass
class SynthesisConfig:
    """How documents become instruction-response pairs."""

    # folder, hub name or embedded:NAME; engine=openai: the server's name of the model; not used
    # with format=rule_based
    model: str = field(default="embedded:smollm2-135m-synthesizer", metadata=PATH)
    # folder of a LoRA adapter, merged into the model before use
    adapter: str | None = field(default=None, metadata=PATH)
    # engine=openai: folder or hub name of the tokenizer that counts lengths; null: that of `model`
    tokenizer: str | None = field(default=None, metadata=PATH)
    # ipt: the paper's synthesizer; chat: any instruction-tuned model; rule_based: no model
    format: str = choice("ipt", "chat", "rule_based")
    # format=chat: a prompt in ipt/synthesis/formats/chat_prompts, or the path of a .yaml file
    prompt: str = field(default="pairs", metadata=PATH)
    # openai: any server with the OpenAI protocol
    engine: str = choice("vllm", "openai", "transformers")
    # engine=openai: URL of the server
    base_url: str = runtime("http://localhost:8000/v1")
    # engine=openai: environment variable with the API key, if the server requires one
    api_key_env: str = runtime("OPENAI_API_KEY")
    # engine=openai: retries of a failed request, with increasing pauses
    max_retries: int = runtime(8)
    # engine=openai: seconds without a byte from the server before a request counts as failed
    timeout: float = runtime(600.0)
    # M: documents per chain; each document's prompt contains the earlier documents with their pairs
    shots: int = 3
    # context window in tokens, prompt and output together
    max_model_len: int = 4096
    # maximum output tokens per document
    max_new_tokens: int = 400
    # 0: greedy
    temperature: float = 0.0
    # temperature above 0: minimum probability of a token, relative to the most likely token
    min_p: float = 0.0
    # format=ipt: a grammar enforces the format and at most this many pairs; null: no grammar
    max_pairs: int | None = None
    # format=chat: variables of the chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=chat_template_kwargs)
    # stop a generation when it repeats a question
    stop_at_repetition: bool = True
    # maximum tokens of a document; null: as many as fit the context window
    max_document_tokens: int | None = None
    # what happens to documents with more tokens
    long_documents: str = choice("split", "truncate", "skip")
    # documents per shard; a finished shard is never rerun
    shard_size: int = 512
    # chains that generate concurrently, per engine
    max_num_seqs: int = runtime(64)
    # vLLM: tokens per engine step
    max_num_batched_tokens: int = runtime(8192)
    # vLLM on GPUs: fraction of the GPU memory
    gpu_memory_utilization: float = runtime(0.9)
    # vLLM: size of the KV cache in bytes; null: vLLM's default (CPU: 1 GiB)
    kv_cache_memory_bytes: int | None = runtime(None)
    # vLLM: auto | fp8 | … : fp8 halves the memory, so that twice as many chains fit
    kv_cache_dtype: str = "auto"
    # vLLM, transformers: precision of the weights
    dtype: str = choice("auto", "float32", "bfloat16", "float16")
    # vLLM: quantise the weights while loading (fp8_per_tensor, bitsandbytes with vLLM's plugin, …)
    quantization: str | None = None
    # vLLM: n-gram speculation: tokens proposed at a time from the prompt; 0: off
    prompt_lookup_num_tokens: int = 0
    # vLLM: GPUs per engine
    tensor_parallel_size: int = runtime(1)
    # vLLM: number of engines, each with its own GPUs
    data_parallel_size: int = runtime(1)
    # ray: shards are processed by Ray actors, each with its own engine
    cluster: str = choice("none", "ray", in_key=False)
    # ray: number of actors; null: one per GPU group of the cluster, at least one
    workers: int | None = runtime(None)
    # ray: an existing cluster ("auto" or ray://…); null: RAY_ADDRESS, else a local cluster
    ray_address: str | None = runtime(None)


@dataclass
class JudgeConfig:
    """A model behind an OpenAI-compatible server that rates a sample of the pairs."""

    # the server's name of the model; null: no judge
    model: str | None = None
    # URL of the server
    base_url: str = runtime("http://localhost:8000/v1")
    # environment variable with the API key, if the server requires one
    api_key_env: str = runtime("OPENAI_API_KEY")
    # number of randomly drawn pairs; null: all
    sample: int | None = 500
    # concurrent requests
    concurrency: int = runtime(16)
    # retries of a failed request, with increasing pauses
    max_retries: int = runtime(8)
    # seconds without a byte from the server before a request counts as failed
    timeout: float = runtime(600.0)
    # maximum output tokens per verdict
    max_tokens: int = 300


@dataclass
class ThresholdsConfig:
    """Which pairs are kept, by measure: [minimum, maximum], with null for an open end; null: the
    measure is not used.
    """

    # words of the document; outside the range all its pairs are dropped
    document_words: list[float | None] | None = None
    question_words: list[float | None] | None = None
    answer_words: list[float | None] | None = None
    # fraction of the answer's words that occur in the document
    grounded: list[float | None] | None = None
    # 1 if the document contains the answer word for word, else 0
    verbatim: list[float | None] | None = None
    # 0 for pairs of a generation that was cut at synthesis.max_new_tokens, else 1
    finished: list[float | None] | None = None
    # 1 if an earlier pair of any document has the same question, else 0
    duplicate_question: list[float | None] | None = None
    # number of earlier pairs whose question has the same template
    question_template_count: list[float | None] | None = None
    # pairs of the document that pass the thresholds above; outside the range all are dropped
    pairs: list[float | None] | None = None
    # 1 if the judge finds the answer correct, else 0; requires judge.sample=null
    judge_accuracy: list[float | None] | None = None
    # 1 if the judge finds the pair relevant to its document, else 0
    judge_relevance: list[float | None] | None = None


@dataclass
class FilterConfig:
    """Which synthesized pairs are excluded from the training texts. Without any setting the stage
    does not run.
    """

    thresholds: ThresholdsConfig = field(default_factory=ThresholdsConfig)
    # pairs that share an n-gram with an item of an evaluation task; null: do not check
    overlap: str | None = choice(None, "report", "remove")
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class RenderingConfig:
    """How a chain of documents and pairs becomes one pre-training text."""

    arrangement: str = choice("attached", "pairs_first", "detached", "pairs_only", "stitched")
    # weight of each layout; conf/rendering/paper.yaml
    layouts: dict[str, float] = field(default_factory=dict)
    # arrangement=attached: probability that the pairs precede their document
    inversion: float = 0.05
    # a template pool in ipt/rendering/templates, or the path of a .yaml file
    templates: str = field(default="default", metadata=PATH)
    # renderings of each chain; arrangement=stitched: renderings of a document in its one text
    versions: int = 1
    # processes; null: one per core. The texts do not depend on it
    workers: int | None = runtime(None)


@dataclass
class TokensConfig:
    """How texts become token stores."""

    # start each document with BOS; null: if the tokenizer does so by default
    bos: bool | None = None
    # end each document with EOS
    eos: bool = True
    # approximate tokens per shard, at 4 bytes of text per token
    shard_tokens: int = 100_000_000
    # cores for tokenisation; null: all that this process may use
    workers: int | None = runtime(None)
    # GiB of remote token stores that are cached on this machine
    cache_gib: float = runtime(100.0)


@dataclass
class SourceConfig:
    """A source of the mixture in addition to `raw` and `instruction`."""

    # file, folder, glob or URL; kind=collection: a file or a folder of datasets
    path: str = field(default="", metadata={**PATH, **INPUT})
    # texts | instructions (instructions with responses) | store (a token store), or a dataset of
    # contexts and pairs that tunes a synthesizer: adversarial_qa | collection | fairytaleqa |
    # medquad | medquad_pages | squad
    kind: str = "texts"
    # texts, instructions: hub name of a dataset, instead of `path`
    dataset: str | None = None
    # configuration of the dataset
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    # texts: Jinja template that builds the text from all fields of a row
    template: str = field(default="", metadata=PLAIN)
    # tuning datasets: maximum examples per text; null: as many as fit max_tokens
    shots: int | None = 3
    # collection: folders of `path` to include, each a dataset; empty: all
    include: list[str] = field(default_factory=list)
    # tuning datasets: maximum contexts per dataset, those with the most pairs; null: all
    max_contexts: int | None = None
    # tuning datasets: maximum tokens per text with BOS and EOS; longer examples are dropped
    max_tokens: int | None = None
    # tuning datasets: fill each text up to max_tokens, so that packing at this seq_len splits none
    fill: bool = False


@dataclass
class SchedulePoint:
    """Ratios from a point of the run onwards."""

    # fraction of the run, 0 to 1
    at: float = 0.0
    # as mixture.ratios
    ratios: dict[str, float | None] = field(default_factory=dict)


@dataclass
class MixtureConfig:
    """Which proportion of the trained tokens comes from which source, and how they are packed."""

    # `raw`: the corpus itself; `instruction`: the corpus with its pairs. null: the remainder to 1
    ratios: dict[str, float | None] = field(default_factory=dict, metadata=INPUT)
    # name -> SourceConfig; Any, so that +mixture.sources.NAME.path=FILE adds one
    sources: dict[str, Any] = field(
        default_factory=dict, metadata={"values": SourceConfig, **INPUT}
    )
    # what the ratios are proportions of
    unit: str = choice("tokens", "documents")
    # ratios that change during the run, instead of `ratios`; empty: constant
    schedule: list[SchedulePoint] = field(default_factory=list, metadata=INPUT)
    # between points of the schedule
    interpolation: str = choice("step", "linear")
    # tokens per packed sequence
    seq_len: int = 2048
    # concat: documents are split at the ends of sequences; best_fit: whole documents, some padding
    packing: str = choice("concat", "best_fit")
    # documents in one sequence do not attend to each other
    intra_document_mask: bool = True
    # per source: maximum epochs
    max_repeats: dict[str, float] = field(default_factory=dict)
    # beyond max_repeats: stop with an error, let the other sources fill in, or repeat all the same
    on_max_repeats: str = choice("stop", "renormalise", "repeat")
    # per source: use this fraction of its documents
    subsample: dict[str, float] = field(default_factory=dict)
    # subsample all sources so that they repeat as in a run of this many tokens; null: no
    match_tokens: int | None = None

    def __post_init__(self) -> None:
        """Convert the sources. Raises UserError for unknown keys and OmegaConf's errors for wrong
        types.
        """
        for name, source in self.sources.items():
            known = [one.name for one in fields(SourceConfig)]
            unknown = [key for key in source if key not in known] if hasattr(source, "keys") else []
            if unknown:
                found = f"there is no key mixture.sources.{name}.{unknown[0]}"
                raise UserError(f"{found}: the keys of a source are {', '.join(known)}")
            typed = OmegaConf.merge(OmegaConf.structured(SourceConfig), source)
            self.sources[name] = OmegaConf.to_object(typed)


@dataclass
class OptimizerConfig:
    # *_8bit: bitsandbytes, moments in 8 bits; paged: moments move to host memory when a GPU runs
    # out; muon: for the matrices of the blocks, adamw for the rest
    name: str = choice("adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "lion_8bit", "muon")
    # peak learning rate
    lr: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # of matrices only; norms and biases are never decayed
    weight_decay: float = 0.1
    # whether weight decay includes the embedding table
    decay_embeddings: bool = True
    eps: float = 1e-8
    # muon
    momentum: float = 0.95


@dataclass
class LrSchedulerConfig:
    # wsd: warm-up, stable, decay
    name: str = choice("cosine", "linear", "constant", "wsd")
    warmup_steps: int = 0
    # instead of warmup_steps, rounded up to whole steps
    warmup_tokens: int | None = None
    # wsd: fraction of the run, at its end, with a linearly decreasing learning rate
    decay_fraction: float = 0.1
    # last learning rate relative to the peak
    min_lr_ratio: float = 0.1


@dataclass
class LoraConfig:
    # 0: train all weights
    rank: int = 0
    # precision of the frozen matrices (bitsandbytes, QLoRA); null: as trainer.precision
    quantize: str | None = choice(None, "4bit", "8bit")
    alpha: int = 32
    dropout: float = 0.0


@dataclass
class TrainerConfig:
    """The training loop and the hardware it runs on."""

    # seed of the data order and of random numbers in training; null: the config's `seed`
    seed: int | None = None
    # optimizer steps
    max_steps: int = 100
    # sequences per device and forward pass
    micro_batch_size: int = runtime(1)
    # forward passes per optimizer step
    accumulate_grad_batches: int = runtime(1)
    # auto | cpu | gpu
    accelerator: str = "auto"
    # processes per machine; start more than one with torchrun
    devices: int = runtime(1)
    # machines
    num_nodes: int = runtime(1)
    # auto: fsdp2 on GPUs and with more than one process, else single
    strategy: str = choice("auto", "single", "fsdp2")
    # bf16-mixed: fp32 weights, bf16 arithmetic, gradients reduced in fp32. bf16-true: also bf16
    # weights with stochastically rounded updates: half the memory of weights and gradients
    precision: str = choice(
        "32-true", "bf16-mixed", "bf16-true", renamed={"fp32": "32-true", "bf16": "bf16-mixed"}
    )
    # auto: packed (document by document) on CPUs, the fastest available kernel on GPUs. varlen:
    # torch's own kernel. An unavailable kernel raises an error
    attn_implementation: str = choice(*ATTN_IMPLEMENTATIONS)
    # full: recompute whole blocks; selective: recompute cheap operations; budget: requires compile
    activation_checkpointing: str = choice(
        "none", "full", "selective", "budget", renamed={"true": "full", "false": "none"}
    )
    # activation_checkpointing=budget: fraction of the activation memory to keep
    activation_budget: float = 0.5
    # torch.compile, block by block
    compile: bool = False
    # fsdp2: replicas of the sharded model (HSDP), each on devices x num_nodes / replicas devices
    replicas: int = runtime(1)
    # fsdp2: reduce gradients once per step; until then each device keeps all of them in fp32
    no_sync: bool = False
    # skip steps whose loss or gradient norm is this many robust standard deviations above the
    # median; null: skip only non-finite steps
    skip_spikes: float | None = 6.0
    # maximum gradient norm
    gradient_clip_val: float = 1.0
    # processes that prepare batches; 0: batches are prepared in the training process
    num_workers: int = runtime(0)
    # target tokens per chunk of vocabulary projection and loss
    loss_chunk: int = 1024
    # precision of the weights in export/
    export_dtype: str = choice(
        "float32", "bfloat16", renamed={"fp32": "float32", "bf16": "bfloat16"}
    )
    # Lightning's profilers, which write to profile/ in the output folder. pytorch: a trace of
    # operators and kernels; simple, advanced: time by hook, by function
    profiler: str | None = choice(
        None,
        "simple",
        "advanced",
        "pytorch",
        renamed={"none": "null", "torch": "pytorch"},
        in_key=False,
    )
    # steps between two records for the loggers; metrics.jsonl has every step
    log_every_n_steps: int = runtime(1)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step over all devices."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.world_size

    @property
    def bf16_arithmetic(self) -> bool:
        """Whether matrix products are computed in bf16."""
        return self.precision != "32-true"

    @property
    def bf16_weights(self) -> bool:
        """Whether weights are stored in bf16."""
        return self.precision == "bf16-true"


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, which are kept, and where."""

    # optimizer steps between checkpoints; null: by time only
    every_n_train_steps: int | None = None
    # minutes between checkpoints; null: by steps only
    every_n_minutes: float | None = 10.0
    # number of newest checkpoints to keep
    keep_last: int = 1
    # also save checkpoints at multiples of this step, and never delete them; null: none
    keep_every_n_steps: int | None = None
    # false: delete all checkpoints when the run finishes
    keep_after_training: bool = True
    # fsspec folder to which checkpoints are copied, and from which a run resumes if there are none
    # on this machine
    url: str | None = field(default=None, metadata=PATH)
    # write checkpoints in the background from a copy in host memory
    async_save: bool = True


@dataclass
class DuringTrainingConfig:
    """Scores of the model during training, in metrics.jsonl and the loggers."""

    # optimizer steps between two evaluations, plus one at the end; null: never
    every_n_train_steps: int | None = None
    # empty: the config's `tasks`
    tasks: list[str] = field(default_factory=list, metadata=PATHS)
    # maximum items per task
    limit: int | None = 100


@dataclass
class EvaluationConfig:
    # hf: Hugging Face transformers
    backend: str = choice("hf", "vllm")
    # tokens per forward pass, padding included
    batch_tokens: int = 4096
    # maximum items per task; null: all
    limit: int | None = None
    # the released scorer uses float16
    dtype: str = choice(
        "float32",
        "bfloat16",
        "float16",
        renamed={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
    )
    # weights quantised by bitsandbytes
    quantize: str | None = choice(None, "4bit", "8bit")
    # auto | cpu | mps | cuda | cuda:NUMBER | sharded (layers spread over all GPUs, then the CPU, by
    # accelerate)
    device: str = "auto"
    # start each prompt with BOS; null: if the tokenizer does so by default
    add_bos_token: bool | None = None
    # format each prompt with the model's chat template
    apply_chat_template: bool = False
    # variables of the chat template, also for `chat`
    chat_template_kwargs: dict[str, Any] = field(default_factory=chat_template_kwargs)
    # maximum tokens of a prompt with its option, or of a window of a document; null: the model's
    # context
    max_length: int | None = None
    # tree: all options of a question in one pass; plain: each option in a sequence of its own;
    # auto: tree if the model supports it
    scoring: str = choice("auto", "tree", "plain")
    # paths of token stores or folders of texts to search for items
    contamination: list[str] = field(default_factory=list, metadata={**PATHS, **INPUT})
    # no effect on the evaluation stage
    during_training: DuringTrainingConfig = field(
        default_factory=DuringTrainingConfig, metadata={"in_key": False}
    )


@dataclass
class ChatConfig:
    """A conversation with a model."""

    # format questions with the tokenizer's chat template; false: the model continues the text
    apply_chat_template: bool = False
    # maximum tokens per answer
    max_new_tokens: int = 400
    # 0: greedy
    temperature: float = 0.0
    # strings that end an answer
    stop: list[str] = field(default_factory=list)
    # keep earlier questions and answers in the context
    memory: bool = True


@dataclass
class PlaygroundConfig:
    """A page in the browser to try a synthesizer and to chat with models."""

    # address to listen on; with any other than this machine's own, others can use the page without
    # a password
    host: str = "127.0.0.1"
    # null: the first free port from 7860
    port: int | None = None
    # models to chat with, in addition to `model` and those in `exports`
    models: list[str] = field(default_factory=list, metadata=PATHS)
    # a folder: every export/ below it is a model to chat with
    exports: str = field(default="outputs", metadata=PATH)
    # maximum characters of a text
    max_characters: int = 50_000
    # maximum size of an uploaded file
    max_file_mib: int = 16


@dataclass
class Config:
    # name of the experiment
    name: str = "run"
    # heading of the report; empty: `name`
    title: str = field(default="", metadata=PLAIN)
    # null: outputs/<command>-<cache key of the config>
    output_dir: str | None = field(default=None, metadata=PATH)
    # cache of finished corpus, pairs, texts and tokens, shared by all runs
    stages_dir: str = field(default="outputs/stages", metadata=PATH)
    seed: int = 0
    # the model that training starts from and that evaluation scores: folder, hub name or
    # embedded:NAME
    model: str = field(default="embedded:smollm2-135m", metadata=PATH)
    # a transformers config: train from scratch; empty: start from `model`
    architecture: dict[str, Any] = field(default_factory=dict)
    # where recipes look for datasets that you download yourself
    data_dir: str = field(default="data", metadata=PATH)
    # names, groups or .yaml files of evaluation tasks
    tasks: list[str] = field(default_factory=list, metadata=PATHS)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    rendering: RenderingConfig = field(default_factory=RenderingConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    playground: PlaygroundConfig = field(default_factory=PlaygroundConfig)
    # name -> _target_ (a Lightning logger) and its arguments; empty: none
    logger: dict[str, Any] | None = field(default_factory=dict)
    # reproduce: name -> changes of the config for this arm
    arms: dict[str, Any] = field(default_factory=dict)
    # reproduce: train each arm once per seed; empty: once, with trainer.seed
    seeds: list[int] = field(default_factory=list)
    # reproduce: synthesis | tokens | training | evaluation | report; empty: all
    stages: list[str] = field(default_factory=list)
    # reproduce: names of the arms to run; empty: all
    only: list[str] = field(default_factory=list)
    # the paper's model whose published figures the report shows next to this arm's; outside of
    # arms: next to the base model's
    published: str = ""
    # train, reproduce: print the required data, memory, time and disk; needs no GPU, weights or
    # network
    dry_run: bool = False
    # GPU that a dry run assumes: H100 | H200 | B200 | A100 | A100-40 | RTX4090 | RTX3090 | L4
    dry_run_gpu: str = "H100"
    # model FLOPs utilisation that a dry run assumes: fraction of the GPU's peak FLOP/s
    dry_run_mfu: float = 0.5

    def __post_init__(self) -> None:
        """Expand paths. Raises UserError for a logger that has no class."""
        for name, settings in self.loggers.items():
            if not isinstance(settings, dict):
                raise UserError(unknown_key(f"logger.{name}"))
            if not isinstance(settings.get("_target_"), str):
                raise UserError(
                    f"logger.{name}: _target_ must name the class of a Lightning logger"
                )
        _expand_paths(self)

    @property
    def loggers(self) -> dict[str, Any]:
        """The loggers of `logger` without those that are null."""
        return {name: one for name, one in (self.logger or {}).items() if one is not None}


ConfigStore.instance().store(name="schema", node=Config)


def keys(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, field and value of each key of a part of the config, depth first."""
    for one in fields(part):
        value, name = getattr(part, one.name), f"{prefix}{one.name}"
        yield name, one, value
        if is_dataclass(value):
            yield from keys(value, f"{name}.")


def key_settings(part: Any) -> dict[str, Any]:
    """The settings of a part of the config that take part in cache keys."""
    settings = {}
    for one in fields(part):
        value = getattr(part, one.name)
        if one.metadata.get("in_key", True):
            settings[one.name] = key_settings(value) if is_dataclass(value) else value
    return settings


def check_choices(config: Any, prefix: str = "") -> None:
    """Raises UserError for a value that is none of the key's choices."""
    for name, one, value in keys(config, prefix):
        choices = one.metadata.get("choices")
        if choices is None or value in choices:
            continue
        new = one.metadata["renamed"].get(str(value).lower())
        hint = f"; {value} is now called {new}" if new else ""
        known = ", ".join("null" if known is None else known for known in choices)
        raise UserError(f"{name}={value}: must be one of {known}{hint}")


def unknown_key(key: str) -> str:
    """The error for a key that the config does not have: its new name, or the most similar key."""
    if renamed := new_name(key):
        return f"the key {key} is now called {renamed}"
    if key.startswith("logger."):
        name = key.split(".")[1]
        return f"there is no key {key}: choose logger={name} first, or add the key with +{key}=…"
    known = [name for name, _, _ in keys(Config())]
    near = difflib.get_close_matches(key, known, n=1)
    return f"there is no key {key}: " + (
        f"did you mean {near[0]}?" if near else "--cfg job prints all keys"
    )


def _check_keys(config: DictConfig, part: Any, prefix: str = "") -> None:
    """Raises UserError for a key that was added with `+` where no key is open to be added."""
    known = {one.name: getattr(part, one.name) for one in fields(part)}
    for name in map(str, config):
        if name not in known:
            raise UserError(unknown_key(f"{prefix}{name}"))
        if is_dataclass(known[name]):
            _check_keys(config[name], known[name], f"{prefix}{name}.")


def _expand_paths(part: Any) -> None:
    """Replace `~` in the paths of a part of the config, and of the parts in it."""
    for one in fields(part):
        value = getattr(part, one.name)
        nested = value.values() if isinstance(value, dict) else [value]
        for inner in nested:
            if is_dataclass(inner):
                _expand_paths(inner)
        if not one.metadata.get("path"):
            continue
        if isinstance(value, str):  # corpus.path may name several
            setattr(part, one.name, ",".join(map(expanded, value.split(","))))
        elif isinstance(value, list):
            setattr(part, one.name, [expanded(entry) for entry in value])


def conf_dir() -> Path:
    """conf/ of the checkout, or the copy that the installed package carries."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").exists() else package.parent / "conf"


def to_config(config: DictConfig) -> Config:
    """The typed config, with all interpolations resolved.

    Raises UserError for unknown keys and choices.
    """
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    _check_keys(config, result)
    check_choices(result)
    return result


def plain_command(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments that Hydra takes as they were typed; GROUP=null selects nothing."""
    result = []
    for argument in plain_arguments(arguments, Config):
        group, _, value = argument.partition("=")
        is_empty_group = value == "null" and (conf_dir() / group).is_dir()
        result.append(f"{group}=[]" if is_empty_group else argument)
    return result


def compose_config(command: str, overrides: Sequence[str]) -> Config:
    """The config of `command` with these overrides.

    Raises UserError for unknown keys and choices, and Hydra's and OmegaConf's errors.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(compose(command, plain_command(overrides)))
