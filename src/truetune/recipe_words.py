"""What other tools call our keys: Axolotl, LLaMA-Factory, Unsloth, torchtune, TRL's commands, older Transformers."""

import difflib
from collections.abc import Iterable

_WORDS_OF = {
    "`model`": """
        base_model model_name_or_path model_name model_id model_path pretrained_model_name_or_path checkpoint
        base_model_name_or_path student_model hf_model""",
    "`revision`": "model_revision revision_of_model base_model_revision",
    "`adapter`": "lora_model_dir adapter_name_or_path adapter_path peft_model peft_model_id resume_adapter",
    "`method` (lora, qlora or full)": """
        finetuning_type finetune_type fine_tuning_type tuner_type tuning_type train_type sft_type stage recipe rl
        mode peft_type training_type""",
    "`method: lora`": "use_peft use_lora lora_enable peft",
    "`method: full`": "full_finetuning full_finetune freeze_trainable_layers",
    "`method: qlora`": """
        load_in_4bit quantization_bit quantization_method use_4bit qlora_enable bnb_4bit bnb_config quantization
        quantization_config bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype bits
        use_bnb_nested_quant double_quantization""",
    "`method: qlora` (4 bits; there are no 8-bit weights)": "load_in_8bit use_8bit int8",
    "`precision`": """
        torch_dtype dtype bf16 fp16 pure_bf16 fp32 compute_dtype mixed_precision bfloat16 float16 half fp8""",
    "`max_length`": """
        sequence_len cutoff_len max_seq_length max_seq_len model_max_length seq_length seq_len sequence_length
        context_length block_size max_tokens max_source_length max_len""",
    "`packing`": """
        sample_packing neat_packing pack_sequences eval_sample_packing packing_strategy padding_free
        pad_to_sequence_len multipack eval_packing packed group_by_length""",
    "`overflow` (truncate or split)": "truncation truncation_mode truncate excess_length_strategy",
    "`supervise` (responses, last_response or all)": """
        train_on_inputs train_on_input train_on_prompt train_on_responses_only completion_only_loss
        assistant_only_loss mask_history mask_prompt roles_to_train train_on_eos train_on_prompts only_last_turn
        response_template loss_scale train_on_eot""",
    "`data`": """
        dataset datasets dataset_path dataset_name dataset_dir train_data train_file train_files
        dataset_name_or_path train_dataset data_files data_path train_path training_data pretraining_dataset
        dataset_mixture train data_file""",
    "`data.0.split`": "split dataset_split dataset_train_split train_split",
    "`data.0.weight`": "weight weights mix_strategy interleave_probs interleave_strategy dataset_weights",
    "`data.0.columns`": """
        columns column_map column_mapping dataset_text_field field_messages field_instruction field_output
        message_property_mappings text_column formatting_func text_field""",
    "`eval_data` (a share such as 0.05, or sources)": """
        val_set_size val_size eval_size test_size eval_dataset eval_datasets test_datasets validation_data
        validation_file val_data eval_file eval_split dataset_test_split validation_split valid eval test validation""",
    "`streaming`": "dataset_streaming stream use_streaming iterable_dataset is_streaming",
    "`chat_template`": """
        template chat_template_path chat_template_jinja prompt_template conversation_template conversation
        prompt_style chat_format""",
    "`lora.r`": "lora_rank lora_r rank lora_dim lora_rank_dimension",
    "`lora.lora_alpha`": "alpha lora_scaling",
    "`lora.lora_dropout`": "dropout",
    "`lora.target_modules`": """
        lora_target lora_target_modules target lora_attn_modules lora_apply_to_mlp lora_modules""",
    "`lora.target_modules: all-linear`": "lora_target_linear all_linear",
    "`lora.modules_to_save`": "lora_modules_to_save additional_target lora_additional_target",
    "`lora.use_rslora`": "peft_use_rslora rslora",
    "`lora.use_dora`": "peft_use_dora dora",
    "`lora.init_lora_weights`": "peft_init_lora_weights pissa_init init_weights",
    "`training.learning_rate`": "lr max_lr peak_lr base_lr",
    "`training.embedding_learning_rate`": "embedding_lr",
    "`training.loraplus_lr_ratio`": "lora_plus_lr_ratio loraplus lora_plus",
    "`training.per_device_train_batch_size`": """
        micro_batch_size batch_size train_batch_size per_device_batch_size micro_batch per_gpu_train_batch_size mbs
        train_micro_batch_size_per_gpu""",
    "`training.per_device_eval_batch_size`": "eval_batch_size per_gpu_eval_batch_size",
    "`training.gradient_accumulation_steps`": """
        gradient_accumulation grad_accum grad_accumulation_steps accumulate_grad_batches""",
    "`training.num_train_epochs`": "num_epochs epochs n_epochs max_epochs epoch num_train_epoch train_epochs",
    "`training.max_steps`": "max_train_steps num_train_steps max_steps_per_epoch steps num_steps total_steps iters",
    "`training.optim`": "optimizer optimizer_type optimizer_name",
    "`training.lr_scheduler_type`": "lr_scheduler scheduler scheduler_type lr_schedule schedule",
    "`training.warmup_steps` (below 1 it is a share of the run)": "warmup_ratio warmup num_warmup_steps warm_up",
    "`training.max_grad_norm`": """
        gradient_clipping clip_grad clip_grad_norm max_gradient_norm gradient_clip_val grad_clip""",
    "`training.weight_decay`": "wd decay",
    "`training.save_steps` (below 1 it is a share of the run)": """
        saves_per_epoch save_every save_interval save_every_n_steps""",
    "`training.save_total_limit`": "max_checkpoints_to_keep keep_checkpoints",
    "`training.eval_steps`": "evals_per_epoch eval_every eval_interval steps_per_eval",
    "`training.eval_strategy`": "evaluation_strategy do_eval val_strategy",
    "`training.logging_steps`": "log_steps log_every log_every_n_steps log_interval logging steps_per_report",
    "`training.report_to`": """
        use_wandb wandb_project wandb use_tensorboard tensorboard use_mlflow logger metric_logger use_swanlab""",
    "`training.run_name`": "wandb_run_name wandb_name experiment_name exp_name",
    "`training.gradient_checkpointing`": """
        use_gradient_checkpointing activation_checkpoint enable_activation_checkpointing""",
    "`training.use_liger_kernel`": "enable_liger_kernel liger use_liger liger_kernel",
    "`training.torch_compile`": "compile use_compile",
    "`training.neftune_noise_alpha`": "neftune_alpha noisy_embedding_alpha neftune",
    "`training.label_smoothing_factor`": "label_smoothing",
    "`training.dataset_num_proc`": "num_proc dataset_processes preprocessing_num_workers num_workers data_num_proc",
    "`training.seed`": "random_state random_seed",
    "`output_dir`": "output out_dir output_path save_dir outdir outputs save_path checkpoint_dir logging_dir",
    "--overwrite": "overwrite_output_dir overwrite_output overwrite",
    "--resume": "resume resume_from_checkpoint auto_resume_from_checkpoints continue_training",
    "--dry-run": "dry_run dryrun",
    "--num-processes": "num_processes num_gpus nproc_per_node n_gpu gpus devices num_machines",
    "remove it, the fastest attention that is installed is used, as `truetune doctor` shows": """
        flash_attention flash_attn attn_implementation sdp_attention sdpa_attention xformers_attention
        flex_attention use_flash_attention_2 use_flash_attention flash_attention_2 use_flash_attn attn_impl""",
    "remove it, the model's own configuration says it": """
        model_type tokenizer_type is_llama_derived_model is_mistral_derived_model is_qwen_derived_model model_class
        type_of_model""",
    "remove it, the tokenizer and the chat template say it": """
        special_tokens tokenizer tokenizer_config eos_token pad_token tokens""",
    "remove it, `truetune train` trains": "do_train task loss do_predict predict_with_generate",
    "remove it, the shape of the rows is recognised": """
        ds_type data_format dataset_format formatting format dataset_type""",
    "`training.trust_remote_code`": "allow_remote_code",
}
_ADVICE = {word: advice for advice, words in _WORDS_OF.items() for word in words.split()}

