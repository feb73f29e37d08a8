"""TRL's tests of GRPOTrainer and SDPOTrainer by name, each as the script that it is about, in our words.

A scenario gets a `Setting`, which is TRL's own trainer or ours with one objective. Where TRL's test cannot be run
without something that is not here, `needs` says what.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import stand_ins
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from setting import Setting
from trl import GRPOTrainer

Script = Callable[[Setting], Any]


@dataclass(frozen=True)
class Scenario:
    """One test of TRL.

    Attributes:
        about: what it sets.
        run: the script; None where `needs` says what is missing.
        of: GRPO, or SDPO: then it says nothing of objective grpo.
    """

    test: str
    about: str
    run: Script | None = None
    needs: str = ""
    of: str = "GRPO"


SCENARIOS: list[Scenario] = []
_VISION, _VLLM, _LIGER = "a vision-language model", "vLLM", "Liger kernels"


def _scenario(about: str, of: str = "GRPO") -> Callable[[Script], Script]:
    """The function has the name of TRL's test."""

    def add(function: Any) -> Any:
        test = function.__name__.replace("test_sdpo_", "test_")  # both have one of that name
        SCENARIOS.append(Scenario(test, about, function, of=of))
        return function

    return add


def _trains(test: str, about: str, **options: Any) -> None:
    """A script that sets these and trains."""
    SCENARIOS.append(Scenario(test, about, lambda s: s.train(s.trainer(**options))))


def _each(test: str, about: str, *variants: dict[str, Any], **options: Any) -> None:
    """The same with several values, each a script of its own."""

    def run(s: Setting) -> None:
        for variant in variants:
            s.train(s.trainer(**options | variant))

    SCENARIOS.append(Scenario(test, about, run))


def _needs(what: str, *tests: str, of: str = "GRPO", about: str = "") -> None:
    SCENARIOS.extend(Scenario(test, about or what, needs=what, of=of) for test in tests)


# Rewards --------------------------------------------------------------------------------------------------------------


