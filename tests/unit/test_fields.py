"""Every field of TRL's and transformers' arguments acts, is refused when set, or cannot matter."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainer_kit
from conftest import build_model, build_tokenizer
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from pgpo import PGPOConfig, PGPOTrainer
from pgpo.errors import UserError
from pgpo.settings.fields import FATES
from pgpo.train.gate import torch_optimizer
from pgpo.train.seam import step as seam_step

OBJECTIVES = ("pgpo", "sdpo", "grpo")
INHERITED = {f.name for cls in (GRPOConfig, TrainingArguments) for f in dataclasses.fields(cls) if f.init}
# A value other than the default, for each field that some objective refuses.
OTHER: dict[str, Any] = {
    **dict(auto_find_batch_size=True, label_smoothing_factor=0.1, bf16_full_eval=True, fp16_full_eval=True),
    **dict(train_sampling_strategy="sequential", data_seed=7, cast_lm_head_to_fp32=True),
    **dict(max_tool_calling_iterations=3, loss_type="grpo", beta=0.1, off_policy_mask_threshold=0.5),
    **dict(top_entropy_quantile=0.2, entropy_coef=0.01, use_adaptive_entropy=True, use_bias_correction_kl=False),
    **dict(entropy_coef_min=0.1, entropy_coef_max=0.5, entropy_coef_delta=0.1, entropy_target=1.0),
    **dict(importance_sampling_level="sequence", sync_ref_model=True, sapo_temperature_neg=2.0),
    **dict(sapo_temperature_pos=2.0, vespo_k_pos=1.0, vespo_lambda_pos=1.0, vespo_k_neg=1.0, vespo_lambda_neg=1.0),
    **dict(ref_model_mixup_alpha=0.5, ref_model_sync_steps=8, epsilon=0.1, epsilon_high=0.28, delta=2.0),
    **dict(scale_rewards=False, multi_objective_aggregation="normalize_then_sum", enable_jit_checkpoint=True),
}
# The same for those that cannot matter, but for the launcher's and those of evaluation alone.
MOOT: dict[str, Any] = {
    **dict(average_tokens_across_devices=False, use_cache=True, dataloader_drop_last=True, length_column_name="size"),
    **dict(label_names=("labels",), pad_to_multiple_of=8, prediction_loss_only=True, eval_do_concat_batches=False),
    **dict(eval_use_gather_object=True, eval_accumulation_steps=2, include_for_metrics=("inputs",)),
    **dict(batch_eval_metrics=True, log_multimodal=False, do_train=True, do_predict=True),
}


def fate(name: str, objective: str):
    return FATES[name][objective == "grpo"]


def source(file: str) -> str:
    """Text of `package/path.py`, installed or ours."""
    package, _, rest = file.partition("/")
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    return (Path(folder) / rest).read_text(encoding="utf-8")


# The table ------------------------------------------------------------------------------------------------------------


def test_every_inherited_field_has_its_fate():
    """Red with a TRL that brings a field, or drops one: give it a row in fields.py, after reading what it does."""
    assert FATES.keys() == INHERITED


@pytest.mark.parametrize("name", sorted(FATES))
def test_a_field_that_acts_is_read_by_the_file_named(name):
    for place in FATES[name]:
        if place.kind == "acts":
            assert re.search(rf'(args|self)\.{name}\b|"{name}"', source(place.text)), place.text
        else:
            assert len(place.text) > 15  # a reason


def test_the_values_tried_below_are_those_of_all_refused_fields():
    assert OTHER.keys() == {name for name, fates in FATES.items() if any(f.kind == "refused" for f in fates)}
    assert {name for name, fates in FATES.items() if fates[0].kind == "moot"} - MOOT.keys() == {
        *("do_eval", "resume_from_checkpoint", "local_rank")
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", OTHER)
def test_a_field_that_would_do_nothing_is_refused_when_set(tmp_path, name, objective):
    if fate(name, objective).kind != "refused":
        trainer_kit.config(tmp_path, objective=objective, **{name: OTHER[name]} | needed(name))
        return
    with pytest.raises(UserError) as caught:
        trainer_kit.config(tmp_path, objective=objective, **{name: OTHER[name]})
    assert re.match(rf"{name} is .*; (leave it at|set|lower) ", str(caught.value)), caught.value
    default = PGPOConfig.__dataclass_fields__[name].default
    trainer_kit.config(tmp_path, objective=objective, **{name: default})  # written out, it is not set


def needed(name: str) -> dict[str, Any]:
    return {"beta": 0.1} if name == "sync_ref_model" else {}


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
def test_what_cannot_matter_does_not(tmp_path, objective):
    ends = []
    for options in ({}, MOOT):
        if objective == "grpo":
            options = {k: v for k, v in options.items() if fate(k, "grpo").kind == "moot"}
        t = trainer_kit.trainer(tmp_path, objective=objective, max_steps=2, **options)
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(*ends)


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_noise_alpha": 5.0},
        {"max_grad_norm": 1e-3},
        {"weight_decay": 0.5},
        {"adam_beta1": 0.1},
        {"optim": "sgd"},
        {"lr_scheduler_type": "linear"},
        {"reward_weights": (0.5,), "success_reward": "sum"},
        {"num_iterations": 2},
        {"seed": 3, "shuffle_dataset": True},
        {"chat_template_kwargs": {"mark": "w9"}},
    ],
    ids=lambda o: next(iter(o)),
)
def test_a_field_that_acts_changes_what_is_learned(tmp_path, options):
    ends = []
    for chosen in ({}, options):
        t = trainer_kit.trainer(tmp_path, max_steps=2, **chosen)
        t.processing_class.chat_template = "{{ mark }} " + t.processing_class.chat_template
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert not trainer_kit.bitwise_equal(*ends)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_device_cache_is_emptied_every_so_many_steps(tmp_path, monkeypatch, objective):
    """transformers does it in its own training_step, which is not run here."""
    at = []
    t = trainer_kit.trainer(tmp_path, objective=objective, max_steps=5, torch_empty_cache_steps=2)
    monkeypatch.setattr(seam_step, "clear_device_cache", lambda: at.append(t.state.global_step))
    trainer_kit.train(t)
    assert at == [0, 2, 4]  # as transformers counts


def test_trls_words_for_the_sizes_of_evaluation(tmp_path):
    """`eval_k` and `eval_batch_size` by TRL's names; 8 rows do not hold whole groups of 3, and need not."""
    config = trainer_kit.config(tmp_path, num_generations_eval=3, per_device_eval_batch_size=8, eval_k=16)
    assert (config.eval_k, config.eval_batch_size, config.per_device_eval_batch_size) == (3, 8, 8)
    config = PGPOConfig(str(tmp_path), use_cpu=True, eval_batch_size=5, eval_strategy="steps")
    assert (config.eval_batch_size, config.per_device_eval_batch_size, config.num_generations_eval) == (5, 5, None)
    with pytest.raises(UserError, match="num_generations_eval is 3 and eval_k is 4, which mean the same; give one"):
        trainer_kit.config(tmp_path, num_generations_eval=3, eval_k=4)


