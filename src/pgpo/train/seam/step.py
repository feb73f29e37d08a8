"""TRL's members that make a training step, as public hooks.

Flow of one Trainer step, which is one optimizer step:

    TRL: prompts -> completions -> rewards     (`_generate_and_score_completions`)
      -> annotate(batch, rollout)              hook: teacher contexts join the batch
    TRL: shuffle, split, buffer                (`_prepare_inputs`)
      -> optimize(model, batch) -> loss        hook: micro-batches, backward, rho
    transformers: clip, optimizer.step(), scheduler, log, save
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_callable_name, get_config_model_id

from pgpo.errors import UserError
from pgpo.evaluate.runners import TransformersRunner, answer_text, render_prompt, shared_options, trimmed
from pgpo.forward.batching import positions
from pgpo.forward.open_model import causal_lm
from pgpo.forward.routers import Load, watched
from pgpo.train import zero
from pgpo.train.engine import Engine
from pgpo.train.gate import StepGate
from pgpo.train.host import Host
from pgpo.train.ranks import watch_ranks
from pgpo.train.success import Success, deciding, weighted_sum
from pgpo.train.user_functions import (
    CONTEXT_COLUMN,
    REWARD_ARGUMENTS,
    call,
    call_async,
    check_rewards,
    check_texts,
    is_async,
)
from pgpo.visible import is_thinking_tag, opens_thinking

MOST_SKIPS = 5  # ours: after so many steps in a row that were skipped, training stops
_OWN = "pgpo_"  # begin of the names of our own files in a checkpoint
_TIE = 1e-5  # ours: nats; entropies of equal tokens from two fp32 forwards differ by 1e-6
# State of TRL's adaptive entropy coefficient, which its loss moves on.
_CONTROLLER = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
# What TRL's GRPO loss reads of every row, and what it takes for nothing behind a row's end.
_LOSS_INPUTS = {
    "prompt_ids": 0,
    "prompt_mask": 0,
    "completion_ids": 0,
    "completion_mask": 0,
    "tool_mask": 1,
    "advantages": 0,
    "old_per_token_logps": 0,
    "ref_per_token_logps": 0,
    "sampling_per_token_logps": 0,
    "importance_sampling_ratio": 1,
}
# Methods that a subclass may override for TRL's trainer, which calls them, and for nothing here.
_NEVER_CALLED = {
    "compute_loss": "override `optimize`",
    "prediction_step": "pass grade=, or override `evaluate`",
    "evaluation_loop": "pass grade=, or override `evaluate`",
    "get_eval_dataloader": "pass eval_dataset, or override `evaluate`",
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Batch = dict[str, Any]
Prompt = Any  # a list of chat messages, or a plain string
Ids = list[list[int]]  # one list of tokens per completion or prompt


@dataclass(frozen=True)
class HeldOutSampler:
    """What samples in place of training's sampler: (token ids of prompts, completions per prompt) -> token ids.

    Each prompt stands `repeats` times in a row.
    """

    sample: Callable[[Ids, int], Ids]
    repeats: int


@dataclass(frozen=True)
class Rollout:
    """What the ranks generated together, in rank order; rows of one question are consecutive.

    Attributes:
        prompts: N prompts as given in the dataset.
        completions: N texts.
        rewards: [N] weighted sum over the reward functions.
        success: [N] rewards that tell right solutions (success.py), nan where there is none; None if nothing tells.
        feedback: N texts or None, or None if there are neither feedback functions nor a column of contexts.
        local: this rank's rows.
        problem: what is not finite in the rewards, with on_nonfinite="skip".
        opened: N flags, whether a completion begins inside a thinking block that its prompt opened; None = nowhere.
    """

    prompts: list[Prompt]
    completions: list[str]
    rewards: list[float]
    feedback: list[str | None] | None
    local: slice
    problem: str | None = None
    opened: list[bool] | None = None
    success: list[float] | None = None


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the completion tokens of some rows and entropies at their places, [B, T], in nats."""

    logps: Tensor
    entropies: Tensor

    @classmethod
    def unknown(cls, batch: Batch) -> Scores:
        """Before any forward: such that no importance ratio overflows."""
        nothing = torch.zeros(batch["completion_ids"].shape, device=batch["completion_ids"].device)
        return cls(batch.get("old_per_token_logps", nothing).float(), nothing)

    def placed(self, rows: Tensor, part: Scores) -> Scores:
        """These with those of the `part` [len(rows), <= T] in its rows, gradient included."""

        def place(whole: Tensor, some: Tensor) -> Tensor:
            wide = nn.functional.pad(some, (0, whole.shape[1] - some.shape[1]))
            return whole.index_copy(0, rows, wide.to(whole.dtype))

        return Scores(place(self.logps, part.logps), place(self.entropies, part.entropies))

    def detached(self) -> Scores:
        return Scores(self.logps.detach(), self.entropies.detach())


