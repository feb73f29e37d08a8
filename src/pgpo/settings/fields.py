"""What happens to every field that PGPOConfig inherits from trl.GRPOConfig and transformers.TrainingArguments.

One row per field (or fields of one fate) and objective: it acts, it is refused when set, or it cannot matter. "Set" is
any value but the default. `tests/unit/test_fields.py` goes through the installed classes, so that a field which a newer
TRL brings turns it red until it has a row, and looks up each `acts` in the file that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pgpo.errors import UserError
from pgpo.settings.field_types import shown


@dataclass(frozen=True)
class Fate:
    """What happens to a field.

    Attributes:
        text: `acts`: the file that reads the field; `refused`: why, behind "NAME is VALUE, "; `moot`: the reason.
        remedy: `refused`: what to do, where leaving the default is not all.
        mixed: `refused`, but it acts where distillation_weight < 1 adds TRL's policy loss.
    """

    kind: Literal["acts", "refused", "moot"]
    text: str
    remedy: str = ""
    mixed: bool = False


def _acts(file: str) -> Fate:
    return Fate("acts", file)


def _refused(why: str, remedy: str = "", mixed: bool = False) -> Fate:
    return Fate("refused", why, remedy, mixed)


def _moot(reason: str) -> Fate:
    return Fate("moot", reason)


_TRL = _acts("trl/trainer/grpo_trainer.py")
_TRL_CONFIG = _acts("trl/trainer/grpo_config.py")
_TRAINER = _acts("transformers/trainer.py")
_ARGUMENTS = _acts("transformers/training_args.py")
_REPORTS = _acts("transformers/integrations/integration_utils.py")
_CALLBACKS = _acts("transformers/trainer_callback.py")
_OPTIMIZERS = _acts("transformers/trainer_optimizer.py")
_SEAM = _acts("pgpo/train/seam/step.py")
_CHECKPOINTS = _acts("pgpo/train/seam/resume.py")
_CONFIG = _acts("pgpo/settings/config.py")

_INSTEAD = "or use objective='grpo'"
_POLICY = _refused("which self-distillation does not have", _INSTEAD)
# Of the policy loss itself, which distillation_weight < 1 mixes in
_MIXED = _refused("which self-distillation does not have", f"{_INSTEAD} or distillation_weight < 1", mixed=True)
_LOSS = _refused("which self-distillation does not have", f"set divergence, {_INSTEAD}", mixed=True)
_CLIP = _refused("which self-distillation does not have", f"set importance_clip, {_INSTEAD}", mixed=True)
_ADVANTAGES = _refused("but self-distillation has no advantages", _INSTEAD, mixed=True)
_TOOLS = _refused("but self-distillation has no tools", _INSTEAD)
_LABELS = _refused("but no loss here has labels to smooth")
_PRECISION = _refused("but held-out completions are sampled in the precision of training")
_SAMPLER = _refused("but TRL draws the questions", "set shuffle_dataset: false for the order of the dataset")
_NO_PREDICTIONS = _moot("evaluation samples and grades; it has no predictions to gather and no compute_metrics")
_SCRIPTS = _moot("read by scripts alone; train() and evaluate() are called by name")

# (names, fate with self-distillation, fate with objective="grpo" where it is another)
_ROWS: tuple[tuple[str, Fate] | tuple[str, Fate, Fate], ...] = (
    # The step: batch, length of the run, optimizer, schedule --------------------------------------------------------
    ("per_device_train_batch_size gradient_accumulation_steps", _CONFIG),
    ("generation_batch_size steps_per_generation", _TRL_CONFIG),
    ("auto_find_batch_size", _refused("but a smaller batch would cut groups", "lower max_tokens_per_microbatch")),
    ("num_generations num_iterations shuffle_dataset", _TRL),
    ("num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs optim optim_args", _TRAINER),
    ("weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm", _TRAINER),
    ("warmup_steps", _ARGUMENTS),
    ("optim_target_modules", _OPTIMIZERS),
    ("average_tokens_across_devices", _moot("losses are divided by counts over all ranks; nothing counts labels")),
    ("label_smoothing_factor", _LABELS),
    ("neftune_noise_alpha", _TRAINER),
    ("torch_empty_cache_steps", _SEAM),
    # Precision and memory -------------------------------------------------------------------------------------------
    ("bf16 fp16 gradient_checkpointing gradient_checkpointing_kwargs", _TRL),
    ("activation_checkpointing activation_checkpointing_kwargs use_liger_kernel liger_kernel_config", _TRAINER),
    ("bf16_full_eval fp16_full_eval", _PRECISION),
    ("tf32 torch_compile torch_compile_backend torch_compile_mode", _ARGUMENTS),
    ("use_cache", _moot("each forward sets for itself whether it keeps a KV cache"), _TRAINER),
    # Data -----------------------------------------------------------------------------------------------------------
    ("dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor", _TRAINER),
    ("dataloader_multiprocessing_context dataloader_in_order remove_unused_columns ignore_data_skip", _TRAINER),
    ("dataloader_drop_last", _moot("TRL's sampler gives whole batches only")),
    ("train_sampling_strategy", _SAMPLER),
    ("length_column_name", _moot("read by sampling strategies that are refused")),
    ("label_names", _moot("a batch has no labels")),
    ("data_seed", _refused("but TRL draws the questions by `seed`", "set seed")),
    ("seed", _TRL),
    ("full_determinism", _TRAINER),
    # The model ------------------------------------------------------------------------------------------------------
    ("model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout", _TRL),
    (
        "cast_lm_head_to_fp32",
        _refused("but self-distillation computes divergence and entropy in fp32 from the model's own logits", _INSTEAD),
        _TRL,
    ),
    # Rollouts -------------------------------------------------------------------------------------------------------
    ("max_completion_length temperature top_p top_k min_p generation_kwargs chat_template_kwargs", _TRL),
    ("repetition_penalty cache_implementation ds3_gather_for_generation mask_truncated_completions", _TRL),
    ("pad_to_multiple_of", _moot("a row is stripped of padding before it is packed or padded"), _TRL),
    ("use_transformers_continuous_batching transformers_continuous_batching_config", _TRL),
    ("use_transformers_paged vllm_importance_sampling_cap", _TRL_CONFIG),
    ("use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex", _TRL),
    ("vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port", _TRL),
    ("vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size", _TRL),
    ("vllm_importance_sampling_correction vllm_importance_sampling_mode", _TRL),
    ("vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min", _TRL),
    ("max_tool_calling_iterations", _TOOLS, _TRL),
    # Rewards and the policy loss ------------------------------------------------------------------------------------
    ("reward_weights", _TRL),
    ("loss_type", _LOSS, _TRL),
    ("beta off_policy_mask_threshold top_entropy_quantile entropy_coef use_adaptive_entropy", _POLICY, _TRL),
    ("use_bias_correction_kl entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target", _POLICY, _TRL),
    ("sync_ref_model", _POLICY, _TRL),
    ("importance_sampling_level sapo_temperature_neg sapo_temperature_pos", _MIXED, _TRL),
    ("vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg", _MIXED, _TRL),
    ("ref_model_mixup_alpha ref_model_sync_steps", _POLICY, _acts("trl/trainer/callbacks.py")),
    ("epsilon epsilon_high delta", _CLIP, _TRL),
    ("scale_rewards multi_objective_aggregation", _ADVANTAGES, _TRL),
    # Evaluation -----------------------------------------------------------------------------------------------------
    ("num_generations_eval per_device_eval_batch_size", _CONFIG),
    ("eval_strategy eval_delay metric_for_best_model greater_is_better", _CALLBACKS),
    ("eval_steps", _ARGUMENTS),
    ("eval_on_start load_best_model_at_end", _TRAINER),
    ("prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps", _NO_PREDICTIONS),
    ("include_for_metrics batch_eval_metrics", _NO_PREDICTIONS),
    # Logs and reports -----------------------------------------------------------------------------------------------
    ("logging_strategy logging_first_step", _CALLBACKS),
    ("logging_steps log_on_each_node log_level log_level_replica", _ARGUMENTS),
    ("disable_tqdm logging_nan_inf_filter include_num_input_tokens_seen report_to debug skip_memory_metrics", _TRAINER),
    ("run_name project trackio_space_id trackio_bucket_id trackio_static_space_id", _REPORTS),
    ("log_completions num_completions_to_print log_unique_prompts log_completions_hub_repo", _TRL),
    ("log_multimodal", _moot("self-distillation refuses models that read images"), _TRL),
    # Checkpoints and the hub ----------------------------------------------------------------------------------------
    ("output_dir save_total_limit push_to_hub", _CHECKPOINTS),
    ("save_strategy", _CALLBACKS),
    ("save_only_model restore_callback_states_from_checkpoint", _TRAINER),
    ("save_steps save_on_each_node", _ARGUMENTS),
    (
        "enable_jit_checkpoint",
        _refused(
            "which saves between a gradient and its update, where no run can continue bit for bit",
            "lower save_steps, or use `pgpo train`, which finishes its step and saves on SIGTERM",
        ),
    ),
    ("hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision", _TRAINER),
    ("do_train do_eval do_predict resume_from_checkpoint", _SCRIPTS),
    # Processes ------------------------------------------------------------------------------------------------------
    ("use_cpu ddp_backend ddp_timeout", _ARGUMENTS),
    ("accelerator_config parallelism_config fsdp fsdp_config", _TRAINER),
    ("deepspeed", _ARGUMENTS),
    ("ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph", _TRAINER),
    ("local_rank", _moot("the launcher's environment says it")),
)

# name -> fate with self-distillation, fate with objective="grpo"
FATES: dict[str, tuple[Fate, Fate]] = {name: (row[1], row[-1]) for row in _ROWS for name in row[0].split()}


def refuse_unused(
    values: Mapping[str, Any], defaults: Mapping[str, Any], distills: bool, follows_rewards: bool
) -> None:
    """UserError for the first field that is set and would do nothing with this objective.

    follows_rewards: TRL's policy loss is the loss or a part of it.
    """
    for name, fates in FATES.items():
        fate, value = fates[0 if distills else 1], values[name]
        if fate.kind == "refused" and value != defaults[name] and not (fate.mixed and follows_rewards):
            leave = f"leave it at {shown(defaults[name])}"
            remedy = f"{leave}, {fate.remedy}" if fate.remedy.startswith("or ") else fate.remedy or leave
            raise UserError(f"{name} is {shown(value)}, {fate.text}; {remedy}.")