@pytest.mark.parametrize(
    ("name", "objective", "says"),
    [
        ("compute_loss", "pgpo", "Mine overrides compute_loss, which PGPOTrainer never calls; override `optimize`"),
        ("compute_loss", "grpo", "never calls; override `optimize`"),
        ("prediction_step", "sdpo", "Mine overrides prediction_step, which PGPOTrainer never calls; pass grade="),
        ("_compute_loss", "pgpo", "Mine overrides _compute_loss, which .* or use objective='grpo'"),
        ("_compute_loss", "grpo", None),
        ("optimize", "pgpo", None),
        ("training_step", "pgpo", None),
    ],
)
def test_an_override_that_is_never_called_is_refused(tmp_path, name, objective, says):
    mine = type("Mine", (PGPOTrainer,), {name: lambda self, *args, **kwargs: None})

    def make():
        return mine(
            build_model(),
            trainer_kit.parity_reward,
            trainer_kit.config(tmp_path, objective=objective),
            trainer_kit.dataset(),
            processing_class=build_tokenizer(),
        )

    if says is None:
        make()
    else:
        with pytest.raises(UserError, match=says):
            make()


# Values that TRL takes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "is_then"),
    [
        ({"scale_rewards": True}, {"scale_rewards": "group"}),
        ({"scale_rewards": False, "objective": "grpo"}, {"scale_rewards": "none"}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": None}, {"top_k": None}),
        ({"top_p": None, "repetition_penalty": None}, {"top_p": None, "repetition_penalty": None}),
        ({"top_k": None, "top_p": None, "use_vllm": True}, {"top_k": 0, "top_p": 1.0}),
        ({"max_grad_norm": None}, {"max_grad_norm": 0.0}),
        ({"delta": math.inf, "epsilon_high": math.inf, "objective": "grpo"}, {"delta": math.inf}),
        ({"vllm_importance_sampling_clip_max": None}, {"vllm_importance_sampling_clip_max": math.inf}),
        (
            {"vllm_importance_sampling_clip_max": None, "vllm_importance_sampling_clip_min": 0.5},
            {"vllm_importance_sampling_clip_max": None},
        ),
        (
            {"vllm_importance_sampling_clip_max": None, "vllm_importance_sampling_mode": "sequence_mask"},
            {"vllm_importance_sampling_clip_max": None},
        ),
        ({"learning_rate": "1e-5", "weight_decay": "2.5E-1"}, {"learning_rate": 1e-5, "weight_decay": 0.25}),
        ({"learning_rate": np.float64(0.5), "bf16": np.bool_(False)}, {"learning_rate": 0.5, "bf16": False}),
        ({"reward_weights": (1.0, 2)}, {"reward_weights": [1.0, 2]}),
        ({"optim_target_modules": ("a", "b")}, {"optim_target_modules": ["a", "b"]}),
        ({"report_to": ("tensorboard",)}, {"report_to": ["tensorboard"]}),
        ({"guard": "warn", "guard_signals": ["sampled_kl"]}, {"guard_signals": "sampled_kl"}),
    ],
    ids=str,
)
def test_a_value_that_trl_takes_is_taken(tmp_path, given, is_then):
    config = trainer_kit.config(tmp_path, **given)
    found = {name: getattr(config, name) for name in is_then}
    assert found == is_then and {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in is_then.items()}


