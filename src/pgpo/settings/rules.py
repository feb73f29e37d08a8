"""What the values of a PGPOConfig must fulfil, as tables: ranges, choices, and combinations that cannot work.

The first rule that is broken becomes one sentence. Values that TRL, transformers or torch would reject late, or never,
are checked here too. Fields that would do nothing are in fields.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from pgpo.alarms import GUARDS
from pgpo.core.divergence import KINDS, check_divergence
from pgpo.core.trust import BUDGETS
from pgpo.errors import UserError
from pgpo.teacher.contexts import CHOICES as DEMONSTRATIONS
from pgpo.teacher.weights import FOLLOWERS
from pgpo.teacher.weights import KINDS as TEACHERS

LOSSES = ("grpo", "sapo", "dr_grpo", "luspo", "dapo", "cispo", "vespo", "bnpo")  # of TRL's GRPO
# Their update is not linear in lr (averages weighted by lr), or has no step() of its own to scale.
_UNSCALABLE_OPTIMIZERS = ("schedule_free", "lomo", "adalomo", "rprop", "asgd", "layerwise")

Range = tuple[Callable[[Any], bool], str]
_NOT_NEGATIVE: Range = (lambda v: v >= 0, "it must be 0 or more")
_POSITIVE: Range = (lambda v: v > 0, "it must be above 0")
_SHARE: Range = (lambda v: 0 <= v <= 1, "it must lie in [0, 1]")
_BELOW_ONE: Range = (lambda v: 0 <= v < 1, "it must lie in [0, 1)")
_FROM_ZERO: Range = (lambda v: v >= 0, "it must be at least 0")
_FROM_ONE: Range = (lambda v: v >= 1, "it must be at least 1")
_LIMIT: Range = (lambda v: v >= 1, "it must be at least 1 token or row, or None for no limit")
_NUCLEUS: Range = (lambda v: 0 < v <= 1, "nucleus sampling needs a share in (0, 1]")
_SEED: Range = (lambda v: 0 <= v < 2**32, "a seed must be between 0 and 4294967295")
# None passes: it is a value of the fields that may be None.
RANGES: dict[str, Range] = {
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": (lambda v: v >= 0, "it must be 0 (no clipping) or more"),
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "adam_epsilon": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda v: v == -1 or v >= 1, "it must be at least 1, or -1 to count in num_train_epochs"),
    "gradient_accumulation_steps": _FROM_ONE,
    "per_device_train_batch_size": _FROM_ONE,
    "steps_per_generation": _FROM_ONE,
    "num_iterations": _FROM_ONE,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "seed": _SEED,
    "data_seed": _SEED,
    "torch_empty_cache_steps": _FROM_ONE,
    "temperature": (lambda v: v > 0, "student and teacher logits are divided by it, so > 0"),
    "top_p": _NUCLEUS,
    "top_k": (lambda v: v >= 0, "it must be 0 (all tokens) or more"),
    "min_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "beta": _NOT_NEGATIVE,
    "epsilon": _NOT_NEGATIVE,
    "epsilon_high": _NOT_NEGATIVE,
    "reward_timeout": (lambda v: v > 0, "it must be seconds above 0, or None for no limit"),
    "rank_timeout": (lambda v: v == 0 or v >= 5, "it must be 5 seconds or more, or 0 for no limit"),
    "information_weight": (lambda v: 0 < v <= 1, "the newest step's share must lie in (0, 1]"),
    "teacher_rate": (lambda v: 0 <= v <= 1, "a share of the student must lie in [0, 1]"),
    "trust_fraction": (lambda v: 0 < v <= 2, "it must lie in (0, 2]: no longer step brings the student nearer"),
    "trust_nats": (lambda v: 0 < v < math.inf, "it must be a number of nats > 0"),
    "adaptive_clip": (lambda v: 1 <= v < math.inf, "a limit below the mean norm (1) would shrink every gradient"),
    "trust_tokens": _FROM_ONE,
    "trust_tolerance": (lambda v: v > 1, "it must be above 1 (1.5 accepts a step of 1.5 times its budget)"),
    "num_generations": _FROM_ONE,
    "distillation_weight": (lambda v: 0 <= v <= 1, "a share of the loss must lie in [0, 1]"),
    "rehearse_weight": (lambda v: 0 <= v < math.inf, "it must be 0 (no rehearsal) or a positive number"),
    "rehearse_fraction": (lambda v: 0 < v <= 1, "it must lie in (0, 1]"),
    "teacher_sync_steps": _FROM_ONE,
    "diagnostics_warning_interval": _NOT_NEGATIVE,
    "diagnostics_step_interval": _FROM_ZERO,
    "diagnostics_flat_tolerance": _NOT_NEGATIVE,
    "importance_clip": (lambda v: v >= 1, "a ratio's upper clip must be >= 1, or None"),
    "success_threshold": (math.isfinite, "it must be a finite reward"),
    "prompts_per_step": _FROM_ONE,
    "eval_k": _FROM_ONE,
    "eval_batch_size": _FROM_ONE,
    "micro_batch_size": _LIMIT,
    "max_tokens_per_microbatch": _LIMIT,
    "max_tokens_per_sampling": _LIMIT,
    "max_prompt_length": _LIMIT,
    "max_teacher_prompt_length": _LIMIT,
    "max_completion_length": _LIMIT,
    "eval_temperature": (lambda v: v >= 0, "it must be 0 (greedy) or a positive number"),
    "eval_top_p": _NUCLEUS,
    "guard_warmup": _FROM_ZERO,
    "guard_patience": _FROM_ONE,
    "guard_max_actions": _FROM_ONE,
}

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("pgpo", "sdpo", "grpo"),
    "on_nonfinite": ("stop", "skip"),
    "sample_weights": ("equal", "pass_rate"),
    "teacher": TEACHERS,
    "divergence": (*KINDS, "sampled_token"),
    "demonstration": DEMONSTRATIONS,
    "feedback_mode": ("without_demonstration", "always", "never"),
    "rho_law": ("exponential", "smooth"),
    "information_source": ("same_batch", "lagged", "cross_fit"),
    "information_baseline": ("zero", "running_mean"),
    "information_denominator": ("all", "hinted"),
    "modulated_weight_decay": ("scaled", "fixed"),
    "sampler": ("auto", "generate"),
    "trust": ("off", "measured"),
    "trust_budget": (*BUDGETS, "fixed"),
    "trust_form": ("undo", "lagged", "auto", "kl_adaptive"),
    "guard": GUARDS,
    # TRL's, which TRL checks in the first step only
    "loss_type": LOSSES,
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}


def _scalable(c: Any) -> bool:
    return not any(name in str(c.optim).lower() for name in _UNSCALABLE_OPTIMIZERS)


def _learns_alone(c: Any) -> bool:
    """Whether one completion per question can have a teacher; whether there is feedback, only the trainer knows."""
    return c.distills and (c.feedback_mode != "never" or c.allow_own_success)


def may_measure_steps(c: Any) -> bool:
    """Whether it can be told how far a step moves the policy, against how far the teacher asks."""
    return c.distills and c.divergence != "sampled_token" and _scalable(c)


def _set(c: Any, name: str) -> bool:
    """Whether a field of ours has another value than its default."""
    return bool(getattr(c, name) != getattr(type(c), name))


def _named(value: Any, key: str) -> Any:
    """An entry of a field that may hold a mapping."""
    return value.get(key) if isinstance(value, Mapping) else None


# (fields, when they act, what to do); a field that is set where it does not act is refused. Left out, since a recipe is
# run with several objectives: alpha; and with 'grpo' teacher_rate and the divergence's numbers.
_ACTS: tuple[tuple[str, Callable[[Any], object], str], ...] = (
    (
        "guard_patience guard_warmup guard_max_actions",
        lambda c: c.guard != "off",
        "guard is 'off'; set it, e.g. 'warn'",
    ),
    (
        "teacher_rate",
        lambda c: not c.distills or c.teacher in ("ema", "trust_region"),
        "teacher={c.teacher!r} has no rate; use 'ema', or leave it out",
    ),
    ("rehearse_fraction", lambda c: c.rehearse_weight or not c.distills, "rehearse_weight is 0; set it, e.g. 0.05"),
    (
        "rehearse_weight",
        lambda c: c.teacher != "live",
        "teacher='live' is the student, from which it cannot differ; use 'ema'",
    ),
    ("divergence_tail", lambda c: c.divergence_top_k, "divergence_top_k is 0, the whole vocabulary; leave it out"),
    (
        "divergence_top_k divergence_tail divergence_beta",
        lambda c: c.divergence != "sampled_token",
        "divergence='sampled_token' reads the sampled token alone; leave it out",
    ),
    (
        "rehearse_weight sample_weights",
        lambda c: c.distillation_weight > 0 or not c.distills,
        "distillation_weight is 0, and it is a part of the distillation; raise that, or leave it out",
    ),
    (
        "demonstration allow_own_success",
        lambda c: c.use_successful_as_teacher,
        "use_successful_as_teacher is False; leave it out",
    ),
    (
        "teacher divergence demonstration feedback_mode importance_clip allow_own_success remove_thinking "
        "rehearse_weight rehearse_fraction sample_weights",
        lambda c: c.distills,
        "objective='grpo' has no teacher; leave it out",
    ),
    (
        "rho_min rho_max rho_law information_source information_baseline alpha_end",
        lambda c: c.objective == "pgpo",
        "objective={c.objective!r} has no multiplier; use 'pgpo', or leave it out",
    ),
)

# (what cannot work, the sentence); {c.x} is a field's value
Combination = tuple[Callable[[Any], object], str]
_TRUST_FIELDS = (
    *("trust_budget", "trust_nats", "trust_fraction", "trust_form", "trust_agreement", "trust_clock"),
    *("trust_tokens", "trust_tolerance"),
)
COMBINATIONS: tuple[Combination, ...] = (
    (
        lambda c: c.num_generations is None,
        "num_generations is None; give the completions per question, the paper takes 8.",
    ),
    (
        lambda c: c.join_siblings and not c.share_teacher_prompts,
        "join_siblings needs share_teacher_prompts, which is off; set it, or leave join_siblings out.",
    ),
    (
        lambda c: c.alpha_steps is not None and (c.alpha_end is None or c.alpha_steps < 1),
        "alpha_steps is {c.alpha_steps}; set it >= 1 and together with alpha_end.",
    ),
    (
        lambda c: c.information_weight != 1 and c.information_source != "lagged",
        "information_weight is {c.information_weight}, but information_source is {c.information_source!r}; only "
        "'lagged' averages over earlier steps.",
    ),
    (
        lambda c: c.information_source == "cross_fit" and c.prompts_per_step == 1,
        "information_source='cross_fit' splits a step's questions into two halves, but prompts_per_step is 1; use 2 "
        "or more, or 'lagged'.",
    ),
    (
        lambda c: c.demonstration == "placebo" and not (c.distills and c.use_successful_as_teacher),
        "demonstration='placebo' replaces the demonstrations of the teacher, and here there are none; leave it out.",
    ),
    (
        lambda c: c.demonstration == "placebo" and c.prompts_per_step == 1,
        "demonstration='placebo' shows a solution of another question of the step, but prompts_per_step is 1; use 2 or "
        "more.",
    ),
    (
        lambda c: c.demonstration == "placebo" and c.information_source == "cross_fit",
        "demonstration='placebo' shows solutions across the two halves of information_source='cross_fit', which must "
        "not know of each other; use 'same_batch' or 'lagged'.",
    ),
    (
        lambda c: c.rho_file is not None and (c.objective, c.information_source) != ("pgpo", "same_batch"),
        "rho_file replaces the law of objective='pgpo' with information_source='same_batch'; here they are "
        "{c.objective!r} and {c.information_source!r}.",
    ),
    (
        lambda c: c.guard == "off" and c.guard_signals is not None,
        "guard_signals is {c.guard_signals!r}, but guard is 'off'; set guard, e.g. 'warn'.",
    ),
    (
        lambda c: c.guard == "off" and c.guard_limits is not None,
        "guard_limits is {c.guard_limits!r}, but guard is 'off'; set guard, e.g. 'warn'.",
    ),
    (
        lambda c: c.guard != "off" and not c.guarded_signals(),
        "guard is {c.guard!r}, but there is no signal to watch.",
    ),
    (
        lambda c: c.guard.endswith("_teacher") and c.objective == "grpo",
        "guard={c.guard!r} acts on a teacher that follows the student, and objective='grpo' has none; use "
        "'halve_step', 'rollback' or 'warn'.",
    ),
    (
        lambda c: c.guard.endswith("_teacher") and c.teacher not in FOLLOWERS,
        "guard={c.guard!r} acts on a teacher that follows the student, and teacher={c.teacher!r} has none; use "
        "'halve_step', 'rollback' or 'warn'.",
    ),
    (
        lambda c: c.guard in ("halve_step", "rollback") and not _scalable(c),
        "guard={c.guard!r} halves steps, but the update of optim={optim!r} is not linear in the learning rate; use "
        "adamw_torch, or another guard.",
    ),
    (
        lambda c: c.objective == "pgpo" and not _scalable(c),
        "optim is {optim!r}, whose update is not linear in the learning rate, so rho cannot act; use adamw_torch, or "
        "objective='sdpo'.",
    ),
    *(
        (
            lambda c, name=name, acts=acts: _set(c, name) and not acts(c),
            f"{name} is {{c.{name}!r}}, but {remedy}.",
        )
        for names, acts, remedy in _ACTS
        for name in names.split()
    ),
    *(
        (
            lambda c, name=name: c.trust == "off" and _set(c, name),
            f"{name} is {{c.{name}!r}}, but trust is 'off'; set trust='measured', or leave it out.",
        )
        for name in _TRUST_FIELDS
    ),
    (
        lambda c: c.trust != "off" and not c.distills,
        "trust={c.trust!r} compares a step with what the teacher corrects, and objective='grpo' has no teacher; use "
        "'sdpo' or 'pgpo', or leave trust at 'off'.",
    ),
    (
        lambda c: c.trust != "off" and c.divergence == "sampled_token",
        "trust={c.trust!r} needs the divergence to the teacher in nats, which divergence='sampled_token' does not "
        "give; use 'jsd', 'forward_kl' or 'reverse_kl'.",
    ),
    (
        lambda c: c.trust != "off" and not _scalable(c),
        "trust={c.trust!r} changes the length of steps, but optim={optim!r} keeps weights of its own or has a rate "
        "that does not act in proportion; use adamw_torch.",
    ),
    *(
        (
            lambda c, name=name: c.trust_form != "undo" and _set(c, name),
            f"{name} is {{c.{name}}}, but trust_form={{c.trust_form!r}} leaves every step as it is; use 'undo', or "
            "leave it out.",
        )
        for name in ("trust_tolerance", "trust_clock")
    ),
    (
        lambda c: _set(c, "diagnostics_step_interval") and c.trust != "off",
        "diagnostics_step_interval is {c.diagnostics_step_interval}, but trust={c.trust!r} measures every step; leave "
        "it out.",
    ),
    (
        lambda c: _set(c, "diagnostics_step_interval") and c.diagnostics_step_interval and not may_measure_steps(c),
        "diagnostics_step_interval is {c.diagnostics_step_interval}, but steps are measured against a teacher's "
        "divergence in nats, with an optimizer that holds no weights of its own; leave it out.",
    ),
    (
        lambda c: (c.trust_budget == "fixed") != (c.trust_nats is not None),
        "trust_nats is {c.trust_nats} and trust_budget is {c.trust_budget!r}; give both, a number and 'fixed', or "
        "neither.",
    ),
    *(
        (
            lambda c, name=name: c.trust_budget == "fixed" and _set(c, name),
            f"{name} is {{c.{name}}}, but trust_budget='fixed' looks at no batch; leave it out.",
        )
        for name in ("trust_fraction", "trust_agreement")
    ),
    (
        lambda c: c.trust_clock is False and c.teacher != "ema",
        "trust_clock is off, but teacher={c.teacher!r} averages nothing; leave it out.",
    ),
    (
        lambda c: c.adaptive_clip is not None and c.fp16,
        "adaptive_clip is {c.adaptive_clip}, but fp16 scales gradients by a factor that changes; use bf16, or leave it "
        "out.",
    ),
    *(
        (
            lambda c, name=name: c.use_vllm and _set(c, name),
            f"{name} is {{c.{name}!r}}, but use_vllm is set, so that vLLM samples; leave it out.",
        )
        for name in ("sampler", "max_tokens_per_sampling")
    ),
    (
        lambda c: c.sampler == "generate" and c.max_tokens_per_sampling is not None,
        "max_tokens_per_sampling is {c.max_tokens_per_sampling}, but sampler='generate' takes all at once; use 'auto', "
        "or leave it out.",
    ),
    (
        lambda c: c.num_generations == 1 and not _learns_alone(c),
        "num_generations is 1; with fewer than 2 completions per question no sibling can be a demonstration (and no "
        "group has an advantage); use 2 or more, the paper takes 8.",
    ),
    (
        lambda c: not c.use_successful_as_teacher and c.feedback_mode == "never",
        "use_successful_as_teacher is False and feedback_mode is 'never', so that no sample has a teacher; change one "
        "of them.",
    ),
    (
        lambda c: c.teacher_sync_steps != 1 and c.teacher not in FOLLOWERS,
        "teacher_sync_steps is {c.teacher_sync_steps}, but teacher={c.teacher!r} follows no student; leave it at 1, or "
        "use teacher='ema'.",
    ),
    (
        lambda c: c.distills and c.teacher == "periodic" and c.teacher_sync_steps == 1,
        "teacher='periodic' copies the student every teacher_sync_steps = 1 step, which is teacher='live'; set the "
        "steps between two copies, e.g. 30.",
    ),
    (
        lambda c: c.distillation_weight != 1 and not c.distills,
        "distillation_weight is {c.distillation_weight}, but objective='grpo' has no distillation; leave it at 1, or "
        "use 'sdpo' or 'pgpo'.",
    ),
    (
        lambda c: c.distillation_weight != 1 and c.information_source == "cross_fit",
        "distillation_weight is {c.distillation_weight}, but information_source='cross_fit' scales each half of the "
        "distillation by itself, and the policy loss has no halves; use 'same_batch' or 'lagged'.",
    ),
    (
        lambda c: c.sample_weights == "pass_rate" and c.num_generations == 1,
        "sample_weights is 'pass_rate', but num_generations is 1, so that every question is passed by all or by none; "
        "use 2 or more, the paper takes 8.",
    ),
    (
        lambda c: c.rehearse_weight and c.information_source == "cross_fit",
        "rehearse_weight is {c.rehearse_weight}, but information_source='cross_fit' scales each half of the "
        "distillation by itself, and rehearsal has no halves; use 'same_batch' or 'lagged'.",
    ),
    (
        lambda c: c.reward_weights is not None and not all(isinstance(w, Real) for w in c.reward_weights),
        "reward_weights is {c.reward_weights!r}; it must be a list of numbers.",
    ),
)

# Of fields that TRL reads from JSON and files, after it has done so.
PARSED: tuple[Combination, ...] = (
    (
        lambda c: _named(c.model_init_kwargs, "torch_dtype") is not None,
        "model_init_kwargs names torch_dtype, which is not read, so that the weights would be fp32; name it dtype.",
    ),
    (
        lambda c: c.objective != "grpo" and _named(c.generation_kwargs, "temperature") is not None,
        "generation_kwargs sets temperature, but student and teacher logits are divided by the field temperature; set "
        "that.",
    ),
    (
        lambda c: getattr(c.accelerator_config, "split_batches", False),
        "accelerator_config sets split_batches, so that a step would have fewer rows than configured; leave it off.",
    ),
    (
        lambda c: (
            _named(getattr(c.accelerator_config, "gradient_accumulation_kwargs", None), "num_steps") not in (None, 1)
        ),
        "accelerator_config sets gradient_accumulation_kwargs.num_steps; set gradient_accumulation_steps.",
    ),
)


def check_values(c: Any) -> None:
    """Each value by itself, and the numbers of law and divergence. Raises UserError."""
    for name, (holds, text) in RANGES.items():
        value = getattr(c, name)
        if value is not None and not holds(value):
            raise UserError(f"{name} is {value}; {text}.")
    for name, allowed in CHOICES.items():
        if getattr(c, name) not in allowed:
            raise UserError(f"{name} is {getattr(c, name)!r}; choose one of {', '.join(allowed)}.")
    try:
        c.law(0)
        if c.divergence != "sampled_token":
            check_divergence(c.divergence, c.divergence_beta, c.divergence_top_k or None)
        if c.alpha_end is not None:
            c.law_of(c.alpha_end)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_combinations(c: Any, rows: tuple[Combination, ...] = COMBINATIONS) -> None:
    """Values that cannot work together; the batch is folded by now. Raises UserError."""
    for broken, sentence in rows:
        if broken(c):
            raise UserError(sentence.format(c=c, optim=str(c.optim)))
