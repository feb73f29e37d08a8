"""`PGPOTrainer`: trl.GRPOTrainer with self-distillation and a step scaled by its own information (docs/DEPARTURES.md).

One optimizer step, top-down; each line is a method below, or the file that it calls:

    prompts -> completions -> rewards        TRL (seam/)
    annotate      what the teacher reads     a right sibling, and/or feedback on the own attempt (teacher/contexts.py)
    optimize      the gradient               student and teacher on the same completions (distill.py, forwards.py),
                                             and/or TRL's policy loss (policy.py)
                  the signal                 entropies of all micro-batches and ranks -> I_k -> rho_k (multiplier.py)
                  the gate                   the optimizer's next step is scaled by rho_k (gate.py), and what of it
                                             is kept follows from how far it moved the policy (trust.py)
    after_step    the teacher follows        (teacher/weights.py); the guard looks for alarms (guard.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import TrainerCallback

from pgpo.alarms import CollapseGuard
from pgpo.core import Information
from pgpo.errors import UserError
from pgpo.evaluate.avg_at_k import Record
from pgpo.forward.passes import Passes
from pgpo.settings.config import PGPOConfig
from pgpo.settings.field_types import file_name
from pgpo.teacher import Teacher, build_contexts
from pgpo.teacher.contexts import TeacherContext
from pgpo.train import problems, state, zero
from pgpo.train.diagnostics import Diagnostics
from pgpo.train.distill import Distillation, TokenDetail
from pgpo.train.forwards import Forwards, release
from pgpo.train.guard import GuardActions
from pgpo.train.held_out import HeldOut
from pgpo.train.host import Host
from pgpo.train.model_card import CardTrainer
from pgpo.train.multiplier import StepSignal
from pgpo.train.policy import PolicyLoss
from pgpo.train.profile import Profiling, part
from pgpo.train.prompts import Rendered
from pgpo.train.rehearsal import Rehearsal
from pgpo.train.rows import Sample, Sums, active_samples, shown_demonstrations
from pgpo.train.seam import Batch, Rollout
from pgpo.train.sharding import keep_precision, shard
from pgpo.train.trust import Trust
from pgpo.train.user_functions import CONTEXT_COLUMN
from pgpo.train.weighting import weigh

_TRL_METRICS = {"completion_length": "completions/mean_length", "clipped_share": "completions/clipped_ratio"}


class PGPOTrainer(CardTrainer):
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
    A `rollout_func` samples in its own way; evaluation asks the model itself.

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
        problems.check_arguments(type(self), args)
        feedback_funcs, reward_funcs = problems.as_list(feedback_funcs), problems.as_list(reward_funcs)
        options = {"tools": tools, "environment_factory": environment_factory, "rollout_func": rollout_func}
        data = problems.check_inputs(args, train_dataset, eval_dataset, reward_funcs, feedback_funcs, grade, options)
        self.signal = StepSignal(args)
        self.templates = args.templates()
        self.teacher: Teacher | None = None
        self.teacher_behind = False  # whether the student has moved since the teacher followed
        self.guard: GuardActions | None = None
        self.trust: Trust | None = None
        self._moves = False  # whether the current step has a gradient
        release(model, optimizers)
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
            reads_contexts=args.distills and data.may_hold(CONTEXT_COLUMN),
            judges_late=data.late,
        )
        self.prompts, self.teacher_prompt_limit = problems.check_model(self, data)
        self.prompt_limit = self.prompts.limit, self.prompts.limit_name
        self.diagnostics = Diagnostics(args, self.say)
        self.held_out_evaluation = HeldOut(self, grade)
        problems.check_evaluation(self)
        if self.accelerator.is_fsdp2:
            keep_precision(self.accelerator)
        if self.is_deepspeed_enabled:
            zero.settle(self.model, self.accelerator, args.per_device_train_batch_size or 1, args.max_grad_norm)
        if self.distills:
            self._open_teacher()
        if self.follows_rewards:
            self.policy = PolicyLoss(self)
        if args.guard != "off":
            guard = CollapseGuard(args.guarded_signals(), args.guard_warmup, args.guard_patience)
            self.guard = GuardActions(self, args.guard, guard, args.guard_max_actions)
        self.add_callback(_AfterStep(self))
        if args.profile:
            self.add_callback(Profiling(self))

    def _open_teacher(self) -> None:
        # TRL has patched model.forward by now; Teacher strips such closures from its copy and checks the rest.
        try:
            self.teacher = Teacher(self.model, self.args.teacher, self.args.teacher_rate)
        except ValueError as error:
            raise UserError(str(error)) from error
        forwards = Forwards(self.model, self.teacher, self.args, self.engine, self.tokenizer.pad_token_id)
        coefficient = self.router_aux_loss_coef if self.aux_loss_enabled else None
        self.distillation = Distillation(self.args, self.engine, forwards, self.signal.meters, self.host, coefficient)
        self.distillation.rehearsal = Rehearsal(self, forwards) if self.args.rehearse_weight else None
        if self.args.trust != "off" or self.args.watches_steps:
            self.trust = Trust(self, forwards)
        if self.is_fsdp_enabled and self.teacher.module is not None:
            shard(self.teacher.module, self.accelerator)

    @property
    def distills(self) -> bool:
        """PGPO and SDPO learn from the teacher; GRPO does not."""
        return self.args.distills

    @property
    def follows_rewards(self) -> bool:
        """Whether TRL's policy loss, on advantages, is all of the loss or a part of it."""
        return self.args.follows_rewards

    @property
    def passes(self) -> Passes:
        return self.distillation.forwards.passes

    @property
    def token_details(self) -> dict[int, list[TokenDetail]]:
        """Tokens of the rows in `host.watched`, of the latest step."""
        return self.distillation.details if self.distills else {}

    def say(self, text: str) -> None:
        """A sentence that all ranks have found, from the main process alone."""
        if self.accelerator.is_main_process:
            self.host.say(text)

    def judge(self, rows: list[dict[str, Any]], first: int) -> None:
        problems.check_rows(self.prompts, rows, first, bool(self.environment_factories))

    # What the teacher reads -----------------------------------------------------------------------------------------

    def annotate(self, batch: Batch, rollout: Rollout) -> Batch:
        self._log_rollout(rollout)
        if self.follows_rewards:
            problems.check_spread(self, rollout)
        if not self.distills:
            return batch
        success = rollout.rewards if rollout.success is None else rollout.success
        self.success.warn_once(success, self.say)
        rendered = Rendered(self.render)  # siblings share one or two teacher prompts
        contexts = self.contexts(rollout, success, rendered)  # of all ranks, since a group may stretch over two
        problems.check_answer_prefixes(self, rollout.prompts, [context.prompt for context in contexts])
        hinted, right = [c.prompt is not None for c in contexts], [self.success.right(reward) for reward in success]
        weights = weigh(self.args.sample_weights, hinted, right, self.num_generations)
        self.diagnostics.inactive(self.state.global_step + 1, rollout.rewards, sum(w > 0 for w in weights))
        mine = range(len(rollout.prompts))[rollout.local]
        prompts = [contexts[i].prompt if weights[i] else None for i in mine]
        batch["teacher_prompt_ids"] = [None if prompt is None else rendered(prompt) for prompt in prompts]
        batch["row"] = torch.arange(len(mine))
        batch["half"] = torch.tensor([i // self.num_generations % 2 for i in mine])
        batch["solved"] = torch.tensor([right[i] for i in mine])
        if self.args.sample_weights != "equal":
            batch["sample_weight"] = torch.tensor([weights[i] for i in mine])
        if self.args.watch_demonstrations:
            shown = shown_demonstrations(contexts, batch["teacher_prompt_ids"], mine)
            if (value := self.distillation.demonstration_logprob(batch, shown)) is not None:
                self.record("demonstration_logprob", value)
        self.record("truncated_contexts", sum(c.truncated for c in contexts) / len(contexts))
        self.record("feedback_share", sum(c.feedback_used for c in contexts) / len(contexts))
        return batch

    def contexts(
        self, rollout: Rollout, success: list[float], rendered: Rendered, **changes: Any
    ) -> list[TeacherContext]:
        """What the teacher reads; `changes` of `build_contexts`' options."""
        a, limit = self.args, self.teacher_prompt_limit
        options: dict[str, Any] = dict(
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
            max_length=limit,
            length=None if limit is None else lambda prompt: len(rendered(prompt)),
        )
        try:
            return build_contexts(
                rollout.prompts, rollout.completions, success, self.num_generations, **options | changes
            )
        except ValueError as error:
            raise UserError(f"at step {self.state.global_step + 1}: {error}") from error

    def _log_rollout(self, rollout: Rollout) -> None:
        if rollout.success is not None:
            # None of a reward that decides is no success; a sample that no function rewards is not counted.
            counted = [s for s, r in zip(rollout.success, rollout.rewards, strict=True) if not math.isnan(r)]
            self.record("success_share", sum(map(self.success.right, counted)) / max(len(counted), 1))
        for ours, trl in _TRL_METRICS.items():
            if (value := self.recorded(trl)) is not None:
                self.record(ours, value)
        lengths = torch.tensor(self.engine.gather_objects(self.completion_lengths)).float()
        self.record("length_tail", torch.quantile(lengths, 0.95).item())
        self.diagnostics.flat(self.state.global_step + 1, rollout.rewards)
        self.last_rollout = rollout

    # One optimizer step ---------------------------------------------------------------------------------------------

    def active_samples(self, batch: Batch) -> list[Sample]:
        """This rank's completions that have a teacher and at least one token of the model's own."""
        return active_samples(batch)

    def optimize(self, model: nn.Module, batch: Batch) -> Tensor:
        """The gradient of the whole optimizer batch, and what the optimizer's next step makes of it."""
        if not self.distills:
            loss, self.finite_here = self.policy.backward(model, batch)
            if self.step_factor != 1:
                self.gate.scale(self.step_factor)
            return torch.tensor(loss, device=self.accelerator.device)
        if self.trust is not None:
            self.trust.prepare(batch)
        distilled = self.distillation.backward(model, batch, self.active_samples(batch))
        share, policy_loss = self.args.distillation_weight, 0.0
        if self.follows_rewards:
            policy_loss, self.finite_here = self.policy.backward(model, batch, 1 - share)
        self.finite_here = self.finite_here and distilled.finite
        self._moves = distilled.tokens > 0 or self.follows_rewards
        try:
            step, total = self.state.global_step, self.state.max_steps
            information, rho = self.signal.read(self.engine.reduce, step, total, distilled.halves)
        except ValueError as error:  # the information is not finite; the step is left out, or the run ends
            self.distrust(str(error).split(";")[0], here=not self.finite_here)
            information = None
        else:
            if self.args.objective == "pgpo" or self.step_factor != 1:
                self.gate.scale(rho * self.step_factor)
        totals = Sums(*self.engine.reduce(distilled.sums).tolist())
        if information is not None:
            self._log_step(information, rho, totals, distilled.tokens, policy_loss)
            if self.trust is not None and self._moves:
                divergence = totals.divergence / distilled.tokens if distilled.tokens else None
                self.trust.watch(divergence, information.information, rho)
        return torch.tensor(share * totals.loss + (1 - share) * policy_loss, device=self.accelerator.device)

    def forget_step(self) -> None:
        if self.distills:
            self.signal.forget()

    @property
    def step_factor(self) -> float:
        """What guard and lagged trust multiply a step by, beside rho."""
        guard = 1.0 if self.guard is None else self.guard.step_factor
        return guard if self.trust is None else guard * self.trust.form.factor

    def _log_step(self, information: Information, rho: float, sums: Sums, tokens: float, policy_loss: float) -> None:
        losses = {"policy_loss": policy_loss} if self.follows_rewards else {}
        if self.aux_loss_enabled and not self.follows_rewards:  # else TRL has logged that of all rows
            losses["aux_loss"] = sums.router_loss
        rate = self.base_learning_rate() * rho * self.step_factor
        law = self.args.law(self.state.global_step, self.state.max_steps)
        for name, value in self.signal.metrics(information, rho, law.alpha, sums, tokens, rate, losses).items():
            self.record(name, value)

    def after_step(self) -> None:
        """The teacher follows, the guard judges."""
        with part("average"):
            self.teacher_follows()
        if self.guard is not None:
            self.guard.after_step(self.state.global_step, self.step_metrics())

    def teacher_follows(self) -> None:
        """After an optimizer step that moved the student, but only every `teacher_sync_steps`-th step, if one of those
        since the last time has. A batch without any teacher moves nothing."""
        if self.teacher is None or (self.guard is not None and self.guard.teacher_frozen):
            return
        self.teacher.observe(self.step_metrics())
        self.teacher_behind |= self._moves and not self.accelerator.optimizer_step_was_skipped
        renewed = False
        if self.teacher_behind and self.state.global_step % self.args.teacher_sync_steps == 0:
            rate = self.teacher.rate if self.trust is None else self.trust.form.teacher_rate(self.teacher.rate)
            renewed = self.teacher.update(rate=rate)
            self.teacher_behind = not renewed
        if self.teacher.condition is not None:
            self.record("teacher_renewed", float(renewed))

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take back what earlier steps of a resumed run left behind (`state.collected`)."""
        self.signal.load_state_dict(saved)
        self.skips_in_a_row = saved.get("skips_in_a_row", 0)
        self.teacher_behind = saved.get("teacher_behind", False)
        self.gate.load_state_dict(saved["modulation"])

    def save_extra(self, directory: Path) -> None:
        state.save(self, directory)

    def load_extra(self, directory: Path) -> None:
        state.load(self, directory)

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
        problems.check_best_metric(self)
        return super().train(*args, **kwargs)


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: PGPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()