def test_a_path_is_a_text(tmp_path):
    limits = tmp_path / "limits.json"
    limits.write_text('{"sampled_kl": 1.0}')
    config = PGPOConfig(tmp_path / "run", use_cpu=True, guard="warn", guard_limits=limits)
    assert config.output_dir == str(tmp_path / "run") and config.guarded_signals()["sampled_kl"] == 1.0
    assert type(config.output_dir) is str


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"scale_rewards": "true"}, "scale_rewards is 'true'; choose one of group, batch, none"),
        ({"scale_rewards": 1}, "scale_rewards is 1; it must be a text"),
        ({"max_grad_norm": math.inf}, "max_grad_norm is inf; it must be a finite number"),
        ({"top_k": -2}, r"top_k is -2; it must be 0 \(all tokens\) or more"),
        ({"epsilon": math.inf}, "epsilon is inf"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"reward_weights": ("much",)}, r"reward_weights is \['much'\]; it must be a list of numbers"),
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; choose one of grpo, sapo, .*bnpo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word'; choose one of token, sequence"),
    ],
    ids=str,
)
def test_its_neighbours_are_refused(tmp_path, given, says):
    with pytest.raises(UserError, match=says):
        trainer_kit.config(tmp_path, objective="grpo", **given)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_rewards": False},
        {"scale_rewards": True},
        {"delta": math.inf, "epsilon_high": math.inf, "num_iterations": 2},
        {"loss_type": "bnpo", "max_tokens_per_microbatch": None},
    ],
    ids=str,
)
def test_it_acts_as_in_trl(tmp_path, options):
    options = dict(max_steps=3, optim="sgd", learning_rate=0.5) | options
    reference = trainer_kit.weights(trainer_kit.trl_trainer(tmp_path, objective="grpo", **options).model)
    t = trainer_kit.trainer(tmp_path, objective="grpo", **options)
    trainer_kit.train(t)
    assert trainer_kit.largest_difference(trainer_kit.weights(build_model()), reference) > 1e-3
    assert trainer_kit.largest_difference(trainer_kit.weights(t.model), reference) < 1e-6


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
def test_none_is_no_clipping(tmp_path, objective):
    ends = []
    for limit in (None, 0.0, 1e-3):
        t = trainer_kit.trainer(tmp_path, objective=objective, max_grad_norm=limit, optim="sgd")
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(*ends[:2]) and not trainer_kit.bitwise_equal(*ends[1:])


