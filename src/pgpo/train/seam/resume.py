"""Checkpoints: what TRL and transformers write and read, made whole, verified and exact.

Formats and checks lie in `train/checkpoint.py`; here is where transformers asks for them.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from pgpo.errors import UserError, reason
from pgpo.teacher.weights import TEACHER_ADAPTER
from pgpo.train import checkpoint as checkpoints
from pgpo.train import profile, zero
from pgpo.train.seam.rollouts import STALE, Rollout
from pgpo.train.seam.step import StepSeam

_OWN = "pgpo_"  # begin of the names of our own files in a checkpoint


class SeamTrainer(StepSeam):
    """`StepSeam` whose checkpoints are whole, verified and exact. Subclass it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failed_save: str | None = None  # why the newest checkpoint could not be written
        self._scratch: str | None = None  # where a checkpoint is being written
        self._sampler: Any = None
        self._unlogged: dict[str, Any] | None = None  # of a checkpoint between two logs, until training continues
        super().__init__(*args, **kwargs)

    # Hooks ----------------------------------------------------------------------------------------------------------

    def save_extra(self, directory: Path) -> None:
        """Write what a checkpoint needs beyond the Trainer's own state (called on every rank)."""

    def load_extra(self, directory: Path) -> None:
        """Read what `save_extra` wrote."""

    def load_weights(self, checkpoint: Path) -> None:
        """The student's weights of a checkpoint, nothing else of it."""
        self._load_from_checkpoint(str(checkpoint))

    # TRL's members --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a checkpoint is verified first, and True is the newest one that is whole."""
        if self.is_deepspeed_enabled and self.model_wrapped is not self.model:
            raise UserError("DeepSpeed's engine trains once; make a new trainer and resume from a checkpoint.")
        self._last_loaded_step = STALE  # the steps are counted anew, or go on from a checkpoint's
        with self.rank_watch(), profile.confined():
            checkpoint = self._verified(resume_from_checkpoint)
            if checkpoint is not None and self.is_deepspeed_enabled:
                with _explained(checkpoint):
                    zero.require_inert(Path(checkpoint), self.accelerator.num_processes)
            return super().train(checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._load_unlogged()
        return super().training_step(model, inputs, num_items_in_batch)

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
                self.host.before_seal()
                checkpoints.commit(folder, step, self.host.run_id)

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
                self.host.say(
                    f"{name} could not be written in {folder} ({self.failed_save}); training continues and the next "
                    "save tries again: free some space there."
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
        return next((f for f in self.engine.gather_objects([failure]) if f is not None), None)

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
            self.host.say(
                f"{directory.name} was written by another number of processes: the run continues, but not bit for bit "
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
        result = self.engine.gather_objects(found)[0]
        if isinstance(result, UserError):
            raise result
        return result

    def _whole_checkpoint(self, resume: Any) -> str:
        if resume is True:
            folder = Path(self.args.output_dir)
            path = checkpoints.newest_whole(folder, self.host.run_id, say=self.host.say)
            if path is None:
                raise UserError(f"{folder} has no whole checkpoint; give the path of one, or start from the beginning.")
            return str(path)
        path = Path(resume).resolve()
        if not path.is_dir():
            raise UserError(f"there is no checkpoint {resume}; give its folder, or True for the newest one.")
        if path == self.host.trusted or (problem := checkpoints.problem(path, self.host.run_id)) is None:
            return str(resume)
        if not (path / checkpoints.MANIFEST_FILE).exists():
            if not any(path.glob(f"{_OWN}*")):
                raise UserError(
                    f"{resume} is no checkpoint of pgpo (it has no {checkpoints.MANIFEST_FILE}), so teacher and "
                    "schedule cannot be continued; give it to the trainer as the model, to train on from its weights."
                )
            self.host.say(f"{path.name} has no {checkpoints.MANIFEST_FILE}: whether it is whole cannot be verified.")
            return str(resume)
        older = checkpoints.newest_whole(path.parent, self.host.run_id, before=checkpoints.named_step(path))
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
    """PEFT makes adapters fp32 when it loads them, also those that TRL made bf16 (QLoRA); keep the dtypes that the run
    began with."""
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
        raise UserError(
            f"the checkpoint {Path(checkpoint).name} cannot be continued "
            f"({type(error).__name__}: {reason(error, 200)}); remove its folder to continue from the one before."
        ) from error