def by_length(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def by_letters(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def zero(completions: list[Any], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def one(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def not_applicable(completions: list[Any], **kwargs: Any) -> list[None]:
    return [None] * len(completions)


async def later(completions: list[Any], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return by_letters(completions)


def first_right(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(i == 0) for i in range(len(completions))]


# Functions of the loss ------------------------------------------------------------------------------------------------


def _entropy_mask(entropies: list[list[float]], mask: list[list[int]], threshold: float) -> Script:
    def run(s: Setting) -> None:
        t = s.trainer(reward=by_length)
        given = torch.tensor(entropies), torch.tensor(mask), threshold
        same = torch.equal(t.get_high_entropy_mask(*given), GRPOTrainer.get_high_entropy_mask(t, *given))
        s.check(same, "another mask than TRL's")

    return run


_RISING = [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.7, 0.8, 0.9, 1.0, 1.1, 1.2]]
_FULL, _CUT = [[1] * 6, [1, 1, 1, 1, 0, 0]], [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
for _test, _given in {
    "test_compute_entropy_mask_0": (_RISING, _FULL, 0.8),
    "test_compute_entropy_mask_1": ([[0.1, 0.2, 0.3, 1.4, 0.5, 0.14], [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]], _CUT, 0.8),
    "test_compute_entropy_mask_lower_threshold": (_RISING, _FULL, 0.5),
    "test_compute_entropy_threshold_0": (_RISING, _FULL, 0.0),
    "test_compute_entropy_threshold_1": (_RISING, _FULL, 1.0),
    "test_compute_entropy_all_masked": (_RISING, [[0] * 6] * 2, 0.5),
}.items():
    SCENARIOS.append(Scenario(_test, "mask of the tokens of high entropy", _entropy_mask(*_given)))


# Rollout functions ----------------------------------------------------------------------------------------------------


def _rollout(trainer: Any, prompts: list[Any], **more: Any) -> dict[str, Any]:
    words = trainer.processing_class
    answers = [words(text)["input_ids"] + [words.eos_token_id] for text in ("ab", "cde", "fghi")]
    ids = [answers[i % 3] for i in range(len(prompts))]
    return {"prompt_ids": [words(p)["input_ids"] for p in prompts], "completion_ids": ids, **more}


@_scenario("`rollout_func` with an environment's tokens")
def test_generate_prefers_rollout_func(s: Setting) -> None:
    calls = []

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        calls.append(len(prompts))
        out = _rollout(trainer, prompts)
        ids = out["completion_ids"]
        return out | {"logprobs": [[-1.0] * len(c) for c in ids], "env_mask": [[0] + [1] * (len(c) - 1) for c in ids]}

    s.train(s.trainer(reward=by_length, rollout_func=rollout))
    s.check(calls == [3, 3, 3], "rollout_func was not called once a step")


_needs(_VLLM, "test_generate_rollout_func_syncs_vllm_weights_when_needed", about="`rollout_func` beside vLLM")


@_scenario("`rollout_func` without log-probabilities is refused")
def test_generate_rollout_func_raises_when_required_keys_are_missing(s: Setting) -> None:
    t = s.trainer(reward=by_length, rollout_func=lambda prompts, trainer: _rollout(trainer, prompts))
    s.refuses(t.train)


_needs(
    "no trainer: it tests transformers",
    "test_generation_output_has_logprobs_field",
    "test_generation_output_logprobs_accepts_floats",
    "test_continuous_batching_config_has_return_logprobs",
    "test_generate_batch_accepts_continuous_batching_config",
    about="members of transformers",
)

# Models and datasets --------------------------------------------------------------------------------------------------


@_scenario("a model, a reward model, a dataset; here also `use_cpu`")
def test_init_minimal(s: Setting) -> None:
    s.trainer(args=s.plain_config(use_cpu=True))


@_scenario("six architectures, four of them with experts")
def test_train(s: Setting) -> None:
    for kind in ("cohere2", "glm4_moe", "gpt_oss", "qwen2", "qwen3_moe", "nemotron_h"):
        t = s.train(s.trainer(kind))
        if t.aux_loss_enabled:
            s.logs(t, "aux_loss")


_each("test_train_dataset_format", "plain text, and chat messages", dict(data="text"), dict(data="chat"))


@_scenario("a model with code of its own")
def test_trust_remote_code(s: Setting) -> None:
    folder = stand_ins.with_own_code()
    s.refuses(lambda: s.trainer(folder, by_length))
    t = s.trainer(folder, by_length, trust_remote_code=True)
    s.check(type(t.model).__name__ == "OwnForCausalLM", "another class was loaded")


def _loss_types(s: Setting) -> None:
    for loss in ("bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"):
        level = "sequence" if loss == "luspo" else "token"
        options = dict(loss_type=loss, importance_sampling_level=level, gradient_accumulation_steps=2)
        # A mean over the tokens of each micro-batch in TRL, so that it depends on the split.
        s.train(s.trainer(max_completion_length=32, **options), compares=loss != "bnpo")
    s.differs("`bnpo` divides by the tokens of all micro-batches")


SCENARIOS.append(Scenario("test_train_loss_types", "every `loss_type`, two micro-batches", _loss_types))

# Evaluation -----------------------------------------------------------------------------------------------------------

_KEYS = "gives `eval_avg_at_k` and `eval_reward`, not `eval_loss`"


def _parts(kind: str) -> Any:
    whole: Any = stand_ins.questions().select(range(4))
    if "iterable" in kind:
        whole = whole.to_iterable_dataset()
    parts = {"data1": whole, "data2": whole}
    if "dataset_dict" in kind:
        return IterableDatasetDict(parts) if "iterable" in kind else DatasetDict(parts)
    return {"none": None, "dict": parts}.get(kind.split("_")[0], whole)


_EVAL_KINDS = ["dataset", "iterable_dataset", "dataset_dict", "iterable_dataset_dict"]
_EVAL_KINDS += ["dict_of_dataset", "dict_of_iterable_dataset"]


def _evaluating(**options: Any) -> Script:
    def run(s: Setting) -> None:
        t = s.trainer(eval_dataset=_parts("dataset"), per_device_eval_batch_size=3, eval_strategy="steps", **options)
        s.train(t, moves=None, compares=False)  # each samples in its own way
        s.logs(t, "eval_reward")

    return run


SCENARIOS += [
    Scenario("test_train_with_eval", "evaluation every second step", _evaluating(eval_steps=2)),
    Scenario(
        "test_train_with_num_generations_eval",
        "one completion per held-out question",
        _evaluating(eval_steps=2, num_generations_eval=1),
    ),
]


@_scenario("a stream of rows")
def test_train_with_iterable_dataset(s: Setting) -> None:
    t = s.trainer(data=stand_ins.stream(), max_steps=4)
    s.check(t.args.accelerator_config.dispatch_batches is False, "dispatch_batches is not False")
    s.train(t)


@_scenario("every kind of `eval_dataset`, or none")
def test_init_with_eval_dataset(s: Setting) -> None:
    for kind in (*_EVAL_KINDS, "none"):
        given = _parts(kind)
        found = s.trainer(eval_dataset=given).eval_dataset
        same = set(found) == {"data1", "data2"} if isinstance(given, dict) else found is given
        s.check(same, f"eval_dataset is {found}")


@_scenario("`dispatch_batches` with a stream is refused")
def test_iterable_dataset_requires_dispatch_batches_false(s: Setting) -> None:
    s.refuses(lambda: s.trainer(data=stand_ins.stream(), accelerator_config={"dispatch_batches": True}))


@_scenario("a stream has no workers")
def test_iterable_dataset_forces_num_workers_zero(s: Setting) -> None:
    t = s.trainer(data=stand_ins.stream(), dataloader_num_workers=4, max_steps=1)
    s.check(t.args.dataloader_num_workers == 0, "the workers are still there")


@_scenario("a stream to evaluate on leaves training its workers")
def test_iterable_eval_keeps_map_style_train_workers(s: Setting) -> None:
    t = s.trainer(eval_dataset=_parts("iterable_dataset"), dataloader_num_workers=4)
    workers = [t.args.dataloader_num_workers, t.get_train_dataloader().num_workers, t.args.dataloader_num_workers]
    s.check(workers == [4, 4, 4], f"the workers are {workers}")


@_scenario("`evaluate(dataset)` of every kind")
def test_evaluate_with_eval_dataset(s: Setting) -> None:
    for kind in _EVAL_KINDS:
        metrics = s.trainer(per_device_eval_batch_size=3).evaluate(eval_dataset=_parts(kind))
        middle = [""] if kind in ("dataset", "iterable_dataset") else ["data1_", "data2_"]
        what = "loss" if s.objective is None else "reward"
        s.check(all(f"eval_{name}{what}" in metrics for name in middle), f"the metrics are {sorted(metrics)}")
    s.differs(_KEYS)


SCENARIOS.append(
    Scenario(
        "test_train_eval_on_start",
        "evaluation before the first step",
        _evaluating(eval_steps=2, eval_on_start=True),
    )
)
_trains("test_train_multiple_iterations", "two updates per batch", num_iterations=2)

# Adapters -------------------------------------------------------------------------------------------------------------


def _lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**options)


@_scenario("`peft_config`")
def test_train_peft_config(s: Setting) -> None:
    s.train(s.trainer(stand_ins.model(), peft_config=_lora()))


_needs(
    _LIGER,
    "test_liger_kernel_with_peft_lm_head_raises",
    "test_liger_kernel_with_peft_non_lm_head_target_allowed",
    "test_liger_kernel_with_peft_modules_to_save_lm_head_allowed",
    "test_liger_kernel_with_peft_prompt_learning_raises",
)


@_scenario("a model that has its adapter already")
def test_train_peft_model(s: Setting) -> None:
    from peft import get_peft_model

    s.train(s.trainer(get_peft_model(stand_ins.model(), _lora())))


@_scenario("an adapter on the experts, KL to the model without it")
def test_train_moe_peft_model(s: Setting) -> None:
    from peft import get_peft_model

    experts = _lora(target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
    s.train(s.trainer(get_peft_model(stand_ins.model("gpt_oss"), experts), beta=0.1))


@_scenario("`peft_config` and gradient checkpointing")
def test_train_peft_with_gradient_checkpointing(s: Setting) -> None:
    s.train(s.trainer(stand_ins.model(), peft_config=_lora(), gradient_checkpointing=True))


# Rewards --------------------------------------------------------------------------------------------------------------


@_scenario("a reward model with another tokenizer")
def test_train_different_reward_model(s: Setting) -> None:
    words = stand_ins.tokenizer("phi3")
    model = stand_ins.reward_model("llama")
    s.train(s.trainer(reward=model, data="chat", reward_processing_classes=words))


_trains("test_train_reward_func_standard", "a function of texts", reward=by_length)
_trains("test_train_reward_func_conversational", "a function of chat messages", reward=by_length, data="chat")
_trains("test_train_multiple_reward_funcs", "two functions", reward=[by_length, by_letters])
_trains("test_train_sync_and_async_reward_funcs", "two functions and an async one", reward=[by_length, one, later])


@_scenario("a function that returns None")
def test_train_multiple_reward_funcs_with_None_output(s: Setting) -> None:
    s.train(s.trainer(reward=[by_length, not_applicable]))


@_scenario("`reward_weights`")
def test_train_multiple_reward_funcs_with_weights(s: Setting) -> None:
    t = s.train(s.trainer(reward=[by_length, by_letters], reward_weights=[0.7, 0.3]))
    for name in ("by_length", "by_letters"):
        s.logs(t, f"rewards/{name}/mean")
        s.logs(t, f"rewards/{name}/std")


@_scenario("the logged reward is the weighted sum, with both aggregations")
def test_reward_metric_reflects_reward_weights(s: Setting) -> None:
    for way in ("sum_then_normalize", "normalize_then_sum"):
        options = dict(multi_objective_aggregation=way) if way != "sum_then_normalize" else {}
        t = s.trainer(reward=[one, zero], reward_weights=[0.7, 0.3], **options)
        s.train(t, moves=None)
        found = next(entry["reward"] for entry in t.state.log_history if "reward" in entry)
        s.check(abs(found - 0.7) < 1e-5, f"the reward is {found}")


@_scenario("a function and a reward model")
def test_train_multiple_mixed_reward_funcs(s: Setting) -> None:
    s.train(s.trainer(reward=[by_length, stand_ins.saved(seed=1, scores=True)]))


@_scenario("a function of a column of the dataset")
def test_train_reward_func_additional_column(s: Setting) -> None:
    def near(completions: list[str], some_values: list[int], **kwargs: Any) -> list[float]:
        return [float(abs(len(c) - value)) for c, value in zip(completions, some_values, strict=True)]

    s.train(s.trainer(reward=near, data=stand_ins.questions(some_values=list(range(16)))))


# The policy loss ------------------------------------------------------------------------------------------------------


@_scenario("a reference model that follows")
def test_train_with_sync_ref_model(s: Setting) -> None:
    t = s.trainer(beta=0.1, sync_ref_model=True, ref_model_sync_steps=2)
    before = {name: p.detach().clone() for name, p in t.ref_model.named_parameters()}
    s.train(t)
    same = [name for name, p in t.ref_model.named_parameters() if torch.equal(p, before[name])]
    s.check(not same, f"{same} of the reference model have not moved")


_trains("test_train_beta_non_zero", "KL to a reference model", beta=0.1)
_trains("test_train_with_pad_to_multiple_of", "`pad_to_multiple_of`", pad_to_multiple_of=8)


def _off_policy_mask(s: Setting) -> None:
    t = s.trainer(reward=by_length)
    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    given = torch.tensor([[1.0], [-1.0], [-1.0]]), -3 * torch.rand(3, 4), torch.zeros(3, 4), mask, 1.0
    s.check(torch.equal(t.get_off_policy_mask(*given), GRPOTrainer.get_off_policy_mask(*given)), "another mask")


for _test in ("test_get_off_policy_mask", "test_get_off_policy_mask_padding"):
    SCENARIOS.append(Scenario(_test, "mask of sequences far from the policy", _off_policy_mask))
_trains("test_train_with_off_policy_mask", "`off_policy_mask_threshold`", off_policy_mask_threshold=0.5)
_needs(_LIGER, "test_train_with_off_policy_mask_with_liger", "test_compute_liger_loss_passes_vllm_is_ratio")
_trains("test_train_with_bias_correction_kl", "`use_bias_correction_kl`", beta=0.1, use_bias_correction_kl=True)


@_scenario("`cast_lm_head_to_fp32`, tied and untied")
def test_train_with_cast_lm_head_to_fp32(s: Setting) -> None:
    for kind in ("qwen3", "gemma2"):
        t = s.train(s.trainer(kind, cast_lm_head_to_fp32=True))
        s.check(t.model.lm_head.weight.dtype == torch.float32, "the head is not in fp32")


_trains("test_train_with_static_entropy", "`entropy_coef`", entropy_coef=0.1)


@_scenario("`use_adaptive_entropy`")
def test_train_with_adaptive_entropy(s: Setting) -> None:
    t = s.train(s.trainer(entropy_coef=0.01, use_adaptive_entropy=True, entropy_target=15.0))
    s.check(t.entropy_coef > 0.01, "the coefficient has not moved")


@_scenario("the entropy counts alike for every loss")
def test_entropy_bonus_scale(s: Setting) -> None:
    for loss in ("grpo", "dr_grpo", "dapo", "luspo"):
        level = "sequence" if loss == "luspo" else "token"
        options = dict(importance_sampling_level=level, loss_type=loss, entropy_coef=0.5, max_completion_length=16)
        t = s.train(s.trainer(**options))
        ratios = [
            (e["policy_loss"] - e["loss"]) / e["entropy"]
            for e in t.state.log_history
            if {"policy_loss", "loss", "entropy"} <= e.keys()
        ]
        s.check(ratios and abs(sorted(ratios)[len(ratios) // 2] - 0.5) < 0.15, f"the coefficients are {ratios}")


@_scenario("the adaptive coefficient moves once per optimizer step")
def test_train_with_adaptive_entropy_gradient_accumulation(s: Setting) -> None:
    options = dict(entropy_coef=0.01, use_adaptive_entropy=True, entropy_target=15.0, entropy_coef_delta=0.005)
    t = s.train(s.trainer(gradient_accumulation_steps=2, **options))
    s.check(abs(t.entropy_coef - 0.01 - 0.005 * t.state.global_step) < 1e-6, f"it is {t.entropy_coef}")


@_scenario("entropies have a gradient where they are in the loss")
def test_entropy_bonus_flows_gradients(s: Setting) -> None:
    t, ids = s.trainer(entropy_coef=0.1), torch.arange(8)[None]
    options = dict(logits_to_keep=4, compute_entropy=True)
    _, entropies, _ = t._get_per_token_logps_and_entropies(t.model, ids, torch.ones_like(ids), **options)
    s.check(entropies.requires_grad, "no gradient")


_trains("test_train_with_entropy_filter", "`top_entropy_quantile`", top_entropy_quantile=0.2)

# Sampling -------------------------------------------------------------------------------------------------------------

_needs(
    _VLLM,
    "test_train_vllm_and_peft",
    "test_train_vllm_structured_outputs",
    "test_train_vllm_importance_sampling_correction",
)
_trains(
    "test_train_with_additional_generation_kwargs",
    "`top_p`, `top_k`, `min_p`, `repetition_penalty`",
    **dict(top_p=0.9, top_k=10, min_p=0.01, repetition_penalty=1.1),
)
_needs(_VLLM, "test_train_vllm_with_additional_generation_kwargs")


@_scenario("`multi_objective_aggregation`")
def test_train_normalize_then_sum_aggregation(s: Setting) -> None:
    s.train(s.trainer(reward=[by_length, by_letters], multi_objective_aggregation="normalize_then_sum"))


_each(
    "test_train_scale_rewards",
    "`scale_rewards`: False, group, batch, True, none",
    *(dict(scale_rewards=value) for value in (False, "group", "batch", True, "none")),
)


def _answers(rows: list[str], length: int) -> Callable[..., torch.Tensor]:
    """In place of `generate`: these texts in turn, filled up or cut to this many tokens."""
    words = stand_ins.tokenizer("qwen3")
    ids = [words(row)["input_ids"][:length] for row in rows]
    ids = [row + [words.pad_token_id] * (length - len(row)) for row in ids]

    def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        chosen = [ids[i % len(ids)] for i in range(len(input_ids))]
        return torch.cat([input_ids, torch.tensor(chosen)], dim=1)

    return generate


@_scenario("`mask_truncated_completions`")
def test_train_with_mask_truncated_completions(s: Setting) -> None:
    rows = ["12345678", "abc<|im_end|>", "qwertyu<|im_end|>"]
    t = s.trainer(mask_truncated_completions=True, loss_type="dapo")
    with patch.object(t.model, "generate", _answers(rows, 8)):
        s.train(t)


@_scenario("every completion is cut off: nothing moves")
def test_train_with_mask_truncated_completions_all_masked(s: Setting) -> None:
    t = s.trainer(mask_truncated_completions=True, loss_type="dapo")
    with patch.object(t.model, "generate", _answers(["12345678", "abcdefgh", "qwertyui"], 8)):
        s.train(t, moves=False)


@_scenario("every reward is None: a warning")
def test_warning_raised_all_rewards_none(s: Setting) -> None:
    s.train(s.trainer(reward=not_applicable), moves=None)
    s.check(s.said("All reward functions returned None"), "no warning")


@_scenario("sequence level with a loss that sums tokens: a warning")
def test_warning_raised_sequence_level_with_token_summed_loss(s: Setting) -> None:
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        s.logged.clear()
        options = dict(importance_sampling_level="sequence", loss_type=loss)
        s.watched(functools.partial(s.trainer, reward=zero, **options))
        found = s.said("weights each sequence by its completion length")
        s.check(found == (loss != "grpo"), f"warning with {loss}: {found}")


_trains(
    "test_train_num_generations_larger_than_batch_size",
    "a group over two micro-batches",
    **dict(num_generations=6, gradient_accumulation_steps=2),
)
_trains("test_train_delta_clipping", "`delta`", delta=2.0)
_trains("test_train_multiple_dataloader_workers", "two workers", dataloader_num_workers=2)
_trains(
    "test_train_with_generation_kwargs",
    "beam search by `generation_kwargs`",
    generation_kwargs={"do_sample": True, "top_k": 50, "num_beams": 2, "length_penalty": -0.1},
)


@_scenario("a function that reads `trainer_state`")
def test_train_with_reward_func_accessing_trainer_state(s: Setting) -> None:
    steps = []

    def reward(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        steps.append(trainer_state.global_step)
        return by_letters(completions)

    s.train(s.trainer(reward=reward))
    s.check(steps == [0, 1, 2], f"it read the steps {steps}")


@_scenario("a function that logs a column")
def test_train_reward_func_with_log_extra(s: Setting) -> None:
    def reward(completions: list[str], log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("test_column", [completion[:5] for completion in completions])
        return by_length(completions)

    t = s.train(s.trainer(reward=reward, log_completions=True))
    s.check("test_column" in t._logs["extra"], "the column is missing")


@_scenario("a function that logs a number")
def test_train_reward_func_with_log_metric(s: Setting) -> None:
    def reward(completions: list[str], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("custom_accuracy", 0.75)
        return by_length(completions)

    s.logs(s.train(s.trainer(reward=reward)), "custom_accuracy")


@_scenario("which rows a step gets: several updates per generation, several iterations")
def test_prepare_input_called_with_correct_data(s: Setting) -> None:
    batch = dict(per_device_train_batch_size=6, num_generations=4, gradient_accumulation_steps=3)
    more = dict(steps_per_generation=4, num_iterations=2, shuffle_dataset=False, max_steps=None, num_train_epochs=3)
    t = s.trainer(**batch | more | {"max_steps": -1})
    with patch.object(GRPOTrainer, "training_step", wraps=t.training_step) as step:
        t.train()
    s.check(step.call_count == 48, f"{step.call_count} steps")


_trains(
    "test_train_sequence_importance_sampling",
    "ratios of sequences, two updates per batch",
    **dict(num_iterations=2, importance_sampling_level="sequence"),
)


@_scenario("`chat_template_kwargs`")
def test_train_with_chat_template_kwargs(s: Setting) -> None:
    s.train(s.trainer("qwen3", data="chat", chat_template_kwargs={"enable_thinking": False}))


# Tools and environments -----------------------------------------------------------------------------------------------

_DONE = "Done!<|im_end|>"


def _call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call><|im_end|>'


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a * b


async def multiply_later(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a * b


def _turns(*rows: str, rest: str = _DONE) -> Callable[..., torch.Tensor]:
    """In place of `generate`: the rows for a whole batch, then the rest for those that go on."""
    first, then = _answers(list(rows), 110), _answers([rest], 10)

    def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return (first if len(input_ids) == len(rows) else then)(input_ids)

    return generate


_TOOLS = dict(model="qwen3_moe", data="chat", max_completion_length=400)


@_scenario("a tool and an async one; right and wrong calls")
def test_train_with_tools(s: Setting) -> None:
    for tool in (multiply, multiply_later):
        t = s.trainer(**_TOOLS, tools=[tool])
        right, wrong = _call(tool.__name__, '{"a": 3, "b": 4}'), _call(tool.__name__, '{"a": 3, "c": 4}')
        with patch.object(t.model, "generate", _turns(right, wrong, "I know no tool<|im_end|>")):
            s.train(t)
        frequency = [e["tools/call_frequency"] for e in t.state.log_history if "tools/call_frequency" in e]
        s.check(frequency and abs(frequency[0] - 2 / 3) < 1e-6, f"the share of calls is {frequency}")
        failed = [e["tools/failure_frequency"] for e in t.state.log_history if "tools/failure_frequency" in e]
        s.check(failed and failed[0] == 0.5, f"the share of failures is {failed}")


class Counter:
    """Counts; its reward is the count."""

    def reset(self, **kwargs: Any) -> str | None:
        self.asked = kwargs
        self.count = 0
        return None

    def increment(self, step: int) -> int:
        """Add to the counter.

        Args:
            step: what to add.
        """
        self.count += step
        return self.count


class Scored(Counter):
    def get_reward(self) -> float:
        return float(self.count)


class Echo:
    def reset(self, **kwargs: Any) -> str | None:
        self.asked, self.shouts = kwargs, 0
        return "Echo."

    def shout(self, text: str) -> str:
        """Shout a text.

        Args:
            text: the text.
        """
        self.shouts += 1
        return text.upper()


class Starting(Counter):
    def reset(self, **kwargs: Any) -> str | None:
        super().reset(**kwargs)
        return "Count."


_ROOMS = dict(model="qwen3_moe", max_completion_length=400)


@_scenario("two environments, chosen by a column of the dataset")
def test_train_with_multiple_environments(s: Setting) -> None:
    data = Dataset.from_dict({"environment": ["counter", "echo"] * 8})
    options = dict(per_device_train_batch_size=4, num_generations=2, shuffle_dataset=False)
    rooms = {"counter": Starting, "echo": Echo}
    t = s.trainer(**_ROOMS, reward=by_turns, data=data, environment_factory=rooms, **options)
    rows = [_call("increment", '{"step": 1}'), "No<|im_end|>", _call("shout", '{"text": "hi"}'), _DONE]
    with patch.object(t.model, "generate", _turns(*rows)):
        s.train(t)
    counters, echoes = (t._environment_pool[name] for name in ("counter", "echo"))
    s.check([c.count for c in counters[:2]] == [1, 0], "the counters")
    s.check([e.shouts for e in echoes[:2]] == [1, 0], "the echoes")
    s.check(not any("environment" in e.asked for e in (*counters, *echoes)), "reset got the column")


def by_turns(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@_scenario("an environment that nobody has: refused")
def test_train_with_unknown_environment_raises(s: Setting) -> None:
    data = stand_ins.questions("chat", environment=["unknown"] * 16)
    t = s.trainer(**_ROOMS, reward=by_turns, data=data, environment_factory={"counter": Counter})
    s.refuses(t.train)


_COUNTING = [_call("increment", '{"step": 1}'), _call("decrement", '{"step": 2}'), "I wait<|im_end|>"]


@_scenario("`environment_factory`; right and wrong calls")
def test_train_with_environment_factory(s: Setting) -> None:
    t = s.trainer(**_ROOMS, data="chat", environment_factory=Counter)
    with patch.object(t.model, "generate", _turns(*_COUNTING)):
        s.train(t)
    s.check([e.count for e in t.environments] == [1, 0, 0], "the counters")


@_scenario("an environment that owns its reward")
def test_train_with_environment_owned_reward(s: Setting) -> None:
    t = s.trainer(**_ROOMS, data="chat", reward=None, environment_factory=Scored)
    s.check(t.reward_func_names == ["Scored"], f"the rewards are {t.reward_func_names}")
    names = [tool.__name__ for tool in t.tools]
    s.check("increment" in names and not {"get_reward", "reset"} & set(names), f"the tools are {names}")
    with patch.object(t.model, "generate", _turns(*_COUNTING)):
        s.train(t)
    s.logs(t, "rewards/Scored/mean")


@_scenario("the same beside a function with a weight")
def test_environment_owned_reward_coexists_with_reward_funcs(s: Setting) -> None:
    t = s.trainer(**_ROOMS, data="chat", reward=zero, reward_weights=[0.5], environment_factory=Scored)
    s.check(t.reward_func_names == ["zero", "Scored"], f"the rewards are {t.reward_func_names}")
    s.check(t.reward_weights.tolist() == [0.5, 1.0], f"the weights are {t.reward_weights.tolist()}")


@_scenario("environments with and without a reward")
def test_environment_owned_reward_mixed_environments(s: Setting) -> None:
    data = Dataset.from_dict({"environment": ["scored", "again", "plain"]})
    rooms = {"scored": Scored, "again": Scored, "plain": Counter}
    t = s.trainer(**_ROOMS, reward=zero, data=data, environment_factory=rooms)
    s.check(t.reward_func_names == ["zero", "Scored"], f"the rewards are {t.reward_func_names}")
    pair = [Scored(), Counter()]
    pair[0].reset()
    rewards = t.reward_funcs[-1](environments=pair, prompts=[""] * 2, completions=[""] * 2)
    s.check(rewards == [0.0, None], f"the rewards are {rewards}")


@_scenario("no reward at all: refused")
def test_no_reward_source_raises(s: Setting) -> None:
    s.refuses(lambda: s.trainer("qwen3", None, "chat"))


@_scenario("no dataset: refused")
def test_dataset_required_without_environment(s: Setting) -> None:
    s.refuses(lambda: s.trainer("qwen3", by_length, data=None))


@_scenario("an environment without a dataset needs `max_steps`")
def test_environment_owned_data_requires_max_steps(s: Setting) -> None:
    s.refuses(lambda: s.trainer("qwen3", by_turns, data=None, environment_factory=Starting, max_steps=-1))


@_scenario("several environments need a dataset")
def test_multiple_environments_without_dataset_raises(s: Setting) -> None:
    rooms = {"a": Starting, "b": Echo}
    s.refuses(lambda: s.trainer("qwen3", by_turns, data=None, environment_factory=rooms))


@_scenario("an environment that gives the prompts")
def test_train_with_environment_owned_data(s: Setting) -> None:
    options = dict(max_completion_length=12, max_steps=5, data=None, environment_factory=Starting)
    t = s.trainer("qwen3", by_length, **options)
    rows = [_DONE, "Do" + _DONE, "DoDo" + _DONE]
    with patch.object(t.model, "generate", _answers(rows, 12)):
        s.train(t)


@_scenario("calls that cannot be read are no calls")
def test_train_with_malformed_tool_calls(s: Setting) -> None:
    t = s.trainer(**_TOOLS, tools=[multiply])
    rows = [
        '<tool_call>\n{"arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>',
        '<toolcall>\n{"arguments": {"a": 3, "b": 4}}\n</toolcall><|im_end|>',
        '<tool_call>\n{"arguments": {a: 3, b: 4}}\n</tool_call><|im_end|>',
    ]
    with patch.object(t.model, "generate", _turns(*rows)):
        s.train(t)


# Reward models --------------------------------------------------------------------------------------------------------


def _reward_models() -> list[str]:
    return [stand_ins.saved(seed=1, scores=True), stand_ins.saved("qwen3", seed=2, scores=True)]


@_scenario("two reward models, one tokenizer: refused")
def test_mismatched_reward_processing_classes_length(s: Setting) -> None:
    s.refuses(lambda: s.trainer(reward=_reward_models(), reward_processing_classes=stand_ins.tokenizer()))


@_scenario("two reward models, two tokenizers")
def test_correct_reward_processing_classes_list(s: Setting) -> None:
    both = [stand_ins.tokenizer(), stand_ins.tokenizer("qwen3")]
    t = s.trainer(reward=_reward_models(), reward_processing_classes=both)
    s.check(len(t.reward_processing_classes) == 2, "not two tokenizers")


@_scenario("one reward model, one tokenizer")
def test_single_reward_model_with_single_processing_class(s: Setting) -> None:
    words = stand_ins.tokenizer()
    t = s.trainer(reward_processing_classes=words)
    s.check(t.reward_processing_classes == [words], "another tokenizer")


_needs(
    _VISION,
    "test_train_vlm",
    "test_train_vlm_with_pad_to_multiple_of",
    "test_train_vlm_beta_non_zero",
    "test_train_vlm_peft",
    "test_train_vlm_and_importance_sampling",
    "test_train_vlm_and_liger",
    "test_train_vlm_and_vllm",
    "test_train_vlm_multi_image",
    "test_train_vlm_log_multimodal_false",
    "test_train_with_tools_multimodal_response",
)
_needs(
    _LIGER,
    "test_train_with_liger_grpo_kernel",
    "test_train_with_liger_grpo_kernel_and_peft",
    "test_liger_grpo_kernel_importance_sampling",
)
_needs("a GPU", "test_train_with_transformers_continuous_batching", about="`use_transformers_continuous_batching`")
_needs(_VISION, "test_vlm_training", "test_vlm_processor_vllm_colocate_mode")
_needs(_VLLM, "test_train_vllm")


# TRL's SDPOTrainer ----------------------------------------------------------------------------------------------------


def _sdpo(about: str) -> Callable[[Script], Script]:
    return _scenario(about, of="SDPO")


_PAIR: dict[str, Any] = dict(per_device_train_batch_size=2, num_generations=2, max_steps=1)


def _row(prompt: Any, **columns: Any) -> Dataset:
    return Dataset.from_dict({"prompt": [prompt], **{name: [value] for name, value in columns.items()}})


def _watching(s: Setting, **options: Any) -> tuple[Any, SimpleNamespace]:
    """A trainer, and what its teacher has read: `texts` of the prompts, `batches` as they were optimized."""
    t, seen = s.trainer(**options), SimpleNamespace(texts=[], batches=[])
    plain = t.optimize

    def optimize(model: Any, batch: dict[str, Any]) -> Any:
        seen.batches.append(batch)
        prompts = batch["teacher_prompt_ids"]
        seen.texts += [None if ids is None else t.tokenizer.decode(ids) for ids in prompts]
        return plain(model, batch)

    t.optimize = optimize
    return t, seen


@_sdpo("a model with code of its own, and a hint in every row")
def test_sdpo_trust_remote_code(s: Setting) -> None:
    folder, data = stand_ins.with_own_code(), _row("Solve 2+2.", privileged_context="Example answer: 4.")
    s.refuses(lambda: s.trainer(folder, zero, data))
    s.check(type(s.trainer(folder, zero, data, trust_remote_code=True).model).__name__ == "OwnForCausalLM", "the class")


@_sdpo("arguments by position; `include_environment_feedback`")
def test_train_with_positional_config_argument(s: Setting) -> None:
    from pgpo import PGPOTrainer

    data = _row("Solve 2+2.", privileged_context="Your earlier answer used the wrong format.")
    s.train(PGPOTrainer(stand_ins.saved(), zero, s.config(**_PAIR), data))


@_sdpo("defaults of the vLLM fields")
def test_vllm_config_defaults_match_reference_trainers(s: Setting) -> None:
    args = s.config()
    s.check((args.vllm_mode, args.vllm_model_impl) == ("colocate", "vllm"), f"{args.vllm_mode}, {args.vllm_model_impl}")


@_sdpo("`distillation_mode='topk_logits'`, `distillation_topk=5`, no clip")
def test_sdpo_train(s: Setting) -> None:
    s.train(s.trainer(divergence_top_k=5, importance_clip=None))


@_sdpo("every kind of `eval_dataset`, or none")
def test_sdpo_init_with_eval_dataset(s: Setting) -> None:
    test_init_with_eval_dataset(s)


_needs(f"{_LIGER} and a GPU", "test_liger_loss_matches_non_liger_loss", of="SDPO", about=_LIGER)


@_sdpo("no right completion")
def test_train_without_successful_rollouts(s: Setting) -> None:
    s.train(s.trainer(reward=zero, importance_clip=None), moves=False)


@_sdpo("more updates than generations: probabilities at sampling are kept")
def test_train_populates_old_log_probs_for_distillation_clipping_when_misaligned(s: Setting) -> None:
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=3, steps_per_generation=2)
    t, seen = _watching(s, reward=zero, **options | dict(num_generations=2, max_steps=1))
    s.train(t, moves=None)
    s.check("old_per_token_logps" in seen.batches[0], "no probabilities")


@_sdpo("evaluation groups by `num_generations_eval`")
def test_evaluation_uses_num_generations_eval_for_teacher_grouping(s: Setting) -> None:
    names = ["Alpha prompt", "Beta prompt", "Gamma prompt", "Delta prompt"]
    groups = []

    def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        groups.append(list(prompts))
        return [float(prompt == "Alpha prompt") for prompt in prompts]

    data = Dataset.from_dict({"prompt": names})
    options = dict(num_generations_eval=2, per_device_eval_batch_size=4)
    metrics = s.trainer(reward=reward, data=data, eval_dataset=data, **options).evaluate()
    seen = [prompt for group in groups for prompt in group]
    s.check(seen == [name for name in names for _ in range(2)], f"the prompts are {seen}")
    s.check(metrics["eval_avg_at_k"] == 0.25, f"the metrics are {metrics}")
    s.differs("evaluation samples and grades without a teacher")


@_sdpo("braces in question, solution and hint")
def test_teacher_reprompt_preserves_curly_braces_in_solution_and_feedback(s: Setting) -> None:
    hint = 'Feedback: use {"x": 2} as a check.'
    data = _row("Solve f(x) = {x^2}.", privileged_context=hint)
    options = _PAIR | dict(allow_own_success=True, feedback_mode="always", success_threshold=0.5)
    t, seen = _watching(s, reward=first_right, data=data, **options)
    s.train(t)
    s.check(all("Solve f(x) = {x^2}." in text and hint in text for text in seen.texts), f"it read {seen.texts}")


_ADVICE = [
    {"role": "system", "content": "You are a careful assistant."},
    {"role": "user", "content": "Solve 2+2."},
]


@_sdpo("chat messages with a system's message")
def test_train_with_conversational_prompts_preserves_context(s: Setting) -> None:
    t, seen = _watching(s, reward=first_right, data=_row(_ADVICE), importance_clip=None, success_threshold=0.5, **_PAIR)
    s.train(t)
    (text,) = (text for text in seen.texts if text is not None)
    s.check("careful assistant" in text and "Solve 2+2" in text, f"it read {text}")


@_sdpo("hints alone, no right completion")
def test_train_with_feedback_only_reprompts_teacher(s: Setting) -> None:
    data = _row(_ADVICE, privileged_context="Your earlier answer violated the format requirements.")
    t, seen = _watching(s, reward=zero, data=data, importance_clip=None, **_PAIR)
    s.train(t)
    s.check(all("format requirements" in (text or "") for text in seen.texts), f"it read {seen.texts}")


@_sdpo("equal rewards, and no teacher: a warning for each")
def test_train_warns_when_sdpo_rewards_are_flat(s: Setting) -> None:
    s.train(s.trainer(reward=zero, diagnostics_warning_interval=2, max_steps=3), moves=False)
    s.check(s.said("rewards") and s.said("teacher"), f"it said {s.logged}")
    s.differs("first after 3 steps, not 2")


@_sdpo("the teacher judges the same completion tokens")
def test_train_preserves_teacher_completion_attention_mask(s: Setting) -> None:
    t, seen = _watching(s, reward=first_right, data=_row("Solve 2+2."), success_threshold=0.5, **_PAIR)
    s.train(t)
    s.check([text is None for text in seen.texts] == [True, False], f"it read {seen.texts}")
    tokens = next(e["active_tokens"] for e in t.state.log_history if "active_tokens" in e)
    s.check(tokens == seen.batches[0]["completion_mask"][1].sum(), f"it judged {tokens} tokens")


_needs(
    "a teacher on a server, which pgpo does not have",
    "test_server_loss_finite_with_masked_and_padded_rows",
    of="SDPO",
    about="`use_teacher_server`",
)