@pytest.mark.parametrize(("top_k", "kept"), [(-1, 0), (None, None), (3, 3)])
def test_top_k_arrives_where_trl_samples(tmp_path, top_k, kept):
    t = trainer_kit.trainer(tmp_path, rollout=None, top_k=top_k)
    assert t.generation_config.top_k == kept
    trainer_kit.train(t)


# Positions ------------------------------------------------------------------------------------------------------------


def test_the_trainer_takes_trls_arguments_by_position():
    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters.values())
    ours = list(inspect.signature(PGPOTrainer.__init__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_arguments_behind_the_tokenizer_act(tmp_path):
    begun = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    args = trainer_kit.config(tmp_path)
    data, tokenizer = trainer_kit.dataset(), build_tokenizer()
    t = PGPOTrainer(
        *(model, trainer_kit.parity_reward, args, data, None, tokenizer, None, [Watch()], (optimizer, None)),
        *(None, None, None, trainer_kit.fake_rollout),
    )
    trainer_kit.train(t)
    assert begun == [0] and torch_optimizer(t.optimizer) is optimizer
    assert not trainer_kit.bitwise_equal(trainer_kit.weights(t.model), trainer_kit.weights(build_model()))


# Weights in half precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("fp16", [False, True])
def test_weights_in_fp16_are_refused(tmp_path, objective, fp16):
    with pytest.raises(UserError, match=r"weight model\.embed_tokens\.weight is fp16, .* load the model with dtype="):
        trainer_kit.trainer(tmp_path, build_model(dtype=torch.float16), objective=objective, fp16=fp16)


def test_a_part_in_fp16_is_refused_and_a_frozen_part_is_not(tmp_path):
    model = build_model()
    model.model.norm.half()
    with pytest.raises(UserError, match=r"weight model\.norm\.weight is fp16"):
        trainer_kit.trainer(tmp_path, model)
    model.model.norm.requires_grad_(False)
    trainer_kit.trainer(tmp_path, model)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "auto of bfloat16"])
def test_other_precisions_are_trained(tmp_path, kind):
    build_model(dtype=torch.float32 if kind == "float32" else torch.bfloat16).save_pretrained(tmp_path / "model")
    kwargs = {"dtype": kind.split()[0]}
    t = trainer_kit.trainer(tmp_path, str(tmp_path / "model"), model_init_kwargs=kwargs)
    trainer_kit.train(t)
    assert str(t.model.dtype) == f"torch.{kind.split()[-1]}"


@pytest.mark.parametrize("dtype", ["float16", torch.float16, "auto"])
def test_a_model_loaded_in_fp16_is_refused(tmp_path, dtype):
    build_model(dtype=torch.float16).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="is fp16"):
        trainer_kit.trainer(tmp_path, str(tmp_path / "model"), model_init_kwargs={"dtype": dtype})


