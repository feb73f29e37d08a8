"""TRL's and transformers' members that make a training step.

Flow of one Trainer step, which is one optimizer step:

    TRL: prompts -> completions -> rewards     (`_generate_and_score_completions`)
      -> annotate(batch, rollout)              hook: teacher contexts join the batch
    TRL: shuffle, split, buffer                (`_prepare_inputs`)
      -> optimize(model, batch) -> loss        hook: micro-batches, backward, rho
    transformers: clip, optimizer.step(), scheduler, log, save
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from trl import GRPOTrainer

from pgpo.errors import UserError
from pgpo.train import zero
from pgpo.train.gate import scale_gradients
from pgpo.train.ranks import watch_ranks
from pgpo.train.seam.policy import PolicySeam
from pgpo.train.seam.rollouts import Batch

MOST_SKIPS = 5  # ours: after so many steps in a row that were skipped, training stops
# Methods that TRL's trainer calls and ours does not, so that an override would have no effect.
_NEVER_CALLED = {
    "compute_loss": "override `optimize`",
    "prediction_step": "pass grade=, or override `evaluate`",
    "evaluation_loop": "pass grade=, or override `evaluate`",
    "get_eval_dataloader": "pass eval_dataset, or override `evaluate`",
}


class StepSeam(PolicySeam):
    """`PolicySeam` with a step that one optimizer batch makes, and that is left out where it is not finite."""

    clip_factor = 1.0  # what clipping has multiplied the gradient by

    # Hooks ----------------------------------------------------------------------------------------------------------

    def optimize(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run forward and backward over the whole optimizer batch of this rank; return the loss to log."""
        raise NotImplementedError

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

    # Services for the subclass ----------------------------------------------------------------------------------------

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

    def base_learning_rate(self) -> float:
        """The scheduler's learning rate of this step, before any modulation."""
        return float(self._get_learning_rate())

    # TRL's members ----------------------------------------------------------------------------------------------------

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, which gives the loss of its GRPO; self-distillation has none on held-out rows."""
        if self.args.distills:
            raise UserError("predict() gives TRL's policy loss, which this objective does not train; call evaluate().")
        return super().predict(*args, **kwargs)

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
        else:
            self._clip_adaptively(self._grad_norm or 0.0)
        if self.args.on_nonfinite == "skip":
            self.record("skipped_share", float(self._distrusted is not None))
        return norm

    def _clip_adaptively(self, norm: float) -> None:
        """Scale the gradient down to `adaptive_clip` times the mean norm, where max_grad_norm has left more of it."""
        most = self.args.max_grad_norm
        self.clip_factor = min(1.0, most / (norm + 1e-6)) if most else 1.0  # as torch clips
        if self.clip is None or (wanted := self.clip(norm)) >= self.clip_factor:
            return
        scale_gradients(self.optimizer, wanted / self.clip_factor)
        self.clip_factor = wanted

    def _count_skip(self) -> None:
        self.skips_in_a_row += 1
        self._grad_norm = None
        self.forget_step()
        text = f"step {self.state.global_step + 1} is skipped: {self._distrusted}"
        if self.skips_in_a_row >= MOST_SKIPS:
            raise UserError(f"{text}; the {MOST_SKIPS} last steps were skipped, so training stops. Look for the cause.")
        if self.accelerator.is_main_process:
            self.host.say(text)
