"""`PGPOTrainer`: trl.GRPOTrainer with self-distillation and a step scaled by its own information.

One optimizer step, top-down:

    rollouts, rewards                        TRL (trl_seam.py)
    annotate    teacher contexts             demonstration = a right sibling, and/or feedback on the own attempt
    optimize    micro-batches                active samples only, sorted by length, within the token budget
                student and teacher hidden states on the same completion tokens (passes.py)
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
    modulate,
)
from pgpo.core.stepping import Modulation
from pgpo.errors import UserError
from pgpo.evaluate.avg_at_k import Record
from pgpo.teacher import ContextTemplates, Teacher, build_contexts
from pgpo.teacher.weights import reshard
from pgpo.train import batching, zero
from pgpo.train.adapters import adapter_problem
from pgpo.train.batching import Bundle, Limits
from pgpo.train.config import ROW_MEAN_LOSSES, PGPOConfig
from pgpo.train.field_types import file_name, shown
from pgpo.train.guard import CollapseGuard, GuardActions
from pgpo.train.held_out import HeldOut
from pgpo.train.multiplier import StepMultiplier
from pgpo.train.passes import Passes, States, causal_lm, head_error, head_problem, joins, open_forward
from pgpo.train.sharding import keep_precision, shard, sharding_problem
from pgpo.train.success import deciding
from pgpo.train.trl_seam import Batch, Prompt, Rollout, SeamTrainer, function_name, torch_optimizer
from pgpo.train.user_functions import is_async

TEACHER_FILE = "pgpo_teacher.safetensors"
STATE_FILE = "pgpo_state.json"
_LOGGER = logging.getLogger(__name__)
_HELD = 8  # ours: teacher states are held for so many micro-batches of tokens; 2 H bytes each in half precision
_CHECKED_TOKENS = 32  # ours
_HEAD_TOLERANCE = 0.02  # ours: of the largest logit; bf16 rounds to 0.004, another formula misses by far more
_DEMONSTRATION_ROWS = 8  # ours: at most so many demonstrations are watched per rank and step
_TRL_METRICS = {"completion_length": "completions/mean_length", "clipped_share": "completions/clipped_ratio"}


@dataclass(frozen=True)
class Row:
    """One active completion, without padding. weight [T] multiplies its tokens' loss (importance ratios)."""

    prompt: list[int]
    teacher_prompt: list[int]
    completion: list[int]
    index: int = 0  # place in this rank's rollout
    half: int = 0  # half-batch of its question, 0 or 1 (cross-fitting)
    solved: bool = True
    rollout_logprobs: Tensor | None = None  # [T] log-probs at rollout time, where the tokens are off-policy
    weight: Tensor | None = None  # [T] or [1] vLLM / trainer mismatch correction

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
    the same on completions that are not right, and their number of tokens."""

    loss: float
    divergence: float
    gap: float
    wrong_gap: float
    wrong_tokens: float


class PGPOTrainer(SeamTrainer):
    """Train a causal language model with PGPO, or with its baselines SDPO and GRPO (`args.objective`).

    A drop-in for trl.GRPOTrainer: the same arguments, plus

    Args:
        feedback_funcs: called like reward functions; each returns one text or None per completion, on the sample's
            own attempt. The teacher reads the first text found (`args.feedback_mode`).
        grade: (completion text, dataset row) -> pgpo.tasks.graders.Grade, for held-out evaluation; by default the
            reward functions, called as in training, the one that decides on success (`args.success_reward`) counting.

    Held-out evaluation (`eval_strategy`, `trainer.evaluate()`) samples `eval_k` completions per row of
    `eval_dataset` at `eval_temperature` and reports avg@k with an interval clustered by question (held_out.py).
    A `rollout_func` samples in its own way, so evaluation asks the model itself.

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
        *,
        feedback_funcs: Callable[..., Any] | list[Callable[..., Any]] | None = None,
        grade: Callable[[str, Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PGPOConfig(f"{file_name(name.split('/')[-1])}-PGPO")
        if not isinstance(args, PGPOConfig):
            raise UserError(f"args is a {type(args).__name__}; PGPOTrainer needs a PGPOConfig (same fields and more).")
        _check_inputs(args, train_dataset, reward_funcs, kwargs)
        _check_evaluation_inputs(args, eval_dataset, grade)
        if feedback_funcs is None:
            feedback_funcs = []
        elif not isinstance(feedback_funcs, list):
            feedback_funcs = [feedback_funcs]
        self.meters = [InformationMeter(args.information_denominator) for _ in range(1 + _splits(args))]
        self.meter = self.meters[0]  # of the half-batch at work
        self.multiplier = StepMultiplier(args)
        self.teacher: Teacher | None = None
        self.guard: GuardActions | None = None
        self.templates = _templates(args)
        self._modulation: Modulation | None = None
        self._modulation_state: dict[str, Any] | None = None
        self._negative_steps = 0
        self._signal_steps = 0
        self._stepped = False
        self.watched: set[int] = set()  # rows of the rollout whose tokens are kept in `token_details`
        self.token_details: dict[int, list[TokenDetail]] = {}
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            feedback_funcs=feedback_funcs,
            **kwargs,
        )
        self.held_out_evaluation = HeldOut(self, grade)
        self._check_model(train_dataset)
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
        return self.args.objective != "grpo"

    # Teacher contexts -----------------------------------------------------------------------------------------------

    def annotate(self, batch: Batch, rollout: Rollout) -> Batch:
        mine = range(len(rollout.prompts))[rollout.local]
        success = rollout.rewards if rollout.success is None else rollout.success
        self._log_rollout(rollout, batch["completion_mask"])
        if not self.distills:
            if math.isinf(self.recorded("reward_std") or 0.0):
                largest = max(map(abs, rollout.rewards))
                raise UserError(
                    f"at step {self.state.global_step + 1}: the rewards, up to {largest:.3g}, have a variance beyond "
                    "single precision, so that every advantage would be 0; divide them."
                )
            return batch
        a = self.args
        if self.accelerator.is_main_process:
            self.success.warn_once(success, self.say)
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
                choice=a.demonstration,
                seed=a.seed,
                step=self.state.global_step,
                allow_own_success=a.allow_own_success,
                feedback_mode=a.feedback_mode,
                remove_thinking=a.remove_thinking,
                templates=self.templates,
                max_length=a.max_teacher_prompt_length,
                length=None if a.max_teacher_prompt_length is None else lambda prompt: len(render(prompt)),
            )
        except ValueError as error:
            raise UserError(f"at step {self.state.global_step + 1}: {error}") from error
        self._check_answer_prefixes(rollout.prompts, [context.prompt for context in contexts])
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

    def _log_rollout(self, rollout: Rollout, completion_mask: Tensor) -> None:
        if rollout.success is not None:
            # None of a reward that decides is no success; a sample that no function rewards is not counted.
            counted = [s for s, r in zip(rollout.success, rollout.rewards, strict=True) if not math.isnan(r)]
            self.record("success_share", sum(map(self.success.right, counted)) / max(len(counted), 1))
        for ours, trl in _TRL_METRICS.items():
            if (value := self.recorded(trl)) is not None:
                self.record(ours, value)
        lengths = self.accelerator.gather(completion_mask.sum(1)).float()
        self.record("length_tail", torch.quantile(lengths, 0.95).item())
        self.last_rollout = rollout

    @torch.no_grad()
    def _watch_demonstrations(self, batch: Batch, shown: Mapping[int, list[int]]) -> None:
        """Mean log-probability per token that the teacher gives to demonstrations shown in its own prompt."""
        rows = [
            Row([], prompt, batch["completion_ids"][j][batch["completion_mask"][j].bool()].tolist())
            for j, prompt in list(shown.items())[:_DEMONSTRATION_ROWS]
        ]
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
        rows = self._active_rows(batch)
        tokens = self._sum(sum(len(r.completion) for r in rows))
        sums = torch.zeros(len(Sums.__annotations__), dtype=torch.float64, device=self.accelerator.device)
        self.token_details = {}
        self._check_head(model, batch)
        parts = 1 + _splits(self.args)
        reshard(model)
        halves = CrossFit(model.parameters()) if parts == 2 else None
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
                last = i == rounds - 1
                with self.exchange(model, last):
                    states = states or self._teacher_states(part)
                    loss, stats = self._distill(model, part, counts, states, tokens, idle)
                    # Ranks average their gradients; the loss is a sum over ranks divided by the global token count.
                    self.backward(model, loss * self.accelerator.num_processes, last)
                sums += stats
            if halves is not None and half == 0:
                halves.stash()
        self.finite_here = bool(sums.isfinite().all())
        signal = self._modulate(halves)
        self._stepped = tokens > 0
        totals = Sums(*self._reduce(sums).tolist())
        if signal is not None:
            self._log_step(*signal, totals, tokens)
        return torch.tensor(totals.loss, device=self.accelerator.device)

    def _active_rows(self, batch: Batch) -> list[Row]:
        """This rank's completions that have a teacher and at least one token, padding removed."""
        rows = []
        loss_mask = batch["completion_mask"].bool()
        for i, teacher_prompt in enumerate(batch["teacher_prompt_ids"]):
            keep = loss_mask[i]
            if teacher_prompt is None or not keep.any():
                continue
            ratio = batch.get("importance_sampling_ratio")  # [B, T] per token or [B, 1] per sequence
            if ratio is not None:
                ratio = ratio[i][keep] if ratio.shape[1] > 1 else ratio[i]
            old = batch.get("old_per_token_logps")
            rows.append(
                Row(
                    prompt=batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist(),
                    teacher_prompt=teacher_prompt,
                    completion=batch["completion_ids"][i][keep].tolist(),
                    index=int(batch["row"][i]),
                    half=int(batch["half"][i]),
                    solved=bool(batch["solved"][i]),
                    rollout_logprobs=None if old is None else old[i][keep],
                    weight=ratio,
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
            ends = list(itertools.accumulate(len(r.completion) for r in block))
            for part in parts:
                mine = [i for bundle in part for i in bundle]
                index = torch.cat([torch.arange(ends[i] - len(block[i].completion), ends[i]) for i in mine])
                yield [block[i] for i in mine], [len(b) for b in part], states[index.to(states.hidden.device)]

    def _limits(self, teacher: bool = False) -> Limits:
        """What a run may hold and costs. teacher: its runs have no backward and no loss, and are packed by themselves.

        Except for GRPO, whose batch is TRL's, and under FSDP, where every run gathers the parameters, a run ends before
        its padding costs more than another.
        """
        run_cost, pair_cost = self._costs
        return Limits(
            budget=self.args.max_tokens_per_microbatch or math.inf,
            most=self.args.micro_batch_size or math.inf,
            run_cost=math.inf if self.gathers_layers or not self.distills else run_cost,
            pair_cost=pair_cost,
            packed=self.distills and self.passes.pack and not teacher,
            apart=not self.distills,
        )

    @cached_property
    def _costs(self) -> tuple[float, float]:
        return batching.costs(causal_lm(self.model), self.accelerator.device.type)

    def _teacher_states(self, rows: list[Row], join: bool = True) -> States:
        assert self.teacher is not None
        # The student's forward autocasts by itself once prepared; under FSDP the weights of both are cast instead.
        with contextlib.nullcontext() if self.is_fsdp_enabled else self.accelerator.autocast():
            return self.passes.teacher(
                self.teacher,
                [r.teacher_prompt for r in rows],
                [r.completion for r in rows],
                self._limits(teacher=True) if self._shares_prompts else None,
                join and self._joins,
            )

    def _distill(
        self, model: nn.Module, rows: list[Row], counts: list[int], teacher: States, tokens: float, idle: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch (its share of the global mean), and its `Sums` as a tensor; counts as in Passes.run."""
        labels = self._labels(rows)
        weights = self._token_weights(rows, 0.0 if idle else 1 / tokens)
        output: HeadOutput = self.passes.run(
            model,
            [r.prompt for r in rows],
            [r.completion for r in rows],
            lambda hidden, head: self._compare(States(hidden, head), teacher, labels, weights),
            counts,
        )
        assert output.loss is not None and output.student_logprob is not None and output.teacher_logprob is not None
        if idle:
            return output.loss, torch.zeros(len(Sums.__annotations__), dtype=torch.float64, device=labels.device)
        lengths = [len(r.completion) for r in rows]
        mask = _mask(lengths).to(labels.device)

        def grid(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)

        self.meter.add(grid(output.student_entropy), grid(output.teacher_entropy), mask)
        gap = output.student_logprob.detach() - output.teacher_logprob
        wrong = torch.tensor([not r.solved for r in rows for _ in r.completion], device=mask.device)
        self._keep_details(rows, output)
        stats = [output.loss.detach(), output.divergence, gap, torch.where(wrong, gap, 0.0), wrong]
        return output.loss, torch.stack([t.double().sum() for t in stats])

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
        fixed = torch.full((sum(len(r.completion) for r in rows),), share, device=device)
        if rows[0].weight is not None:
            ratios = [r.weight.expand(len(r.completion)) for r in rows]  # type: ignore[union-attr]
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
        """Completion tokens [N], row after row."""
        return torch.tensor([t for r in rows for t in r.completion], device=self.accelerator.device)

    def _keep_details(self, rows: list[Row], output: HeadOutput) -> None:
        start = 0
        for row in rows:
            end = start + len(row.completion)
            if row.index in self.watched:
                columns = (output.divergence, output.student_logprob, output.teacher_logprob)
                values = torch.stack([t[start:end].detach().float() for t in columns], 1).tolist()  # type: ignore[index]
                self.token_details[row.index] = [TokenDetail(t, *v) for t, v in zip(row.completion, values)]
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
        """TRL's own loss, in micro-batches: token sums add up, means over rows are weighted by rows."""
        count = len(batch["completion_ids"])
        sizes = list(zip(batch["prompt_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()))
        # Image tensors are not indexed by row, so such a batch stays whole.
        parts = [list(range(count))] if "num_images" in batch else batching.split(sizes, self._limits())
        rounds = int(self._max(len(parts)))
        by_rows = self.args.loss_type in ROW_MEAN_LOSSES
        total = torch.zeros((), device=self.accelerator.device)
        for k in range(rounds):
            index = parts[min(k, len(parts) - 1)]
            share = 0.0 if k >= len(parts) else len(index) / count if by_rows else 1.0
            last = k == rounds - 1
            with self.exchange(model, last):
                part = batch if len(index) == count else _select(batch, index, count)
                loss = self.grpo_loss(model, part) * share
                self.backward(model, loss, last)
            total += loss.detach()
        self.finite_here = bool(total.isfinite())
        if self.step_factor != 1:
            self._arm(1.0)
        return self.accelerator.reduce(total, "mean")

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
            self._arm(rho)
        return information, rho

    def forget_step(self) -> None:
        if self.distills:
            self._negative_steps, self._signal_steps, signal = self._before_step
            self.multiplier.load_state_dict(signal)

    @property
    def step_factor(self) -> float:
        """What the guard multiplies every step by, beside rho."""
        return 1.0 if self.guard is None else self.guard.step_factor

    def _arm(self, rho: float) -> None:
        if self._modulation is None:
            try:
                optimizer, stepper = torch_optimizer(self.optimizer), None
                if self.is_deepspeed_enabled:
                    optimizer, stepper = zero.inner_optimizer(optimizer), optimizer
                self._modulation = modulate(optimizer, self.args.modulated_weight_decay, stepper)
            except ValueError as error:
                raise UserError(str(error)) from error
            if self._modulation_state is not None:
                self._modulation.load_state_dict(self._modulation_state)
        self._modulation.arm(rho * self.step_factor)

    def _log_step(self, information: Information, rho: float, sums: Sums, tokens: float) -> None:
        values = {
            "information": information.information,
            "rho": rho,
            "alpha": self.args.law(self.state.global_step, self.state.max_steps).alpha
            if self.args.objective == "pgpo"
            else 0.0,
            "student_entropy": information.student_entropy,
            "teacher_entropy": information.teacher_entropy,
            "divergence": sums.divergence / max(tokens, 1),
            "active_share": information.hinted_samples / information.samples,
            "active_tokens": tokens,
            "effective_lr": self.base_learning_rate() * rho * self.step_factor,
            "negative_information_share": self._negative_steps / self._signal_steps,
        }
        if tokens:
            values["sampled_kl"] = sums.gap / tokens
        if sums.wrong_tokens:
            values["sampled_kl_wrong"] = sums.wrong_gap / sums.wrong_tokens
        for name, value in values.items():
            self.record(name, value)

    def teacher_follows(self) -> None:
        """After an optimizer step that moved the student. A batch without any teacher moves nothing."""
        if self.guard is not None and self.guard.teacher_frozen:
            return
        if self.teacher is not None and self._stepped and not self.accelerator.optimizer_step_was_skipped:
            self.teacher.update()

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
            "modulation": self._modulation.state_dict() if self._modulation is not None else None,
            "multiplier": self.multiplier.state_dict(),
            "guard": None if self.guard is None else self.guard.state_dict(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take `extra_state()` back. Raises KeyError or ValueError if it was written by another kind of run."""
        self._negative_steps, self._signal_steps = state["negative_steps"], state["signal_steps"]
        self.skips_in_a_row = state.get("skips_in_a_row", 0)
        self._modulation_state = state["modulation"]
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

    # Checks ---------------------------------------------------------------------------------------------------------

    def _check_model(self, train_dataset: Any) -> None:
        if self.tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no pad token and no eos token; set tokenizer.pad_token.")
        first = next(iter(train_dataset), None) if train_dataset is not None else None
        if first is not None and not isinstance(first["prompt"], str) and not self.tokenizer.chat_template:
            raise UserError(
                "the prompts are chat messages but the tokenizer has no chat template; set "
                "tokenizer.chat_template, use an instruction-tuned model, or give prompts as plain strings."
            )
        if (
            self.is_deepspeed_enabled
            and (problem := zero.zero_problem(self.model, self.accelerator, self.args)) is not None
        ):
            raise UserError(problem)
        if self.args.guard == "rollback" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError(
                "guard='rollback' keeps a copy of weights and optimizer, which is not sharded under FSDP or DeepSpeed; "
                "use 'rollback_teacher', 'halve_step' or 'warn'."
            )
        if (problem := adapter_problem(self.model, self.distills)) is not None:
            raise UserError(problem)
        if not self.distills:
            return
        if self.is_multimodal:
            raise UserError("self-distillation of vision-language models is not supported; use objective='grpo'.")
        if self.is_fsdp_enabled and (problem := sharding_problem(self.accelerator)) is not None:
            raise UserError(problem)


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


def _check_inputs(args: PGPOConfig, train_dataset: Any, reward_funcs: Any, kwargs: Mapping[str, Any]) -> None:
    if not reward_funcs:
        raise UserError("reward_funcs is empty; pass a function that grades completions (1.0 = right).")
    if not kwargs.get("environment_factory"):  # an environment may bring a reward of its own
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        deciding(args.success_reward, [function_name(f) for f in functions], args.objective != "grpo")
    if args.objective != "grpo":
        for name in ("tools", "environment_factory"):
            if kwargs.get(name):
                raise UserError(f"{name} is not supported with self-distillation; use objective='grpo'.")
    if isinstance(train_dataset, Dataset):
        if len(train_dataset) == 0:
            raise UserError("train_dataset is empty; check its filters and its path.")
        if "prompt" not in train_dataset.column_names:
            raise UserError(
                f"train_dataset has the columns {', '.join(train_dataset.column_names)} but no 'prompt'; rename "
                "the one that holds the chat messages or the text."
            )
        if len(train_dataset) < args.prompts_per_step:
            raise UserError(
                f"train_dataset has {len(train_dataset)} rows, fewer than prompts_per_step = {args.prompts_per_step}; "
                "lower prompts_per_step."
            )


def _check_evaluation_inputs(args: PGPOConfig, eval_dataset: Any, grade: Any) -> None:
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    for asked, given, remedy in (
        (strategy != "no", f"eval_strategy is {strategy!r}", "set eval_strategy='no'"),
        (args.eval_on_start, "eval_on_start is True", "leave it False"),
    ):
        if asked and eval_dataset is None:
            raise UserError(f"{given}, but there is no eval_dataset; pass one, or {remedy}.")
    if grade is not None and (not callable(grade) or is_async(grade)):
        raise UserError(
            f"grade is {'an async function' if callable(grade) else shown(grade)}; pass a plain function (completion "
            "text, dataset row) -> pgpo.tasks.graders.Grade."
        )


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
