"""Whole steps of PGPOTrainer and of TRL's SDPOTrainer on a model of any size, part by part, on a CPU or a GPU.

What growth.py and gpu_day.py share. Both trainers get the same random model, questions and sampling; a completion ends
where its first token says (sampler.py): lengths log-normal with sigma 0.6, their mean half the longest. Two completions
of each question are right, so that each sample has a teacher. Parts are those of `pgpo train --profile`:

    sampling   the completions
    teacher    the teacher's forwards
    student    the student's forwards and backwards, with the loss
    update     optimizer and teacher's average
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("CI", "true")  # TRL sends no telemetry from CI
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
from datasets import Dataset
from sampler import ends_by_first_token
from transformers import AutoModelForCausalLM, LlamaConfig, PrinterCallback, Qwen3Config, TrainerCallback
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from update_step import EOS, PAD, TEXTS, words_tokenizer

from pgpo import PGPOConfig, PGPOTrainer
from pgpo.train import profile

PARTS = {
    "sampling": ("sampling",),
    "teacher": ("teacher",),
    "student": ("student", "backward"),
    "update": ("optimizer", "average"),
}
SIDES = ("ours", "trl")
_MICRO_BATCH = 8  # rows of SDPOTrainer's, a common setting of its


@dataclass(frozen=True)
class Shape:
    """A decoder: Qwen3, or Llama (SmolLM2)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    kind: str = "qwen3"

    def config(self, vocabulary: int) -> Any:
        return {"qwen3": Qwen3Config, "llama": LlamaConfig}[self.kind](
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=16_384,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
            initializer_range=0.1,  # far from uniform
        )


SMOLLM2_135M = Shape(576, 1536, 30, 9, 3, 64, "llama")
SMOLLM2_VOCABULARY = 49_152


@dataclass(frozen=True)
class Work:
    """A step.

    Attributes:
        completions: per step.
        group: completions of each question.
        longest: tokens of a completion; the mean is half of it.
        prompt: mean tokens of a question.
    """

    shape: Shape
    vocabulary: int
    completions: int = 64
    group: int = 8
    longest: int = 64
    prompt: int = 50


def random_model(work: Work, device: torch.device, folder: Path) -> Any:
    """Written to `folder` too, where SDPOTrainer looks for its teacher."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(work.shape.config(work.vocabulary), dtype=torch.float32)
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    ends_by_first_token(model, work.vocabulary, mean=max(2, work.longest // 2), most=work.longest)
    return model


class Steps(TrainerCallback):
    """A trainer; a call trains for some steps and returns what each took.

    Args:
        side: "ours" or "trl".
        precision: "bf16" or "fp16" for autocast; None = fp32.
        clock: as of `profile.Profile`.
    """

    def __init__(
        self,
        side: str,
        work: Work,
        device: torch.device,
        folder: Path,
        precision: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.clock, self._group = device, clock, work.group
        rng = np.random.default_rng(0)
        questions = max(1, work.completions // work.group)
        lengths = rng.integers(round(0.8 * work.prompt), round(1.2 * work.prompt) + 1, 2 * questions)
        texts = [" ".join(f"w{i}" for i in rng.integers(len(TEXTS), work.vocabulary, n)) for n in lengths]
        common: dict[str, Any] = dict(
            output_dir=str(folder / side),
            num_generations=work.group,
            max_completion_length=work.longest,
            learning_rate=1e-7,  # both stay where they began
            lr_scheduler_type="constant",
            warmup_steps=0,
            logging_steps=1,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        rows = min(_MICRO_BATCH, work.completions)
        theirs = dict(
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=work.completions // rows,
            distillation_alpha=0.5,
            distillation_mode="topk_logits",
            distillation_topk=100,
            distillation_add_tail=True,
        )
        sides: dict[str, tuple[Any, Any, dict[str, Any]]] = {
            "ours": (PGPOTrainer, PGPOConfig, {"prompts_per_step": questions}),
            "trl": (SDPOTrainer, SDPOConfig, theirs),
        }
        trainer, config, own = sides[side]
        self.trainer: Any = trainer(
            random_model(work, device, folder / f"model-{side}"),
            self.reward,
            config(**common, **own),
            Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=words_tokenizer(work.vocabulary),
        )
        if side == "trl":
            _name_parts(self.trainer)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self)
        self._optimizer = contextlib.ExitStack()

    def __call__(self, steps: int, seconds: float = float("inf")) -> list[dict[str, Any]]:
        """What each of at most so many steps took; once all but the first took so many seconds, no other one begins.

        Returns:
            per step {"seconds": {part: s, "step": s}, "peak": {part: bytes}, "tokens": of its completions}
        """
        self.found: list[dict[str, Any]] = []
        self.trainer.args.max_steps = steps
        self._enough = seconds
        self.trainer.train()
        return self.found

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Two completions of each question are right."""
        self._tokens = sum(map(len, completion_ids))
        return [float(i % self._group < 2) for i in range(len(completion_ids))]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        profile._on = self.profile = profile.Profile(self.device, self.clock)
        self._start = self._now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer.enter_context(profile.part("optimizer"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer.close()
        step = self._now() - self._start
        seconds, peaks = self.profile.take()
        profile._on = None
        names = PARTS.items()
        self.found.append(
            {
                "seconds": {part: sum(seconds[name] for name in of) for part, of in names} | {"step": step},
                "peak": {part: max(peaks[name] for name in of) for part, of in names},
                "tokens": self._tokens,
            }
        )
        after_first = [step["seconds"]["step"] for step in self.found[1:]]
        control.should_training_stop |= bool(after_first) and sum(after_first) >= self._enough


def _name_parts(trainer: Any) -> None:
    """Book what SDPOTrainer does to the parts that PGPOTrainer names itself."""

    def booked(holder: Any, method: str, part: Callable[[], str | None]) -> None:
        plain = getattr(holder, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            name = part()
            with profile.part(name) if name else contextlib.nullcontext():
                return plain(*args, **kwargs)

        setattr(holder, method, call)

    booked(trainer, "_generate_transformers", lambda: "sampling")
    booked(trainer, "compute_loss", lambda: "student")
    booked(trainer, "_forward_logits", lambda: None if torch.is_grad_enabled() else "teacher")
    booked(trainer.accelerator, "backward", lambda: "backward")
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "SyncTeacherModelCallback":
            booked(callback, "on_step_end", lambda: "average")


@contextlib.contextmanager
def quiet() -> Iterator[Path]:
    """A folder, and few words on the terminal."""
    import tempfile
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(folder)