def test_adapters_on_weights_in_fp16_are_trained(tmp_path):
    """PEFT keeps them fp32; whole modules beside them stay fp16."""
    lora = dict(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    t = trainer_kit.trainer(tmp_path, build_model(dtype=torch.float16), peft_config=LoraConfig(**lora))
    assert {p.dtype for p in t.model.parameters() if p.requires_grad} == {torch.float32}
    saved = LoraConfig(**lora, modules_to_save=["norm"])
    with pytest.raises(UserError, match=r"norm\.modules_to_save\.default\.weight is fp16"):
        trainer_kit.trainer(tmp_path, build_model(dtype=torch.float16), peft_config=saved)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_init_kwargs": {"torch_dtype": "bfloat16"}}, "names torch_dtype, which is not read, .*; name it dtype"),
        ({"model_init_kwargs": '{"torch_dtype": "auto"}'}, "names torch_dtype"),
        ({"generation_kwargs": {"temperature": 0.7}}, "generation_kwargs sets temperature, but .* set that"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config sets split_batches"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            "set gradient_accumulation_steps",
        ),
    ],
)
def test_what_stands_inside_a_mapping_is_checked_too(tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        trainer_kit.config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(guard_patience=3), "guard_patience is 3, but guard is 'off'"),
        (dict(guard_warmup=9), "guard_warmup is 9, but guard is 'off'"),
        (dict(teacher="frozen", teacher_rate=0.1), "teacher_rate is 0.1, but teacher='frozen' has no rate"),
        (dict(divergence_top_k=0, divergence_tail=False), "divergence_tail is False, but divergence_top_k is 0"),
        (
            dict(use_successful_as_teacher=False, demonstration="random"),
            "demonstration is 'random', but use_successful_as_teacher is False",
        ),
        (dict(objective="grpo", teacher="frozen"), "teacher is 'frozen', but objective='grpo' has no teacher"),
        (dict(objective="grpo", divergence="reverse_kl"), "divergence is 'reverse_kl', but objective='grpo'"),
        (dict(objective="grpo", feedback_mode="always"), "feedback_mode is 'always', but objective='grpo'"),
        (dict(objective="sdpo", rho_min=0.5), "rho_min is 0.5, but objective='sdpo' has no multiplier"),
        (dict(divergence="sampled_token", divergence_tail=False), "divergence='sampled_token' reads the sampled token"),
        (dict(distillation_weight=0.0, sample_weights="pass_rate"), "but distillation_weight is 0"),
        (dict(distillation_weight=0.0, rehearse_weight=0.1), "but distillation_weight is 0"),
        (dict(objective="sdpo", rho_max=3.0), "rho_max is 3.0, but objective='sdpo' has no multiplier"),
        (dict(objective="sdpo", information_source="lagged"), "information_source is 'lagged', but objective='sdpo'"),
    ],
)
def test_a_field_of_ours_that_would_do_nothing_is_refused(options, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        PGPOConfig(str(tmp_path), use_cpu=True, bf16=False, prompts_per_step=4, num_generations=4, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(objective="sdpo", alpha=5.0),
        dict(objective="grpo", alpha=1.0, teacher_rate=0.01, divergence_top_k=20, divergence_tail=False),
        dict(teacher="gated"),
        dict(teacher="gated", teacher_sync_steps=9),
        dict(teacher="trust_region", teacher_rate=0.01),
        dict(objective="sdpo", guard="off", rho_min=0.0, rho_max=2.0, teacher_rate=0.05, demonstration="first"),
        dict(distillation_weight=0.5, rehearse_weight=0.05, sample_weights="pass_rate"),
    ],
    ids=str,
)
def test_what_a_recipe_sets_for_all_its_runs_and_what_acts_is_taken(options, tmp_path):
    """Red if the table of what does nothing takes in too much; a value that is the default says nothing either way."""
    PGPOConfig(str(tmp_path), use_cpu=True, bf16=False, prompts_per_step=4, num_generations=4, **options)
