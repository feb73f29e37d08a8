"""The seam to TRL: the ONLY file that names private members of trl.GRPOTrainer (1.16).

It turns them into a handful of public hooks, so that `trainer.py` reads as the method and an upgrade of TRL is a
change of this file. `tests/contract/test_trl_seam.py` checks every name used here against the installed TRL.

Flow of one Trainer step, which is one optimizer step:

    TRL: prompts -> completions -> rewards     (`_generate_and_score_completions`)
      -> annotate(batch, rollout)              hook: teacher contexts join the batch
    TRL: shuffle, split, buffer                (`_prepare_inputs`)
      -> optimize(model, batch) -> loss        hook: micro-batches, backward, rho
    transformers: clip, optimizer.step(), scheduler, log, save
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from pgpo.errors import UserError
from pgpo.teacher.weights import TEACHER_ADAPTER
from pgpo.train import checkpoint as checkpoints
from pgpo.train import zero
from pgpo.train.ranks import watch_ranks
from pgpo.train.user_functions import call, call_async, check_rewards, check_texts, is_async
from pgpo.visible import is_thinking_tag, opens_thinking

MOST_SKIPS = 5  # ours: after so many steps in a row that were skipped, training stops
_OWN = "pgpo_"  # begin of the names of our own files in a checkpoint
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Batch = dict[str, Any]
Prompt = Any  # a list of chat messages, or a plain string


@dataclass(frozen=True)
class Rollout:
    """What the ranks generated together, in rank order; rows of one question are consecutive.

    Attributes:
        prompts: N prompts as given in the dataset.
        completions: N texts.
        rewards: [N] weighted sum over the reward functions.
        feedback: N texts or None, or None if there are no feedback functions.
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


