"""`PGPOConfig`: trl.GRPOConfig plus the method's numbers. Defaults = the paper's setting.

Sources: PGPO = arXiv 2606.03620; SDPO = arXiv 2601.20802 and the settings of its public code, which PGPO follows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from pgpo.core.divergence import KINDS, check_divergence
from pgpo.core.viscosity import ExponentialLaw, SmoothExponentialLaw, linear_schedule
from pgpo.errors import UserError
from pgpo.train.field_types import check_types
from pgpo.train.guard import GUARDS, choose_limits

OBJECTIVES = ("pgpo", "sdpo", "grpo")
TEACHERS = ("ema", "live", "frozen", "trust_region")
DIVERGENCES = (*KINDS, "sampled_token")
# Their update is not linear in lr (averages weighted by lr), or has no step() of its own to scale.
_UNSCALABLE_OPTIMIZERS = ("schedule_free", "lomo", "adalomo", "rprop", "asgd", "layerwise")
# Objective GRPO: losses that are sums or row means, hence exact when a batch is split into micro-batches.
ROW_MEAN_LOSSES = ("grpo", "sapo", "dr_grpo", "luspo")
SPLITTABLE_LOSSES = ("dapo", "cispo", "vespo", *ROW_MEAN_LOSSES)
ON_NONFINITE = ("stop", "skip")

_Rule = tuple[Callable[[float], bool], str]
_NOT_NEGATIVE: _Rule = (lambda v: v >= 0, "it must be 0 or more")
_POSITIVE: _Rule = (lambda v: v > 0, "it must be above 0")
_SHARE: _Rule = (lambda v: 0 <= v <= 1, "it must lie in [0, 1]")
_BELOW_ONE: _Rule = (lambda v: 0 <= v < 1, "it must lie in [0, 1)")
_FROM_ONE: _Rule = (lambda v: v >= 1, "it must be at least 1")
_SEED: _Rule = (lambda v: 0 <= v < 2**32, "a seed must be between 0 and 4294967295")
# What TRL, transformers and torch would find out late, in their own words, or never.
_RULES: dict[str, _Rule] = {
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
    "top_p": (lambda v: 0 < v <= 1, "nucleus sampling needs a share in (0, 1]"),
    "top_k": (lambda v: v >= 0, "it must be 0 (all tokens) or more"),
    "min_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "beta": _NOT_NEGATIVE,
    "epsilon": _NOT_NEGATIVE,
    "epsilon_high": _NOT_NEGATIVE,
    "reward_timeout": (lambda v: v > 0, "it must be seconds above 0, or None for no limit"),
    "rank_timeout": (lambda v: v == 0 or v >= 5, "it must be 5 seconds or more, or 0 for no limit"),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PGPOConfig(GRPOConfig):
    """Configuration of `PGPOTrainer`; every field of trl.GRPOConfig works as in TRL.

    Raises:
        UserError: a value outside its range or a combination that cannot work, with the remedy.

    One Trainer step is one optimizer step over `prompts_per_step * num_generations` completions on all ranks;
    the trainer splits it into micro-batches itself. `gradient_accumulation_steps = n` is accepted for compatibility
    and folded: the step gets n times the rows, in micro-batches of `per_device_train_batch_size` rows.
    """

    # The method -----------------------------------------------------------------------------------------------
    objective: str = _option("pgpo", "'pgpo', or a baseline: 'sdpo' (rho = 1), 'grpo' (TRL's own loss).")
    alpha: float = _option(1.0, "Sensitivity of Eq. 9, per nat; the paper runs 0.5, 1.0, 1.5. 0 is SDPO.")
    rho_max: float = _option(2.0, "Cap of Eq. 9, >= 1. Not given in the paper; 2.0 is ours.")
    rho_min: float = _option(0.0, "Floor of rho in [0, 1]. 0 is the paper's formula, 1 its text (rho >= 1).")
    alpha_end: float | None = _option(None, "Linear schedule of alpha from `alpha` to this value (ours).")
    alpha_steps: int | None = _option(None, "Steps of that schedule; default: the whole run.")
    rho_law: str = _option("exponential", "'exponential' (Eq. 9) or 'smooth' (ours: the cap without its kink).")
    rho_file: str | None = _option(
        None, "JSON list of multipliers, one per step, instead of the law: for controls (shuffled or constant rho)."
    )
    information_source: str = _option(
        "same_batch", "Whose I scales a step: 'same_batch' (the paper), 'lagged' or 'cross_fit' (ours)."
    )
    information_weight: float = _option(
        1.0, "lagged: weight of the newest earlier step in the average, in (0, 1]; 1 = the previous step alone."
    )
    information_baseline: str = _option(
        "zero",
        "'zero' (the paper), or 'running_mean': I minus its average over earlier steps, so rho falls as often "
        "as it rises (ours).",
    )
    information_denominator: str = _option("all", "Average I over 'all' samples (Eq. 8) or the 'hinted' ones.")
    modulated_weight_decay: str = _option(
        "scaled", "Decoupled weight decay is 'scaled' by rho with lr, or 'fixed' (divided by rho)."
    )

    # Self-distillation ----------------------------------------------------------------------------------------
    divergence: str = _option("jsd", "'jsd', 'forward_kl' (teacher||student), 'reverse_kl' or 'sampled_token'.")
    divergence_beta: float = _option(0.5, "Weight of the teacher in the JSD mixture. SDPO: 0.5.")
    divergence_top_k: int = _option(100, "Student's top-k tokens; 0 = full vocabulary. SDPO: 100.")
    divergence_tail: bool = _option(True, "With top-k, one bucket for the remaining mass. SDPO: yes.")
    importance_clip: float | None = _option(
        2.0, "Upper clip of exp(logp_now - logp_rollout) on off-policy tokens. SDPO: 2.0; None = no ratio."
    )
    teacher: str = _option("ema", "'ema', 'live' (the student), 'frozen' (the initial model) or 'trust_region'.")
    teacher_rate: float = _option(0.05, "EMA rate per step, or the trust region's share of student. SDPO: 0.05.")
    watch_demonstrations: bool = _option(
        False, "Log how likely the teacher finds a demonstration that its own prompt shows (a few short forwards)."
    )
    success_threshold: float = _option(1.0, "Reward from which a completion counts as a right solution.")
    success_reward: str | None = _option(
        None,
        "Name of the reward function whose reward (without its weight) is compared with that; None = the only one. Or "
        "a rule over several: 'all' must reach it, or their weighted 'sum'.",
    )
    demonstration: str = _option("first", "Which right sibling is shown: 'first' (SDPO) or 'random' (seeded).")
    allow_own_success: bool = _option(False, "May a right completion be its own demonstration? SDPO: no.")
    feedback_mode: str = _option(
        "without_demonstration", "Use feedback_funcs 'without_demonstration' (only then), 'always' or 'never'."
    )
    remove_thinking: bool = _option(True, "Strip <think>..</think> from demonstrations. SDPO: yes.")
    reprompt_template: str | None = _option(None, "Teacher prompt with {prompt}{solution}{feedback}; None = SDPO's.")
    solution_template: str | None = _option(None, "Section around {demonstration}; None = SDPO's.")
    feedback_template: str | None = _option(None, "Section around {feedback}; None = SDPO's.")

    # Collapse guard (ours) --------------------------------------------------------------------------------------
    guard: str = _option(
        "off",
        "What an alarm does: 'off', 'warn' (a line in alarms.jsonl), 'freeze_teacher', 'rollback_teacher' (to its "
        "best snapshot, then frozen), 'halve_step', or 'rollback' (student, optimizer and teacher).",
    )
    guard_signals: str | None = _option(
        None,
        "Signals to watch, with commas between (or a list); the first one tells the best step. None = those that suit "
        "the objective.",
    )
    guard_limits: str | None = _option(
        None, "JSON file {signal: limit} from healthy runs (guard.calibrate); None = values of the lab's world."
    )
    guard_warmup: int = _option(5, "First steps that only feed the smoothing; no alarm.")
    guard_patience: int = _option(1, "Steps in a row beyond a limit that make an alarm.")
    guard_max_actions: int = _option(3, "After so many actions, alarms only warn.")

    # What may fail in a step (ours) -----------------------------------------------------------------------------
    on_nonfinite: str = _option(
        "stop",
        "nan or inf in rewards, signal or gradient: 'stop' before the update, or 'skip' the update (5 in a row stop).",
    )
    reward_timeout: float | None = _option(
        None,
        "Seconds for one call of a reward or feedback function; None = no limit. It interrupts Python and waiting for "
        "files or sockets, not a computation inside a C library.",
    )
    rank_timeout: float = _option(
        45.0,
        "Several processes: seconds without a sign of life after which a rank counts as dead and the job ends, naming "
        "it; 0 = wait as long as torch does (ddp_timeout).",
    )

    # Batch and lengths ----------------------------------------------------------------------------------------
    prompts_per_step: int = _option(32, "Questions per optimizer step, over all ranks. Paper: 32.")
    per_device_train_batch_size: int | None = _option(
        None, "Completions of one step on one rank; None = prompts_per_step * num_generations / ranks."
    )
    micro_batch_size: int | None = _option(None, "At most this many completions per forward; None = no limit.")
    max_tokens_per_microbatch: int | None = _option(
        16384, "At most so many tokens per forward, padding included; one row may exceed it. Ours."
    )
    fused_head: bool = _option(
        True, "Divergence and entropies from hidden states in chunks; False = the slow twin, with all logits. Ours."
    )
    share_teacher_prompts: bool = _option(
        True, "Run a teacher prompt that several completions share once, and let them attend to its cache. Ours."
    )
    join_siblings: bool | None = _option(
        None,
        "Completions of one prompt behind one another in a row, kept apart by a mask, where that is cheaper; None = on "
        "a CPU with sdpa and without packing. Needs share_teacher_prompts, and sdpa or eager attention. Ours.",
    )
    packing: bool | None = _option(
        None,
        "Rows of a micro-batch behind one another, without padding; None = with flash or flex attention on CUDA. Ours.",
    )
    num_generations: int | None = _option(8, "Completions per question. Paper: 8.")
    max_completion_length: int | None = _option(8192, "Tokens. Paper: 8192.")
    max_prompt_length: int | None = _option(2048, "Tokens; a longer prompt is an error. Paper: 2048.")
    max_teacher_prompt_length: int | None = _option(
        10240, "Tokens; demonstration and feedback are shortened to fit, question and instruction never. SDPO: 10240."
    )

    # Held-out evaluation, apart from the training sampling ------------------------------------------------------
    eval_k: int = _option(16, "Completions per held-out question. Paper: 16.")
    eval_temperature: float = _option(0.6, "Paper: 0.6.")
    eval_top_p: float = _option(0.95, "Paper: 0.95.")
    eval_batch_size: int = _option(256, "Sequences generated at once.")

    # Fields of TRL and transformers whose default is the paper's ----------------------------------------------
    learning_rate: float = _option(1e-5, "Paper: AdamW 1e-5, constant.")
    lr_scheduler_type: str = _option("constant_with_warmup", "Paper: constant after 10 warm-up steps.")
    warmup_steps: float = _option(10, "Paper: 10.")
    weight_decay: float = _option(0.01, "Paper: 0.01.")
    logging_steps: float = _option(1, "One log per optimizer step.")
    vllm_importance_sampling_mode: str = _option("token_truncate", "SDPO: token-level rollout correction,")
    vllm_importance_sampling_clip_max: float | None = _option(2.0, "with threshold 2.0.")

    def __post_init__(self) -> None:
        self._check()
        self._fold_batch()
        if self.chat_template_kwargs is None:  # type: ignore[has-type]
            self.chat_template_kwargs = {"enable_thinking": False}  # paper: thinking off; other templates ignore it
        # TRL wants eval batches in multiples of the group; evaluation does not go through its loop.
        self.per_device_eval_batch_size = self.num_generations or 8
        try:
            super().__post_init__()
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        rows = self.per_device_train_batch_size * self.world_size
        self.prompts_per_step = rows // (self.num_generations or 1)

    def _check(self) -> None:
        check_types(type(self), vars(self))
        for name, (holds, rule) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UserError(f"{name} is {value}; {rule}.")
        if self.join_siblings and not self.share_teacher_prompts:
            raise UserError(
                "join_siblings needs share_teacher_prompts, which is off; set it, or leave join_siblings out."
            )
        _choice("objective", self.objective, OBJECTIVES)
        _choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        _choice("teacher", self.teacher, TEACHERS)
        _choice("divergence", self.divergence, DIVERGENCES)
        _choice("demonstration", self.demonstration, ("first", "random"))
        _choice("feedback_mode", self.feedback_mode, ("without_demonstration", "always", "never"))
        _choice("rho_law", self.rho_law, ("exponential", "smooth"))
        _choice("information_source", self.information_source, ("same_batch", "lagged", "cross_fit"))
        _choice("information_baseline", self.information_baseline, ("zero", "running_mean"))
        _choice("information_denominator", self.information_denominator, ("all", "hinted"))
        _choice("modulated_weight_decay", self.modulated_weight_decay, ("scaled", "fixed"))
        try:
            self.law(0)
            if self.divergence != "sampled_token":
                check_divergence(self.divergence, self.divergence_beta, self.divergence_top_k or None)
            if self.alpha_end is not None:
                self._law(self.alpha_end)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{error} (alpha = {self.alpha!r}, rho_max = {self.rho_max!r}, rho_min = {self.rho_min!r}, "
                f"divergence_beta = {self.divergence_beta!r})"
                if isinstance(error, TypeError)
                else str(error)
            ) from error
        if self.alpha_steps is not None and (self.alpha_end is None or self.alpha_steps < 1):
            raise UserError(f"alpha_steps is {self.alpha_steps}; set it >= 1 and together with alpha_end.")
        self._check_signal()
        self._check_guard()
        if not 0 <= self.teacher_rate <= 1:
            raise UserError(f"teacher_rate is {self.teacher_rate}; a share of the student must lie in [0, 1].")
        if self.num_generations is None or self.num_generations < 2:
            raise UserError(
                f"num_generations is {self.num_generations}; with fewer than 2 completions per question no sibling can "
                "be a demonstration (and no group has an advantage); use 2 or more, the paper takes 8."
            )
        if self.importance_clip is not None and not self.importance_clip >= 1:
            raise UserError(f"importance_clip is {self.importance_clip}; a ratio's upper clip must be >= 1, or None.")
        if not math.isfinite(self.success_threshold):
            raise UserError(f"success_threshold is {self.success_threshold}; it must be a finite reward.")
        for name in ("prompts_per_step", "eval_k", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in (
            "micro_batch_size",
            "max_tokens_per_microbatch",
            "max_prompt_length",
            "max_teacher_prompt_length",
            "max_completion_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1 token or row, or None for no limit.")
        if not (self.eval_temperature >= 0 and math.isfinite(self.eval_temperature)):
            raise UserError(f"eval_temperature is {self.eval_temperature}; it must be 0 (greedy) or a positive number.")
        if not 0 < self.eval_top_p <= 1:
            raise UserError(f"eval_top_p is {self.eval_top_p}; nucleus sampling needs a share in (0, 1].")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; student and teacher logits are divided by it, so > 0.")
        if self.objective == "pgpo" and any(name in str(self.optim).lower() for name in _UNSCALABLE_OPTIMIZERS):
            raise UserError(
                f"optim is {str(self.optim)!r}, whose update is not linear in the learning rate, so rho cannot act; "
                "use adamw_torch, or objective='sdpo'."
            )
        if self.objective == "grpo" and self.loss_type not in SPLITTABLE_LOSSES:
            raise UserError(
                f"loss_type is {self.loss_type!r}, which changes when a batch is split into micro-batches; use one of "
                f"{', '.join(SPLITTABLE_LOSSES)}."
            )
        if self.objective != "grpo":
            for name, off in (
                ("beta", 0.0),
                ("entropy_coef", 0.0),
                ("use_adaptive_entropy", False),
                ("top_entropy_quantile", 1.0),
                ("off_policy_mask_threshold", None),
            ):
                if getattr(self, name) != off:
                    raise UserError(
                        f"{name} is {getattr(self, name)}, which self-distillation does not have; "
                        f"leave it at {off}, or use objective='grpo'."
                    )
            if self.cast_lm_head_to_fp32:
                raise UserError(
                    "cast_lm_head_to_fp32 is True, but self-distillation computes divergence and entropy in fp32 from "
                    "the model's own logits; leave it False."
                )

    def _check_signal(self) -> None:
        """Combinations of information_source, information_baseline and rho_file."""
        if not 0 < self.information_weight <= 1:
            raise UserError(
                f"information_weight is {self.information_weight}; the newest step's share must lie in (0, 1]."
            )
        if self.information_weight != 1 and self.information_source != "lagged":
            raise UserError(
                f"information_weight is {self.information_weight}, but information_source is "
                f"{self.information_source!r}; only 'lagged' averages over earlier steps."
            )
        if self.information_source == "cross_fit" and self.prompts_per_step == 1:
            raise UserError(
                "information_source='cross_fit' splits a step's questions into two halves, but prompts_per_step is 1; "
                "use 2 or more, or 'lagged'."
            )
        if self.rho_file is not None and (self.objective, self.information_source) != ("pgpo", "same_batch"):
            raise UserError(
                f"rho_file replaces the law of objective='pgpo' with information_source='same_batch'; here they are "
                f"{self.objective!r} and {self.information_source!r}."
            )

    def _check_guard(self) -> None:
        _choice("guard", self.guard, GUARDS)
        for name, least in (("guard_warmup", 0), ("guard_patience", 1), ("guard_max_actions", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.guard == "off":
            for name in ("guard_signals", "guard_limits"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name} is {getattr(self, name)!r}, but guard is 'off'; set guard, e.g. 'warn'.")
            return
        self.guarded_signals()
        if self.guard.endswith("_teacher") and (self.objective == "grpo" or self.teacher != "ema"):
            teacher = "objective='grpo' has none" if self.objective == "grpo" else f"teacher={self.teacher!r} has none"
            raise UserError(
                f"guard={self.guard!r} acts on a teacher that follows the student, and {teacher}; use 'halve_step', "
                "'rollback' or 'warn'."
            )
        unscalable = any(name in str(self.optim).lower() for name in _UNSCALABLE_OPTIMIZERS)
        if self.guard in ("halve_step", "rollback") and unscalable:
            raise UserError(
                f"guard={self.guard!r} halves steps, but the update of optim={str(self.optim)!r} is not linear in the "
                "learning rate; use adamw_torch, or another guard."
            )

    def guarded_signals(self) -> dict[str, float]:
        """{signal: limit} that the guard watches; see guard.choose_limits."""
        return choose_limits(self.guard_signals, self.guard_limits, self.objective != "grpo", self.watch_demonstrations)

    def _fold_batch(self) -> None:
        """Make one Trainer step one optimizer step, whichever way the batch was given."""
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        accumulation = self.gradient_accumulation_steps  # type: ignore[has-type]
        if self.per_device_train_batch_size is None:
            if accumulation != 1:
                raise UserError(
                    f"gradient_accumulation_steps is {accumulation} without per_device_train_batch_size; give both, or "
                    "give prompts_per_step and micro_batch_size."
                )
            rows = self.prompts_per_step * (self.num_generations or 1)
            if rows % ranks:
                raise UserError(
                    f"prompts_per_step * num_generations = {rows} completions do not divide evenly by {ranks} ranks; "
                    "change prompts_per_step."
                )
            self.per_device_train_batch_size = rows // ranks
        elif accumulation > 1:
            if self.micro_batch_size is None:
                self.micro_batch_size = self.per_device_train_batch_size
            if self.steps_per_generation is not None:  # TRL counts micro-batches here, we count optimizer steps
                if self.steps_per_generation % accumulation:
                    raise UserError(
                        f"steps_per_generation is {self.steps_per_generation}, no multiple of "
                        f"gradient_accumulation_steps = {accumulation}, so a generation would end "
                        "within an optimizer step; make it one."
                    )
                self.steps_per_generation //= accumulation
            self.per_device_train_batch_size *= accumulation
            self.gradient_accumulation_steps = 1
        rows = self.per_device_train_batch_size * ranks
        if rows % (self.num_generations or 1):
            raise UserError(
                f"{rows} completions per step are no multiple of num_generations = {self.num_generations}; every "
                "question needs its whole group in the step."
            )

    def law(self, step: int, total_steps: int | None = None) -> ExponentialLaw | SmoothExponentialLaw:
        """The multiplier law at a 0-based optimizer step. Raises ValueError for numbers outside their range."""
        alpha = self.alpha
        if self.alpha_end is not None and (steps := self.alpha_steps or total_steps):
            alpha = linear_schedule(self.alpha, self.alpha_end, steps)(step)
        return self._law(alpha)

    def _law(self, alpha: float) -> ExponentialLaw | SmoothExponentialLaw:
        if self.rho_law == "exponential":
            return ExponentialLaw(alpha, self.rho_max, self.rho_min)
        if self.rho_min != 0:
            raise ValueError(f"rho_min is {self.rho_min!r}, but rho_law='smooth' has no floor; leave it at 0.")
        return SmoothExponentialLaw(alpha, self.rho_max)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {value!r}; choose one of {', '.join(allowed)}.")
