"""Typed configuration. A misspelt key or a wrong type fails while Hydra composes, before any model
is loaded.

Every group of `conf/` has one dataclass here; `Config` is what each of the commands composes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ipt.arguments import plain_arguments
from ipt.places import expanded

# Metadata of keys. PLAIN: on the command line the value is taken as typed, commas and brackets
# included. PATH: the same, and `~` is the home folder. PATHS: a list of paths.
PLAIN, PATH = {"plain": True}, {"plain": True, "path": True}
PATHS = {"path": True}


@dataclass
class CorpusConfig:
    """Where raw documents come from, and which of them are held out from training."""

    # files | hub | ontology; auto: files if path is set, hub if dataset is, else ontology
    kind: str = "auto"
    # files: a .parquet, .jsonl, .ndjson, .txt or .json file (also .gz, .zst), a folder of them or a
    # glob; paths or fsspec URLs
    path: str | None = field(default=None, metadata=PATH)
    dataset: str | None = None  # hub: dataset name
    subset: str | None = None  # hub: dataset configuration
    split: str = "train"  # hub: dataset split
    text_field: str = "text"  # column that holds the text
    # files, hub: Jinja template that makes a text of all of a row's fields, in place of text_field;
    # empty: text_field
    template: str = field(default="", metadata=PLAIN)
    id_field: str | None = None  # column that holds the id; null: a hash of file and row
    held_out: float = 0.05  # share of documents (ontology: of terms) that never enter training
    # files, hub: field such as chapter: documents with the same value are held out together, those
    # without one never; null: each alone
    held_out_by: str | None = None
    limit: int | None = None  # at most so many training documents; null: all
    min_characters: int = 0  # files, hub: shorter documents are left out
    max_characters: int | None = None  # files, hub: longer documents are left out; null: none
    languages: list[str] = field(
        default_factory=list
    )  # files, hub: only documents in these, as [en, de]; empty: in any
    language_probability: float = 0.5  # and only if it is so probable
    exact_duplicates: str = (
        "keep"  # files, hub: keep | remove a document whose text was there before
    )
    near_duplicates: float | None = (
        # files, hub: remove one of this Jaccard similarity to an earlier one, as 0.8; null: keep
        None
    )
    ontologies: list[str] = field(
        default_factory=lambda: ["MONDO", "UBERON", "CL"]
    )  # ontology: which ones
    pages: int | None = None  # ontology: at most so many training pages; null: all 8,371
    questions: int = 100  # ontology: questions per task and split
    overlap: str | None = (
        # report | remove documents that share an n-gram with an item of an evaluation task; null:
        # do not look
        None
    )

    def __post_init__(self) -> None:
        if self.kind == "auto":
            self.kind = "files" if self.path else "hub" if self.dataset else "ontology"
        if self.kind == "ontology" and self.pages is not None:
            self.limit = self.pages if self.limit is None else min(self.limit, self.pages)


@dataclass
class DecontaminationConfig:
    """What `corpus.overlap` and `filters.overlap` look for: n-grams of words that items of
    evaluation tasks have too.
    """

    tasks: list[str] = field(
        default_factory=list, metadata=PATHS
    )  # tasks and groups; empty: those of the run
    ngram: int = 13  # words in a row


def chat_template_kwargs() -> dict[str, Any]:
    """Variables of chat templates: no reasoning before the answer, and no prompt that depends on
    the day.
    """
    return {"enable_thinking": False, "date_string": "01 Jan 2026"}


@dataclass
class SynthesisConfig:
    """How documents become instruction-response pairs."""

    # Folder, hub name, or embedded:NAME; with engine=openai the server's name for it; without a
    # meaning for format=rule_based.
    model: str = field(default="embedded:smollm2-135m-synthesizer", metadata=PATH)
    adapter: str | None = field(
        default=None, metadata=PATH
    )  # folder of a LoRA adapter, merged into the model before use
    # engine=openai: folder or hub name of the tokenizer that counts lengths; null: that of `model`
    tokenizer: str | None = field(default=None, metadata=PATH)
    # ipt (the paper's synthesizer) | chat (any instruction-tuned model) | rule_based (no model)
    format: str = "ipt"
    # format=chat: a prompt shipped in ipt/synthesis/formats/chat_prompts, or the path of a .yaml
    # file
    prompt: str = field(default="pairs", metadata=PATH)
    engine: str = "vllm"  # vllm | openai (any server that speaks that protocol) | transformers
    base_url: str = "http://localhost:8000/v1"  # engine=openai: the server
    # engine=openai: environment variable that holds the key, if the server wants one
    api_key_env: str = "OPENAI_API_KEY"
    max_retries: int = (
        8  # engine=openai: further tries of a failed request, each after a longer pause
    )
    # engine=openai: seconds without a byte from the server after which a request has failed
    timeout: float = 600.0
    shots: int = 3  # M: documents in one chain, each later one sees the earlier ones' pairs
    max_model_len: int = 4096  # context window in tokens, prompt and output together
    max_new_tokens: int = 400  # output tokens for one document
    temperature: float = 0.0
    # where temperature is above 0: no token below this share of the likeliest one's probability
    min_p: float = 0.0
    max_pairs: int | None = (
        # format=ipt: a grammar holds each output to the format and to so many pairs; null: no
        # grammar
        None
    )
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=chat_template_kwargs
    )  # format=chat: variables of the template
    stop_at_repetition: bool = (
        True  # end a generation as soon as it asks a question again that it has asked before
    )
    max_document_tokens: int | None = (
        None  # of one document; null: as many as the context window has room for
    )
    long_documents: str = "split"  # split | truncate | skip a document with more tokens than that
    shard_size: int = 512  # documents in one shard; a finished shard is never redone
    max_live_chains: int = 64  # chains that generate at the same time, for each engine
    max_num_batched_tokens: int = 8192  # vLLM: tokens in one engine step
    gpu_memory_utilization: float = 0.9  # vLLM on GPU: share of its memory
    kv_cache_gib: float | None = (
        None  # vLLM: size of the KV cache; null: vLLM's choice (CPU: 1 GiB)
    )
    kv_cache_dtype: str = (
        "auto"  # vLLM: auto | fp8 and others of vLLM's: half the memory, twice the chains
    )
    dtype: str = "auto"
    quantization: str | None = (
        # vLLM: quantise weights while loading (fp8_per_tensor, bitsandbytes with vLLM's plugin, …)
        None
    )
    lookup_tokens: int = (
        0  # vLLM: guess so many tokens at a time by looking up in the prompt what follows; 0: off
    )
    tensor_parallel: int = 1  # vLLM: GPUs that share one model
    replicas: int = 1  # vLLM: engines side by side, each with GPUs of its own
    cluster: str = (
        "none"  # none | ray: shards are worked on by Ray actors, each with an engine of its own
    )
    workers: int | None = (
        None  # ray: actors; null: as many as the cluster has GPUs for, at least one
    )
    ray_address: str | None = (
        # ray: an existing cluster ("auto" or ray://…); null: RAY_ADDRESS, else one started on this
        # machine
        None
    )


@dataclass
class JudgeConfig:
    """A model behind an OpenAI-compatible server that says of a sample of pairs whether they are
    right.
    """

    model: str | None = None  # the server's name for it; null: no judge
    base_url: str = "http://localhost:8000/v1"  # the server
    api_key_env: str = (
        "OPENAI_API_KEY"  # environment variable that holds the key, if the server wants one
    )
    sample: int | None = 500  # pairs that are judged, drawn at random; null: all
    concurrency: int = 16  # requests at the same time
    max_retries: int = 8  # further tries of a failed request, each after a longer pause
    timeout: float = (
        600.0  # seconds without a byte from the server after which a request has failed
    )
    max_tokens: int = 300  # output tokens of one verdict


@dataclass
class LimitsConfig:
    """Which pairs stay, by measure: [at least, at most], null for no limit on that side; null
    instead of both: not looked at.
    """

    document_words: list[float | None] | None = (
        None  # words of the document; outside the limits it loses all its pairs
    )
    question_words: list[float | None] | None = None
    answer_words: list[float | None] | None = None
    grounded: list[float | None] | None = (
        None  # share of the answer's words that occur in the document
    )
    verbatim: list[float | None] | None = (
        None  # 1 if the answer stands in the document word for word, else 0
    )
    finished: list[float | None] | None = (
        None  # 0 for pairs of a generation that was cut at synthesis.max_new_tokens, else 1
    )
    asked_before: list[float | None] | None = (
        None  # 1 if a pair before asked this very question, of whatever document, else 0
    )
    same_frame: list[float | None] | None = (
        None  # how many pairs before had the same frame of the question
    )
    pairs: list[float | None] | None = (
        None  # pairs that the limits above leave to the document; outside it loses them all
    )
    judge_accuracy: list[float | None] | None = (
        None  # 1 if the judge finds the answer right, else 0; needs judge.sample=null
    )
    judge_relevance: list[float | None] | None = (
        None  # 1 if the judge finds that the pair is about its document, else 0
    )


@dataclass
class FilterConfig:
    """Which of the synthesized pairs are left out of the texts that are trained on. Empty: none,
    and the stage does not run.
    """

    limits: LimitsConfig = field(default_factory=LimitsConfig)
    overlap: str | None = (
        # report | remove pairs that share an n-gram with an item of an evaluation task; null: do
        # not look
        None
    )
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class RenderingConfig:
    """How a chain of documents and pairs becomes one pre-training text."""

    arrangement: str = "attached"  # attached | pairs_first | detached | pairs_only | stitched
    layouts: dict[str, float] = field(
        default_factory=dict
    )  # weight of each layout; conf/rendering/paper.yaml
    inversion: float = (
        0.05  # probability that pairs precede their document (arrangement=attached only)
    )
    templates: str = field(
        default="default", metadata=PATH
    )  # a pool shipped in ipt/rendering/templates, or the path of a .yaml file
    # renderings of each chain; arrangement=stitched: renderings of a document in its one text
    versions: int = 1
    workers: int | None = None  # processes; null: one for each core. The texts do not depend on it


@dataclass
class TokensConfig:
    """How texts become token stores."""

    bos: bool | None = None  # start each document with BOS; null: as the tokenizer does by itself
    eos: bool = True  # end each document with EOS
    shard_tokens: int = 100_000_000  # rough size of a shard, taking 4 bytes of text for a token
    workers: int | None = None  # cores that tokenise; null: those that this process may use
    cache_gib: float = 100.0  # of stores behind URLs, so much is kept on this machine


@dataclass
class SourceConfig:
    """A source of the mixture beside `raw` and `instruction`."""

    path: str = field(
        default="", metadata=PATH
    )  # file, folder, glob or URL; collection: a file or a folder of data sets
    # texts | instructions (instructions with their responses) | store (a token store), or a set of
    # contexts and pairs that tunes a synthesizer: adversarial_qa | collection | fairytaleqa |
    # medquad | medquad_pages | squad
    kind: str = "texts"
    dataset: str | None = None  # texts, instructions: hub name of a data set, in place of path
    subset: str | None = None  # its configuration
    split: str = "train"
    text_field: str = "text"
    # texts: Jinja template that makes a text of all of a row's fields, in place of text_field
    template: str = field(default="", metadata=PLAIN)
    shots: int | None = (
        3  # tuning sets: at most so many examples in one text; null: as many as max_tokens allows
    )
    include: list[str] = field(
        default_factory=list
    )  # collection: which folders of path, each a data set; empty: all
    max_contexts: int | None = (
        None  # tuning sets: at most so many contexts of a data set, those with most pairs
    )
    max_tokens: int | None = (
        None  # tuning sets: tokens of a text with BOS and EOS; a longer example is left out
    )
    # tuning sets: fill each text up to max_tokens, so that with this seq_len packing cuts none
    fill: bool = False


@dataclass
class SchedulePoint:
    """Ratios from a moment of the run on."""

    at: float = 0.0  # share of the run, 0 to 1
    ratios: dict[str, float | None] = field(default_factory=dict)  # as mixture.ratios


@dataclass
class MixtureConfig:
    """Which share of the trained tokens comes from which source, and how they are packed."""

    # `raw`: the corpus as it is; `instruction`: the corpus with its pairs. null: what the others
    # leave of 1.
    ratios: dict[str, float | None] = field(default_factory=dict)
    # name -> SourceConfig; Any, so that +mixture.sources.NAME.path=FILE adds one
    sources: dict[str, Any] = field(default_factory=dict, metadata={"values": SourceConfig})
    unit: str = "tokens"  # tokens | documents: what ratios are shares of
    schedule: list[SchedulePoint] = field(
        default_factory=list
    )  # ratios that change over the run, instead of `ratios`; empty: constant
    interpolation: str = "step"  # between points of the schedule: step | linear
    seq_len: int = 2048  # tokens in one packed sequence
    # concat: documents cut at the ends of sequences | best_fit: whole documents, a little padding
    packing: str = "concat"
    document_mask: bool = True  # documents in one sequence do not see each other
    max_repeats: dict[str, float] = field(
        default_factory=dict
    )  # per source: at most so many epochs
    # beyond them: stop with an error | renormalise (the others take its place) | repeat all the
    # same
    on_max_repeats: str = "stop"
    subsample: dict[str, float] = field(
        default_factory=dict
    )  # per source: use this share of its documents
    match_tokens: int | None = (
        None  # subsample all sources so that they repeat as in a run of so many tokens; null: no
    )

    def __post_init__(self) -> None:
        """Types the sources. Raises as a misspelt key or a wrong value of any other part does."""
        for name, source in self.sources.items():
            self.sources[name] = OmegaConf.to_object(
                OmegaConf.merge(OmegaConf.structured(SourceConfig), source)
            )


@dataclass
class OptimizerConfig:
    # adamw | adamw_8bit and paged_adamw_8bit (bitsandbytes: moments in 8 bits; paged: those move to
    # host memory when a GPU runs out) | lion | lion_8bit | muon (matrices of the blocks; adamw for
    # the rest)
    name: str = "adamw"
    lr: float = 1e-5  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1  # on matrices only: norms and biases are never decayed
    decay_embeddings: bool = True  # whether the embedding table counts as a matrix there
    eps: float = 1e-8
    momentum: float = 0.95  # muon


@dataclass
class ScheduleConfig:
    name: str = "cosine"  # cosine | linear | constant | wsd (warm-up, stable, decay)
    warmup_steps: int = 0
    warmup_tokens: int | None = None  # instead of warmup_steps, rounded up to whole steps
    decay: float = 0.1  # wsd: share of the run at its end in which the rate falls, linearly
    final_lr: float = 0.1  # last learning rate as a share of the peak


@dataclass
class LoraConfig:
    rank: int = 0  # 0: train all weights
    quantize: str | None = (
        # 4bit | 8bit: keep the frozen matrices so (bitsandbytes, QLoRA); null: as trainer.weights
        # says
        None
    )
    alpha: int = 32
    dropout: float = 0.0


@dataclass
class TrainerConfig:
    """The training loop and the hardware it runs on."""

    seed: int | None = (
        None  # of the order of the data and of what training draws; null: the config's seed
    )
    max_steps: int = 100  # optimizer steps
    micro_batch_size: int = 1  # sequences per device and forward pass
    accumulate: int = 1  # forward passes per optimizer step
    accelerator: str = "auto"  # auto | cpu | gpu
    devices: int = 1  # processes on one machine; start more than one with torchrun
    num_nodes: int = 1
    strategy: str = (
        "auto"  # auto: fsdp2 on GPUs and wherever there is more than one process | single | fsdp2
    )
    precision: str = "fp32"  # of the arithmetic: fp32 | bf16 (with gradients reduced in fp32)
    # fp32 | bf16: half the memory of weights and gradients; updates are rounded stochastically
    weights: str = "fp32"
    # auto (CPU: packed; GPU: the best that is installed) | packed (document by document) | sdpa (block mask) | varlen (torch's kernel)
    # | flash_attention_2 | flash_attention_3 | flash_attention_4. One that cannot be had is an error.
    attention: str = "auto"
    # none | full (recompute blocks) | selective (but costly operations) | budget (needs compile)
    activation_checkpointing: str = "none"
    activation_budget: float = 0.5  # budget: share of the activations' memory to keep
    compile: bool = False  # torch.compile, block by block
    # fsdp2: copies of the sharded model (HSDP), each on devices x num_nodes / replicas devices
    replicas: int = 1
    # fsdp2: reduce gradients once a step; until then each device keeps whole ones, in fp32
    no_sync: bool = False
    skip_spikes: float | None = (
        # skip steps whose loss or gradient norm is so many robust deviations high; null: only
        # non-finite ones
        6.0
    )
    gradient_clip: float = 1.0
    loader_workers: int = 0  # processes that fill batches ahead; 0: filled when asked for
    loss_chunk: int = 1024  # target tokens per chunk of projection and loss
    checkpoint_steps: int | None = None  # save every so many steps; null: by time only
    checkpoint_minutes: float | None = 10.0  # and save after so many minutes; null: by steps only
    keep_last: int = 1  # newest checkpoints that are kept
    keep_every: int | None = (
        None  # steps: those at multiples of it are saved too, and kept for good; null: none
    )
    keep_checkpoints: bool = True  # false: all checkpoints are removed once the run has finished
    # fsspec folder that checkpoints are copied to, and resumed from where there is none here
    checkpoint_url: str | None = field(default=None, metadata=PATH)
    async_checkpoint: bool = (
        True  # write checkpoints beside the training, from a copy in host memory
    )
    export_dtype: str = "fp32"  # weights of export/: fp32 | bf16
    profiler: str = "none"  # none | torch: a trace of a few steps after warm-up
    log_every: int = 1  # steps between two records for the loggers; metrics.jsonl has every step


@dataclass
class DuringTrainingConfig:
    """Scores of the model while it is trained, in metrics.jsonl and the loggers."""

    steps: int | None = None  # score every so many optimizer steps, and at the end; null: never
    tasks: list[str] = field(default_factory=list, metadata=PATHS)  # empty: those of `tasks`
    limit: int | None = 100  # at most so many items of a task


@dataclass
class EvaluationConfig:
    backend: str = "hf"  # hf (Hugging Face) | vllm
    batch_tokens: int = 4096  # tokens in one forward pass, padding included
    limit: int | None = None  # at most so many items of a task
    dtype: str = "fp32"  # fp32 | bf16 | fp16 (the released scorer's)
    quantize: str | None = None  # 4bit | 8bit: weights by bitsandbytes
    # auto | cpu | mps | cuda | cuda:NUMBER | sharded: layers spread over all GPUs, then the CPU, by
    # accelerate
    device: str = "auto"
    bos: bool | None = None  # begin each prompt with BOS; null: as the tokenizer does by itself
    chat: bool = False  # put each prompt through the model's chat template
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=chat_template_kwargs
    )  # variables of the template; chat's too
    max_length: int | None = (
        # tokens of a prompt with its option, or of a window of a document; null: the model's
        # context
        None
    )
    # auto: tree where the model takes it | tree: all options in one pass | plain: each option alone
    scoring: str = "auto"
    contamination: list[str] = field(
        default_factory=list, metadata=PATHS
    )  # paths of token stores or folders of texts to look for items in
    during_training: DuringTrainingConfig = field(default_factory=DuringTrainingConfig)


@dataclass
class ChatConfig:
    """A conversation with a model."""

    # put questions through the tokenizer's chat template; else the model goes on with what is typed
    template: bool = False
    max_new_tokens: int = 400  # tokens of an answer
    temperature: float = 0.0  # 0: always the likeliest token
    stop: list[str] = field(default_factory=list)  # texts that end an answer
    memory: bool = True  # earlier questions and answers stay in the context


@dataclass
class PlaygroundConfig:
    """A page in the browser to try a synthesizer and to talk to models."""

    # address to listen at; any other than this machine's own lets others use the page, without a
    # password
    host: str = "127.0.0.1"
    port: int | None = None  # null: the first free one from 7860 on
    models: list[str] = field(
        default_factory=list, metadata=PATHS
    )  # models to talk to, in addition to `model` and those in `exports`
    exports: str = field(
        default="outputs", metadata=PATH
    )  # every export/ below this folder is a model to talk to
    max_characters: int = 50_000  # of a text
    max_file_mib: int = 16  # of a file that is dropped on the page


@dataclass
class LoggerConfig:
    name: str = "none"  # none | wandb
    project: str = "ipt"
    group: str | None = None  # null: the experiment, or the sweep's folder
    tags: list[str] = field(default_factory=list)
    offline: bool | None = None  # null: as WANDB_MODE and W&B's settings say; without a key offline
    # artifacts hold the data themselves, weights included; false: where they are, and their digests
    upload: bool = False
    # seconds that W&B may take to begin a run, or to end it; then the run is offline, or what is
    # left is
    timeout: float = 20.0


@dataclass
class Config:
    name: str = "run"  # name of the experiment
    title: str = field(default="", metadata=PLAIN)  # heading of its report; empty: its name
    output_dir: str | None = field(
        default=None, metadata=PATH
    )  # null: outputs/<command>-<key of the config>
    stages_dir: str = field(
        default="outputs/stages", metadata=PATH
    )  # where finished corpus, pairs, texts and tokens are kept for all runs
    seed: int = 0
    # what training starts from and evaluation scores: folder, hub name, embedded:NAME
    model: str = field(default="embedded:smollm2-135m", metadata=PATH)
    architecture: dict[str, Any] = field(
        default_factory=dict
    )  # not empty: train from scratch, a transformers config
    data_dir: str = field(
        default="data", metadata=PATH
    )  # where recipes look for data sets that you fetch yourself
    tasks: list[str] = field(default_factory=list, metadata=PATHS)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    rendering: RenderingConfig = field(default_factory=RenderingConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    playground: PlaygroundConfig = field(default_factory=PlaygroundConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    arms: dict[str, Any] = field(
        default_factory=dict
    )  # reproduce: name -> what the arm changes in this config
    seeds: list[int] = field(
        default_factory=list
    )  # reproduce: train each arm once for each of them; empty: once, with trainer.seed
    stages: list[str] = field(
        default_factory=list
    )  # reproduce: synthesis | tokens | training | evaluation | report; empty: all
    only: list[str] = field(
        default_factory=list
    )  # reproduce: names of the arms to work on; empty: all
    # the model of the paper whose figures an arm's are put beside; outside of arms: the start's
    published: str = ""
    # train: only say what the training needs: data, memory, time, disk; no GPU, weights or network
    dry_run: bool = False
    # the GPU that a dry run reckons with: H100 | H200 | B200 | A100 | A100-40 | RTX4090 | RTX3090 |
    # L4
    dry_run_gpu: str = "H100"
    dry_run_mfu: float = (
        0.5  # and the share of its peak rate that is reached (model FLOPs utilisation)
    )

    def __post_init__(self) -> None:
        _expand_paths(self)


ConfigStore.instance().store(name="schema", node=Config)


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
    """The typed config, with all interpolations resolved."""
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result


def compose_config(command: str, overrides: Sequence[str]) -> Config:
    """What `command` would run with these overrides. Raises Hydra's and OmegaConf's errors."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(compose(command, plain_arguments(overrides, Config)))