class _OneProcess:
    """An accelerator as TRL's loss sees it where the batch of all ranks lies before it: nobody to ask."""

    num_processes = 1

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def pad_across_processes(self, tensor: Tensor, dim: int, pad_index: float) -> Tensor:
        return tensor


class StepSeam(GRPOTrainer):
    """GRPOTrainer with public hooks in place of the private members that make a step. Subclass it."""

    _tag_names: ClassVar = ["trl", "pgpo"]
    _name = "PGPO"
    _paper: ClassVar = {"title": "Physics-Guided Policy Optimization with Self-Distillation", "id": "2606.03620"}

    def __init__(
        self,
        *args: Any,
        feedback_funcs: list[Callable[..., Any]],
        reads_contexts: bool = False,
        judges_late: bool = False,
        host: Host,
        **kwargs: Any,
    ) -> None:
        """reads_contexts: rows may hold a context for the teacher. judges_late: `judge` sees rows as they are read."""
        self.feedback_funcs, self.reads_contexts, self.judges_late = feedback_funcs, reads_contexts, judges_late
        self.host = host
        reward_funcs = kwargs.get("reward_funcs") or []
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        kwargs["reward_funcs"] = [self._guarded(f) for f in reward_funcs]
        if kwargs.get("rollout_func") is not None:
            kwargs["rollout_func"] = self._checked(kwargs["rollout_func"])
        self._forwarded: tuple[Tensor, Tensor, Tensor | None] | None = None  # what TRL's loss is to take for a forward
        self._captured: tuple[list[Prompt], list[str], list[bool], Tensor, list[str | None] | None] | None = None
        self.prompt_limit: tuple[int | None, str] = None, ""  # tokens, and where the limit comes from
        self._held_out: HeldOutSampler | None = None  # while held-out rows are sampled and graded
        self._recorded_before: dict[str, int] = {}  # scalars per name when this training step began
        self._grad_norm: float | None = None
        self._failure: UserError | None = None  # of a user's function on this rank, until all ranks know of it
        self._problem: str | None = None  # what is not finite in the rewards of this rank
        self._distrusted: str | None = None  # what is not finite in the step at work
        self.finite_here = True  # whether what this rank put into the step is finite
        self.skips_in_a_row = 0
        self.last_rollout: Rollout | None = None
        self.gate = StepGate(kwargs["args"].modulated_weight_decay)
        self.completion_lengths: list[int] = []  # of the latest rollout on this rank: tokens that the model wrote
        self._watching = False
        super().__init__(*args, **kwargs)
        functions: list[Any] = self.reward_funcs  # type: ignore[has-type]
        own = functions[len(reward_funcs) :]  # get_reward of environments, which TRL appends
        self.reward_funcs = functions[: len(reward_funcs)] + [self._guarded(f) for f in own]
        decides = deciding(self.args.success_reward, self.reward_func_names, self.args.distills)
        self.success = Success(decides, self.args.success_threshold)
        if self.args.distills:
            # TRL cuts a completion behind these alone; what fills it up behind a stop of the user's would be trained.
            self.eos_token_ids = list(dict.fromkeys(self._stops))

    # Hooks ----------------------------------------------------------------------------------------------------

    def annotate(self, batch: Batch, rollout: Rollout) -> Batch:
        """Add what the loss needs to this rank's batch; lists and tensors must have one entry per row."""
        raise NotImplementedError

    def optimize(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run forward and backward over the whole optimizer batch of this rank; return the loss to log."""
        raise NotImplementedError

    def judge(self, rows: list[dict[str, Any]], first: int) -> None:
        """Raise UserError for a row that cannot be used; `first` is the place of the first one in the stream."""

    def forget_step(self) -> None:
        """Undo what `optimize` has noted of a step that is skipped."""

    @classmethod
    def unused_override(cls, distills: bool) -> str | None:
        """Which method of a user's subclass would never be called, as a sentence."""
        policy = {"_compute_loss": "override `optimize`, or use objective='grpo'"} if distills else {}
        for name, remedy in (_NEVER_CALLED | policy).items():
            if getattr(cls, name) is not getattr(GRPOTrainer, name):
                return f"{cls.__name__} overrides {name}, which PGPOTrainer never calls; {remedy}."
        return None

    # Services for the subclass ----------------------------------------------------------------------------------

    @functools.cached_property
    def engine(self) -> Engine:
        """The processes of this run."""
        return Engine(self.accelerator, bool(self.is_fsdp_enabled), bool(self.is_deepspeed_enabled))

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def is_multimodal(self) -> bool:
        return bool(self._is_vlm)

    def record(self, name: str, value: float) -> None:
        """Add a scalar to the log of this training step; call it on every rank with the same value."""
        self._metrics["train"][name].append(value)

    def rescale_recorded(self, name: str, factor: float) -> None:
        """Multiply the latest scalar of this training step, as `record` took it."""
        self._metrics["train"][name][-1] *= factor

    def recorded(self, name: str) -> float | None:
        """The latest scalar TRL recorded in this step, e.g. 'completions/mean_length'."""
        values = self._metrics["train"].get(name)
        return values[-1] if values else None

    def step_metrics(self) -> dict[str, float]:
        """What was recorded in the training step that has just ended, and its gradient norm; equal on all ranks."""
        new = {name: values[self._recorded_before.get(name, 0) :] for name, values in self._metrics["train"].items()}
        found = {name: sum(values) / len(values) for name, values in new.items() if values}
        return found if self._grad_norm is None else found | {"grad_norm": self._grad_norm}

    def distrust(self, cause: str, here: bool | None) -> None:
        """Something in the step at work is not finite: it must not update anything. Every rank must call it.

        Args:
            here: whether this rank's part is not finite; None where the cause names its place.

        Raises:
            UserError: with on_nonfinite="stop". With "skip" the optimizer's step is left out.
        """
        step = f"step {self.state.global_step + 1}"
        if here is not None:
            found = [str(rank) for rank, culprit in enumerate(self.engine.gather_objects([here])) if culprit]
            if not found:  # an overflow in the sum over ranks
                found = ["0"] if self.accelerator.num_processes == 1 else ["all"]
            cause = f"{cause} (rank {', '.join(found)})"
        self._distrusted = self._distrusted or cause
        if self.args.on_nonfinite == "stop":
            raise UserError(
                f"at {step}: {cause}; nothing was updated. Look for inf or nan in rewards, importance ratios or "
                "logits, lower the learning rate, or set on_nonfinite='skip'."
            )

    def grpo_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """TRL's GRPO loss of a batch of padded tensors, with its metrics, in one forward."""
        return self._compute_loss(model, batch)

    def grpo_scores(self, model: nn.Module, batch: Batch) -> tuple[Scores, Load | None]:
        """What TRL's GRPO loss takes from the model's forward over some rows, and the load of its routers, if it has
        any that the loss balances."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        taken = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        options = {name: batch[name] for name in taken if name in batch}  # images
        options |= dict(compute_entropy=True, compute_aux_loss=self.aux_loss_enabled)
        loads: list[Load] = []
        with watched(causal_lm(self.model), loads) if self.aux_loss_enabled else contextlib.nullcontext():
            width = batch["completion_ids"].shape[1]
            logps, entropies, _ = self._get_per_token_logps_and_entropies(model, ids, mask, width, **options)
        return Scores(logps, entropies), sum(loads[1:], loads[0]) if loads else None

    def grpo_loss_of(self, batch: Batch, scores: Scores, router_loss: Tensor | None, record: bool = False) -> Tensor:
        """TRL's GRPO loss of a batch whose forwards have been run, as one process computes it that holds the batch.

        record: let TRL write its metrics and move its entropy controller on.
        """
        kept = {name: getattr(self, name) for name in ("accelerator", "_metrics", *_CONTROLLER)}
        self.accelerator: Any = _OneProcess(kept["accelerator"])
        if not record:
            self._metrics: Any = {mode: collections.defaultdict(list) for mode in kept["_metrics"]}
        self._forwarded = (scores.logps, scores.entropies, router_loss)
        try:
            return self._compute_loss(self.model, batch)
        finally:
            self._forwarded = None
            for name, value in kept.items():
                if not record or name == "accelerator":
                    setattr(self, name, value)

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """TRL's tokens of high entropy. Siblings begin with equal entropies, between which rounding must not choose
        where they come from several forwards."""
        chosen: Tensor = super().get_high_entropy_mask(entropies, mask, threshold)
        if self._forwarded is None or not chosen.any():
            return chosen
        return mask.bool() & (entropies >= entropies[chosen].min() - _TIE)

    @property
    def couples_rows(self) -> bool:
        """Whether the gradient of a row in TRL's GRPO loss depends on forwards of other rows: the quantile of the
        entropies does, and the load of the routers."""
        return bool(self.top_entropy_quantile < 1.0 or self.aux_loss_enabled)

    def grpo_batch(self, batch: Batch) -> Batch:
        """What TRL's GRPO loss reads of the rows of all ranks, in rank order."""
        found = {
            name: self.engine.gather_rows(batch[name], filler) for name, filler in _LOSS_INPUTS.items() if name in batch
        }
        return found | {"num_items_in_batch": batch["num_items_in_batch"]}

    def raise_together(self) -> None:
        """End all ranks with the sentence of a user's function that failed on one. Every rank must call it."""
        failure, self._failure = self._failure, None
        for text in self.engine.gather_objects([None if failure is None else str(failure)]):
            if text is not None:
                raise UserError(text) from failure

    def base_learning_rate(self) -> float:
        """The scheduler's learning rate of this step, before any modulation."""
        return float(self._get_learning_rate())

    def render(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, ready for generation, by the same template as the student's prompts."""
        return render_prompt(
            self.processing_class, prompt, chat_template=self.chat_template, **self.chat_template_kwargs
        )

    def answer_prefix(self, prompt: Prompt) -> str:
        """Text that the chat template puts behind the last message to open the answer; none for plain text."""
        if isinstance(prompt, str):
            return ""
        opened, plain = (
            self.processing_class.apply_chat_template(
                conversation=prompt,
                chat_template=self.chat_template,
                add_generation_prompt=opening,
                tokenize=False,
                **self.chat_template_kwargs,
            )
            for opening in (True, False)
        )
        shared = (i for i, (a, b) in enumerate(zip(opened, plain)) if a != b)
        return str(opened[next(shared, min(len(opened), len(plain))) :])

    @property
    def unseen_thinking_tags(self) -> list[str]:
        """Thinking tags that decoding drops as special tokens, where TRL does not parse the completion either."""
        if any(getattr(self.tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
            return []
        return sorted(
            {
                t.content
                for t in self.tokenizer.added_tokens_decoder.values()
                if t.special and is_thinking_tag(t.content)
            }
        )

    def opens_thinking(self, prompt: Prompt) -> bool:
        """Whether a prompt, rendered for generation, ends inside a thinking block, as behind a template's `<think>`."""
        if isinstance(prompt, str):
            return opens_thinking(prompt)
        text = self.processing_class.apply_chat_template(
            conversation=prompt,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **self.chat_template_kwargs,
        )
        return opens_thinking(str(text))

    @contextlib.contextmanager
    def generation_model(self) -> Iterator[nn.Module]:
        """The student, gathered and unwrapped for `generate`."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model

    def held_out_sampler(self, repeats: int, seed: int) -> HeldOutSampler:
        """The evaluation's own sampling (`eval_*`), with training's stops, lengths and forbidden words."""
        a = self.args

        def by_vllm(prompts: Ids, num_generations: int) -> Ids:
            with self._vllm_sampling(a.eval_temperature, a.eval_top_p) as engine:
                return engine.generate(prompts=prompts, images=None, num_generations=num_generations)[1]

        def by_transformers(prompts: Ids, num_generations: int) -> Ids:
            with self.generation_model() as model, sampling_explained(f"after step {self.state.global_step}"):
                runner = TransformersRunner(
                    model,
                    self.tokenizer,
                    temperature=a.eval_temperature,
                    top_p=a.eval_top_p,
                    max_new_tokens=self.generation_config.max_new_tokens,
                    batch_size=a.eval_batch_size,
                    generation=self.generation_config.to_dict(),
                    rendered=True,
                )
                return runner.sample(prompts, seed)

        return HeldOutSampler(by_vllm if self.use_vllm else by_transformers, repeats)

    @contextlib.contextmanager
    def held_out(self, sampler: HeldOutSampler) -> Iterator[None]:
        """Inside, `complete` and `score` work on held-out rows; afterwards training is as it was before."""
        modes = [(module, module.training) for module in self.model.modules()]
        before = {name: getattr(self, name) for name in ("rollout_func", "num_generations_eval")}
        self.rollout_func: Any = None  # it has its own sampling
        self.num_generations_eval = sampler.repeats
        self._held_out = sampler
        self.model.eval()  # TRL files what it records under train or eval by the model's mode
        try:
            yield
        finally:
            self._held_out = None
            self.rollout_func, self.num_generations_eval = before.values()
            for module, training in modes:
                module.training = training
            self._metrics["eval"].clear()
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()

    def complete(self, prompts: list[Prompt]) -> tuple[Ids, list[Any]]:
        """Sampled token ids and what reward functions see of them, by the code that makes both in training.

        Every rank must call it, with equally many prompts.
        """
        if self.tools:
            tools = {t.__name__: t for t in self._standalone_tools}
            asynchronous = {name: t for name, t in tools.items() if is_async(t)}
            self._async_tool_dicts: Any = [asynchronous] * len(prompts)
            self._sync_tool_dicts: Any = [{n: t for n, t in tools.items() if n not in asynchronous}] * len(prompts)
        _, ids, _, completions, *_ = self._generate(prompts)
        return ids, completions

    def score(self, rows: list[Batch], prompts: list[Prompt], completions: list[Any], ids: Ids) -> Tensor:
        """Rewards of held-out completions: [this rank's, functions], nan where a function does not apply.

        Every rank must call it, with equally many completions.
        """
        self._problem = None
        rows = self.told_of_thinking(rows, prompts, completions, ids)
        per_function = super()._calculate_rewards(rows, prompts, completions, ids)  # all ranks
        self.raise_together()
        if self._problem is not None:
            self.host.say(f"{self._problem} It counts as None.")
            self._problem = None
        start = self.accelerator.process_index * len(prompts)
        return per_function[start : start + len(prompts)].cpu()

    def logged_by_functions(self) -> dict[str, float]:
        """Means over all ranks of what reward functions gave to `log_metric` on held-out completions."""
        found: dict[str, list[float]] = {}
        for logged in self.engine.gather_objects(
            [{name: list(values) for name, values in self._pending_metrics.items()}]
        ):
            for name, values in logged.items():
                found.setdefault(name, []).extend(values)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def ended(self, ids: list[int]) -> bool:
        """Whether a completion ends by a stop token, not at the length limit; as TRL judges."""
        return ids[-1] in (*self._stops, self.tokenizer.pad_token_id)

    @contextlib.contextmanager
    def _vllm_sampling(self, temperature: float, top_p: float) -> Iterator[Any]:
        """TRL's vLLM engine with other sampling parameters and the current weights."""
        engine = self.vllm_generation
        other: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            **{"top_k": 0, "min_p": None, "repetition_penalty": 1.0},  # off
            "generation_kwargs": shared_options(self.args.generation_kwargs or {}),
        }
        before = {name: getattr(engine, name, None) for name in other}
        if self.state.global_step != self._last_loaded_step:
            engine.sync_weights()
            self._last_loaded_step: int = self.state.global_step
        try:
            for name, value in other.items():
                setattr(engine, name, value)
            yield engine
        finally:
            for name, value in before.items():
                setattr(engine, name, value)

    # TRL's members ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def rank_watch(self) -> Iterator[None]:
        """End this process if another rank is lost (`watch_ranks`); may be opened around `train`."""
        if self._watching:
            yield
            return
        self._watching = True
        try:
            with watch_ranks(self.args.rank_timeout, lambda: self.host.advice(self.state.global_step), self.host.say):
                yield
        finally:
            self._watching = False

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        start = time.perf_counter()
        self._recorded_before = {name: len(values) for name, values in self._metrics["train"].items()}
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self.gate.open(self.optimizer, model if self.is_deepspeed_enabled else None)
        self._distrusted, self.finite_here = None, True
        batch = self._prepare_inputs(inputs)
        generated = time.perf_counter()
        if self.last_rollout is not None and self.last_rollout.problem is not None:
            self.distrust(self.last_rollout.problem, here=None)
        with self.compute_loss_context_manager():
            loss = self.optimize(model, batch)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        self._step += 1
        end = time.perf_counter()
        self.record("generation_seconds", generated - start)
        self.record("update_seconds", end - generated)
        self.record("step_time", end - start)
        return loss.detach()

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        self._check_weights()
        self._judge(inputs)
        with sampling_explained(f"at step {self.state.global_step + 1}"):
            batch = super()._generate_and_score_completions(inputs)
        assert self._captured is not None
        prompts, completions, opened, per_function, feedback = self._captured
        self._captured = None
        rows = len(prompts)
        gathered_prompts, gathered_texts = self.engine.gather_objects(prompts), self.engine.gather_objects(completions)
        start = self.accelerator.process_index * rows
        rollout = Rollout(
            prompts=gathered_prompts,
            completions=gathered_texts,
            rewards=weighted_sum(per_function, self.reward_weights).tolist(),
            success=self.success.of(per_function, self.reward_weights, self.reward_func_names),
            feedback=None if feedback is None else self.engine.gather_objects(feedback),
            local=slice(start, start + rows),
            problem=next((p for p in self.engine.gather_objects([self._problem]) if p is not None), None),
            opened=flags if any(flags := self.engine.gather_objects(opened)) else None,
        )
        return self.annotate(batch, rollout)

    def _generate(self, prompts: list[Prompt]) -> Any:
        generated = super()._generate(prompts)
        _, completions, masks = generated[:3]
        counted = completions if masks is None else masks
        self.completion_lengths = [len(ids) if masks is None else int(sum(ids)) for ids in counted]
        return generated

    def _calculate_rewards(
        self, inputs: list[Batch], prompts: list[Prompt], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        self._problem = None
        inputs = self.told_of_thinking(inputs, prompts, completions, completion_ids_list)
        per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # all ranks
        if weighted_sum(per_function, self.reward_weights).isinf().any():
            self._problem = self._problem or f"the weighted sum of the rewards is inf {self._place}"
            if self.args.on_nonfinite == "stop":
                self.fail(UserError(f"{self._problem}; lower reward_weights, or the rewards."))
        columns = {k: [row[k] for row in inputs] for k in inputs[0] if k not in ("prompt", "completion")}
        feedback = self._feedback(
            prompts=prompts, completions=completions, completion_ids=completion_ids_list, **columns
        )
        if self.reads_contexts:
            given = [row.get(CONTEXT_COLUMN) for row in inputs]
            feedback = [a or b for a, b in zip(feedback or given, given, strict=True)]
        self.raise_together()
        opened = [bool(row.get("thinking_opened", False)) for row in inputs]
        self._captured = (prompts, [answer_text(c) for c in completions], opened, per_function, feedback)
        return per_function

    def told_of_thinking(
        self, rows: list[Batch], prompts: list[Prompt], completions: list[Any], ids: Ids
    ) -> list[Batch]:
        """The rows of completions, with a column "thinking_opened" if any of them begins inside a thinking block that
        its prompt opened and still holds it: where the tokenizer has a response template and the block is closed, TRL
        has cut it off."""
        opens = {repr(prompt): self.opens_thinking(prompt) for prompt in {repr(p): p for p in prompts}.values()}
        if not any(opens.values()):
            return rows
        flags = [
            opens[repr(prompt)]
            and self.tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer_text(completion).strip()
            for prompt, completion, tokens in zip(prompts, completions, ids, strict=True)
        ]
        return [{"thinking_opened": flag, **row} for flag, row in zip(flags, rows, strict=True)]

    def _judge(self, rows: list[Batch]) -> None:
        """Rows that nothing has looked at before. What one rank finds, all say."""
        if not self.judges_late:
            return
        copies = self.num_generations
        questions = len(rows) * self.accelerator.num_processes // copies  # of one round of completions
        before = self._step // self._generate_every * questions
        mine = self.accelerator.process_index * len(rows)
        found: UserError | None = None
        # A group may have begun on the rank before.
        places = range(-mine % copies, len(rows), copies)
        try:
            self.judge([rows[i] for i in places], before + -(-mine // copies))
        except UserError as error:
            found = error
        for text in self.engine.gather_objects([None if found is None else str(found)]):
            if text is not None:
                raise UserError(text) from found

    def _feedback(self, **kwargs: Any) -> list[str | None] | None:
        """First text that a feedback function gives for each completion of this rank."""
        if not self.feedback_funcs:
            return None
        found: list[str | None] = [None] * len(kwargs["prompts"])
        for function in self.feedback_funcs:
            what, timeout = f"feedback function {function_name(function)!r}", self.args.reward_timeout
            try:
                texts = call(function, what, self._place, "text", timeout, {"trainer_state": self.state, **kwargs})
                found = [a or b for a, b in zip(found, check_texts(texts, what, self._place), strict=True)]
            except UserError as error:
                self.fail(error)
        return found

    def _guarded(self, function: Any) -> Any:
        """A reward function that TRL can take: floats or None, whatever the user's does."""
        if isinstance(function, (str, nn.Module)):
            return function
        what = f"reward function {function_name(function)!r}"

        def check(rewards: list[Any]) -> list[float | None]:
            checked, problem = check_rewards(rewards, what, self._place)
            if problem is not None and self.args.on_nonfinite == "stop":
                raise UserError(problem)
            self._problem = self._problem or problem
            return checked

        if is_async(function):

            @functools.wraps(function, assigned=("__doc__",), updated=())
            async def guarded_async(**kwargs: Any) -> list[float | None]:
                try:
                    limit = self.args.reward_timeout
                    return check(await call_async(function, what, self._place, "reward", limit, kwargs))
                except UserError as error:
                    return self.fail(error, len(kwargs["prompts"]))

            guarded_async.__name__ = function_name(function)
            return guarded_async

        @functools.wraps(function, assigned=("__doc__",), updated=())
        def guarded(**kwargs: Any) -> list[float | None]:
            try:
                return check(call(function, what, self._place, "reward", self.args.reward_timeout, kwargs))
            except UserError as error:
                return self.fail(error, len(kwargs["prompts"]))

        guarded.__name__ = function_name(function)  # TRL names the metric after it
        return guarded

    def _checked(self, rollout: Callable[..., Any]) -> Callable[..., Any]:
        """A rollout function whose completions all have a token, and masks one value for each, as TRL takes for
        granted."""

        @functools.wraps(rollout)
        def checked(prompts: list[Prompt], trainer: Any) -> dict[str, Any]:
            output: dict[str, Any] = rollout(prompts, trainer)
            _check_env_mask(output, self._place)
            for name in REWARD_ARGUMENTS:
                if name != "completion_ids" and name in output:
                    raise UserError(
                        f"rollout_func returned a field {name!r}, a name under which reward functions get something "
                        "else; rename it."
                    )
            for i, ids in enumerate(output.get("completion_ids", [])):
                if len(ids) == 0:
                    raise UserError(
                        f"rollout_func returned no token for sample {i} {self._place}; return at least the end-of-text "
                        "token."
                    )
            most = positions(self.model.config)
            for i, (prompt, ids) in enumerate(zip(output.get("prompt_ids", []), output.get("completion_ids", []))):
                if most is not None and len(prompt) + len(ids) > most:
                    raise UserError(
                        f"rollout_func returned {len(prompt)} prompt and {len(ids)} completion tokens for sample {i} "
                        f"{self._place}, more than the model's {most} positions; let it return fewer."
                    )
            return output

        return checked

    @property
    def _place(self) -> str:
        """Where a user's function is called, for a sentence."""
        step = f"at step {self.state.global_step + 1}"
        if self._held_out is not None:
            step = f"in the evaluation after step {self.state.global_step}"
        return step if self.accelerator.num_processes == 1 else f"{step} on rank {self.accelerator.process_index}"

    def fail(self, error: UserError, count: int = 0) -> list[float | None]:
        """End the run. Where other ranks wait, not before they know: with rewards of no meaning until then."""
        if self.accelerator.num_processes == 1:
            raise error
        self._failure = self._failure or error
        return [0.0] * count

    def _check_weights(self) -> None:
        """Weights with nan or inf never mend, and on a GPU sampling from them ends the process."""
        for rank, name in enumerate(self.engine.gather_objects([nonfinite_parameter(self.model)])):
            if name is not None:
                raise UserError(
                    f"at step {self.state.global_step + 1}: the weight {name} holds nan or inf (rank {rank}), so "
                    "nothing can be sampled and nothing was updated; continue from an earlier checkpoint with a lower "
                    "learning rate."
                )

    def _generate_single_turn(
        self, prompt_ids: Ids, images: Any, multimodal_fields: Any, num_generations: int, **kwargs: Any
    ) -> Any:
        if self._held_out is not None:
            return self._held_out.sample(prompt_ids, num_generations), None
        with self._stop_strings_known() as by_string:
            ids, logprobs = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, **kwargs
            )
        return [trimmed(row, self._stops, self.generation_config) for row in ids] if by_string else ids, logprobs

    @contextlib.contextmanager
    def _stop_strings_known(self) -> Iterator[bool]:
        """transformers needs the tokenizer for `stop_strings`, which TRL does not hand over. Whether there are any."""
        if self.use_vllm or not self.generation_config.stop_strings:
            yield False
            return
        model = self.accelerator.unwrap_model(self.model_wrapped)
        model.generate = functools.partial(model.generate, tokenizer=self.tokenizer)
        try:
            yield True
        finally:
            del model.generate

    @property
    def _stops(self) -> list[int]:
        """Every token that ends a completion."""
        if self.use_vllm:
            own = (self.args.generation_kwargs or {}).get("stop_token_ids")
        else:
            own = self.generation_config.eos_token_id
        return [*self.eos_token_ids, *([] if own is None else [own] if isinstance(own, int) else own)]

    def _tokenize_prompts(self, prompts: list[Prompt]) -> Any:
        repeats = 1 if self._held_out is None else self._held_out.repeats
        prompt_ids, images, fields = super()._tokenize_prompts(prompts[::repeats])
        prompt_ids = [ids for ids in prompt_ids for _ in range(repeats)]
        limit, name = self.prompt_limit
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            if limit is not None and len(ids) > limit:
                raise UserError(
                    f"a prompt has {len(ids)} tokens, more than {name} = {limit}: {_start(prompt)!r}; raise the limit "
                    "or drop the row."
                )
        return prompt_ids, images, fields

    def _get_per_token_logps_and_entropies(self, model: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._forwarded is not None:
            return self._forwarded
        # TRL passes the whole optimizer batch as one forward; keep to the micro-batch limits.
        rows = input_ids.shape[0]
        limits = [self.args.micro_batch_size or rows]
        if self.args.max_tokens_per_microbatch:
            limits.append(max(1, self.args.max_tokens_per_microbatch // input_ids.shape[1]))
        kwargs["batch_size"] = min(kwargs.get("batch_size") or rows, rows, *limits)
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """transformers asks for it between clipping and the optimizer's step: the last place to stop a bad update."""
        if self.is_deepspeed_enabled:
            norm: float | None = zero.gradient_norm(model)
        else:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = None if norm is None else float(norm)
        finite = self._grad_norm is None or math.isfinite(self._grad_norm)
        if not finite and not self.args.fp16:  # a gradient scaler tries too large scales now and then
            self.distrust(f"the gradient norm is {self._grad_norm}", here=not self.finite_here)
        if self._distrusted is not None:
            self._count_skip()
        else:
            self.skips_in_a_row = 0
        if self._distrusted is not None or not finite:
            self.gate.leave_out()
        if self.args.on_nonfinite == "skip":
            self.record("skipped_share", float(self._distrusted is not None))
        return norm

    def _count_skip(self) -> None:
        self.skips_in_a_row += 1
        self._grad_norm = None
        self.forget_step()
        text = f"step {self.state.global_step + 1} is skipped: {self._distrusted}"
        if self.skips_in_a_row >= MOST_SKIPS:
            raise UserError(f"{text}; the {MOST_SKIPS} last steps were skipped, so training stops. Look for the cause.")
        if self.accelerator.is_main_process:
            self.host.say(text)


def _check_env_mask(output: dict[str, Any], place: str) -> None:
    """Raises UserError if a rollout function's env_mask does not say of every token whose it is."""
    if (masks := output.get("env_mask")) is None:
        return
    completions = output.get("completion_ids", [])
    if len(masks) != len(completions):
        raise UserError(
            f"rollout_func returned {len(masks)} rows of env_mask for {len(completions)} completions {place}; return "
            "one per completion."
        )
    for i, (mask, ids) in enumerate(zip(masks, completions)):
        if len(mask) != len(ids):
            raise UserError(
                f"rollout_func returned an env_mask of {len(mask)} values for the {len(ids)} tokens of sample {i} "
                f"{place}; return one per token: 1 for the model's, 0 for the environment's."
            )
        if (value := next((v for v in mask if v not in (0, 1)), None)) is not None:
            raise UserError(
                f"rollout_func returned the value {value!r} in the env_mask of sample {i} {place}; return 1 for a "
                "token of the model, 0 for one of the environment."
            )


def function_name(function: Any) -> str:
    """What TRL calls a function or a reward model, in metrics too."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if isinstance(function, nn.Module):
        return str(get_config_model_id(function.config)).split("/")[-1]
    return str(get_callable_name(function))


def _start(prompt: Prompt, characters: int = 60) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return text if len(text) <= characters else text[:characters] + "…"


def nonfinite_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter, in the part that this rank holds, with nan or inf. A sum tells, without a copy."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
        if local.dtype in _FLOATS and not local.is_meta:
            wide = torch.float64 if local.dtype == torch.float64 else torch.float32
            if not math.isfinite(local.detach().sum(dtype=wide).item()):
                return name
    return None


@contextlib.contextmanager
def sampling_explained(place: str) -> Iterator[None]:
    """torch's error where logits are not finite, as one sentence. (On a GPU it is an assertion that cannot be told.)"""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError(
            f"{place}: the model's logits hold nan or inf, so nothing can be sampled; look for an overflow in half "
            "precision, or a temperature close to 0."
        ) from error
