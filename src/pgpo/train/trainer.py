"""`PGPOTrainer`: trl.GRPOTrainer with self-distillation and a step scaled by its own information.

One optimizer step, top-down:

    rollouts, rewards                        TRL (trl_seam.py)
    annotate    teacher contexts             demonstration = a right sibling, and/or feedback on the own attempt
    optimize    micro-batches                active samples only, sorted by length, within the token budget
                student and teacher logits on the same completion tokens
                divergence / GLOBAL number of active tokens -> backward;   entropies -> InformationMeter
                I_k over all micro-batches and ranks -> rho_k -> armed for the optimizer's step
    on_optimizer_step                        the teacher follows

Departures from lasgroup/SDPO and from TRL's SDPOTrainer are listed in docs/METHOD.md.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import TrainerCallback

from pgpo.core import (
    CrossFit,
    Information,
    InformationMeter,
    divergence,
    modulate,
    sampled_token_divergence,
    token_entropy,
)
from pgpo.core.stepping import Modulation
from pgpo.errors import UserError
from pgpo.evaluate.avg_at_k import Record, summarize
from pgpo.evaluate.run import evaluate
from pgpo.evaluate.runners import TransformersRunner
from pgpo.teacher import ContextTemplates, Teacher, build_contexts
from pgpo.train.config import ROW_MEAN_LOSSES, PGPOConfig
from pgpo.train.multiplier import StepMultiplier
from pgpo.train.trl_seam import Batch, Prompt, Rollout, SeamTrainer, torch_optimizer

TEACHER_FILE = "pgpo_teacher.safetensors"
STATE_FILE = "pgpo_state.json"
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
            weighted sum of the reward functions, one completion at a time.

    Held-out evaluation (`eval_strategy`, `trainer.evaluate()`) samples `eval_k` completions per row of
    `eval_dataset` at `eval_temperature` and reports avg@k with an interval clustered by question.

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
            args = PGPOConfig(f"{name.split('/')[-1]}-PGPO")
        if not isinstance(args, PGPOConfig):
            raise UserError(f"args is a {type(args).__name__}; PGPOTrainer needs a PGPOConfig (same fields and more).")
        _check_inputs(args, train_dataset, reward_funcs, kwargs)
        if feedback_funcs is None:
            feedback_funcs = []
        elif not isinstance(feedback_funcs, list):
            feedback_funcs = [feedback_funcs]
        self.grade = grade
        self.meters = [InformationMeter(args.information_denominator) for _ in range(1 + _splits(args))]
        self.multiplier = StepMultiplier(args)
        self.teacher: Teacher | None = None
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
        self._check_model(train_dataset)
        if self.distills:
            # TRL has patched model.forward by now; Teacher strips such closures from its copy and checks the rest.
            try:
                self.teacher = Teacher(self.model, args.teacher, args.teacher_rate)  # type: ignore[arg-type]
            except ValueError as error:
                raise UserError(str(error)) from error
            self._forward_keys = _accepted(self.model, ("position_ids", "logits_to_keep"))
            self.add_callback(_TeacherFollows(self))

    @property
    def distills(self) -> bool:
        """PGPO and SDPO learn from the teacher; GRPO does not."""
        return self.args.objective != "grpo"

    # Teacher contexts -----------------------------------------------------------------------------------------------

    def annotate(self, batch: Batch, rollout: Rollout) -> Batch:
        mine = range(len(rollout.prompts))[rollout.local]
        self._log_rollout(rollout, batch["completion_mask"])
        if not self.distills:
            return batch
        a = self.args
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
                rollout.rewards,
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
        prompts = [contexts[i].prompt for i in mine]
        batch["teacher_prompt_ids"] = [None if prompt is None else render(prompt) for prompt in prompts]
        batch["row"] = torch.arange(len(mine))
        batch["half"] = torch.tensor([i // a.num_generations % 2 for i in mine])
        batch["solved"] = torch.tensor([rollout.rewards[i] >= a.success_threshold for i in mine])
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

    def _log_rollout(self, rollout: Rollout, completion_mask: Tensor) -> None:
        rewards = [r for r in rollout.rewards if not math.isnan(r)]
        self.record("success_share", sum(r >= self.args.success_threshold for r in rewards) / max(len(rewards), 1))
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
        completions = [r.completion for r in rows]
        assert self.teacher is not None
        with self.accelerator.autocast():
            logits = self.teacher.logits(
                lambda module: self._completion_logits(module, [r.teacher_prompt for r in rows], completions)
            )
        labels, mask = self._labels(completions, logits.device)
        sums = torch.stack([(_log_prob(logits, labels, self.args.temperature) * mask).sum(), mask.sum()]).double()
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
        parts = 1 + _splits(self.args)
        halves = CrossFit(model.parameters()) if parts == 2 else None
        for half in range(parts):
            mine = [r for r in rows if parts == 1 or r.half == half]
            total = len(batch["half"]) if parts == 1 else int((batch["half"] == half).sum())
            self.meter = self.meters[half]
            self.meter.reset()
            self.meter.add_unhinted(total - len(mine))
            micro_batches = [[mine[i] for i in part] for part in self._micro_batches([r.size for r in mine])]
            # Every rank runs the same number of forwards and backwards: collectives hide in them.
            rounds = int(self._max(len(micro_batches)))
            if self.args.fp16:
                rounds = max(rounds, 1)  # a gradient scaler needs gradients in every step, if only zeros
            for i in range(rounds):
                part = micro_batches[i] if i < len(micro_batches) else None
                with self.exchange(model, last=i == rounds - 1):
                    loss, stats = self._distill(model, part or [self._idle_row(batch)], tokens, idle=part is None)
                    # Ranks average their gradients; the loss is a sum over ranks divided by the global token count.
                    self.accelerator.backward(loss * self.accelerator.num_processes)
                sums += stats
            if halves is not None and half == 0:
                halves.stash()
        information, rho = self._modulate(halves)
        self._stepped = tokens > 0
        totals = Sums(*self._reduce(sums).tolist())
        self._log_step(information, rho, totals, tokens)
        return torch.tensor(totals.loss / max(tokens, 1), device=self.accelerator.device)

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

    def _micro_batches(self, sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
        """Indices of rows that go through the model together, longest first: little is padded.

        sizes: (prompt, completion) tokens per row. Prompts are padded left and completions right, so a part takes
        rows * (longest prompt + longest completion) tokens: at most the budget, unless it is a single row.
        """
        most = self.args.micro_batch_size or len(sizes)
        budget = self.args.max_tokens_per_microbatch or math.inf
        part: list[int] = []
        prompt = completion = 0
        for i in sorted(range(len(sizes)), key=lambda i: -sum(sizes[i])):
            longest = max(prompt, sizes[i][0]) + max(completion, sizes[i][1])
            if part and (len(part) == most or (len(part) + 1) * longest > budget):
                yield part
                part, prompt, completion = [], 0, 0
            part.append(i)
            prompt, completion = max(prompt, sizes[i][0]), max(completion, sizes[i][1])
        if part:
            yield part

    def _distill(self, model: nn.Module, rows: list[Row], tokens: float, idle: bool) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch (its share of the global mean), and its `Sums` as a tensor."""
        a = self.args
        completions = [r.completion for r in rows]
        assert self.teacher is not None
        with self.accelerator.autocast():  # the student's forward autocasts by itself once prepared
            teacher_logits = self.teacher.logits(
                lambda module: self._completion_logits(module, [r.teacher_prompt for r in rows], completions)
            )
        student_logits = self._completion_logits(model, [r.prompt for r in rows], completions)
        labels, mask = self._labels(completions, student_logits.device)

        if a.divergence == "sampled_token":
            per_token = sampled_token_divergence(student_logits, teacher_logits, labels, a.temperature)
        else:
            per_token = divergence(
                student_logits,
                teacher_logits,
                kind=a.divergence,
                beta=a.divergence_beta,
                top_k=a.divergence_top_k or None,
                tail=a.divergence_tail,
                temperature=a.temperature,
            )
        per_token = torch.where(mask, per_token, 0.0)
        weighted = per_token * self._importance(rows, student_logits, labels)
        if idle:
            return weighted.sum() * 0.0, weighted.new_zeros(len(Sums.__annotations__), dtype=torch.float64)
        with torch.no_grad():
            self.meter.add(
                token_entropy(student_logits, a.temperature), token_entropy(teacher_logits, a.temperature), mask
            )
            student = _log_prob(student_logits, labels, a.temperature)
            teacher = _log_prob(teacher_logits, labels, a.temperature)
            self._keep_details(rows, per_token, student, teacher)
            wrong = mask & ~torch.tensor([[r.solved] for r in rows], device=mask.device)
            gap = torch.where(mask, student - teacher, 0.0)
            stats = torch.stack(
                [t.detach().double().sum() for t in (weighted, per_token, gap, torch.where(wrong, gap, 0.0), wrong)]
            )
        return weighted.sum() / tokens, stats

    def _labels(self, completions: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and mask of the completions, [B, T] each, padded right."""
        labels = _pad(completions, self.tokenizer.pad_token_id, "right").to(device)
        mask = _pad([[1] * len(c) for c in completions], 0, "right").bool().to(device)
        return labels, mask

    def _keep_details(self, rows: list[Row], divergence: Tensor, student: Tensor, teacher: Tensor) -> None:
        for i, row in enumerate(rows):
            if row.index in self.watched:
                count = len(row.completion)
                values = torch.stack([t[i, :count].float() for t in (divergence, student, teacher)], 1).tolist()
                self.token_details[row.index] = [TokenDetail(t, *v) for t, v in zip(row.completion, values)]

    def _importance(self, rows: list[Row], student_logits: Tensor, labels: Tensor) -> Tensor | float:
        """Detached token weights: clipped ratio to the rollout policy (SDPO) times vLLM's correction."""
        weight: Tensor | float = 1.0
        if self.args.importance_clip is not None and rows[0].rollout_logprobs is not None:
            with torch.no_grad():
                logprobs = _log_prob(student_logits, labels, self.args.temperature)
                old = _pad_rows([r.rollout_logprobs for r in rows], logprobs)
                weight = (logprobs - old).exp().clamp_max(self.args.importance_clip)
        if rows[0].weight is not None:
            length = labels.shape[1]
            ratios = [r.weight if len(r.weight) > 1 else r.weight.expand(length) for r in rows]  # type: ignore[union-attr, arg-type]
            weight = weight * _pad_rows(ratios, student_logits[..., 0])
        return weight

    def _completion_logits(self, model: nn.Module, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
        """Logits that predict each completion token: [B, T, V]; prompts padded left, completions right."""
        device = self.accelerator.device
        pad = self.tokenizer.pad_token_id
        ids = torch.cat([_pad(prompts, pad, "left"), _pad(completions, pad, "right")], dim=1).to(device)
        mask = torch.cat(
            [_pad([[1] * len(p) for p in prompts], 0, "left"), _pad([[1] * len(c) for c in completions], 0, "right")],
            dim=1,
        ).to(device)
        keep = max(map(len, completions)) + 1
        extra: dict[str, Any] = {"use_cache": False}
        if "position_ids" in self._forward_keys:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        if "logits_to_keep" in self._forward_keys:
            extra["logits_to_keep"] = keep
        logits = model(input_ids=ids, attention_mask=mask, **extra).logits
        return logits[:, -keep:-1]

    def _optimize_grpo(self, model: nn.Module, batch: Batch) -> Tensor:
        """TRL's own loss, in micro-batches: token sums add up, means over rows are weighted by rows."""
        count = len(batch["completion_ids"])
        sizes = list(zip(batch["prompt_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()))
        # Image tensors are not indexed by row, so such a batch stays whole.
        parts = [list(range(count))] if "num_images" in batch else list(self._micro_batches(sizes))
        rounds = int(self._max(len(parts)))
        by_rows = self.args.loss_type in ROW_MEAN_LOSSES
        total = torch.zeros((), device=self.accelerator.device)
        for k in range(rounds):
            index = parts[min(k, len(parts) - 1)]
            share = 0.0 if k >= len(parts) else len(index) / count if by_rows else 1.0
            with self.exchange(model, last=k == rounds - 1):
                part = batch if len(index) == count else _select(batch, index, count)
                loss = self.grpo_loss(model, part) * share
                self.accelerator.backward(loss)
            total += loss.detach()
        return self.accelerator.reduce(total, "mean")

    # The signal -----------------------------------------------------------------------------------------------------

    def _modulate(self, halves: CrossFit | None) -> tuple[Information, float]:
        """Read the meters, and arm the optimizer with the multiplier of the step that follows."""
        try:
            parts = [meter.summary(self._reduce) for meter in self.meters]
        except ValueError as error:
            if halves is not None:
                halves.discard()
            raise UserError(f"at step {self.state.global_step + 1}: {error}") from error
        information = pooled(parts, self.args.information_denominator)
        self._signal_steps += 1
        self._negative_steps += information.information < 0
        gaps = [part.information for part in parts] if halves is not None else []
        rhos = self.multiplier(self.state.global_step, self.state.max_steps, information.information, gaps)
        rho = rhos[0] if halves is None else halves.combine(*rhos)
        if self.args.objective == "pgpo":
            self._arm(rho)
        return information, rho

    def _arm(self, rho: float) -> None:
        if self._modulation is None:
            try:
                self._modulation = modulate(torch_optimizer(self.optimizer), self.args.modulated_weight_decay)
            except ValueError as error:
                raise UserError(str(error)) from error
            if self._modulation_state is not None:
                self._modulation.load_state_dict(self._modulation_state)
        self._modulation.arm(rho)

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
            "effective_lr": self.base_learning_rate() * rho,
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

    def save_extra(self, directory: Path) -> None:
        from safetensors.torch import save_file

        state = {
            "negative_steps": self._negative_steps,
            "signal_steps": self._signal_steps,
            "modulation": self._modulation.state_dict() if self._modulation is not None else None,
            "multiplier": self.multiplier.state_dict(),
        }
        tensors: dict[str, Tensor] = {}
        if self.teacher is not None:
            saved = self.teacher.state_dict()
            state["teacher"] = {"kind": saved["kind"], "rate": saved["rate"]}
            for part in ("parameters", "buffers"):
                tensors |= {f"{part}/{name}": t.contiguous() for name, t in saved[part].items()}
        if self.args.should_save:
            if tensors:
                save_file(tensors, directory / TEACHER_FILE)
            (directory / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")

    def load_extra(self, directory: Path) -> None:
        from safetensors.torch import load_file

        try:
            state = json.loads((directory / STATE_FILE).read_text())
            self._negative_steps, self._signal_steps = state["negative_steps"], state["signal_steps"]
            self._modulation_state = state["modulation"]
            self.multiplier.load_state_dict(state["multiplier"])
            if self.teacher is not None:
                if state.get("teacher") is None:
                    raise ValueError("it was written by a run without a teacher")
                saved: dict[str, Any] = {**state["teacher"], "parameters": {}, "buffers": {}}
                if (directory / TEACHER_FILE).exists():
                    for key, tensor in load_file(directory / TEACHER_FILE).items():
                        part, name = key.split("/", 1)
                        saved[part][name] = tensor
                self.teacher.load_state_dict(saved)
        except Exception as error:
            raise UserError(
                f"the checkpoint {directory.name} cannot be continued ({error}); resume from an earlier one."
            ) from error

    # Held-out evaluation --------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """avg@k, pass@k and maj@k on held-out rows, with the evaluation's own sampling; logged like any metric."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            results: dict[str, float] = {}
            for name, part in data.items():
                results |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return results
        if data is None:
            raise UserError("there is no eval_dataset to evaluate on; pass one to the trainer or to evaluate().")
        rows = list(data)
        if not rows or any("prompt" not in row for row in rows):
            raise UserError("eval_dataset needs rows, each with a 'prompt' (chat messages or text); check its columns.")
        self.last_records = self.held_out_records(rows)
        summary = summarize(self.last_records, self.args.eval_k).as_dict()
        metrics = {
            f"{metric_key_prefix}_{name}": value for name, value in summary.items() if isinstance(value, (int, float))
        }
        self.model.eval()  # TRL files a log under train or eval by the model's mode; the next step trains again
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_records(self, rows: list[dict[str, Any]], seed: int | None = None) -> list[Record]:
        """`eval_k` graded completions for every row, gathered from all ranks."""
        rows = [{"id": str(i), "domain": "", **row} for i, row in enumerate(rows)]
        seed = self.args.seed if seed is None else seed
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = rows[rank::ranks]
        if self.args.use_vllm:
            # Every rank calls the engine with equally many prompts: a short rank repeats one and drops it again.
            short = len(mine) * ranks < len(rows)
            filled = [*mine, {**rows[0], "id": "filler"}] if short else mine
            records = evaluate(filled, self._vllm_generate, self._grade, self.args.eval_k, seed)
            records = records[: len(mine) * self.args.eval_k]
        else:
            with self.generation_model() as model:
                runner = TransformersRunner(
                    model,
                    self.tokenizer,
                    temperature=self.args.eval_temperature,
                    top_p=self.args.eval_top_p,
                    max_new_tokens=self.args.max_completion_length,
                    batch_size=self.args.eval_batch_size,
                    chat_template_kwargs=self.args.chat_template_kwargs,
                )
                records = evaluate(mine, runner, self._grade, self.args.eval_k, seed) if mine else []
        return self.gather_objects(records)

    def _vllm_generate(self, prompts: list[Any], k: int, seed: int) -> list[list[str]]:
        """TRL's vLLM engine as a `generate` callable, with the evaluation's sampling; its seed is the engine's."""
        repeated = [ids for ids in map(self.render, prompts) for _ in range(k)]
        with self.vllm_sampling(self.args.eval_temperature, self.args.eval_top_p) as engine:
            _, completions, _, _ = engine.generate(prompts=repeated, images=None, num_generations=k)
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return [texts[i * k : (i + 1) * k] for i in range(len(prompts))]

    def _grade(self, text: str, row: Mapping[str, Any]) -> Any:
        if self.grade is not None:
            return self.grade(text, row)
        from pgpo.tasks.graders import Grade

        prompt = row["prompt"]
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        columns = {k: [v] for k, v in row.items() if k not in ("prompt", "completion")}
        reward = 0.0
        functions: list[Any] = self.reward_funcs
        for function, weight in zip(functions, self.reward_weights.tolist()):
            if isinstance(function, nn.Module) or inspect.iscoroutinefunction(function):
                raise UserError("a reward model or async reward cannot grade held-out completions; pass grade=.")
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            value = function(
                prompts=[prompt],
                completions=[completion],
                completion_ids=[ids],
                trainer_state=self.state,
                log_extra=lambda *_: None,
                log_metric=lambda *_: None,
                **columns,
            )[0]
            reward += weight * (value or 0.0)
        return Grade(reward=reward, answer=None, well_formed=True, feedback=None)

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
        if self.is_deepspeed_enabled:
            # accelerate steps DeepSpeed's engine inside backward(), that is after every micro-batch and before rho.
            raise UserError("DeepSpeed is not supported, because its engine steps inside backward(); use DDP or FSDP.")
        if not self.distills:
            return
        if self.is_multimodal:
            raise UserError("self-distillation of vision-language models is not supported; use objective='grpo'.")
        separate = self.args.teacher != "live" and not hasattr(self.model, "peft_config")
        if separate and self.is_fsdp_enabled:
            raise UserError(
                f"teacher={self.args.teacher!r} keeps a second full model, which is not sharded under FSDP; use DDP, "
                "train LoRA (peft_config), or teacher='live'."
            )


class _TeacherFollows(TrainerCallback):
    def __init__(self, trainer: PGPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.teacher_follows()


def _check_inputs(args: PGPOConfig, train_dataset: Any, reward_funcs: Any, kwargs: Mapping[str, Any]) -> None:
    if not reward_funcs:
        raise UserError("reward_funcs is empty; pass a function that grades completions (1.0 = right).")
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


def _log_prob(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the labels [B, T], nats, fp32."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def _accepted(model: Any, names: tuple[str, ...]) -> set[str]:
    """Which keyword arguments the causal language model's own forward takes."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return {name for name in names if name in inspect.signature(type(base).forward).parameters}


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    """Rows of unequal length -> [B, longest]."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    left = side == "left"
    return torch.tensor([f + list(row) if left else list(row) + f for f, row in zip(fill, rows)])


def _pad_rows(rows: Sequence[Any], like: Tensor) -> Tensor:
    """Rows [T_i] into the right-padded shape of `like` [B, T]."""
    out = torch.zeros_like(like, dtype=torch.float32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row[: like.shape[1]]
    return out


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
