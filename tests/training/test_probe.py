"""The check of a model before its training: what must fail it, and what it says."""

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface

from ipt.config import Config
from ipt.errors import UserError
from ipt.models import load_model
from ipt.models.small_copy import (
    TOLERANCE,
    distance,
    losses_alone,
    plain_attention,
    random_model,
    small_copies,
)
from ipt.pipeline import commands
from ipt.training import loss, probe
from ipt.training.attention import PACKED, implementation, packed_attention
from ipt.training.loss import CausalLMLoss, LogitTransform, chunked_cross_entropy
from tests.training.model_cases import config_of_case, write_case

# Published sizes, by the defaults of the config classes: what is compared is a small copy of them.
GEMMA_2 = transformers.Gemma2Config()
GEMMA_3 = transformers.Gemma3TextConfig()
MISTRAL = transformers.MistralConfig()
GPT_OSS = transformers.GptOssConfig()
PHI = transformers.PhiConfig()
GRANITE = transformers.GraniteConfig(
    logits_scaling=8.0, attention_multiplier=0.0156, residual_multiplier=0.22
)
COHERE = transformers.CohereConfig()
MIXTRAL = transformers.MixtralConfig(output_router_logits=True)
QWEN_3_MOE = transformers.Qwen3MoeConfig(output_router_logits=True)
GPT_2 = transformers.GPT2Config()
LLAMA_3 = transformers.LlamaConfig(
    hidden_size=4096, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256
)


def _problem(architecture, attention: str = "packed", document_mask: bool = True):
    return probe._problem(probe._reference_of(architecture), attention, document_mask)


@cache
def _problem_with_all(model_type: str) -> str | None:
    """With every feature of the model of this type in REMOVALS."""
    return _problem(
        next(
            architecture
            for architecture, _ in REMOVALS.values()
            if architecture.model_type == model_type
        )
    )


def _without_option(monkeypatch, *names: str) -> None:
    """Packed attention that ignores options of the model, as some function of transformers ignores
    each of them.
    """

    def ignoring(module, query, key, value, mask, **options):
        return packed_attention(
            module, query, key, value, mask, **{**options, **dict.fromkeys(names)}
        )

    register = AttentionInterface.register

    def patched(name, function):
        register(name, ignoring if name == PACKED else function)

    monkeypatch.setattr(AttentionInterface, "register", patched)


def _with_transform(monkeypatch, change) -> None:
    original = loss.logit_transform
    monkeypatch.setattr(
        loss, "logit_transform", lambda architecture: change(original(architecture))
    )


def _without_bias(monkeypatch) -> None:
    def ignoring(*arguments, **options):
        return chunked_cross_entropy(*arguments, **{**options, "bias_V": None})

    monkeypatch.setattr(loss, "chunked_cross_entropy", ignoring)


def _without_restarting_positions(monkeypatch) -> None:
    inputs = CausalLMLoss._inputs

    def running_on(self, batch):
        found = inputs(self, batch)
        return {**found, "position_ids": torch.arange(found["input_ids"].shape[1])[None]}

    monkeypatch.setattr(CausalLMLoss, "_inputs", running_on)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "architecture",
    [LLAMA_3, MISTRAL, GEMMA_3, MIXTRAL],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_the_implementations_of_transformers_pass_too(architecture, attention):
    assert _problem(architecture, attention) is None
    assert _problem(architecture, attention, document_mask=False) is None


REMOVALS = {  # models of the test above first: the check keeps the references of the last few
    "sliding window, Gemma-3": (GEMMA_3, lambda patch: _without_option(patch, "sliding_window")),
    "sliding window, Mistral": (MISTRAL, lambda patch: _without_option(patch, "sliding_window")),
    "load balancing": (
        MIXTRAL,
        lambda patch: patch.setattr(loss, "load_balancing", lambda model: None),
    ),
    "bounds of documents": (LLAMA_3, lambda patch: _without_option(patch, "document_sizes")),
    "soft-cap of the scores": (GEMMA_2, lambda patch: _without_option(patch, "softcap")),
    "soft-cap of the logits": (
        GEMMA_2,
        lambda patch: _with_transform(patch, lambda old: LogitTransform(old.scale)),
    ),
    "sliding window, Gemma-2": (GEMMA_2, lambda patch: _without_option(patch, "sliding_window")),
    "scale of the scores": (GRANITE, lambda patch: _without_option(patch, "scaling")),
    "attention sinks": (GPT_OSS, lambda patch: _without_option(patch, "s_aux")),
    "bias of the head": (PHI, _without_bias),
    "scale of the logits, a divisor": (
        GRANITE,
        lambda patch: _with_transform(patch, lambda old: LogitTransform()),
    ),
    "scale of the logits, a factor": (
        COHERE,
        lambda patch: _with_transform(patch, lambda old: LogitTransform()),
    ),
    "load balancing, Qwen3": (
        QWEN_3_MOE,
        lambda patch: patch.setattr(loss, "load_balancing", lambda model: None),
    ),
    "positions that restart": (GPT_2, _without_restarting_positions),
}


