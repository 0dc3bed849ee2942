"""Names that other programs for fine-tuning give to our settings, for the answer to a name that we do not have.

The programs are mlx_lm.lora, mlx-lm-lora, Unsloth, TRL with transformers and PEFT, Axolotl and LLaMA-Factory.
"""

from __future__ import annotations

_LENGTH = ("data.max_length",)
_STEPS = ("train.iters",)
_BATCH = ("train.batch_size",)

OUR_NAMES: dict[str, tuple[str, ...]] = {
    # adapter
    **dict.fromkeys(("r", "lora_r", "lora_rank"), ("lora.rank",)),
    **dict.fromkeys(("lora_alpha",), ("lora.alpha",)),
    **dict.fromkeys(("lora_dropout",), ("lora.dropout",)),
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target", "lora_keys"), ("lora.keys",)),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), ("lora.rslora",)),
    **dict.fromkeys(("lora_layers", "layers_to_transform", "num_lora_layers"), ("lora.num_layers",)),
    **dict.fromkeys(("fine_tune_type", "train_type", "finetuning_type"), ("lora.type",)),
    **dict.fromkeys(("use_dora", "peft_use_dora"), ("lora.type",)),
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save", "additional_target"), ("lora.modules_to_save",)),
    **dict.fromkeys(("rank_pattern",), ("lora.rank_pattern",)),
    **dict.fromkeys(("init_lora_weights", "peft_init_lora_weights", "pissa_init"), ("lora.init",)),
    **dict.fromkeys(("loraplus_lr_ratio",), ("lora.b_lr_ratio",)),
    **dict.fromkeys(("resume_adapter_file", "lora_model_dir", "adapter_name_or_path", "adapter_path"), ("adapter",)),
    # model
    **dict.fromkeys(
        ("model_name", "model_name_or_path", "base_model", "pretrained_model_name_or_path"), ("model.path",)
    ),
    **dict.fromkeys(("torch_dtype", "bf16", "fp16"), ("model.dtype",)),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), ("model.quantize.bits",)),
    # data
    **dict.fromkeys(("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "model_max_length"), _LENGTH),
    **dict.fromkeys(
        ("dataset", "dataset_name", "dataset_path", "dataset_dir", "train_file", "hf_dataset", "data_path"),
        ("data.path",),
    ),
    **dict.fromkeys(("datasets", "interleave_probs", "mix_strategy"), ("data.mix",)),
    **dict.fromkeys(("dataset_config_name", "dataset_config", "subset"), ("data.config",)),
    **dict.fromkeys(("val_set_size", "val_size", "test_size", "eval_split"), ("data.valid_fraction",)),
    **dict.fromkeys(("dataset_text_field", "text_feature", "text_column"), ("data.keys.text",)),
    **dict.fromkeys(("prompt_feature",), ("data.keys.prompt",)),
    **dict.fromkeys(("completion_feature",), ("data.keys.completion",)),
    **dict.fromkeys(("chat_feature", "field_messages"), ("data.keys.messages",)),
    **dict.fromkeys(
        ("train_on_inputs", "completion_only_loss", "train_on_prompt", "assistant_only_loss"), ("data.mask_prompt",)
    ),
    **dict.fromkeys(("default_system_message", "default_system"), ("data.system_prompt",)),
    **dict.fromkeys(("chat_template_path", "chat_template_jinja"), ("data.template",)),
    **dict.fromkeys(("chat_template_kwargs",), ("data.template_args",)),
    # training
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), ("train.epochs",)),
    **dict.fromkeys(("max_steps", "num_iters", "num_steps", "steps", "total_steps"), _STEPS),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "per_gpu_train_batch_size"), _BATCH),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accumulation_steps", "gradient_accumulation"),
        ("train.grad_accumulation",),
    ),
    **dict.fromkeys(("gradient_checkpointing", "use_gradient_checkpointing"), ("train.grad_checkpoint",)),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping"), ("train.grad_clip",)),
    **dict.fromkeys(("logging_steps", "steps_per_report"), ("train.report_every",)),
    **dict.fromkeys(("eval_steps", "steps_per_eval"), ("train.eval_every",)),
    **dict.fromkeys(("val_batches", "eval_batches", "test_batches"), ("train.eval_batches",)),
    **dict.fromkeys(("early_stopping_patience",), ("train.early_stopping.patience",)),
    **dict.fromkeys(("neftune_noise_alpha",), ("train.neftune_alpha",)),
    **dict.fromkeys(("ema", "use_ema", "ema_decay", "swa", "weight_averaging"), ("train.averaging_power",)),
    **dict.fromkeys(("torch_compile",), ("train.compile",)),
    # optimizer and schedule
    **dict.fromkeys(("lr", "learning_rate", "max_lr"), ("optimizer.learning_rate",)),
    **dict.fromkeys(("optim",), ("optimizer",)),
    **dict.fromkeys(("weight_decay",), ("optimizer.weight_decay",)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("optimizer.betas",)),
    **dict.fromkeys(("adam_epsilon",), ("optimizer.eps",)),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "lr_schedule"), ("schedule",)),
    **dict.fromkeys(("warmup_steps", "warmup_iters"), ("schedule.warmup",)),
    **dict.fromkeys(("min_lr",), ("schedule.end",)),
    **dict.fromkeys(("num_cycles",), ("schedule.cycles",)),
    **dict.fromkeys(("decay_ratio", "num_decay_steps"), ("schedule.decay",)),
    **dict.fromkeys(("decay_type",), ("schedule.decay_shape",)),
    # checkpoints and reports
    **dict.fromkeys(("save_steps", "save_every", "steps_per_save"), ("checkpoint.every",)),
    **dict.fromkeys(("save_total_limit",), ("checkpoint.keep_last",)),
    **dict.fromkeys(("report_to", "logger"), ("loggers",)),
    **dict.fromkeys(("resume_from_checkpoint",), ("resume",)),
    **dict.fromkeys(("output_dir", "save_dir"), ("hydra.run.dir",)),
    **dict.fromkeys(("random_seed", "data_seed"), ("seed",)),
}
"""The last part of a name there, in lower case, and what it is here."""
_ANSWERS = {
    **dict.fromkeys(
        ("packing", "sample_packing", "eval_packing", "neat_packing", "eval_sample_packing", "pad_to_sequence_len"),
        "Rows are neither packed into one nor padded to a length: docs/data.md, 'Batches'.",
    ),
    **dict.fromkeys(
        ("roles_to_train", "train_on_eos", "train_on_eot"),
        'Every turn of the assistant is trained on, its end included; "train": false in a message leaves it out.',
    ),
    **dict.fromkeys(("eot_tokens",), "The ends of turns are found in the chat template: docs/chat.md."),
    **dict.fromkeys(
        ("dataset_num_proc", "dataset_processes", "preprocessing_num_workers", "dataloader_num_workers"),
        "Rows are tokenized on all cores.",
    ),
}
"""The sentence for a name that has no counterpart here."""
_REVERSED = "The meaning is reversed: {name}=true is data.mask_prompt=false, and false is true."
_NOTES = {
    **{name: _REVERSED.format(name=name) for name in ("train_on_inputs", "train_on_prompt")},
    **dict.fromkeys(("use_dora", "peft_use_dora"), "lora.type=dora."),
    "warmup_ratio": "schedule.warmup is a number of updates here: the ratio times train.iters.",
    "lora_alpha": "lora.alpha is the numerator as in PEFT: scale = alpha / rank.",
    "target_modules": "A suffix such as q_proj names the layer in every block.",
    "ema_decay": "It is the power of a mean over the whole run, not a decay: 3 is a good value.",
    "max_steps": "It counts optimizer updates.",
}


def explain_foreign(name: str) -> str | None:
    """Return the sentence for the name of a setting in another program, if `name` ends with one."""
    last = name.lstrip("-").rpartition(".")[2].lower().replace("-", "_")
    note = _NOTES.get(last) or _ANSWERS.get(last, "")
    ours = OUR_NAMES.get(last)
    if ours is None:
        return f"There is no setting '{name}'. {note}" if note else None
    if name.lstrip("-") in ours:
        return None
    return f"There is no setting '{name}': here it is {' and '.join(ours)}.{' ' * bool(note)}{note}"
