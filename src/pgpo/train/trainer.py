"""`PGPOTrainer`: trl.GRPOTrainer with self-distillation and a step scaled by its own information.

One optimizer step, top-down:

    rollouts, rewards                        TRL (seam/step.py)
    annotate    teacher contexts             demonstration = a right sibling, and/or feedback on the own attempt
    optimize    micro-batches                active samples only, sorted by length, within the token budget
                student and teacher hidden states on the same completion tokens (forward/)
                divergence / GLOBAL number of active tokens -> backward;   entropies -> InformationMeter
                I_k over all micro-batches and ranks -> rho_k -> armed for the optimizer's step
    on_optimizer_step                        the teacher follows

Departures from lasgroup/SDPO and from TRL's SDPOTrainer are listed in docs/METHOD.md.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import TrainerCallback

from pgpo.core import (
    CrossFit,
    HeadOutput,
    Information,
    InformationMeter,
    dense_distillation_head,
    distillation_of_logits,
    fused_distillation_head,
)
from pgpo.errors import UserError
from pgpo.evaluate.avg_at_k import Record
from pgpo.forward import batching
from pgpo.forward.batching import Bundle, Limits
from pgpo.forward.open_model import causal_lm, head_error, head_problem, joins, open_forward, release_forward
from pgpo.forward.passes import Passes, States
from pgpo.forward.routers import Load
from pgpo.teacher import ContextTemplates, Teacher, build_contexts
from pgpo.teacher.weights import release_adapter, reshard
from pgpo.train import zero
from pgpo.train.config import PGPOConfig
from pgpo.train.field_types import file_name
from pgpo.train.gate import torch_optimizer
from pgpo.train.guard import GuardActions
from pgpo.train.held_out import HeldOut
from pgpo.train.host import Host
from pgpo.train.multiplier import StepMultiplier
from pgpo.train.problems import as_list, check_inputs, check_model, check_rows
from pgpo.train.seam import Batch, Prompt, Rollout, Scores, SeamTrainer
from pgpo.train.sharding import keep_precision, shard
from pgpo.train.signals import CollapseGuard
from pgpo.train.user_functions import CONTEXT_COLUMN

TEACHER_FILE = "pgpo_teacher.safetensors"
STATE_FILE = "pgpo_state.json"
_LOGGER = logging.getLogger(__name__)
_HELD = 8  # ours: teacher states are held for so many micro-batches of tokens; 2 H bytes each in half precision
_CHECKED_TOKENS = 32  # ours
_HEAD_TOLERANCE = 0.02  # ours: of the largest logit; bf16 rounds to 0.004, another formula misses by far more
_DEGENERATE = 3  # ours: steps in a row without signal after which a warning says so
_DEMONSTRATION_ROWS = 8  # ours: at most so many demonstrations are watched per rank and step
_TRL_METRICS = {"completion_length": "completions/mean_length", "clipped_share": "completions/clipped_ratio"}


@dataclass(frozen=True)
class Row:
    """One active completion, without padding.

    Its T tokens all stand in the context; loss and statistics take the N of them that the model wrote.
    """

    prompt: list[int]
    teacher_prompt: list[int]
    completion: list[int]  # [T]
    index: int = 0  # place in this rank's rollout
    half: int = 0  # half-batch of its question, 0 or 1 (cross-fitting)
    solved: bool = True
    rollout_logprobs: Tensor | None = None  # [N] log-probs at rollout time, where the tokens are off-policy
    weight: Tensor | None = None  # [N] or [1] vLLM / trainer mismatch correction
    own: list[int] | None = None  # [N] places in the completion that the model wrote, not its environment; None = all

    @property
    def labels(self) -> list[int]:
        """The tokens that count [N]."""
        return self.completion if self.own is None else [self.completion[i] for i in self.own]

    @property
    def student_size(self) -> tuple[int, int]:
        """Tokens of the student's prompt and of the completion."""
        return len(self.prompt), len(self.completion)

    @property
    def size(self) -> tuple[int, int]:
        """Tokens of the longer prompt (student's or teacher's) and of the completion."""
        return max(len(self.prompt), len(self.teacher_prompt)), len(self.completion)


class TokenDetail(NamedTuple):
    """One completion token of a watched row: divergence and log-probabilities in nats."""

    token: int
    divergence: float
    student_logprob: float
    teacher_logprob: float


class Sums(NamedTuple):
    """Sums over the active tokens of a step: weighted loss, divergence, log pi_S(y) - log pi_T(y) of the sampled token,
    the same on completions that are not right, and their number of tokens; and the router loss, 0 without routers."""

    loss: float
    divergence: float
    gap: float
    wrong_gap: float
    wrong_tokens: float
    router_loss: float


