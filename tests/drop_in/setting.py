"""What a scenario trains with: TRL's own trainer, or ours with one objective."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import stand_ins
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from pgpo import PGPOConfig, PGPOTrainer

# What TRL's tests set nearly everywhere; and where our defaults are not TRL's (schedule, weight decay, thinking).
_USUAL: dict[str, Any] = dict(
    learning_rate=0.1,
    per_device_train_batch_size=3,
    num_generations=3,
    max_completion_length=8,
    report_to="none",
    max_steps=3,
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
)
_SAME: dict[str, Any] = dict(
    lr_scheduler_type="linear",
    warmup_steps=0,
    weight_decay=0.0,
    logging_steps=1,
    chat_template_kwargs={"enable_thinking": False},
)
_OF_THE_TRAINER = (
    *("eval_dataset", "processing_class", "reward_processing_classes", "callbacks", "peft_config", "tools"),
    *("rollout_func", "environment_factory"),
)


class Broken(AssertionError):
    """The script ran, but what TRL's test asks for did not come about."""


class Unmoved(Broken):
    """Weights that should have been trained are what they were."""


class Setting:
    """Runs one test's script.

    Args:
        objective: of ours; None: TRL's own trainer.
        folder: for output.
        changes: fields that replace the script's.
    """

    def __init__(self, objective: str | None, folder: Path, changes: dict[str, Any] | None = None) -> None:
        self.objective, self.folder, self.changes = objective, folder, changes or {}
        self.ended: list[dict[str, Tensor]] = []  # weights after each training that is to be compared
        self.notes: list[str] = []  # what is otherwise than in TRL
        self.logged: list[str] = []
        torch.manual_seed(0)  # of adapters that a script makes

    @property
    def distills(self) -> bool:
        return self.objective in ("sdpo", "pgpo")

    def config(self, **options: Any) -> Any:
        return self.plain_config(**{"output_dir": str(self.folder), **_USUAL, **_SAME, **options})

    def plain_config(self, **options: Any) -> Any:
        """Without what TRL's tests usually set."""
        if self.objective is None:
            return GRPOConfig(**options | self.changes)
        return PGPOConfig(**options | {"objective": self.objective} | self.changes)

    def trainer(
        self, model: Any = "qwen2", reward: Any = "scores", data: Any = "text", args: Any = None, **options: Any
    ) -> Any:
        """model: the kind of a stand-in, or a model. reward: "scores" for a reward model, or functions. data: "text",
        "chat", or a dataset."""
        own = {name: options.pop(name) for name in _OF_THE_TRAINER if name in options}
        given: dict[str, Any] = {"model": stand_ins.saved(model) if model in stand_ins.KINDS else model}
        given["reward_funcs"] = stand_ins.saved(seed=1, scores=True) if reward == "scores" else reward
        given["train_dataset"] = stand_ins.questions(data) if isinstance(data, str) else data
        cls = GRPOTrainer if self.objective is None else PGPOTrainer
        return cls(**given, args=args or self.config(**options), **own)

    def train(self, trainer: Any, moves: bool | None = True, compares: bool = True) -> Any:
        """Train; every trainable weight must have moved (or none; None: whichever), a frozen one not.

        compares: whether the weights must end as TRL's.
        """
        before = _weights(trainer.model)
        with self._logs():
            trainer.train()
        loss = trainer.state.log_history[-1]["train_loss"]
        if not math.isfinite(loss):
            raise Broken(f"the loss is {loss}")
        after = _weights(trainer.model)
        if compares:
            self.ended.append(after)
        for name, parameter in trainer.model.named_parameters():
            moved = not torch.equal(before[name], after[name])
            if moves and parameter.requires_grad and not moved:
                raise Unmoved(f"{name} has not moved")
            if moves is False and moved:
                raise Broken(f"{name} has moved")
            if moved and not parameter.requires_grad and "lora_" not in name and "modules_to_save" not in name:
                raise Broken(f"{name} is frozen and has moved")
        return trainer

    def check(self, holds: Any, what: str) -> None:
        if not holds:
            raise Broken(what)

    def logs(self, trainer: Any, name: str) -> None:
        self.check(any(name in entry for entry in trainer.state.log_history), f"{name} is not logged")

    def refuses(self, make: Callable[[], Any]) -> None:
        """TRL raises a ValueError here, and so must we."""
        try:
            make()
        except ValueError:
            return
        raise Broken("nothing was raised")

    def differs(self, note: str) -> None:
        if self.objective is not None and note not in self.notes:
            self.notes.append(note)

    def said(self, text: str) -> bool:
        return any(text in line for line in self.logged)

    @contextlib.contextmanager
    def _logs(self) -> Iterator[None]:
        handler = logging.Handler()
        handler.emit = lambda record: self.logged.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("trl.trainer.grpo_trainer")
        logger.addHandler(handler)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                logger.removeHandler(handler)
        self.logged += [str(warning.message) for warning in caught]

    def watched(self, make: Callable[[], Any]) -> Any:
        with self._logs():
            return make()


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