class SeamTrainer(GRPOTrainer):
    """GRPOTrainer with public hooks in place of private members. Subclass it; do not use it alone."""

    _tag_names: ClassVar = ["trl", "pgpo"]
    _name = "PGPO"
    _paper: ClassVar = {"title": "Physics-Guided Policy Optimization with Self-Distillation", "id": "2606.03620"}

    def __init__(self, *args: Any, feedback_funcs: list[Callable[..., Any]], **kwargs: Any) -> None:
        self.feedback_funcs = feedback_funcs
        reward_funcs = kwargs.get("reward_funcs") or []
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        kwargs["reward_funcs"] = [self._guarded(f) for f in reward_funcs]
        if kwargs.get("rollout_func") is not None:
            kwargs["rollout_func"] = self._checked(kwargs["rollout_func"])
        self._captured: tuple[list[Prompt], list[str], list[bool], Tensor, list[str | None] | None] | None = None
        self._recorded_before: dict[str, int] = {}  # scalars per name when this training step began
        self._grad_norm: float | None = None
        self._scratch: str | None = None  # where a checkpoint is being written
        self._sampler: Any = None
        self._unlogged: dict[str, Any] | None = None  # of a checkpoint between two logs, until training goes on
        self._failure: UserError | None = None  # of a user's function on this rank, until all ranks know of it
        self._problem: str | None = None  # what is not finite in the rewards of this rank
        self._distrusted: str | None = None  # what is not finite in the step at work
        self.finite_here = True  # whether what this rank put into the step is finite
        self.skips_in_a_row = 0
        self.last_rollout: Rollout | None = None
        self.run_id: str | None = None  # written into checkpoints
        self.trusted: Path | None = None  # a checkpoint that was verified already
        self.failed_save: str | None = None  # why the newest checkpoint could not be written
        self.say: Callable[[str], Any] = warnings.warn
        self.advice: Callable[[], str] = lambda: f"after step {self.state.global_step}."  # when a rank is lost
        self._watching = False
        self.before_seal: Callable[[], Any] = lambda: None
        super().__init__(*args, **kwargs)

    # Hooks ----------------------------------------------------------------------------------------------------

    def annotate(self, batch: Batch, rollout: Rollout) -> Batch:
        """Add what the loss needs to this rank's batch; lists and tensors must have one entry per row."""
        raise NotImplementedError

    def optimize(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run forward and backward over the whole optimizer batch of this rank; return the loss to log."""
        raise NotImplementedError

    def forget_step(self) -> None:
        """Undo what `optimize` has noted of a step that is skipped."""

    def save_extra(self, directory: Path) -> None:
        """Write what a checkpoint needs beyond the Trainer's own state (called on every rank)."""

    def load_extra(self, directory: Path) -> None:
        """Read what `save_extra` wrote."""

    # Services for the subclass ----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def is_multimodal(self) -> bool:
        return bool(self._is_vlm)

    def record(self, name: str, value: float) -> None:
        """Add a scalar to the log of this training step; call it on every rank with the same value."""
        self._metrics["train"][name].append(value)

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
            found = [str(rank) for rank, culprit in enumerate(self.gather_objects([here])) if culprit]
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
        """TRL's GRPO loss on a micro-batch of padded tensors."""
        return self._compute_loss(model, batch)

    def gather_objects(self, local: list[Any]) -> list[Any]:
        """The ranks' lists, one after the other in rank order."""
        if self.accelerator.num_processes == 1:
            return local
        from accelerate.utils import gather_object

        return gather_object(local)

    def raise_together(self) -> None:
        """End all ranks with the sentence of a user's function that failed on one. Every rank must call it."""
        for text in self.gather_objects([None if self._failure is None else str(self._failure)]):
            if text is not None:
                raise UserError(text) from self._failure

    def load_weights(self, checkpoint: Path) -> None:
        """The student's weights of a checkpoint, nothing else of it."""
        self._load_from_checkpoint(str(checkpoint))

    def base_learning_rate(self) -> float:
        """The scheduler's learning rate of this step, before any modulation."""
        return float(self._get_learning_rate())

    def exchange(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of forward and backward of a micro-batch: ranks exchange gradients in the last one only, but under
        FSDP in each, because what is not exchanged is a whole gradient on every rank. DeepSpeed knows by itself."""
        own_way = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return contextlib.nullcontext() if last or own_way else self.accelerator.no_sync(model)

    @property
    def gathers_layers(self) -> bool:
        """Whether collectives hide in the layers' forwards, so that every rank must run the same ones."""
        return bool(self.is_fsdp_enabled) or zero.cuts_weights(self.accelerator)

    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """Backward of a micro-batch, the `last` of the step or not."""
        if self.is_deepspeed_enabled:
            zero.backward(model, loss, last)
        else:
            self.accelerator.backward(loss)

    def render(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, ready for generation, by the same template as the student's prompts."""
        if isinstance(prompt, str):
            return self.processing_class(text=prompt)["input_ids"]
        return self.processing_class.apply_chat_template(
            conversation=prompt,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )["input_ids"]

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

    @contextlib.contextmanager
    def vllm_sampling(self, temperature: float, top_p: float) -> Iterator[Any]:
        """TRL's vLLM engine with other sampling parameters and the current weights."""
        engine = self.vllm_generation
        before = engine.temperature, engine.top_p
        if self.state.global_step != self._last_loaded_step:
            engine.sync_weights()
            self._last_loaded_step: int = self.state.global_step
        engine.temperature, engine.top_p = temperature, top_p
        try:
            yield engine
        finally:
            engine.temperature, engine.top_p = before

    # TRL's members ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a checkpoint is verified first, and True is the newest one that is whole."""
        if self.is_deepspeed_enabled and self.model_wrapped is not self.model:
            raise UserError("DeepSpeed's engine trains once; make a new trainer and resume from a checkpoint.")
        with self.rank_watch():
            checkpoint = self._verified(resume_from_checkpoint)
            if checkpoint is not None and self.is_deepspeed_enabled:
                with _explained(checkpoint):
                    zero.require_inert(Path(checkpoint), self.accelerator.num_processes)
            return super().train(checkpoint, *args, **kwargs)

    @contextlib.contextmanager
    def rank_watch(self) -> Iterator[None]:
        """End this process if another rank is lost (`watch_ranks`); may be opened around `train`."""
        if self._watching:
            yield
            return
        self._watching = True
        try:
            with watch_ranks(self.args.rank_timeout, self.advice, self.say):
                yield
        finally:
            self._watching = False

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        start = time.perf_counter()
        self._load_unlogged()
        self._recorded_before = {name: len(values) for name, values in self._metrics["train"].items()}
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._distrusted, self.finite_here = None, True
        batch = self._prepare_inputs(inputs)
        generated = time.perf_counter()
        if self.last_rollout is not None and self.last_rollout.problem is not None:
            self.distrust(self.last_rollout.problem, here=None)
        with self.compute_loss_context_manager():
            loss = self.optimize(model, batch)
        self._step += 1
        end = time.perf_counter()
        self.record("generation_seconds", generated - start)
        self.record("update_seconds", end - generated)
        self.record("step_time", end - start)
        return loss.detach()

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        self._check_weights()
        with sampling_explained(f"at step {self.state.global_step + 1}"):
            batch = super()._generate_and_score_completions(inputs)
        assert self._captured is not None
        prompts, completions, opened, rewards, feedback = self._captured
        self._captured = None
        rows = len(prompts)
        gathered_prompts, gathered_texts = self.gather_objects(prompts), self.gather_objects(completions)
        start = self.accelerator.process_index * rows
        rollout = Rollout(
            prompts=gathered_prompts,
            completions=gathered_texts,
            rewards=rewards.tolist(),
            feedback=None if feedback is None else self.gather_objects(feedback),
            local=slice(start, start + rows),
            problem=next((p for p in self.gather_objects([self._problem]) if p is not None), None),
            opened=flags if any(flags := self.gather_objects(opened)) else None,
        )
        return self.annotate(batch, rollout)

    def _calculate_rewards(
        self, inputs: list[Batch], prompts: list[Prompt], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        self._problem = None
        inputs = self.told_of_thinking(inputs, prompts, completions, completion_ids_list)
        per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # all ranks
        weights = self.reward_weights.to(per_function.device)
        rewards = (per_function * weights).nansum(dim=1)
        rewards[per_function.isnan().all(dim=1)] = math.nan
        if rewards.isinf().any():
            self._problem = self._problem or f"the weighted sum of the rewards is inf {self._place}"
            if self.args.on_nonfinite == "stop":
                self._fail(UserError(f"{self._problem}; lower reward_weights, or the rewards."))
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        columns = {k: [row[k] for row in inputs] for k in inputs[0] if k not in ("prompt", "completion")}
        feedback = self._feedback(
            prompts=prompts, completions=completions, completion_ids=completion_ids_list, **columns
        )
        self.raise_together()
        opened = [bool(row.get("thinking_opened", False)) for row in inputs]
        self._captured = (prompts, texts, opened, rewards, feedback)
        return per_function

    def told_of_thinking(
        self, rows: list[Batch], prompts: list[Prompt], completions: list[Any], ids: list[list[int]]
    ) -> list[Batch]:
        """The rows of completions, with a column "thinking_opened" if any of them begins inside a thinking block that
        its prompt opened and still holds it: where the tokenizer has a response template and the block is closed, TRL
        has cut it off."""
        opens = {repr(prompt): self.opens_thinking(prompt) for prompt in {repr(p): p for p in prompts}.values()}
        if not any(opens.values()):
            return rows
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        flags = [
            opens[repr(prompt)] and self.tokenizer.decode(tokens, skip_special_tokens=True).strip() == text.strip()
            for prompt, text, tokens in zip(prompts, texts, ids, strict=True)
        ]
        return [{"thinking_opened": flag, **row} for flag, row in zip(flags, rows, strict=True)]

    def _feedback(self, **kwargs: Any) -> list[str | None] | None:
        """First text that a feedback function gives for each completion of this rank."""
        if not self.feedback_funcs:
            return None
        found: list[str | None] = [None] * len(kwargs["prompts"])
        for function in self.feedback_funcs:
            what, timeout = f"feedback function {_name(function)!r}", self.args.reward_timeout
            try:
                texts = call(function, what, self._place, "text", timeout, {"trainer_state": self.state, **kwargs})
                found = [a or b for a, b in zip(found, check_texts(texts, what, self._place), strict=True)]
            except UserError as error:
                self._fail(error)
        return found

    def _guarded(self, function: Any) -> Any:
        """A reward function that TRL can take: floats or None, whatever the user's does."""
        if isinstance(function, (str, nn.Module)):
            return function
        what = f"reward function {_name(function)!r}"

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
                    return self._fail(error, len(kwargs["prompts"]))

            guarded_async.__name__ = _name(function)
            return guarded_async

        @functools.wraps(function, assigned=("__doc__",), updated=())
        def guarded(**kwargs: Any) -> list[float | None]:
            try:
                return check(call(function, what, self._place, "reward", self.args.reward_timeout, kwargs))
            except UserError as error:
                return self._fail(error, len(kwargs["prompts"]))

        guarded.__name__ = _name(function)  # TRL names the metric after it
        return guarded

    def _checked(self, rollout: Callable[..., Any]) -> Callable[..., Any]:
        """A rollout function whose completions all have a token, as TRL takes for granted."""

        @functools.wraps(rollout)
        def checked(prompts: list[Prompt], trainer: Any) -> dict[str, Any]:
            output: dict[str, Any] = rollout(prompts, trainer)
            for i, ids in enumerate(output.get("completion_ids", [])):
                if len(ids) == 0:
                    raise UserError(
                        f"rollout_func returned no token for sample {i} {self._place}; return at least the end-of-text "
                        "token."
                    )
            return output

        return checked

    @property
    def _place(self) -> str:
        """Where a user's function is called, for a sentence."""
        step = f"at step {self.state.global_step + 1}"
        return step if self.accelerator.num_processes == 1 else f"{step} on rank {self.accelerator.process_index}"

    def _fail(self, error: UserError, count: int = 0) -> list[float | None]:
        """End the run. Where other ranks wait, not before they know: with rewards of no meaning until then."""
        if self.accelerator.num_processes == 1:
            raise error
        self._failure = self._failure or error
        return [0.0] * count

    def _check_weights(self) -> None:
        """Weights with nan or inf never mend, and on a GPU sampling from them ends the process."""
        for rank, name in enumerate(self.gather_objects([nonfinite_parameter(self.model)])):
            if name is not None:
                raise UserError(
                    f"at step {self.state.global_step + 1}: the weight {name} holds nan or inf (rank {rank}), so "
                    "nothing can be sampled and nothing was updated; continue from an earlier checkpoint with a lower "
                    "learning rate."
                )

    def _tokenize_prompts(self, prompts: list[Prompt]) -> Any:
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        limit = self.args.max_prompt_length
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            if limit is not None and len(ids) > limit:
                raise UserError(
                    f"a prompt has {len(ids)} tokens, more than max_prompt_length = {limit}: {_start(prompt)!r}; raise "
                    "the limit or drop the row."
                )
        return prompt_ids, images, fields

    def _get_per_token_logps_and_entropies(self, model: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
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
            self._step_engine(model)
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
            self._leave_out_step()
        else:
            self.optimizer._is_overflow = False
        if self.args.on_nonfinite == "skip":
            self.record("skipped_share", float(self._distrusted is not None))
        return norm

    def _step_engine(self, engine: Any) -> None:
        """Let `optimizer.step()`, empty in accelerate's wrapper of DeepSpeed's optimizer, step the engine."""
        before = self.optimizer.step
        if hasattr(before, "steps_engine"):
            return

        @functools.wraps(before)  # a scheduler has left its mark on it
        def step(closure: Any = None) -> None:
            before()
            zero.step(engine)

        step.steps_engine = True  # type: ignore[attr-defined]
        self.optimizer.step = step

    def _count_skip(self) -> None:
        self.skips_in_a_row += 1
        self._grad_norm = None
        self.forget_step()
        text = f"step {self.state.global_step + 1} is skipped: {self._distrusted}"
        if self.skips_in_a_row >= MOST_SKIPS:
            raise UserError(f"{text}; the {MOST_SKIPS} last steps were skipped, so training stops. Look for the cause.")
        if self.accelerator.is_main_process:
            self.say(text)

    def _leave_out_step(self) -> None:
        """Let the optimizer's next step do nothing, told as accelerate tells of what a gradient scaler skips: neither
        schedule nor teacher move on. (accelerate itself misses what a scaler skips within a fused optimizer.)"""
        optimizer, before = self.optimizer, vars(self.optimizer).get("step")

        def step(closure: Any = None) -> None:
            del optimizer.step
            if before is not None:
                optimizer.step = before
            optimizer._is_overflow = True
            if self.is_deepspeed_enabled:
                zero.discard(self.model_wrapped)
            if optimizer.scaler is not None:
                optimizer.scaler.update()  # it has seen the gradients when they were unscaled for their norm

        optimizer.step = step

    # Checkpoints (checkpoint.py) --------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write aside, seal, rename. A disk that takes no more costs this checkpoint, not the run."""
        folder, step, best = Path(self._get_output_dir(trial)), self.state.global_step, self.state.best_model_checkpoint
        name = f"checkpoint-{step}"

        def write() -> None:
            path = Path(self._get_output_dir(trial)) / name
            super(SeamTrainer, self)._save_checkpoint(model, trial)
            if self.state.best_global_step == step:  # transformers saw it where it is written
                self.state.best_model_checkpoint = str(folder / name)
                if self.args.should_save:
                    self.state.save_to_json(str(path / TRAINER_STATE_NAME))
            self._save_progress(path)
            self.save_extra(path)

        def seal() -> None:
            if self.args.should_save:
                self.before_seal()
                checkpoints.commit(folder, step, self.run_id)

        push, self.args.push_to_hub = self.args.push_to_hub, False  # not before it has its name
        self._scratch = str(folder / checkpoints.WRITING)
        try:
            self.failed_save = (
                self._disk_failure(lambda: checkpoints.begin(folder) if self.args.should_save else None)
                or self._disk_failure(write)
                or self._disk_failure(seal)
            )
        finally:
            self.args.push_to_hub, self._scratch = push, None
        if self.failed_save is not None:
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                checkpoints.remove_leftovers(folder)
            if self.accelerator.is_main_process:
                self.say(
                    f"{name} could not be written in {folder} ({self.failed_save}); training goes on and the next save "
                    "tries again: free some space there."
                )
            return
        if self.args.should_save:
            kept = self.state.best_model_checkpoint
            checkpoints.rotate(folder, step, self.args.save_total_limit, None if kept is None else Path(kept))
        if push:
            self._push_from_checkpoint(str(folder / name))

    def _disk_failure(self, action: Callable[[], Any]) -> str | None:
        """Run a part of a save on every rank; what the disk of some rank said, if it failed."""
        failure = None
        try:
            action()
        except Exception as error:
            failure = checkpoints.write_failure(error)
            if failure is None:
                raise
        return next((f for f in self.gather_objects([failure]) if f is not None), None)

    def _get_output_dir(self, trial: Any) -> str:
        return str(super()._get_output_dir(trial)) if self._scratch is None else self._scratch

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The student alone, for the teacher's adapter has a file of its own; and no pickle of the arguments."""
        model = self.accelerator.unwrap_model(self.model)
        adapters = [name for name in getattr(model, "peft_config", {}) if name != TEACHER_ADAPTER]
        if adapters:
            model.save_pretrained = functools.partial(type(model).save_pretrained, model, selected_adapters=adapters)
        try:
            super()._save(output_dir, state_dict)
        finally:
            if adapters:
                del model.save_pretrained
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_progress(self, directory: Path) -> None:
        """What TRL and transformers keep in memory only, per rank: counters, scalars not logged yet, and the
        completions that the next step takes again."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        progress: dict[str, Any] = {
            "ranks": self.accelerator.num_processes,
            "step": self._step,
            "metrics": self._metrics["train"],
            "loss": self._tr_loss.item(),
            "logged": self._globalstep_last_logged,
        }
        if self._step % self._generate_every and self._buffered_inputs is not None:
            tensors, progress["batches"] = checkpoints.pack(self._buffered_inputs)
            save_file(tensors, directory / self._own_file("rollout", "safetensors"))
            assert self.last_rollout is not None
            local = self.last_rollout.local
            rollout = vars(self.last_rollout) | {"local": [local.start, local.stop]}
            # A prompt may hold images, of which no sample is written.
            progress["rollout"] = json.loads(json.dumps(rollout, default=str))
        (directory / self._own_file("progress", "json")).write_text(json.dumps(progress) + "\n", encoding="utf-8")

    def _load_progress(self, directory: Path) -> None:
        from safetensors.torch import load_file

        self.state.compute_steps(self.args, self.state.max_steps)  # transformers keeps the checkpoint's save_steps
        self._skip_permutations(int(self.state.epoch or 0))
        file = directory / self._own_file("progress", "json")
        progress: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if progress.get("ranks") != self.accelerator.num_processes:
            self.say(
                f"{directory.name} was written by another number of processes: the run goes on, but not bit for bit "
                "as one that was never stopped."
            )
            self._step = self.state.global_step
            return
        self._step = progress["step"]
        self._unlogged = progress
        if "batches" not in progress:
            return
        if len(progress["batches"]) != self.args.steps_per_generation:
            raise ValueError(
                f"its steps_per_generation is {len(progress['batches'])}, this run's {self.args.steps_per_generation}"
            )
        tensors = load_file(directory / self._own_file("rollout", "safetensors"))
        self._buffered_inputs: Any = checkpoints.unpack(tensors, progress["batches"], self.accelerator.device)
        self.last_rollout = Rollout(**(progress["rollout"] | {"local": slice(*progress["rollout"]["local"])}))

    def _load_unlogged(self) -> None:
        """Scalars between two logs; transformers sets its own to zero when the loop starts."""
        if self._unlogged is None:
            return
        for name, values in self._unlogged["metrics"].items():
            self._metrics["train"][name] = values
        self._tr_loss += self._unlogged["loss"]
        self._globalstep_last_logged: int = self._unlogged["logged"]
        self._unlogged = None

    @property
    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _own_file(self, what: str, ending: str) -> str:
        return f"{_OWN}{what}-{self.accelerator.process_index}.{ending}"

    def _get_train_sampler(self, *args: Any) -> Any:
        self._sampler = super()._get_train_sampler(*args)
        return self._sampler

    def _skip_permutations(self, epochs: int) -> None:
        """TRL's sampler draws one permutation per epoch from its own generator, which starts anew with the process."""
        if self.shuffle_dataset and self._sampler is not None:
            for _ in range(epochs):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)

    def _verified(self, resume: Any) -> str | None:
        """Path of the checkpoint to continue from. The main process looks; all raise UserError if it cannot be used."""
        found: list[str | UserError | None] = [None]
        if resume and self.accelerator.is_main_process:
            try:
                found = [self._whole_checkpoint(resume)]
            except UserError as error:
                found = [error]
        result = self.gather_objects(found)[0]
        if isinstance(result, UserError):
            raise result
        return result

    def _whole_checkpoint(self, resume: Any) -> str:
        if resume is True:
            folder = Path(self.args.output_dir)
            path = checkpoints.newest_whole(folder, self.run_id, say=self.say)
            if path is None:
                raise UserError(f"{folder} has no whole checkpoint; give the path of one, or start from the beginning.")
            return str(path)
        path = Path(resume).resolve()
        if not path.is_dir():
            raise UserError(f"there is no checkpoint {resume}; give its folder, or True for the newest one.")
        if path == self.trusted or (problem := checkpoints.problem(path, self.run_id)) is None:
            return str(resume)
        if not (path / checkpoints.MANIFEST_FILE).exists():
            if not any(path.glob(f"{_OWN}*")):
                raise UserError(
                    f"{resume} is no checkpoint of pgpo (it has no {checkpoints.MANIFEST_FILE}), so teacher and "
                    "schedule cannot be continued; give it to the trainer as the model, to train on from its weights."
                )
            self.say(f"{path.name} has no {checkpoints.MANIFEST_FILE}: whether it is whole cannot be verified.")
            return str(resume)
        older = checkpoints.newest_whole(path.parent, self.run_id, before=checkpoints.named_step(path))
        go_on = "no older one is whole, so restore it from a copy" if older is None else f"continue from {older}"
        raise UserError(f"the checkpoint {resume} is not as it was written ({problem}); {go_on}.")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _explained(resume_from_checkpoint):
            for file in Path(resume_from_checkpoint).rglob(".metadata"):
                checkpoints.require_inert(file)
            with _dtypes_kept(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with _explained(checkpoint):
            own_way = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if not own_way and not (Path(checkpoint) / OPTIMIZER_NAME).exists():
                raise ValueError(f"it has no {OPTIMIZER_NAME}, as with save_only_model")
            super()._load_optimizer_and_scheduler(checkpoint)
            self._load_progress(Path(checkpoint))
            self.load_extra(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _explained(str(checkpoint)):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _explained(str(checkpoint)):
            super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def _dtypes_kept(model: nn.Module) -> Iterator[None]:
    """PEFT makes adapters fp32 when it loads them, also those that TRL made bf16 (QLoRA): the run would go on otherwise
    than it began."""
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])


@contextlib.contextmanager
def _explained(checkpoint: str) -> Iterator[None]:
    """Name the checkpoint that cannot be read. transformers reads with weights_only, so pickled code is an error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"the checkpoint {Path(checkpoint).name} cannot be continued ({type(error).__name__}: {reason}); remove "
            "its folder to continue from the one before."
        ) from error


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    inner = optimizer
    while hasattr(inner, "accelerator_state"):
        inner = inner.optimizer
    return inner


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


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