_SOURCE_ADVICE = {
    word: advice
    for advice, words in {
        "`path`": "file file_name data_files dataset_name dataset url hub_id hf_hub_url dataset_path train_file",
        "`split`": "split_name subset_split train_split",
        "`weight`": "ratio prob probability share sampling_weight num_samples",
        "`columns`": "field_messages field_instruction field_output mapping column_mapping column_map fields keys",
        "`streaming: true` for all sources, at the top of the recipe": "streaming stream dataset_streaming",
        "remove it, the shape of the rows is recognised": "type ds_type format formatting data_format conversation",
    }.items()
    for word in words.split()
}

_VALUES = {
    "method": {
        **dict.fromkeys(("sft", "peft", "adapter", "dora", "rslora", "lora16", "lora_16bit"), "lora"),
        **dict.fromkeys(("lora_4bit", "4bit", "nf4", "bnb"), "qlora"),
        **dict.fromkeys(("freeze", "none", "finetune", "all", "full_finetuning"), "full"),
    },
    "precision": {
        **dict.fromkeys(("bfloat16", "torch.bfloat16", "16"), "bf16"),
        **dict.fromkeys(("float16", "half", "torch.float16"), "fp16"),
        **dict.fromkeys(("float32", "float", "32", "full", "torch.float32"), "fp32"),
        **dict.fromkeys(("4bit", "4", "int4", "fp4", "8bit", "int8", "8"), "nf4"),
    },
    "supervise": {
        **dict.fromkeys(
            ("assistant", "completion", "completions", "response", "assistants", "false", "train"), "responses"
        ),
        **dict.fromkeys(("last", "last_turn", "final"), "last_response"),
        **dict.fromkeys(("everything", "inputs", "true", "full"), "all"),
    },
    "training.optim": dict.fromkeys(
        ("adamw", "adam", "adamw_hf", "adamw_apex_fused", "adamw_fused"), "adamw_torch_fused"
    ),
    "training.lr_scheduler_type": {"constant_warmup": "constant_with_warmup", "wsd": "warmup_stable_decay"},
    "overflow": {**dict.fromkeys(("drop", "cut", "keep_start"), "truncate"), "wrap": "split", "bfd_split": "split"},
}


def advice(word: str, *, source: bool = False) -> str | None:
    """What to use for another tool's key, in words: "`training.learning_rate`". `source`: a key of one data source."""
    return (_SOURCE_ADVICE if source else _ADVICE).get(word.lower().replace("-", "_"))


def value_advice(key: str, value: str) -> str | None:
    """Our word for another tool's value of `key`: "bf16" for `precision: bfloat16`."""
    return _VALUES.get(key, {}).get(value.lower())


def all_advice() -> set[str]:
    """Every answer that `advice` can give, for the test that they name keys that exist."""
    return {*_ADVICE.values(), *_SOURCE_ADVICE.values()}


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that `word` is most likely a slip of."""
    near = difflib.get_close_matches(word.lower(), [choice for choice in choices if choice], n=1, cutoff=cutoff)
    return near[0] if near else None