class PGPOTrainer(SeamTrainer):
    """Train a causal language model with PGPO, or with its baselines SDPO and GRPO (`args.objective`).

    A drop-in for trl.GRPOTrainer: the same arguments, plus

    Args:
        feedback_funcs: called like reward functions; each returns one text or None per completion, on the sample's
            own attempt. The teacher reads the first text found (`args.feedback_mode`).
        grade: (completion text, dataset row) -> pgpo.tasks.graders.Grade, for held-out evaluation; by default the
            reward functions, called as in training, the one that decides on success (`args.success_reward`) counting.
        host: where messages, alarms and checkpoints' names go (pgpo.train.host.Host); by default to stderr.

    Held-out evaluation (`eval_strategy`, `trainer.evaluate()`) samples `eval_k` completions per row of
    `eval_dataset` at `eval_temperature` and reports avg@k with an interval clustered by question (held_out.py).

    Raises:
        UserError: what cannot work, in one sentence with the remedy.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: PGPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: Callable[..., Any] | None = None,
        environment_factory: Any = None,
        *,
        feedback_funcs: Callable[..., Any] | list[Callable[..., Any]] | None = None,
        grade: Callable[[str, Any], Any] | None = None,
        host: Host | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PGPOConfig(f"{file_name(name.split('/')[-1])}-PGPO")
        if not isinstance(args, PGPOConfig):
            raise UserError(f"args is a {type(args).__name__}; PGPOTrainer needs a PGPOConfig (same fields and more).")
        if (problem := self.unused_override(args.distills)) is not None:
            raise UserError(problem)
        feedback_funcs = as_list(feedback_funcs)
        reward_funcs = list(reward_funcs) if isinstance(reward_funcs, tuple) else reward_funcs
        options = {"tools": tools, "environment_factory": environment_factory, "rollout_func": rollout_func}
        data = check_inputs(args, train_dataset, eval_dataset, reward_funcs, feedback_funcs, grade, options)
        self.meters = [InformationMeter(args.information_denominator) for _ in range(1 + _splits(args))]
        self.meter = self.meters[0]  # of the half-batch at work
        self.multiplier = StepMultiplier(args)
        self.teacher: Teacher | None = None
        self.guard: GuardActions | None = None
        self.templates = _templates(args)
        self._negative_steps = 0
        self._signal_steps = 0
        self._stepped = False
        self.token_details: dict[int, list[TokenDetail]] = {}  # of the rows in host.watched
        self._behind = False  # whether the student has moved since the teacher followed
        self._degenerate = {"flat": 0, "inactive": 0}  # so many generations in a row
        _release(model, optimizers)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
            feedback_funcs=feedback_funcs,
            host=host or Host(),
            reads_contexts=args.distills and data[0].may_hold(CONTEXT_COLUMN),
            judges_late=data[0].late,
        )
        self.prompts, self.teacher_prompt_limit = check_model(self, *data)
        self.prompt_limit = self.prompts.limit, self.prompts.limit_name
        self.held_out_evaluation = HeldOut(self, grade)
        self._check_evaluation()
        if self.accelerator.is_fsdp2:
            keep_precision(self.accelerator)
        if self.is_deepspeed_enabled:
            zero.settle(self.model, self.accelerator, args.per_device_train_batch_size or 1, args.max_grad_norm)
        if self.distills:
            # TRL has patched model.forward by now; Teacher strips such closures from its copy and checks the rest.
            try:
                self.teacher = Teacher(self.model, args.teacher, args.teacher_rate)  # type: ignore[arg-type]
            except ValueError as error:
                raise UserError(str(error)) from error
            self.passes = self._open_passes()
            if self.is_fsdp_enabled and self.teacher.module is not None:
                shard(self.teacher.module, self.accelerator)
            self.add_callback(_TeacherFollows(self))
        if args.guard != "off":
            guard = CollapseGuard(args.guarded_signals(), args.guard_warmup, args.guard_patience)
            self.guard = GuardActions(self, args.guard, guard, args.guard_max_actions)
            self.add_callback(_GuardWatches(self))

    @property
    def distills(self) -> bool:
        """PGPO and SDPO learn from the teacher; GRPO does not."""
        return self.args.distills

    @property
    def follows_rewards(self) -> bool:
        """Whether TRL's policy loss, on advantages, is all of the loss or a part of it."""
        return self.args.follows_rewards

    def judge(self, rows: list[dict[str, Any]], first: int) -> None:
        check_rows(self.prompts, rows, first, bool(self.environment_factories))

    # Teacher contexts -----------------------------------------------------------------------------------------------

    def annotate(self, batch: Batch, rollout: Rollout) -> Batch:
        mine = range(len(rollout.prompts))[rollout.local]
        success = rollout.rewards if rollout.success is None else rollout.success
        self._log_rollout(rollout)
        if self.follows_rewards and math.isinf(self.recorded("reward_std") or 0.0):
            largest = max(map(abs, rollout.rewards))
            raise UserError(
                f"at step {self.state.global_step + 1}: the rewards, up to {largest:.3g}, have a variance beyond "
                "single precision, so that every advantage would be 0; divide them."
            )
        if not self.distills:
            return batch
        a = self.args
        if self.accelerator.is_main_process:
            self.success.warn_once(success, self.host.say)
        rendered: dict[str, list[int]] = {}  # siblings share one or two teacher prompts

        def render(prompt: Prompt) -> list[int]:
            key = repr(prompt)
            if key not in rendered:
                rendered[key] = self.render(prompt)
            return rendered[key]

        # On the whole batch of all ranks, since a group may stretch over two of them.
        try:
            contexts = build_contexts(
                rollout.prompts,
                rollout.completions,
                success,
                a.num_generations,
                feedback=rollout.feedback,
                success_threshold=a.success_threshold,
                use_successes=a.use_successful_as_teacher,
                choice=a.demonstration,
                seed=a.seed,
                step=self.state.global_step,
                allow_own_success=a.allow_own_success,
                feedback_mode=a.feedback_mode,
                remove_thinking=a.remove_thinking,
                opened=rollout.opened,
                templates=self.templates,
                max_length=self.teacher_prompt_limit,
                length=None if self.teacher_prompt_limit is None else lambda prompt: len(render(prompt)),
            )
        except ValueError as error:
            raise UserError(f"at step {self.state.global_step + 1}: {error}") from error
        self._check_answer_prefixes(rollout.prompts, [context.prompt for context in contexts])
        self._warn_if_inactive(rollout, sum(context.prompt is not None for context in contexts))
        prompts = [contexts[i].prompt for i in mine]
        batch["teacher_prompt_ids"] = [None if prompt is None else render(prompt) for prompt in prompts]
        batch["row"] = torch.arange(len(mine))
        batch["half"] = torch.tensor([i // a.num_generations % 2 for i in mine])
        batch["solved"] = torch.tensor([self.success.right(success[i]) for i in mine])
        if a.watch_demonstrations:
            shown: dict[int, list[int]] = {}  # demonstration of this rank -> the prompt that shows it
            for i in mine:
                j = contexts[i].demonstration
                if j is not None and j in mine:
                    shown.setdefault(j - mine.start, batch["teacher_prompt_ids"][i - mine.start])
            self._watch_demonstrations(batch, shown)
        self.record("truncated_contexts", sum(c.truncated for c in contexts) / len(contexts))
        self.record("feedback_share", sum(c.feedback_used for c in contexts) / len(contexts))
        return batch

    def _check_answer_prefixes(self, prompts: list[Prompt], teacher_prompts: list[Prompt | None]) -> None:
        """Student and teacher must judge a completion behind the same opening; a template may add <think> to one only.

        Raises UserError, on all ranks, which all see all prompts.
        """
        seen: dict[str, str] = {}  # siblings share prompts

        def prefix(prompt: Prompt) -> str:
            key = repr(prompt)
            if key not in seen:
                seen[key] = self.answer_prefix(prompt)
            return seen[key]

        for prompt, teacher_prompt in zip(prompts, teacher_prompts, strict=True):
            if teacher_prompt is not None and prefix(prompt) != prefix(teacher_prompt):
                raise UserError(
                    f"at step {self.state.global_step + 1}: the chat template opens the student's answer with "
                    f"{prefix(prompt)!r} and the teacher's with {prefix(teacher_prompt)!r}, so that they would judge "
                    "different texts; set a template (or chat_template_kwargs) whose opening does not depend on the "
                    f"messages, which begin with {str(prompt)[:60]!r}."
                )

    def _log_rollout(self, rollout: Rollout) -> None:
        if rollout.success is not None:
            # None of a reward that decides is no success; a sample that no function rewards is not counted.
            counted = [s for s, r in zip(rollout.success, rollout.rewards, strict=True) if not math.isnan(r)]
            self.record("success_share", sum(map(self.success.right, counted)) / max(len(counted), 1))
        for ours, trl in _TRL_METRICS.items():
            if (value := self.recorded(trl)) is not None:
                self.record(ours, value)
        lengths = torch.tensor(self.gather_objects(self.completion_lengths)).float()
        self.record("length_tail", torch.quantile(lengths, 0.95).item())
        self._warn_if_flat([r for r in rollout.rewards if not math.isnan(r)])
        self.last_rollout = rollout

    def _warn_if_flat(self, rewards: list[float]) -> None:
        """rewards: of all ranks, without nan."""
        flat = not rewards or statistics.pstdev(rewards) <= self.args.diagnostics_flat_tolerance
        value = f"{rewards[0]:g}" if rewards else "None"
        self._warn_if_degenerate(
            "flat",
            flat,
            f"all {len(rewards)} rewards were {value}, so that they tell no completion from another; look at the "
            "reward function and at how hard the questions are.",
        )

    def _warn_if_inactive(self, rollout: Rollout, active: int) -> None:
        best = max((r for r in rollout.rewards if not math.isnan(r)), default=math.nan)
        self._warn_if_degenerate(
            "inactive",
            active == 0,
            f"no completion had a teacher, so that nothing was learned (largest reward {best:g}, "
            f"success_threshold = {self.args.success_threshold:g}); lower the threshold, take easier questions or more "
            f"num_generations, or give feedback_funcs or a column {CONTEXT_COLUMN!r}.",
        )

    def _warn_if_degenerate(self, kind: str, degenerate: bool, text: str) -> None:
        """Say it after the third step in a row (sooner if asked), and again every `diagnostics_warning_interval`."""
        count = self._degenerate[kind] = self._degenerate[kind] + 1 if degenerate else 0
        interval = self.args.diagnostics_warning_interval
        first = min(_DEGENERATE, interval)
        due = interval > 0 and count >= first and (count - first) % interval == 0
        if due and self.accelerator.is_main_process:
            self.host.say(f"at step {self.state.global_step + 1}, for {count} steps in a row: {text}")

    @torch.no_grad()
    def _watch_demonstrations(self, batch: Batch, shown: Mapping[int, list[int]]) -> None:
        """Mean log-probability per token that the teacher gives to demonstrations shown in its own prompt."""
        written = _completions(batch)
        rows = [Row([], prompt, **written[j]) for j, prompt in shown.items() if j in written][:_DEMONSTRATION_ROWS]
        idle = not rows
        if idle:  # the other ranks may run a forward that gathers
            rows = [self._idle_row(batch)]
        states = self._teacher_states(rows, join=False)  # before the first update has shown that it may be
        labels = self._labels(rows)
        output = self._compare(states, states, labels, torch.zeros(len(labels), device=labels.device))
        assert output.teacher_logprob is not None
        sums = torch.tensor([output.teacher_logprob.double().sum(), len(labels)], dtype=torch.float64)
        total, tokens = self._reduce(sums * (not idle)).tolist()
        if tokens:
            self.record("demonstration_logprob", total / tokens)

    # One optimizer step ---------------------------------------------------------------------------------------------

    def optimize(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self.distills:
            return self._optimize_grpo(model, batch)
        share = self.args.distillation_weight
        rows = self._active_rows(batch)
        tokens = self._sum(sum(len(r.labels) for r in rows))
        sums = torch.zeros(len(Sums.__annotations__), dtype=torch.float64, device=self.accelerator.device)
        self.token_details = {}
        self._check_head(model, batch)
        parts = 1 + _splits(self.args)
        reshard(model)
        halves = CrossFit(model.parameters()) if parts == 2 else None
        load = self._load_of_step(model, batch, rows) if self.aux_loss_enabled else None
        for half in range(parts):
            mine = [r for r in rows if parts == 1 or r.half == half]
            total = len(batch["half"]) if parts == 1 else int((batch["half"] == half).sum())
            self.meter = self.meters[half]
            self.meter.reset()
            self.meter.add_unhinted(total - len(mine))
            work = self._schedule(mine)
            # Every rank runs the same number of forwards and backwards: collectives hide in them.
            rounds = int(self._max(sum(len(parts) for _, parts in work)))
            if self.args.fp16:
                rounds = max(rounds, 1)  # a gradient scaler needs gradients in every step, if only zeros
            micro_batches = self._with_teacher(work)
            for i in range(rounds):
                part, counts, states = next(micro_batches, (None, [1], None))
                if idle := part is None:
                    part = [self._idle_row(batch)]
                last = i == rounds - 1 and not self.follows_rewards
                with self.exchange(model, last):
                    states = states or self._teacher_states(part)
                    loss, stats = self._distill(model, part, counts, states, tokens, idle, load)
                    # Ranks average their gradients; the loss is a sum over ranks divided by the global token count.
                    self.backward(model, loss * (share * self.accelerator.num_processes), last)
                sums += stats
            if halves is not None and half == 0:
                halves.stash()
        policy_loss = self._policy_gradient(model, batch, 1 - share) if self.follows_rewards else 0.0
        self.finite_here = self.finite_here and bool(sums.isfinite().all())
        signal = self._modulate(halves)
        self._stepped = tokens > 0 or self.follows_rewards
        totals = Sums(*self._reduce(sums).tolist())
        if signal is not None:
            self._log_step(*signal, totals, tokens, policy_loss)
        return torch.tensor(share * totals.loss + (1 - share) * policy_loss, device=self.accelerator.device)

    def _active_rows(self, batch: Batch) -> list[Row]:
        """This rank's completions that have a teacher and at least one token of the model's own, padding removed."""
        rows = []
        ratios = batch.get("importance_sampling_ratio")  # [B, T] per token or [B, 1] per sequence
        old = batch.get("old_per_token_logps")
        mask = _loss_mask(batch)
        for i, written in _completions(batch).items():
            if (teacher_prompt := batch["teacher_prompt_ids"][i]) is None:
                continue
            keep = mask[i]
            weight = None
            if ratios is not None:
                weight = ratios[i][keep] if ratios.shape[1] > 1 else ratios[i]
            rows.append(
                Row(
                    prompt=batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist(),
                    teacher_prompt=teacher_prompt,
                    **written,
                    index=int(batch["row"][i]),
                    half=int(batch["half"][i]),
                    solved=bool(batch["solved"][i]),
                    rollout_logprobs=None if old is None else old[i][keep],
                    weight=weight,
                )
            )
        return rows

    def _idle_row(self, batch: Batch) -> Row:
        """Any row, for a rank that has run out of micro-batches: its loss is multiplied by zero."""
        prompt = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist()
        return Row(prompt=prompt, teacher_prompt=prompt, completion=batch["completion_ids"][0][:1].tolist())

    def _schedule(self, rows: list[Row]) -> list[tuple[list[Row], list[list[Bundle]]]]:
        """Blocks of rows whose teacher states are held at the same time, each with the student's micro-batches.

        With shared teacher prompts a block is as much as may be held: the rows of one prompt stay together, and the
        student's micro-batches need not make room for the teacher's longer prompts. Otherwise, as under FSDP, where
        every rank must run the same forwards, a block is a micro-batch.
        """
        limits = self._limits()
        if not self._shares_prompts:
            parts = batching.split([r.size for r in rows], limits)
            return [([rows[i] for i in part], [[[i] for i in range(len(part))]]) for part in parts]
        limit = _HELD * (self.args.max_tokens_per_microbatch or math.inf)
        blocks: list[list[Row]] = [[]]
        held = 0
        for _, siblings in itertools.groupby(sorted(rows, key=lambda r: r.teacher_prompt), lambda r: r.teacher_prompt):
            more = list(siblings)
            size = sum(len(r.completion) for r in more)
            if blocks[-1] and held + size > limit:
                blocks.append([])
                held = 0
            blocks[-1] += more
            held += size
        return [(block, self._bundles(block, limits)) for block in blocks if block]

    def _bundles(self, rows: list[Row], limits: Limits) -> list[list[Bundle]]:
        """The student's micro-batches: siblings joined where that is cheaper."""
        if self._joins:
            padded = replace(limits, packed=False)
            parts, _ = batching.join([r.prompt for r in rows], [len(r.completion) for r in rows], padded)
            if any(len(bundle) > 1 for part in parts for bundle in part):
                return parts
        return [[[i] for i in part] for part in batching.split([r.student_size for r in rows], limits)]

    def _with_teacher(
        self, work: list[tuple[list[Row], list[list[Bundle]]]]
    ) -> Iterator[tuple[list[Row], list[int], States]]:
        """Micro-batches in turn: rows, how many of them share each row of the batch, and the teacher's states."""
        for block, parts in work:
            states = self._teacher_states(block)
            ends = list(itertools.accumulate(len(r.labels) for r in block))
            for part in parts:
                mine = [i for bundle in part for i in bundle]
                index = torch.cat([torch.arange(ends[i] - len(block[i].labels), ends[i]) for i in mine])
                yield [block[i] for i in mine], [len(b) for b in part], states[index.to(states.hidden.device)]

    def _limits(self, teacher: bool = False) -> Limits:
        """What a forward may hold and costs. teacher: its forwards have no loss, and are packed by `Passes.teacher`.

        A forward ends before its padding costs more than another one, except for GRPO, whose batch is TRL's, and under
        FSDP, where every forward gathers the parameters.
        """
        forward_cost, pair_cost = self._costs
        return Limits(
            budget=self.args.max_tokens_per_microbatch or math.inf,
            most=self.args.micro_batch_size or math.inf,
            forward_cost=math.inf if self.gathers_layers or not self.distills else forward_cost,
            pair_cost=pair_cost,
            packed=self.distills and self.passes.pack and not teacher,
            apart=not self.distills,
        )

    @cached_property
    def _costs(self) -> tuple[float, float]:
        return batching.costs(causal_lm(self.model), self.accelerator.device.type)

    def _teacher_states(self, rows: list[Row], join: bool = True) -> States:
        """Of the tokens that count, row after row."""
        assert self.teacher is not None
        # The student's forward autocasts by itself once prepared; under FSDP the weights of both are cast instead.
        with contextlib.nullcontext() if self.is_fsdp_enabled else self.accelerator.autocast():
            states = self.passes.teacher(
                self.teacher,
                [r.teacher_prompt for r in rows],
                [r.completion for r in rows],
                self._limits(teacher=True) if self._shares_prompts else None,
                join and self._joins,
            )
        return states.at(_own_places(rows))

    def _distill(
        self,
        model: nn.Module,
        rows: list[Row],
        counts: list[int],
        teacher: States,
        tokens: float,
        idle: bool,
        load: Load | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch (its share of the global mean), and its `Sums` as a tensor.

        Args:
            counts: as in Passes.forward.
            load: of the whole step's routers; None = this is the whole step.
        """
        labels = self._labels(rows)
        weights = self._token_weights(rows, 0.0 if idle else 1 / tokens)
        places = _own_places(rows)
        loads: list[Load] | None = [] if self.aux_loss_enabled else None
        output: HeadOutput = self.passes.forward(
            model,
            [r.prompt for r in rows],
            [r.completion for r in rows],
            lambda hidden, head: self._compare(States(hidden, head).at(places), teacher, labels, weights),
            counts,
            loads,
        )
        assert output.loss is not None and output.student_logprob is not None and output.teacher_logprob is not None
        # An idle rank goes the same ways back: ZeRO-3 compares what the ranks run.
        router_loss = loads[0].loss(load) * (not idle) if loads else torch.zeros((), device=labels.device)
        loss = output.loss + self.router_aux_loss_coef * router_loss if loads else output.loss
        if idle:
            return loss, torch.zeros(len(Sums.__annotations__), dtype=torch.float64, device=labels.device)
        lengths = [len(r.labels) for r in rows]
        mask = _mask(lengths).to(labels.device)

        def grid(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)

        self.meter.add(grid(output.student_entropy), grid(output.teacher_entropy), mask)
        gap = output.student_logprob.detach() - output.teacher_logprob
        wrong = torch.tensor([not r.solved for r in rows for _ in r.labels], device=mask.device)
        self._keep_details(rows, output)
        stats = [loss.detach(), output.divergence, gap, torch.where(wrong, gap, 0.0), wrong, router_loss.detach()]
        return loss, torch.stack([t.double().sum() for t in stats])

    def _compare(
        self,
        student: States,
        teacher: States,
        labels: Tensor,
        weights: Tensor | Callable[[HeadOutput, slice], Tensor],
    ) -> HeadOutput:
        """Divergence, entropies and log-probabilities of N tokens; runs inside the student's forward."""
        a = self.args
        arguments: dict[str, Any] = dict(
            kind=a.divergence,
            beta=a.divergence_beta,
            top_k=a.divergence_top_k or None,
            tail=a.divergence_tail,
            temperature=a.temperature,
        )
        if student.head is None or teacher.head is None:
            return distillation_of_logits(student.hidden, teacher.hidden, labels, weights, **arguments)
        s, t = student.head, teacher.head
        function = fused_distillation_head if a.fused_head else dense_distillation_head
        return function(
            student.hidden,
            s.weight,
            teacher.hidden,
            t.weight,
            labels,
            weights,
            student_bias=s.bias,
            teacher_bias=t.bias,
            student_scale=s.scale,
            teacher_scale=t.scale,
            student_softcap=s.softcap,
            teacher_softcap=t.softcap,
            **arguments,
        )

    def _token_weights(self, rows: list[Row], share: float) -> Tensor | Callable[[HeadOutput, slice], Tensor]:
        """share * clipped ratio to the rollout policy (SDPO) * vLLM's correction, for every token."""
        device = self.accelerator.device
        fixed = torch.full((sum(len(r.labels) for r in rows),), share, device=device)
        if rows[0].weight is not None:
            ratios = [r.weight.expand(len(r.labels)) for r in rows]  # type: ignore[union-attr]
            fixed = fixed * torch.cat(ratios).to(device)
        clip = self.args.importance_clip
        if clip is None or rows[0].rollout_logprobs is None:
            return fixed
        old = torch.cat([r.rollout_logprobs for r in rows]).to(device)  # type: ignore[misc]

        def weigh(chunk: HeadOutput, part: slice) -> Tensor:
            assert chunk.student_logprob is not None
            return (chunk.student_logprob - old[part]).exp().clamp_max(clip) * fixed[part]

        return weigh

    def _labels(self, rows: list[Row]) -> Tensor:
        """The tokens that count [N], row after row."""
        return torch.tensor([t for r in rows for t in r.labels], device=self.accelerator.device)

    def _keep_details(self, rows: list[Row], output: HeadOutput) -> None:
        start = 0
        for row in rows:
            end = start + len(row.labels)
            if row.index in self.host.watched:
                columns = (output.divergence, output.student_logprob, output.teacher_logprob)
                values = torch.stack([t[start:end].detach().float() for t in columns], 1).tolist()  # type: ignore[index]
                self.token_details[row.index] = [TokenDetail(t, *v) for t, v in zip(row.labels, values)]
            start = end

    def _open_passes(self) -> Passes:
        """Let student and teacher end in hidden states, where their logits are a plain head on these."""
        assert self.teacher is not None
        a = self.args
        problem = "torch_compile wraps its forward" if a.torch_compile else head_problem(self.model)
        config = self.model.config.get_text_config()
        if problem is None and a.teacher == "trust_region" and getattr(config, "final_logit_softcapping", None):
            problem = "its logits are soft-capped, and teacher='trust_region' mixes logits"
        if problem is None:
            open_forward(self.model)
            if self.teacher.module is not None:
                open_forward(self.teacher.module)
        elif a.fused_head:
            _LOGGER.warning("the loss holds all logits, because %s", problem)
        pack = a.packing
        if pack is None:
            attention = str(config._attn_implementation)
            pack = a.device.type == "cuda" and ("flash" in attention or "flex" in attention)
        self._head_checked = problem is not None
        self._joinable = joins(self.model)  # until the first update shows otherwise
        if a.join_siblings and (self.gathers_layers or problem is not None or not self._joinable):
            _LOGGER.warning(
                "join_siblings has no effect: it needs sdpa or eager attention to all tokens, a plain head, and no "
                "FSDP or ZeRO-3"
            )
        return Passes(self.model, self.tokenizer.pad_token_id, self.accelerator.device, pack, problem is not None)

    @property
    def _shares_prompts(self) -> bool:
        return self.args.share_teacher_prompts and not self.gathers_layers and not self.passes.whole_logits

    @property
    def _joins(self) -> bool:
        asked = self.args.join_siblings
        if asked is None:
            sdpa = self.model.config.get_text_config()._attn_implementation == "sdpa"  # eager keeps all scores
            asked = self.accelerator.device.type == "cpu" and sdpa and not self.passes.pack
        return asked and self._shares_prompts and self._joinable

    def _check_head(self, model: nn.Module, batch: Batch) -> None:
        """Once, before the first update: the head on the hidden states must give the model's own logits, and joined
        completions must not see one another."""
        if self._head_checked:
            return
        self._head_checked = True
        ids = batch["prompt_ids"][:1][batch["prompt_mask"][:1].bool()][:_CHECKED_TOKENS].unsqueeze(0)
        training = model.training
        model.eval()
        error = self._max(head_error(model, ids))
        if error < _HEAD_TOLERANCE and self._joins:
            leak, why = math.inf, "joined, they see one another"
            try:
                leak = self.passes.join_error(model, self.model.config.get_text_config().vocab_size)
            except torch.OutOfMemoryError:
                raise
            except Exception as refusal:  # whatever a model says that takes no mask of four dimensions
                why = str(refusal)
            self._joinable = self._max(leak) < _HEAD_TOLERANCE
            if not self._joinable:
                _LOGGER.warning("completions of one prompt stay apart: %s", why)
        model.train(training)
        if not error < _HEAD_TOLERANCE:
            _LOGGER.warning("the loss holds all logits: the head on the last hidden state misses them by %.2g", error)
            self.passes.whole_logits = True

    def _optimize_grpo(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = self._policy_gradient(model, batch)
        if self.step_factor != 1:
            self.gate.scale(self.step_factor)
        return torch.tensor(loss, device=self.accelerator.device)

    def _policy_gradient(self, model: nn.Module, batch: Batch, share: float = 1.0) -> float:
        """TRL's own loss, whose gradient is taken `share` times; its batch goes through the model at once or in
        parts."""
        count = len(batch["completion_ids"])
        sizes = list(zip(batch["prompt_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()))
        # Image tensors are not indexed by row, so such a batch stays whole.
        limits = replace(self._limits(), forward_cost=math.inf, packed=False, apart=True)
        parts = [list(range(count))] if "num_images" in batch else batching.split(sizes, limits)
        rounds = int(self._max(len(parts)))
        if rounds == self.accelerator.num_processes == 1:
            with self.exchange(model, last=True):
                loss = self.grpo_loss(model, batch)
                self.backward(model, loss * share, last=True)
            self.finite_here = bool(loss.isfinite())
        else:
            loss = self._policy_gradient_in_parts(model, batch, parts, rounds, share)
        return loss.item()

    def _policy_gradient_in_parts(
        self, model: nn.Module, batch: Batch, parts: list[list[int]], rounds: int, share: float
    ) -> Tensor:
        """TRL's loss always sees the whole batch of all ranks: the rows of the part at work with their gradient, all
        others as numbers. So sums, means, quantiles and TRL's metrics do not depend on the parts, which add up to the
        gradient of the whole."""
        ranks, count = self.accelerator.num_processes, len(batch["completion_ids"])
        whole, first = self.grpo_batch(batch), self.accelerator.process_index * count
        scores, load = Scores.unknown(whole), None
        if self.couples_rows:
            with torch.no_grad(), self._same_random_numbers():
                scores, load = self._scores_of_all(model, batch, parts, rounds)
        local = Scores.unknown(batch)
        for k in range(rounds):
            idle, last = k >= len(parts), k == rounds - 1
            index = torch.tensor(parts[0 if idle else k], device=self.accelerator.device)
            with self.exchange(model, last):
                found, own = self.grpo_scores(model, _select(batch, index.tolist(), count))
                router_loss = None if own is None else own.loss(load)
                loss = self.grpo_loss_of(whole, scores.placed(first + index, found), router_loss)
                # Ranks average their gradients.
                self.backward(model, loss * (0 if idle else share * ranks), last)
            if not idle:
                local = local.placed(index, found.detached())
        self.finite_here = all(
            bool(t.isfinite().all())
            for t in (local.logps, local.entropies, batch["advantages"], batch.get("importance_sampling_ratio"))
            if t is not None
        )
        return self.grpo_loss_of(whole, self._of_all_ranks(local), None if load is None else load.loss(), record=True)

    def _scores_of_all(
        self, model: nn.Module, batch: Batch, parts: list[list[int]], rounds: int
    ) -> tuple[Scores, Load | None]:
        """Of all ranks, from forwards without gradient."""
        count = len(batch["completion_ids"])
        local = Scores.unknown(batch)
        loads: list[Load] = []
        for k in range(rounds):
            index = parts[min(k, len(parts) - 1)]
            found, load = self.grpo_scores(model, _select(batch, index, count))
            if k < len(parts):
                local = local.placed(torch.tensor(index, device=self.accelerator.device), found)
                loads += [] if load is None else [load]
        return self._of_all_ranks(local), self._whole_load(loads) if loads else None

    def _of_all_ranks(self, scores: Scores) -> Scores:
        return Scores(self.gather_rows(scores.logps), self.gather_rows(scores.entropies))

    # Routers of a mixture of experts --------------------------------------------------------------------------------

    def _load_of_step(self, model: nn.Module, batch: Batch, rows: list[Row]) -> Load | None:
        """Of the students' forwards on all ranks, from a pass without gradient; None if the step is a single forward,
        which tells it by itself."""
        work = [
            ([block[i] for bundle in part for i in bundle], [len(bundle) for bundle in part])
            for block, parts in self._schedule(rows)
            for part in parts
        ]
        rounds = int(self._max(len(work)))
        if rounds <= 1 == self.accelerator.num_processes and not _splits(self.args):
            return None
        loads: list[Load] = []
        with torch.no_grad(), self._same_random_numbers():
            for k in range(rounds):
                part, counts = work[k] if k < len(work) else ([self._idle_row(batch)], [1])
                prompts, completions = [r.prompt for r in part], [r.completion for r in part]
                found: list[Load] = []
                self.passes.forward(model, prompts, completions, lambda hidden, head: hidden[:1], counts, found)
                if k < len(work):
                    loads += found
        return self._whole_load(loads)

    def _whole_load(self, loads: list[Load]) -> Load:
        """Sum over parts and ranks; a rank without any gives an empty list."""
        experts = self.model.config.get_text_config().num_experts
        flat = torch.zeros(2 * experts + 1, dtype=torch.float64)
        for load in loads:
            flat += torch.cat([load.chosen, load.probability.detach(), load.tokens.reshape(1)]).cpu()
        total = self._reduce(flat).float().to(self.accelerator.device)
        chosen, probability, tokens = total.split([experts, experts, 1])
        return Load(chosen, probability, tokens.squeeze())

    def _same_random_numbers(self) -> contextlib.AbstractContextManager[Any]:
        """A pass that is run again draws again what it has drawn: dropout."""
        device = self.accelerator.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    # The signal -----------------------------------------------------------------------------------------------------

    def _modulate(self, halves: CrossFit | None) -> tuple[Information, float] | None:
        """Read the meters, and arm the optimizer with the multiplier of the step that follows.

        None: the information is not finite, and the step will be skipped.
        """
        self._before_step = self._negative_steps, self._signal_steps, self.multiplier.state_dict()
        try:
            parts = [meter.summary(self._reduce) for meter in self.meters]
        except ValueError as error:
            if halves is not None:
                halves.discard()
            self.distrust(str(error).split(";")[0], here=not self.finite_here)
            return None
        information = pooled(parts, self.args.information_denominator)
        self._signal_steps += 1
        self._negative_steps += information.information < 0
        gaps = [part.information for part in parts] if halves is not None else []
        rhos = self.multiplier(self.state.global_step, self.state.max_steps, information.information, gaps)
        rho = rhos[0] if halves is None else halves.combine(*rhos)
        if self.args.objective == "pgpo" or self.step_factor != 1:
            self.gate.scale(rho * self.step_factor)
        return information, rho

    def forget_step(self) -> None:
        if self.distills:
            self._negative_steps, self._signal_steps, signal = self._before_step
            self.multiplier.load_state_dict(signal)

    @property
    def step_factor(self) -> float:
        """What the guard multiplies every step by, beside rho."""
        return 1.0 if self.guard is None else self.guard.step_factor

    def _log_step(
        self, information: Information, rho: float, sums: Sums, tokens: float, policy_loss: float = 0.0
    ) -> None:
        values = {
            "information": information.information,
            "rho": rho,
            "alpha": self.args.law(self.state.global_step, self.state.max_steps).alpha
            if self.args.objective == "pgpo"
            else 0.0,
            "active_share": information.hinted_samples / information.samples,
            "active_tokens": tokens,
            "effective_lr": self.base_learning_rate() * rho * self.step_factor,
            "negative_information_share": self._negative_steps / self._signal_steps,
        }
        if self.aux_loss_enabled and not self.follows_rewards:  # else TRL has logged that of all rows
            values["aux_loss"] = sums.router_loss
        if self.follows_rewards:
            values["policy_loss"] = policy_loss
        if tokens:  # without any teacher there is nothing to measure
            values["student_entropy"] = information.student_entropy
            values["teacher_entropy"] = information.teacher_entropy
            values["divergence"] = sums.divergence / tokens
            values["sampled_kl"] = sums.gap / tokens
        if sums.wrong_tokens:
            values["sampled_kl_wrong"] = sums.wrong_gap / sums.wrong_tokens
        for name, value in values.items():
            self.record(name, value)

    def teacher_follows(self) -> None:
        """After an optimizer step that moved the student, but only every `teacher_sync_steps`-th step, if one of those
        since the last time has. A batch without any teacher moves nothing."""
        if self.guard is not None and self.guard.teacher_frozen:
            return
        self._behind |= self._stepped and not self.accelerator.optimizer_step_was_skipped
        due = (self.state.global_step + 1) % self.args.teacher_sync_steps == 0
        if self.teacher is not None and self._behind and due:
            self.teacher.update()
            self._behind = False

    # Ranks ----------------------------------------------------------------------------------------------------------

    def _reduce(self, values: Tensor) -> Tensor:
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else values.dtype  # MPS has no fp64
        return self.accelerator.reduce(values.to(device, dtype), "sum").cpu()

    def _sum(self, value: float) -> float:
        return self._reduce(torch.tensor([float(value)], dtype=torch.float64)).item()

    def on_any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; every rank must call it."""
        return self._max(flag) > 0

    def _max(self, value: float) -> float:
        local = torch.tensor([float(value)], device=self.accelerator.device)
        return self.accelerator.gather(local).max().item()

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """What earlier steps left behind beside the tensors, as JSON can hold it."""
        return {
            "negative_steps": self._negative_steps,
            "signal_steps": self._signal_steps,
            "skips_in_a_row": self.skips_in_a_row,
            "teacher_behind": self._behind,
            "modulation": self.gate.state_dict(),
            "multiplier": self.multiplier.state_dict(),
            "guard": None if self.guard is None else self.guard.state_dict(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take `extra_state()` back. Raises KeyError or ValueError if it was written by another kind of run."""
        self._negative_steps, self._signal_steps = state["negative_steps"], state["signal_steps"]
        self.skips_in_a_row = state.get("skips_in_a_row", 0)
        self._behind = state.get("teacher_behind", False)
        self.gate.load_state_dict(state["modulation"])
        self.multiplier.load_state_dict(state["multiplier"])

    def save_extra(self, directory: Path) -> None:
        from safetensors.torch import save_file

        state = self.extra_state()
        tensors: dict[str, Tensor] = {}
        if self.teacher is not None:
            saved = self.teacher.state_dict(keep=self.args.should_save)
            state["teacher"] = {"kind": saved["kind"], "rate": saved["rate"]}
            for part in ("parameters", "buffers"):
                tensors |= {f"{part}/{name}": t.contiguous() for name, t in saved[part].items()}
        if self.args.should_save:
            if tensors:
                save_file(tensors, directory / TEACHER_FILE)
            if self.guard is not None:
                self.guard.save_snapshot(directory)
            (directory / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")

    def load_extra(self, directory: Path) -> None:
        from safetensors.torch import load_file

        state = json.loads((directory / STATE_FILE).read_text())
        self.load_extra_state(state)
        if self.guard is not None and state.get("guard") is not None:  # else it starts here
            self.guard.load(state["guard"], directory)
        if self.teacher is None:
            return
        if state.get("teacher") is None:
            raise ValueError("it was written by a run without a teacher")
        saved: dict[str, Any] = {**state["teacher"], "parameters": {}, "buffers": {}}
        if (directory / TEACHER_FILE).exists():
            for key, tensor in load_file(directory / TEACHER_FILE).items():
                part, name = key.split("/", 1)
                saved[part][name] = tensor
        self.teacher.load_state_dict(saved)

    # Held-out evaluation --------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """avg@k, pass@k and maj@k on held-out rows, with the evaluation's own sampling; logged like any metric."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str) and isinstance(self.eval_dataset, dict):
            data = self.eval_dataset.get(data)
        if isinstance(data, dict):
            results: dict[str, float] = {}
            for name, part in data.items():
                results |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return results
        if data is None:
            raise UserError("there is no eval_dataset to evaluate on; pass one to the trainer or to evaluate().")
        outcome = self.held_out_evaluation.run(data)
        self.last_records = outcome.records
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.held_out_evaluation.metrics(outcome).items()}
        self.model.eval()  # TRL files a log under train or eval by the model's mode; the next step trains again
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, which gives the loss of its GRPO; self-distillation has none on held-out rows."""
        if self.distills:
            raise UserError("predict() gives TRL's policy loss, which this objective does not train; call evaluate().")
        return super().predict(*args, **kwargs)

    def held_out_records(self, rows: Sequence[Mapping[str, Any]], seed: int | None = None) -> list[Record]:
        """`eval_k` graded completions for every row, gathered from all ranks, in the order of the rows."""
        return self.held_out_evaluation.run(rows, seed).records

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a `metric_for_best_model` that no evaluation gives is found before the first step."""
        self._check_best_metric()
        return super().train(*args, **kwargs)

    def _check_evaluation(self) -> None:
        if self.eval_dataset is not None:
            self.held_out_evaluation.check(self.eval_dataset)
        if self.args.load_best_model_at_end or self.args.save_strategy == "best":
            self._check_best_metric()

    def _check_best_metric(self) -> None:
        own = "evaluate" not in vars(self) and type(self).evaluate is PGPOTrainer.evaluate
        if own and self.eval_dataset is not None:
            self.held_out_evaluation.check_best_metric(self.eval_dataset)


class _TeacherFollows(TrainerCallback):
    def __init__(self, trainer: PGPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.teacher_follows()


class _GuardWatches(TrainerCallback):
    def __init__(self, trainer: PGPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer.guard is not None
        self.trainer.guard.after_step(state.global_step, self.trainer.step_metrics())


def _release(model: Any, optimizers: Any) -> None:
    """Undo what an earlier trainer has left on a model object, and on an optimizer that came from outside."""
    if isinstance(model, nn.Module):
        release_forward(model)
        release_adapter(model)
    if optimizers and optimizers[0] is not None:
        handle = getattr(torch_optimizer(optimizers[0]), "_pgpo_handle", None)
        if handle is not None:
            handle.remove()


def _templates(args: PGPOConfig) -> ContextTemplates:
    given = {
        name: text
        for name in ("reprompt", "solution", "feedback")
        if (text := getattr(args, f"{name}_template")) is not None
    }
    try:
        return replace(ContextTemplates(), **given)
    except ValueError as error:
        raise UserError(str(error)) from error


def _splits(args: PGPOConfig) -> bool:
    """Whether a step is made of two half-batches."""
    return args.information_source == "cross_fit" and args.objective == "pgpo"


def pooled(parts: Sequence[Information], denominator: str = "all") -> Information:
    """The information of the whole batch from that of its half-batches."""
    if len(parts) == 1:
        return parts[0]
    samples, hinted = sum(p.samples for p in parts), sum(p.hinted_samples for p in parts)

    def mean(values: Sequence[float], weights: Sequence[int]) -> float:
        return math.fsum(v * w for v, w in zip(values, weights)) / max(sum(weights), 1)

    weights = [p.samples if denominator == "all" else p.hinted_samples for p in parts]
    return Information(
        information=mean([p.information for p in parts], weights),
        student_entropy=mean([p.student_entropy for p in parts], [p.hinted_samples for p in parts]),
        teacher_entropy=mean([p.teacher_entropy for p in parts], [p.hinted_samples for p in parts]),
        samples=samples,
        hinted_samples=hinted,
    )


def _mask(lengths: Sequence[int]) -> Tensor:
    """[B, longest], True on the first lengths[i] places of row i."""
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def _loss_mask(batch: Batch) -> Tensor:
    """[B, T], True on completion tokens that the model wrote: neither padding nor its environment (TRL's tool_mask),
    nor a truncated completion under mask_truncated_completions."""
    mask = batch["completion_mask"].bool()
    return mask if "tool_mask" not in batch else mask & batch["tool_mask"].bool()


def _completions(batch: Batch) -> dict[int, dict[str, Any]]:
    """`completion` and `own` of the rows with tokens that count, as `Row` takes them."""
    found: dict[int, dict[str, Any]] = {}
    for i, mine in enumerate(_loss_mask(batch)):
        if not mine.any():
            continue
        tokens = batch["completion_mask"][i].bool()
        own = mine[tokens]
        found[i] = {
            "completion": batch["completion_ids"][i][tokens].tolist(),
            "own": None if own.all() else own.nonzero().flatten().tolist(),
        }
    return found


def _own_places(rows: Sequence[Row]) -> Tensor | None:
    """[N] places of the tokens that count among all completion tokens of the rows; None = all of them."""
    if all(row.own is None for row in rows):
        return None
    starts = itertools.accumulate((len(row.completion) for row in rows), initial=0)
    own = [range(len(row.completion)) if row.own is None else row.own for row in rows]
    return torch.tensor([start + i for start, places in zip(starts, own) for i in places])


def _select(batch: Batch, index: list[int], count: int) -> Batch:
    """Rows of a TRL batch, trimmed to their longest prompt (padded left) and completion (padded right)."""
    prompt = int(batch["prompt_mask"][index].sum(1).max())
    completion = max(int(batch["completion_mask"][index].sum(1).max()), 1)
    width = batch["completion_ids"].shape[1]
    picked: Batch = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count:
            value = value[index]
            if key in ("prompt_ids", "prompt_mask"):
                value = value[:, value.shape[1] - prompt :]
            elif value.dim() == 2 and value.shape[1] == width:
                value = value[:, :completion]
        picked[key] = value
    return picked
