"""`PGPOConfig`: trl.GRPOConfig plus the method's numbers.

The method's defaults are the paper's. Batch and lengths are TRL's, so that a changed import costs no more than before.
`PGPOConfig.paper()` has the paper's.

Sources: PGPO = arXiv 2606.03620; SDPO = arXiv 2601.20802 and the settings of its public code, which PGPO follows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import training_args
from transformers.utils import is_torch_xla_available
from trl import GRPOConfig

from pgpo.alarms import choose_limits
from pgpo.core.viscosity import ExponentialLaw, SmoothExponentialLaw, linear_schedule
from pgpo.errors import UserError
from pgpo.settings.field_types import fit, shown
from pgpo.settings.fields import refuse_unused
from pgpo.settings.rules import PARSED, check_combinations, check_values, may_measure_steps
from pgpo.teacher import ContextTemplates

# The paper's step, 256 completions of 8192 tokens. TRL's defaults are far smaller.
PAPER: dict[str, Any] = {
    "prompts_per_step": 32,
    "num_generations": 8,
    "max_prompt_length": 2048,
    "max_completion_length": 8192,
}
WARMUP_STEPS = 10  # paper
AUTO_RATE = 1e-7  # ours: a tenth of the smallest rate that is usual for post-training with Adam
# TRL's name for a field -> our field, which gets its value.
_SAME = {"num_generations_eval": "eval_k", "per_device_eval_batch_size": "eval_batch_size"}
# TRL's form of a value -> ours.
_TRANSLATED: dict[str, dict[Any, Any]] = {
    "scale_rewards": {True: "group", False: "none"},
    "max_grad_norm": {None: 0.0},
    "top_k": {-1: 0},  # vLLM's value for all tokens
}
# For vLLM; with None transformers uses the model's generation config.
_UNFILTERED: dict[str, dict[Any, Any]] = {"top_k": {None: 0}, "top_p": {None: 1.0}, "repetition_penalty": {None: 1.0}}


# The fields that define the batch, computed once.
_BATCH = (
    *("prompts_per_step", "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("generation_batch_size", "steps_per_generation"),
)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PGPOConfig(GRPOConfig):
    """Configuration of `PGPOTrainer`; a field of trl.GRPOConfig works as in TRL, or is refused when set
    (fields.py).

    Raises:
        UserError: a value outside its range or a combination that cannot work, with the remedy.

    One Trainer step is one optimizer step over `prompts_per_step * num_generations` completions on all ranks;
    the trainer splits it into micro-batches itself. `gradient_accumulation_steps = n` is accepted for compatibility
    and folded: the step gets n times the rows, in micro-batches of `per_device_train_batch_size` rows. Batch and
    lengths default to TRL's; `PGPOConfig.paper()` has the paper's.
    """

    # The method -----------------------------------------------------------------------------------------------
    objective: str = _option("pgpo", "'pgpo' (the paper), or a baseline: 'sdpo' (rho = 1), 'grpo' (TRL's own loss).")
    alpha: float = _option(1.0, "Sensitivity of Eq. 9, per nat; the paper uses 0.5, 1.0, 1.5. 0 is SDPO.")
    rho_max: float = _option(2.0, "Cap of Eq. 9, >= 1. Not given in the paper; 2.0 is ours.")
    rho_min: float = _option(0.0, "Floor of rho in [0, 1]. 0 is the paper's formula, 1 its text (rho >= 1).")
    alpha_end: float | None = _option(None, "Linear schedule of alpha from `alpha` to this value (ours).")
    alpha_steps: int | None = _option(None, "Steps of that schedule; default: the whole run (ours).")
    rho_law: str = _option("exponential", "'exponential' (Eq. 9) or 'smooth' (ours: the cap without its kink).")
    rho_file: str | None = _option(
        None, "JSON list of multipliers, one per step, instead of the law: for controls (ours)."
    )
    information_source: str = _option(
        "same_batch", "Whose I scales a step: 'same_batch' (the paper), 'lagged' or 'cross_fit' (ours)."
    )
    information_weight: float = _option(
        1.0, "lagged: weight of the newest earlier step in the average, in (0, 1]; 1 = the last one alone (ours)."
    )
    information_baseline: str = _option(
        "zero",
        "'zero' (the paper), or 'running_mean': I minus its average over earlier steps, so rho falls as often "
        "as it rises (ours).",
    )
    information_denominator: str = _option("all", "Average I over 'all' samples (Eq. 8) or the 'hinted' ones.")
    modulated_weight_decay: str = _option(
        "scaled", "Decoupled weight decay is 'scaled' by rho with lr, or 'fixed' (divided by rho). Ours."
    )

    # Measured trust (ours) --------------------------------------------------------------------------------------
    trust: str = _option(
        "off",
        "'measured': a step moves the policy no further than the teacher's correction is worth, measured on a few "
        "completions, whatever the learning rate; it multiplies rho. 'off': as far as the learning rate takes it.",
    )
    trust_budget: str = _option(
        "auto",
        "What the correction is worth: the 'divergence' to the teacher, less where its 'information' is small, or "
        "'auto': less where the information has fallen since the first steps. 'fixed': trust_nats (TRPO's bound).",
    )
    trust_nats: float | None = _option(None, "trust_budget='fixed': nats that every step may move the policy.")
    trust_fraction: float = _option(
        0.1,
        "Length of a late step as a share of the way to the teacher, in (0, 2]; the first ones go further, up to .5.",
    )
    trust_form: str = _option(
        "undo",
        "'undo' the rest of a step that goes too far (holds a copy of what trains), or 'lagged': the next step's "
        "learning rate follows, up to ten times as high. 'auto': without that bound. 'kl_adaptive': in factors of 1.5, "
        "as in rsl_rl.",
    )
    trust_agreement: bool = _option(True, "Shorten steps while successive gradients disagree (ours).")
    trust_clock: bool = _option(True, "undo: the averaged teacher follows by the part of a step that was kept (ours).")
    trust_tokens: int = _option(
        4096, "Completion tokens measured per step over all ranks, at most; one random completion per question."
    )
    trust_tolerance: float = _option(
        1.5, "undo: a step may exceed its budget by this factor; nearer costs more forwards."
    )

    adaptive_clip: float | None = _option(
        None,
        "Clip the gradient norm at this multiple of its own running mean, before max_grad_norm; None: do not. Ours: 2.",
    )

    # Self-distillation ----------------------------------------------------------------------------------------
    divergence: str = _option(
        "jsd", "'jsd', 'forward_kl' (teacher||student), 'reverse_kl' or 'sampled_token'. SDPO: jsd."
    )
    divergence_beta: float = _option(0.5, "Weight of the teacher in the JSD mixture. SDPO: 0.5.")
    divergence_top_k: int = _option(100, "Student's top-k tokens; 0 = full vocabulary. SDPO: 100.")
    divergence_tail: bool = _option(True, "With top-k, one bucket for the remaining mass. SDPO: yes.")
    importance_clip: float | None = _option(
        2.0, "Upper clip of exp(logp_now - logp_rollout) on off-policy tokens. SDPO: 2.0; None = no ratio."
    )
    distillation_weight: float = _option(
        1.0,
        "Share w of self-distillation: loss = w * distillation + (1 - w) * TRL's policy loss (`loss_type`). SDPO: 1.0.",
    )
    rehearse_weight: float = _option(
        0.0,
        "Hint rehearsal: weight of KL(teacher || student) where both read the hinted prompt, on a few samples; so an "
        "averaged teacher keeps its skill. 0: none. Ours, a prototype's: 0.05.",
    )
    rehearse_fraction: float = _option(
        1 / 16,
        "Share of the active samples that are rehearsed in a step, at least one sample. Ours, a prototype's: 1/16.",
    )
    sample_weights: str = _option(
        "equal",
        "How much a sample learns from its teacher: 'equal' (SDPO), or by the 'pass_rate' p of its question: "
        "sqrt(p (1 - p)), with mean 1 over the samples that learn (SC-SDPO, arXiv 2605.27765).",
    )
    teacher: str = _option(
        "ema",
        "'ema', 'live' (the student), 'frozen' (the initial model) or 'trust_region'. SDPO: ema. 'periodic': a copy of "
        "the student, made anew every teacher_sync_steps; 'gated': where its reward has risen and its completions have "
        "not grown long since (arXiv 2606.03532).",
    )
    teacher_rate: float = _option(0.05, "EMA rate per step, or the trust region's share of student. SDPO: 0.05.")
    watch_demonstrations: bool = _option(
        False, "Log the teacher's log-probability of demonstrations shown in its own prompt (short forwards). Ours."
    )
    success_threshold: float = _option(1.0, "Reward from which a completion counts as a right solution. SDPO: 1.0.")
    success_reward: str | None = _option(
        None,
        "Reward function that decides what is right: its reward, unweighted, must reach success_threshold. None = the "
        "only one. Or a rule over several: 'all' must reach it, or their weighted 'sum'. Ours.",
    )
    demonstration: str = _option(
        "first",
        "Which right sibling is shown: 'first' (SDPO) or 'random' (seeded). Or, as a control, a 'placebo': a right "
        "completion of another question of the step (does the hint inform, or the context?).",
    )
    allow_own_success: bool = _option(False, "May a right completion be its own demonstration? SDPO: no.")
    feedback_mode: str = _option(
        "without_demonstration",
        "When the teacher reads feedback: 'without_demonstration', 'always' or 'never'. Ours.",
    )
    remove_thinking: bool = _option(True, "Strip <think>..</think> from demonstrations. SDPO: yes.")
    reprompt_template: str | None = _option(None, "Teacher prompt with {prompt}{solution}{feedback}; None = SDPO's.")
    solution_template: str | None = _option(None, "Section around {demonstration}; None = SDPO's.")
    feedback_template: str | None = _option(None, "Section around {feedback}; None = SDPO's.")

    # From TRL's SDPOConfig, under its names ---------------------------------------------------------------------
    use_successful_as_teacher: bool = _option(True, "May right siblings be demonstrations? False: feedback alone.")
    teacher_sync_steps: int = _option(
        1, "The teacher follows at every n-th optimizer step ('ema', 'periodic', 'gated')."
    )
    diagnostics_warning_interval: int = _option(
        10,
        "Steps between warnings of equal rewards or of no teacher; the first comes after 3. 0: none.",
    )
    diagnostics_step_interval: int = _option(
        10,
        "With trust='off', measure every so many steps how far one moves the policy, and warn where it goes further "
        "than the teacher asks. 0: never.",
    )
    diagnostics_flat_tolerance: float = _option(1e-8, "Rewards count as equal up to this standard deviation.")

    # Collapse guard (ours) --------------------------------------------------------------------------------------
    guard: str = _option(
        "off",
        "What an alarm does: 'off', 'warn' (a line in alarms.jsonl), 'freeze_teacher', 'rollback_teacher' (to its "
        "best snapshot, then frozen), 'halve_step', or 'rollback' (student, optimizer and teacher).",
    )
    guard_signals: str | None = _option(
        None,
        "Signals to watch: a list, or names with commas; the first one defines the best step. None = by the objective.",
    )
    guard_limits: str | None = _option(
        None, "JSON file {signal: limit} from healthy runs (alarms.calibrate); None = values of the lab's world."
    )
    guard_warmup: int = _option(5, "Number of first steps that feed the smoothing and raise no alarm.")
    guard_patience: int = _option(1, "Consecutive steps beyond a limit that raise an alarm.")
    guard_max_actions: int = _option(3, "After this many actions, alarms only warn.")

    # Failures within a step (ours) -----------------------------------------------------------------------------
    on_nonfinite: str = _option(
        "stop",
        "nan or inf in rewards, signal or gradient: 'stop' before the update, or 'skip' the update (5 in a row stop).",
    )
    reward_timeout: float | None = _option(
        None,
        "Time limit in seconds for one call of a reward or feedback function; None = no limit. It interrupts Python "
        "and blocking calls, not a computation inside a C library.",
    )
    rank_timeout: float = _option(
        45.0,
        "Several processes: seconds without a heartbeat after which a rank counts as dead and the job ends with "
        "its name; 0 = wait as long as torch does (ddp_timeout).",
    )

    profile: bool = _option(
        False, "Log seconds and peak memory of each part of a step, and a table of them at the end of training. Ours."
    )

    # Batch and lengths ----------------------------------------------------------------------------------------
    prompts_per_step: int = _option(
        None, "Questions per optimizer step, over all ranks; None = from per_device_train_batch_size. Paper: 32."
    )
    per_device_train_batch_size: int | None = _option(
        None, "Completions of one step on one rank; None = prompts_per_step * num_generations / ranks, else TRL's 8."
    )
    micro_batch_size: int | None = _option(None, "Completions per forward, at most; None = no limit. Ours.")
    max_tokens_per_microbatch: int | None = _option(
        16384, "Tokens per forward, at most, with padding; a single row may exceed it. Ours."
    )
    fused_head: bool = _option(
        True, "Compute divergence and entropies from hidden states in chunks; False = slow twin, all logits. Ours."
    )
    share_teacher_prompts: bool = _option(
        True,
        "Prefix sharing: one forward for a teacher prompt of several completions, which attend to its KV cache. Ours.",
    )
    join_siblings: bool | None = _option(
        None,
        "Join completions of one prompt in one row, kept apart by a mask, where that is cheaper; None = on a CPU with "
        "sdpa and without packing. Needs share_teacher_prompts, and sdpa or eager attention. Ours.",
    )
    packing: bool | None = _option(
        None,
        "Pack the rows of a micro-batch into one, without padding; None = with flash or flex attention on CUDA. Ours.",
    )
    sampler: str = _option(
        "auto",
        "Without vLLM: 'auto' samples with a loop that computes a prompt once and drops what has ended, or, where it "
        "cannot serve the model, with transformers' generate(); 'generate' always with that. Ours.",
    )
    max_tokens_per_sampling: int | None = _option(
        None,
        "Tokens sampled at once, prompts and the longest possible completions, at most; a single row may exceed it. "
        "None = a step's completions at once, in evaluation eval_batch_size. Ours.",
    )
    max_prompt_length: int | None = _option(None, "Tokens; a longer prompt is an error; None = no limit. Paper: 2048.")
    max_teacher_prompt_length: int | None = _option(
        10240, "Tokens; demonstration and feedback are shortened to fit, question and instruction never. SDPO: 10240."
    )

    # Held-out evaluation, apart from the training sampling ------------------------------------------------------
    eval_k: int = _option(16, "Completions per held-out question. Paper: 16.")
    eval_temperature: float = _option(0.6, "Paper: 0.6.")
    eval_top_p: float = _option(0.95, "Paper: 0.95.")
    eval_batch_size: int = _option(256, "Sequences generated at once. Ours.")
    per_device_eval_batch_size: int | None = _option(None, "TRL's name for eval_batch_size.")

    # Fields of TRL and transformers whose default is the paper's ----------------------------------------------
    learning_rate: float = _option(
        1e-5, "Paper: AdamW 1e-5, constant. 'auto': found by measured trust, from 1e-7 upwards (trust_form='auto')."
    )
    lr_scheduler_type: str = _option("constant_with_warmup", "Paper: constant after 10 warm-up steps.")
    warmup_steps: float = _option(WARMUP_STEPS, "Paper: 10.")
    weight_decay: float = _option(0.01, "Paper: 0.01.")
    logging_steps: float = _option(1, "One log per optimizer step. Ours.")
    vllm_importance_sampling_mode: str = _option("token_truncate", "SDPO: token-level rollout correction.")
    vllm_importance_sampling_clip_max: float | None = _option(2.0, "SDPO: threshold 2.0.")

    @classmethod
    def paper(cls, output_dir: str | None = None, **overrides: Any) -> PGPOConfig:
        """The paper's setting: the class's defaults with its batch and lengths (`PAPER`); overrides win."""
        return cls(output_dir=output_dir, **yielding(PAPER, overrides) | overrides)

    def __post_init__(self) -> None:
        if self.learning_rate == "auto":
            self._leave_rate_to_trust()
        fit(self)
        self._translate()
        check_values(self)
        self._fold_batch()
        check_combinations(self)
        self._refuse_unused()
        self.precision_note = self._choose_precision()
        if self.chat_template_kwargs is None:  # type: ignore[has-type]
            self.chat_template_kwargs = {"enable_thinking": False}  # paper: thinking off; other templates ignore it
        # TRL wants eval batches in multiples of the group; evaluation does not go through its loop.
        self.per_device_eval_batch_size: int | None = self.num_generations_eval or self.num_generations
        completions: int = self.num_generations or 1
        if completions == 1:
            self.num_generations: Any = _One()
        try:
            super().__post_init__()
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        self.num_generations = completions
        self.per_device_eval_batch_size = self.eval_batch_size
        check_combinations(self, PARSED)
        self._batch = {name: getattr(self, name) for name in _BATCH}

    def check_again(self) -> None:
        """Judge what a script has set on the finished configuration as if it had been given. Raises UserError."""
        for name, value in self._batch.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"{name} was set to {shown(getattr(self, name))} on a finished configuration, whose batch was "
                    f"computed with {value}; give it to PGPOConfig(...) instead."
                )
        if isinstance(self.learning_rate, str):
            raise UserError(
                f"learning_rate was set to {self.learning_rate!r} on a finished configuration; give it to "
                "PGPOConfig(...) instead."
            )
        check_values(self)
        check_combinations(self)
        check_combinations(self, PARSED)
        self._refuse_unused()

    def _leave_rate_to_trust(self) -> None:
        """`learning_rate="auto"` in terms of other fields."""
        if self.trust_form not in ("undo", "auto"):
            raise UserError(
                f"learning_rate is 'auto', which is trust_form='auto', but trust_form is {self.trust_form!r}; leave "
                "one of them out."
            )
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if not schedule.startswith("constant") or self.warmup_steps not in (0, WARMUP_STEPS):
            raise UserError(
                f"learning_rate is 'auto', but lr_scheduler_type is {self.lr_scheduler_type!r} and warmup_steps "
                f"{self.warmup_steps}; a rate that is found has no schedule, leave them out."
            )
        self.learning_rate, self.warmup_steps = AUTO_RATE, 0
        self.trust, self.trust_form = "measured", "auto"

    def _refuse_unused(self) -> None:
        defaults = {f.name: f.default for f in fields(PGPOConfig)}
        refuse_unused(vars(self), defaults, self.distills, self.follows_rewards)

    def _choose_precision(self) -> str | None:
        """TRL's default is bf16, which transformers refuses without a device that has it. A sentence if it is fp32."""
        bf16 = training_args.is_torch_bf16_gpu_available() or is_torch_xla_available()
        if self.bf16 is False or self.fp16 or self.use_cpu or bf16:
            return None
        if self.bf16:
            raise UserError(
                "bf16 is True, but no device here computes in bf16; leave it out for fp32, or set use_cpu for bf16 on "
                "the CPU."
            )
        self.bf16: bool | None = False
        return "no device here computes in bf16, so the matmuls are in fp32."

    def _translate(self) -> None:
        for names in (_TRANSLATED, _UNFILTERED) if self.use_vllm else (_TRANSLATED,):
            for name, forms in names.items():
                if getattr(self, name) in forms:
                    setattr(self, name, forms[getattr(self, name)])
        bounds = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if bounds == (None, None) and self.vllm_importance_sampling_mode.endswith("_truncate"):
            self.vllm_importance_sampling_clip_max = math.inf  # no upper bound; TRL takes None in its other modes only
        if isinstance(self.guard_signals, list):
            self.guard_signals = ", ".join(map(str, self.guard_signals))
        for theirs, ours in _SAME.items():
            value, own = getattr(self, theirs), getattr(self, ours)
            if value is None:
                continue
            if own not in (getattr(PGPOConfig, ours), value):
                raise UserError(f"{theirs} is {value} and {ours} is {own}, which mean the same; give one.")
            setattr(self, ours, value)

    @property
    def distills(self) -> bool:
        """PGPO and SDPO learn from the teacher; GRPO does not."""
        return self.objective != "grpo"

    @property
    def follows_rewards(self) -> bool:
        """Whether TRL's policy loss, on advantages, is all of the loss or a part of it."""
        return not self.distills or self.distillation_weight < 1

    @property
    def watches_steps(self) -> bool:
        """Whether steps are measured though trust is off."""
        return self.trust == "off" and self.diagnostics_step_interval > 0 and may_measure_steps(self)

    def templates(self) -> ContextTemplates:
        """SDPO's, with those that are given in their place."""
        names = ("reprompt", "solution", "feedback")
        given = {name: text for name in names if (text := getattr(self, f"{name}_template")) is not None}
        try:
            return replace(ContextTemplates(), **given)
        except ValueError as error:
            raise UserError(str(error)) from error

    def guarded_signals(self) -> dict[str, float]:
        """{signal: limit} that the guard watches; see alarms.choose_limits."""
        return choose_limits(self.guard_signals, self.guard_limits, self.distills, self.watch_demonstrations)

    def _fold_batch(self) -> None:
        """Make one Trainer step one optimizer step, whichever way the batch was given."""
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        group = self.num_generations or 1
        questions, accumulation = self.prompts_per_step, self.gradient_accumulation_steps
        if self.per_device_train_batch_size is None and questions is not None:
            if accumulation != 1:
                raise UserError(
                    f"gradient_accumulation_steps is {accumulation} without per_device_train_batch_size; give both, or "
                    "give prompts_per_step and micro_batch_size."
                )
            rows = questions * group
            if rows % ranks:
                raise UserError(
                    f"prompts_per_step * num_generations = {rows} completions do not divide evenly by {ranks} ranks; "
                    "change prompts_per_step."
                )
            self.per_device_train_batch_size = rows // ranks
        else:
            self._fold_accumulation(self.per_device_train_batch_size or GRPOConfig.per_device_train_batch_size)
        rows = (self.per_device_train_batch_size or 0) * ranks
        if rows % group:
            raise UserError(
                f"{rows} completions per step are not a multiple of num_generations = {self.num_generations}; every "
                "question needs its whole group in the step."
            )
        self.prompts_per_step = rows // group
        if questions not in (None, self.prompts_per_step):
            raise UserError(
                f"prompts_per_step is {questions}, but per_device_train_batch_size, gradient_accumulation_steps and "
                f"num_generations make {self.prompts_per_step} questions on {ranks} ranks; give one or the other."
            )

    def _fold_accumulation(self, rows: int) -> None:
        accumulation: int = self.gradient_accumulation_steps  # type: ignore[has-type]
        if accumulation > 1:
            if self.micro_batch_size is None:
                self.micro_batch_size = rows
            if self.steps_per_generation is not None:  # TRL counts micro-batches here, we count optimizer steps
                if self.steps_per_generation % accumulation:
                    raise UserError(
                        f"steps_per_generation is {self.steps_per_generation}, no multiple of "
                        f"gradient_accumulation_steps = {accumulation}, so a generation would end "
                        "within an optimizer step; make it one."
                    )
                self.steps_per_generation //= accumulation
            self.gradient_accumulation_steps = 1
        self.per_device_train_batch_size = rows * accumulation

    def law(self, step: int, total_steps: int | None = None) -> ExponentialLaw | SmoothExponentialLaw:
        """The multiplier law at a 0-based optimizer step. Raises ValueError for numbers outside their range."""
        alpha = self.alpha
        if self.alpha_end is not None and (steps := self.alpha_steps or total_steps):
            alpha = linear_schedule(self.alpha, self.alpha_end, steps)(step)
        return self.law_of(alpha)

    def law_of(self, alpha: float) -> ExponentialLaw | SmoothExponentialLaw:
        if self.rho_law == "exponential":
            return ExponentialLaw(alpha, self.rho_max, self.rho_min)
        if self.rho_min != 0:
            raise ValueError(f"rho_min is {self.rho_min!r}, but rho_law='smooth' has no floor; leave it at 0.")
        return SmoothExponentialLaw(alpha, self.rho_max)


class _One(int):
    """1 that is not < 2: TRL requires groups of 2 for its advantages, which self-distillation does not use."""

    def __new__(cls) -> _One:
        return super().__new__(cls, 1)

    def __lt__(self, other: object) -> bool:
        return False


def yielding(preset: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset, without its batch where the user gives one by TRL's fields."""
    in_rows = given.get("per_device_train_batch_size") is not None
    return {name: value for name, value in preset.items() if not (in_rows and name == "prompts_per_step")}
