"""Config keys of earlier versions, and their present names."""

RENAMED = {
    "corpus.held_out": "corpus.held_out_fraction",
    "corpus.limit": "corpus.max_documents",
    "corpus.pages": "corpus.max_documents",
    "synthesis.kv_cache_gib": "synthesis.kv_cache_memory_bytes",
    "synthesis.lookup_tokens": "synthesis.prompt_lookup_num_tokens",
    "synthesis.max_live_chains": "synthesis.max_num_seqs",
    "synthesis.replicas": "synthesis.data_parallel_size",
    "synthesis.tensor_parallel": "synthesis.tensor_parallel_size",
    "filters.limits": "filters.thresholds",
    "filters.limits.asked_before": "filters.thresholds.duplicate_question",
    "filters.limits.same_frame": "filters.thresholds.question_template_count",
    "filters.thresholds.asked_before": "filters.thresholds.duplicate_question",
    "filters.thresholds.same_frame": "filters.thresholds.question_template_count",
    "logger.group": "logger.wandb.group",
    "logger.name": "logger (logger=wandb; the name of the run is logger.wandb.name)",
    "logger.offline": "logger.wandb.offline",
    "logger.project": "logger.wandb.project",
    "logger.tags": "logger.wandb.tags",
    "logger.timeout": "logger.wandb.settings.init_timeout and .finish_timeout",
    "logger.upload": "logger.wandb.log_model (uploads the model only)",
    "mixture.document_mask": "mixture.intra_document_mask",
    "schedule": "lr_scheduler",
    "schedule.decay": "lr_scheduler.decay_fraction",
    "schedule.final_lr": "lr_scheduler.min_lr_ratio",
    "trainer.accumulate": "trainer.accumulate_grad_batches",
    "trainer.async_checkpoint": "checkpoint.async_save",
    "trainer.attention": "trainer.attn_implementation",
    "trainer.checkpoint_minutes": "checkpoint.every_n_minutes",
    "trainer.checkpoint_steps": "checkpoint.every_n_train_steps",
    "trainer.checkpoint_url": "checkpoint.url",
    "trainer.gradient_clip": "trainer.gradient_clip_val",
    "trainer.keep_checkpoints": "checkpoint.keep_after_training",
    "trainer.keep_every": "checkpoint.keep_every_n_steps",
    "trainer.keep_last": "checkpoint.keep_last",
    "trainer.loader_workers": "trainer.num_workers",
    "trainer.log_every": "trainer.log_every_n_steps",
    "trainer.weights": "trainer.precision (bf16-true: weights in bf16 too)",
    "chat.template": "chat.apply_chat_template",
    "evaluation.bos": "evaluation.add_bos_token",
    "evaluation.chat": "evaluation.apply_chat_template",
    "evaluation.during_training.steps": "evaluation.during_training.every_n_train_steps",
}


def new_name(key: str) -> str | None:
    """The present name of a key of an earlier version; None for other keys."""
    if key in RENAMED:
        return RENAMED[key]
    group, _, rest = key.rpartition(".")
    renamed_group = new_name(group) if group else None
    return f"{renamed_group}.{rest}" if renamed_group else None