@pytest.mark.parametrize("feature", REMOVALS)
def test_a_training_without_a_feature_of_the_model_fails(feature, monkeypatch):
    architecture, remove = REMOVALS[feature]
    assert _problem_with_all(architecture.model_type) is None
    remove(monkeypatch)
    assert _problem(architecture) is not None


def test_small_copies_are_small_and_keep_each_kind_of_layer():
    for architecture in (GEMMA_2, GPT_OSS, QWEN_3_MOE, LLAMA_3, transformers.SmolLM3Config()):
        small = small_copies(architecture)[0]
        assert (
            sum(parameter.numel() for parameter in random_model(small, "eager").parameters())
            < 40_000_000
        )
        assert small.num_hidden_layers <= 4 < architecture.num_hidden_layers
        if kinds := getattr(architecture, "layer_types", None):
            assert set(small.layer_types) == set(kinds)


# default sizes of classes whose configs lack what most have, or that accept few sizes
PUBLISHED = {
    "falcon_mamba": transformers.FalconMambaConfig(num_hidden_layers=2),  # no attention heads
    "mamba2": transformers.Mamba2Config(num_hidden_layers=2),  # heads of states, in groups
    "codegen": transformers.CodeGenConfig(n_layer=2),  # at least four heads
    "granitemoehybrid": transformers.GraniteMoeHybridConfig(),
    "gemma3": transformers.Gemma3Config(),  # with a vision tower
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_models_of_published_sizes_have_a_small_copy(kind):
    assert probe._reference_of(PUBLISHED[kind]) is not None


def test_experts_whose_config_cannot_be_read_back_are_checked():
    """Dbrx rejects what its own config says when that is given as settings."""
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    dbrx = transformers.DbrxConfig(
        vocab_size=300,
        d_model=32,
        n_heads=4,
        n_layers=2,
        ffn_config=experts,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 2.0},
    )
    assert _problem(dbrx) is None


ROPES = {
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_long_documents_must_not_change_the_positions_of_short_ones(kind):
    """The difference itself, and the length up to which there is none."""
    model_class = transformers.Phi3Config if kind == "longrope" else transformers.LlamaConfig
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **ROPES[kind]}
    stated = 256 if kind == "longrope" else 64
    sizes = {
        **SIZES,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "pad_token_id": 0,
        "max_position_embeddings": stated,
    }
    architecture = model_class(**sizes, rope_parameters=rope, original_max_position_embeddings=64)
    model = random_model(architecture, implementation("packed"))
    for longest, is_same in ((64, True), (65, False)):
        documents = [torch.randint(5, 300, (length,)) for length in (longest, 40)]
        packed = probe._our_losses(model, [documents], True)
        alone = torch.cat(losses_alone(model, documents))
        assert (distance([packed], [alone]) < TOLERANCE) is is_same
    config = _config(architecture)
    config.mixture.seq_len = 64
    assert probe.check_model(config) == "packed"
    config.mixture.seq_len = 65
    with pytest.raises(
        UserError,
        match=(
            r"more than 64 tokens; set mixture.seq_len=64 or less, or "
            r"mixture.intra_document_mask=false"
        ),
    ):
        probe.check_model(config)
    config.mixture.intra_document_mask = False
    assert probe.check_model(config) == "packed"


def test_a_model_that_cannot_be_checked_is_an_error(monkeypatch, caplog):
    llama = transformers.LlamaConfig(**SIZES, num_attention_heads=4, intermediate_size=64)
    config = _config(llama)
    monkeypatch.setattr(probe, "_measure", lambda *arguments: 1 / 0)
    probe._reference.cache_clear()
    with pytest.raises(
        UserError, match=r"architecture \(model type llama\): no small copy of it runs"
    ):
        probe.check_model(config)
    monkeypatch.setattr(probe, "architecture_of", lambda config: llama)
    config.architecture = {}
    with pytest.raises(UserError, match=r"its class does not run as a causal language model"):
        probe.check_model(config)
    monkeypatch.setattr(probe, "architecture_of", lambda config: LLAMA_3)  # other sizes may run
    assert probe.check_model(config) == "packed"
    assert "checked only on its weights" in caplog.text
    probe._reference.cache_clear()


def _config(architecture, **settings) -> Config:
    config = Config(architecture=architecture.to_dict())
    config.trainer.accelerator = "cpu"
    for name, value in settings.items():
        setattr(config.trainer, name, value)
    return config


SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
STATES = {  # layers whose state flows on from one document into the next
    "mamba2": transformers.Mamba2Config(
        **SIZES, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16
    ),
    "lfm2": transformers.Lfm2Config(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    ),
    "rwkv": transformers.RwkvConfig(**SIZES),
    "qwen3_next": transformers.Qwen3NextConfig(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "bloom": transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_model_whose_packed_documents_influence_each_other_is_an_error(kind):
    config = _config(STATES[kind])
    expected = (
        rf"model type {kind}.*trainer.attn_implementation=\w+: packed documents influence each "
        r"other.*mixture.intra_document_mask=false"
    )
    with pytest.raises(UserError, match=expected) as error:
        probe.check_model(config)
    assert "\n" not in str(error.value)
    config.mixture.intra_document_mask = False
    assert probe.check_model(config) in ("packed", "sdpa", "eager")


def test_a_model_that_reads_ahead_is_an_error():
    bert = transformers.BertConfig(**SIZES, num_attention_heads=4, intermediate_size=64)
    for mask in (True, False):
        config = _config(bert)
        config.mixture.intra_document_mask = mask
        with pytest.raises(
            UserError, match=r"model type bert.*no causal language model; use another model"
        ):
            probe.check_model(config)


def test_an_objective_that_we_do_not_compute_is_an_error():
    """Bamba adds a z-loss where its config asks for one."""
    settings = {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "num_attention_heads": 4,
    }
    bamba = transformers.BambaConfig(
        **SIZES, **settings, num_key_value_heads=2, attn_layer_indices=[1], z_loss_coefficient=1.0
    )
    config = _config(bamba)
    config.mixture.intra_document_mask = False
    with pytest.raises(
        UserError,
        match=(
            r"model type bamba.*from the loss that the model computes.*no setting is correct for it"
        ),
    ):
        probe.check_model(config)


def test_auto_takes_what_is_right_for_the_model():
    gptj = transformers.GPTJConfig(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4
    )
    assert probe.check_model(_config(gptj)) == "eager"  # attention code of its own
    assert probe.check_model(_config(config_of_case("Gemma-2"))) == "packed"
    assert probe.check_model(_config(config_of_case("Gemma-2"), compile=True)) == "eager"
    with pytest.raises(
        UserError,
        match=(
            r"trainer\.attn_implementation=sdpa: sdpa ignores the soft-capped scores of this "
            r"model; use packed, eager"
        ),
    ):
        probe.check_model(_config(config_of_case("Gemma-2"), attn_implementation="sdpa"))
    opt = transformers.OPTConfig(
        vocab_size=300,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    with pytest.raises(
        UserError,
        match=(
            r"trainer\.attn_implementation=sdpa: packed documents influence each other.*set "
            r"trainer.attn_implementation=packed"
        ),
    ):
        probe.check_model(_config(opt, attn_implementation="sdpa"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Gemma-2", "eager"), ("gpt-oss", "eager"), ("Llama 2/3", "sdpa"), ("Granite", "sdpa")],
)
def test_scoring_uses_eager_attention_where_sdpa_ignores_a_feature(
    name, expected, tmp_path, tiny_model
):
    assert plain_attention(config_of_case(name, vocab_size=300)) == expected
    model = load_model(write_case(name, tmp_path, tiny_model), torch.float32)
    assert model.config._attn_implementation == expected


def test_real_weights_are_compared_before_the_first_step(tmp_path, tiny_model, monkeypatch):
    """A feature that only the weights have acts in no random copy; here packing is broken after the
    first check.
    """
    config = Config(model=write_case("Llama 2/3", tmp_path, tiny_model))
    module = CausalLMLoss(
        load_model(config.model, torch.float32, attn_implementation=implementation("packed")), 64
    )
    module.train()
    probe.check_weights(module, config)
    assert all(part.training for part in module.modules())
    _without_option(monkeypatch, "document_sizes")
    implementation("packed")
    with pytest.raises(
        UserError,
        match=r"model type llama\): on its weights the loss of packed documents differs by",
    ):
        probe.check_weights(module, config)
    monkeypatch.undo()
    implementation("packed")


def test_a_command_ends_before_any_stage(tmp_path, monkeypatch):
    """An unsupported model is an error before documents are read."""
    config = _config(STATES["bloom"])
    config.corpus.path = str(tmp_path / "c.jsonl")
    config.stages_dir = str(tmp_path / "stages")
    config.mixture.ratios = {"raw": 1.0}
    Path(config.corpus.path).write_text('{"text": "a document"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="packed documents influence each other"):
        commands.train(config)
    assert not Path(config.stages_dir).exists()
