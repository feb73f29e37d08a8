"""`pgpo train`: task + model + trainer + run directory, from arguments to the last picture."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import get_peft_config, get_quantization_config

from pgpo import runlog
from pgpo.errors import UserError
from pgpo.evaluate.run import write_records
from pgpo.runlog import RunLog
from pgpo.tasks import Row, Task, lab_world
from pgpo.train import checkpoint as checkpoints
from pgpo.train.arguments import Parsed, RunArguments, parse
from pgpo.train.field_types import file_name
from pgpo.train.trainer import PGPOTrainer
from pgpo.train.trl_seam import nonfinite_parameter

console = Console(stderr=True)
# What a continued run may do differently: how long it goes on, and what it tells on the way.
RESUMABLE = {
    "max_steps",
    "num_train_epochs",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "eval_rows",
    "test_rows",
    "samples_per_step",
    "report_to",
    "data_path",
}
INTERRUPTED = 130  # the shell's status for Ctrl-C
TERMINATED = 143  # and for SIGTERM
NOT_SAVED = 1  # the last checkpoint could not be written
RUN_ID = "run_id"  # in config.json and in every checkpoint of the run
BASE_FOLDER = "base"  # the model made on the spot
TEST_RECORDS_FILE = "test_records.jsonl"
RESULT_FILE = "result.json"  # what --protocol paper or strict reports
SELECTED = "test_selected"  # the test questions at the step that the validation questions select
SAMPLE_TOKENS = 1000  # ours: a sample's tokens after these are kept as text alone
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class Terminated(KeyboardInterrupt):
    """SIGTERM where there is no step to finish."""

    status = TERMINATED


def main(argv: Sequence[str]) -> tuple[int, Path]:
    """Run `pgpo train` with these flags; exit status and run directory.

    0: done. 130 or 143: stopped after a step, and saved, by Ctrl-C or SIGTERM. 1: the last checkpoint was not written.
    """
    with _stopped_by_sigterm():
        return _main(argv)


def _main(argv: Sequence[str]) -> tuple[int, Path]:
    # TRL sets this field of transformers 5 by its old name; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    argv, resume = _take_resume(list(argv))
    if resume is None:
        parsed = parse(argv)
        directory = Path(parsed.config.output_dir or "")
        if "output_dir" not in parsed.given:
            directory = _new_name(parsed)
        return train(parsed, directory)
    config = runlog.read_run(resume).config
    if "arguments" not in config:
        raise UserError(f"{resume} was not written by `pgpo train`, so it cannot be resumed.")
    parsed = parse(argv, stored=config["arguments"])
    changed = {k for k, v in parsed.given.items() if config["arguments"].get(k) != v} - {"output_dir"}
    if refused := sorted(changed - RESUMABLE):
        raise UserError(
            f"--resume continues the run as it was, so {', '.join(f'--{name}' for name in refused)} cannot change; "
            f"start a new run for that. What may change: {', '.join(sorted(RESUMABLE))}."
        )
    return train(parsed, resume, resume=True)


def train(parsed: Parsed, directory: Path, resume: bool = False) -> tuple[int, Path]:
    """Train, evaluate and log in `directory`; see `main`.

    Raises:
        UserError: anything a user can mend. A new directory without a finished step is removed again.
    """
    if parsed.config.process_index != 0:  # the other ranks write no run log
        return _train(parsed, directory, resume)
    existing = _existing(directory)
    if not resume:
        _require_free(directory, existing, parsed.run.overwrite)
    with _alone(directory, existing):
        return _train(parsed, directory, resume)


def _train(parsed: Parsed, directory: Path, resume: bool) -> tuple[int, Path]:
    run, args = parsed.run, parsed.config
    quiet()
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # models that fit a CPU gain nothing from more, and spinning threads lose a lot
    main = args.process_index == 0
    task = run.load()
    _prepare_selection(parsed, task)
    if len(task.train) < args.prompts_per_step:
        raise UserError(
            f"the task has {len(task.train)} training questions, fewer than prompts_per_step = "
            f"{args.prompts_per_step}; lower --prompts_per_step or give more questions."
        )
    if resume and main:
        _remove_leftovers(directory)
    run_id = runlog.read_run(directory).config.get(RUN_ID) if resume else uuid.uuid4().hex
    checkpoint = last_checkpoint(directory) if resume else None
    with tempfile.TemporaryDirectory() as scratch:
        source = model_source(parsed, task, Path(scratch), directory if resume else None)
        m = parsed.model
        model, tokenizer = load_model(
            source,
            m.dtype,
            revision=m.model_revision,
            trust_remote_code=args.trust_remote_code,
            attn_implementation=m.attn_implementation,
            quantization_config=get_quantization_config(m),
        )
        rows = [*task.train, *task.validation, *task.test]
        check_prompts(tokenizer, rows, args.max_prompt_length, args.chat_template_kwargs)
        if source == Path(scratch) / BASE_FOLDER:
            model.name_or_path = str(directory / BASE_FOLDER)  # where it will lie; adapters note it as their base
        args.disable_tqdm = True
        args.output_dir = scratch  # nothing is written in the run directory before all parts fit together
        trainer = _trainer(parsed, task, model, tokenizer)
        args.output_dir = str(directory / runlog.CHECKPOINTS_FOLDER)
        trainer.say = say
        trainer.advice = lambda: _after_a_lost_rank(trainer, directory)
        trainer.run_id = run_id = trainer.gather_objects([run_id])[0]
        if not main:
            log = RunLog(directory)
        elif checkpoint is None:
            log = _create(parsed, directory, Path(scratch) / BASE_FOLDER, run_id)
        else:
            log = RunLog.resume(directory, checkpoint[0])
            runlog.update_config(directory, _config(parsed, run_id))  # a later --resume must know what this one changed
        try:
            with trainer.rank_watch(), _full_disk_explained(directory), log:
                status = _Session(trainer, log, run, task).go(checkpoint)
        except BaseException:
            if main and checkpoint is None and trainer.state.global_step == 0:
                _discard(directory)
            raise
    if not main:
        return status, directory
    if trainer.failed_save is not None:
        saved = checkpoints.steps(directory / runlog.CHECKPOINTS_FOLDER)
        say(
            f"step {trainer.state.global_step} is not saved ({trainer.failed_save}), the newest checkpoint is of step "
            f"{saved[-1] if saved else 0}; the log is complete. Free some space, then: pgpo train --resume {directory}"
        )
        status = NOT_SAVED
    elif status in (INTERRUPTED, TERMINATED):
        say(f"stopped after step {trainer.state.global_step}; continue with: pgpo train --resume {directory}")
    else:
        say(f"run directory: {directory}")
    return status, directory


def model_source(parsed: Parsed, task: Task, scratch: Path, resumed: Path | None) -> Path | str:
    """Where the model lies: as named, the lab's base, or one made on the spot."""
    if parsed.model.model_name_or_path:
        return parsed.model.model_name_or_path
    if parsed.run.task == "lab_world":
        return lab_world.checkpoint_path(parsed.run.variant)
    if resumed is not None:
        return resumed / BASE_FOLDER
    from pgpo.train.warm_start import warm_start

    say("no model given: a small one is made on the spot and shown the answer format (one to three minutes).")
    with _progress("warm start") as (bar, line):
        return warm_start(
            task.train,
            parsed.run.prompt_style,
            scratch / BASE_FOLDER,
            seed=parsed.config.seed,
            progress=lambda step, steps, loss: bar.update(
                line, total=steps, completed=step, shown=f"loss {loss:.2f} nats per token"
            ),
        )


def load_model(source: Path | str, dtype: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Model (fp32 unless dtype says otherwise) and tokenizer; UserError with the reason if they cannot be read."""
    if not Path(source).exists() and not _HUB_ID.fullmatch(str(source)):
        raise UserError(f"there is no model folder {source}; give one with config, weights and tokenizer, or a hub id.")
    shared = {k: options[k] for k in ("revision", "trust_remote_code") if k in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **shared)
        precision = "auto" if dtype == "auto" else getattr(torch, dtype or "float32")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=precision, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the model {str(source)!r} cannot be loaded ({type(error).__name__}: {reason}); give a folder or hub id "
            "with config, weights and tokenizer."
        ) from error
    if (weight := nonfinite_parameter(model)) is not None:
        raise UserError(f"the weight {weight} of the model {str(source)!r} holds nan or inf; give an intact copy.")
    return model, tokenizer


def check_prompts(tokenizer: Any, rows: Sequence[Row], limit: int | None, template: dict[str, Any]) -> None:
    """Before anything is written: a chat template, a pad token, and every prompt within the limit (tokens)."""
    if not tokenizer.chat_template:
        raise UserError("the model's tokenizer has no chat template; use an instruction-tuned model or set one.")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no pad token and no eos token; set tokenizer.pad_token.")
    prompts = [row["prompt"] for row in rows]
    encoded = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True, **template)[
        "input_ids"
    ]
    for row, ids in zip(rows, encoded, strict=True):
        if limit is not None and len(ids) > limit:
            raise UserError(
                f"question {row['id']} has {len(ids)} prompt tokens, more than max_prompt_length = {limit}; raise it."
            )


def last_checkpoint(directory: Path) -> tuple[int, Path]:
    """Step and path of the newest checkpoint that is whole and of this run; others are named and skipped."""
    folder = directory / runlog.CHECKPOINTS_FOLDER
    run_id = runlog.read_run(directory).config.get(RUN_ID)
    path = checkpoints.newest_whole(folder, run_id, say=say)
    if path is not None:
        return int(path.name.removeprefix("checkpoint-")), path
    if not checkpoints.steps(folder):
        raise UserError(
            f"{directory} has no readable checkpoint, for it was stopped before its first one was written: there is "
            'nothing to continue, so start it again with the "command" in its config.json, --overwrite and a smaller '
            "--save_steps."
        )
    raise UserError(f"{directory} has no readable checkpoint in {runlog.CHECKPOINTS_FOLDER}/; start a new run.")


def _after_a_lost_rank(trainer: PGPOTrainer, directory: Path) -> str:
    saved = checkpoints.steps(directory / runlog.CHECKPOINTS_FOLDER)
    if saved:
        go_on = f"continue from step {saved[-1]}, with the same launcher, by: pgpo train --resume {directory}"
    elif trainer.accelerator.is_main_process:
        go_on = "nothing is saved yet."
    else:
        go_on = f"what is saved lies in {directory} on rank 0's machine."
    return f"after step {trainer.state.global_step}; {go_on}"


@contextmanager
def _full_disk_explained(directory: Path) -> Iterator[None]:
    """A log that cannot be written ends the run: it goes on from its last checkpoint, and no line is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise UserError(
            f"the log in {directory} could not be written ({error.strerror}); free some space, then continue with "
            f"`pgpo train --resume {directory}`."
        ) from error


def _remove_leftovers(directory: Path) -> None:
    """Temporary files and folders of a process that died."""
    checkpoints.remove_leftovers(directory / runlog.CHECKPOINTS_FOLDER)
    for file in directory.glob("*.tmp"):
        if re.fullmatch(r"[\w.]+\.(json|jsonl)\.\d+\.tmp", file.name):  # as runlog.write_atomically names them
            file.unlink(missing_ok=True)


def _prepare_selection(parsed: Parsed, task: Task) -> None:
    """What `--protocol` asks of the trainer: a checkpoint at every evaluation, the best one kept."""
    run, args = parsed.run, parsed.config
    if run.protocol == "last":
        return
    if args.eval_strategy == "no":
        raise UserError(f"--protocol {run.protocol} selects a step by its evaluation; add --eval_strategy steps.")
    if run.protocol == "paper":
        return
    if not task.validation:
        raise UserError("--protocol strict selects by validation questions; give --validation_fraction above 0.")
    args.save_strategy, args.save_steps = args.eval_strategy, args.eval_steps
    args.metric_for_best_model, args.greater_is_better = f"eval_{runlog.AVG_AT_K}", True


def rewards_of(task: Task) -> Any:
    """The task's grader as a TRL reward function."""

    def grade(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        rows = [{k: v[i] for k, v in columns.items() if isinstance(v, list)} for i in range(len(prompts))]
        return [task.grade(c[-1]["content"], row).reward for c, row in zip(completions, rows)]

    grade.__name__ = f"{task.name}_grade"
    return grade


def _trainer(parsed: Parsed, task: Task, model: Any, tokenizer: Any) -> PGPOTrainer:
    validation = task.validation[: parsed.run.eval_rows]
    if parsed.run.protocol == "paper":
        validation = task.test[: parsed.run.test_rows]
    elif not validation:
        validation = task.test[: parsed.run.eval_rows]
    try:
        trainer = PGPOTrainer(
            model,
            rewards_of(task),
            parsed.config,
            Dataset.from_list(task.train),
            eval_dataset=validation,
            processing_class=tokenizer,
            grade=task.grade,
            peft_config=get_peft_config(parsed.model),
        )
    except UserError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:  # vLLM, PEFT or a logger, missing or with a wrong value
        raise UserError(f"these arguments cannot be used: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Session(TrainerCallback):
    """One call of `train`: writes the run log, shows progress, stops cleanly on Ctrl-C."""

    def __init__(self, trainer: PGPOTrainer, log: RunLog, run: RunArguments, task: Task) -> None:
        self.trainer, self.log, self.run, self.task = trainer, log, run, task
        self.main = trainer.accelerator.is_main_process
        trainer.before_seal = log.sync
        self.curve = "test" if run.protocol == "paper" else "validation"
        self.accuracy = float("nan")
        self.untouched = False  # neither trained nor evaluated yet
        self.interrupted = False
        self.status = INTERRUPTED
        self.bar: Progress | None = None
        rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        trainer.watched = set(self._sampled_rows(rows * trainer.accelerator.num_processes))
        trainer.add_callback(self)
        if trainer.guard is not None:
            trainer.guard.report = self._alarm

    def go(self, checkpoint: tuple[int, Path] | None) -> int:
        test, records = self.task.test[: self.run.test_rows], self.log.directory / TEST_RECORDS_FILE
        self.untouched = checkpoint is None
        if not self.trainer.is_fsdp_enabled:  # FSDP places the model when training begins
            self._evaluate_untouched()
        args = self.trainer.args
        if checkpoint is not None and 0 < args.max_steps <= checkpoint[0]:
            # All steps are done. The Trainer would do one more; with no epochs to do it only loads the checkpoint.
            say(f"all {args.max_steps} steps are done; raise --max_steps to go on.")
            args.max_steps, args.num_train_epochs = -1, 0
        elif self.main:
            records.unlink(missing_ok=True)  # of a run that ended earlier, and now goes on
        self.trainer.trusted = None if checkpoint is None else checkpoint[1].resolve()
        try:
            with self._stopped_by_signals(), _progress(args.objective) as (self.bar, self.line):
                self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint[1]))
        finally:
            self.bar = None
        if self.interrupted:
            return self.status
        step = self.trainer.state.global_step
        tested = records.exists() and self._evaluated("test", step)
        if checkpoint is None or step > checkpoint[0] or not tested:
            self._evaluate(test, "test", step, TEST_RECORDS_FILE)
        if self.run.protocol != "last":
            self._select(test, step)
        return 0

    def _select(self, test: list[Row], last: int) -> None:
        """The step that the curve selects (the first of equals, the start included), and its test accuracy."""
        step, tested = self.trainer.gather_objects([self._selection()])[0]  # the main process has read what it wrote
        if not tested:
            self.trainer.load_weights(self.log.directory / runlog.CHECKPOINTS_FOLDER / f"checkpoint-{step}")
            self._evaluate(test, SELECTED, step)
        if not self.main:
            return
        lines = runlog.read_run(self.log.directory).evaluations
        found = {line[runlog.STEP]: line for line in lines if line[runlog.SPLIT] in ("test", SELECTED)}
        result = {
            "protocol": self.run.protocol,
            "selected_by": self.curve,
            "last": found[last],
            "selected": found[step],
        }
        runlog.write_atomically(self.log.directory / RESULT_FILE, runlog.json_line(result))
        at_last, at_best = found[last][runlog.AVG_AT_K], found[step][runlog.AVG_AT_K]
        say(
            f"{self.run.protocol}: test avg@{self.trainer.args.eval_k} {at_last:.3f} at the last step {last}, "
            f"{at_best:.3f} at step {step}, which the {self.curve} questions select"
        )

    def _selection(self) -> tuple[int, bool]:
        """Selected step, and whether the test questions were asked there."""
        lines = runlog.read_run(self.log.directory).evaluations
        curve = [line for line in lines if line[runlog.SPLIT] == self.curve]
        step = max(curve, key=lambda line: (line[runlog.AVG_AT_K], -line[runlog.STEP]))[runlog.STEP]
        return step, any(line[runlog.STEP] == step for line in lines if line[runlog.SPLIT] in ("test", SELECTED))

    def _evaluate_untouched(self) -> None:
        if not self.untouched:
            return
        self.untouched = False
        self._evaluate(self.task.test[: self.run.test_rows], "test", 0)
        if self.curve == "validation":
            self._evaluate(self.trainer.eval_dataset, "validation", 0)

    def _evaluated(self, split: str, step: int) -> bool:
        """Whether a run that is resumed has this evaluation already."""
        lines = runlog.read_run(self.log.directory).evaluations
        return any(line[runlog.SPLIT] == split and line[runlog.STEP] == step for line in lines)

    def _evaluate(self, rows: list[Row], split: str, step: int, file: str | None = None) -> None:
        records = self.trainer.held_out_records(rows)
        if file is not None and self.main:  # before the line that says that it is done
            write_records(self.log.directory / file, records)
        if not (self.curve == split == "test" and step and self._evaluated("test", step)):  # the curve has it already
            self._write_evaluation(
                step, {"split": split, **self.trainer.held_out_evaluation.summarize(records).as_dict()}
            )

    def _write_evaluation(self, step: int, values: dict[str, Any]) -> None:
        if not self.main:
            return
        self.log.evaluation(step, values)
        k, low, high = values["k"], values["avg_at_k_low"], values["avg_at_k_high"]
        self.accuracy = values["avg_at_k"]
        say(
            f"step {step:4d}  {values['split']:10s} avg@{k} {self.accuracy:.3f}  95 % [{low:.3f}, {high:.3f}]  "
            f"{values['questions']} questions"
        )

    # Trainer callbacks ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluate_untouched()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "grad_norm" not in logs or not self.main:
            return
        names = {"step_time": runlog.STEP_SECONDS}
        values = {names.get(k, k): v for k, v in logs.items()}
        self.log.metrics(state.global_step, {k: values[k] for k in (*runlog.METRICS, "success_share") if k in values})
        self.log.samples(state.global_step, self._samples())
        if self.bar is not None:
            shown = f"acc {self.accuracy:.3f}"
            for name, form in (("reward", ".2f"), ("information", "+.3f"), ("rho", ".3f")):
                if name in values:  # no reward on a step that reuses completions, no rho with GRPO
                    shown += f"  {name} {values[name]:{form}}"
            self.bar.update(self.line, total=state.max_steps, completed=state.global_step, shown=shown)

    def _sampled_rows(self, count: int) -> list[int]:
        """Which rows of a rollout are kept, evenly spread."""
        kept = self.run.samples_per_step
        return list(range(0, count, max(1, count // max(kept, 1))))[:kept]

    def _samples(self) -> list[dict[str, Any]]:
        rollout, details = self.trainer.last_rollout, self.trainer.token_details
        samples: list[dict[str, Any]] = []
        if rollout is None:
            return samples
        for i in self._sampled_rows(len(rollout.completions)):
            sample = {
                "prompt": rollout.prompts[i][-1]["content"],
                "completion": rollout.completions[i],
                "reward": rollout.rewards[i],
            }
            if i in details:
                sample["tokens"] = [
                    [self.trainer.tokenizer.decode([d.token]), *(round(v, 4) for v in d[1:])]
                    for d in details[i][:SAMPLE_TOKENS]
                ]
            samples.append(sample)
        return samples

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        values = {k: metrics[f"eval_{k}"] for k in runlog.EVALUATIONS if f"eval_{k}" in metrics}
        self._write_evaluation(state.global_step, {"split": self.curve, **values})

    def _alarm(self, line: dict[str, Any], text: str) -> None:
        self.log.alarm(line[runlog.STEP], line)
        say(text)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interrupted = self.trainer.on_any_rank(self.interrupted)  # ranks stop after the same step
        if self.interrupted:
            control.should_training_stop = True
            control.should_save = True

    def _interrupt(self, number: int, frame: Any) -> None:
        terminated = number == signal.SIGTERM
        if self.interrupted:
            raise Terminated if terminated else KeyboardInterrupt
        self.interrupted, self.status = True, TERMINATED if terminated else INTERRUPTED
        say("stopping after this step and saving; press Ctrl-C again to stop at once.")

    @contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Ctrl-C, and SIGTERM where `main` has taken it, end training after the step."""
        if not _in_main_thread():
            yield
            return
        numbers = [signal.SIGINT, *([signal.SIGTERM] if signal.getsignal(signal.SIGTERM) is _terminate else [])]
        before = [signal.signal(number, self._interrupt) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, with what is half-made removed."""
    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _config(parsed: Parsed, run_id: str) -> dict[str, Any]:
    """Everything that shaped the run; `arguments` alone repeats it."""
    resolved = {k: v for k, v in parsed.config.to_dict().items() if not k.startswith("_")}
    return {
        **resolved,
        **vars(parsed.run),
        "model_name_or_path": parsed.model.model_name_or_path,
        RUN_ID: run_id,
        "arguments": {
            k: v
            for k, v in parsed.given.items()
            if k not in ("output_dir", "overwrite") and not k.endswith(runlog.SECRET_SUFFIXES)
        },
    }


def _create(parsed: Parsed, directory: Path, base: Path, run_id: str) -> RunLog:
    """The run directory of a new run, with the model that was made on the spot, if any."""
    config, device = _config(parsed, run_id), {"device": _device(parsed.config)}
    log = RunLog.create(directory, config, device, overwrite=parsed.run.overwrite)
    _remove_parts(directory, (BASE_FOLDER, TEST_RECORDS_FILE, RESULT_FILE))  # of a run that is replaced
    if base.exists():
        shutil.copytree(base, directory / BASE_FOLDER)
    return log


@contextmanager
def _alone(directory: Path, existing: Path) -> Iterator[None]:
    """No other process trains in this directory meanwhile. The folders made for it go if they stay empty."""
    try:
        with runlog.lock(
            directory, f"another process is training in {directory}; wait until it ends, or stop it first."
        ):
            yield
    finally:
        for folder in (directory, *directory.parents):
            if folder == existing or not folder.is_dir() or any(folder.iterdir()):
                break
            with suppress(OSError):  # somebody has just put something there
                folder.rmdir()


def _discard(directory: Path) -> None:
    """Remove what a run without a finished step wrote; nothing else that lies there."""
    files = (runlog.CONFIG_FILE, runlog.ENVIRONMENT_FILE, runlog.EVALUATIONS_FILE, runlog.SAMPLES_FILE)
    _remove_parts(directory, (*files, runlog.CHECKPOINTS_FOLDER, BASE_FOLDER))


def _remove_parts(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        else:
            (directory / name).unlink(missing_ok=True)


def _existing(directory: Path) -> Path:
    """The directory or the nearest of its parents that is there."""
    try:
        return next(p for p in (directory, *directory.parents) if p.exists())
    except OSError as error:  # such as a name that is too long
        raise UserError(
            f"the run directory {str(directory)[:60]!r} cannot be made ({error.strerror}); choose another --output_dir."
        ) from error


def _require_free(directory: Path, existing: Path, overwrite: bool) -> None:
    """Refuse an existing run, or a place that cannot hold one, before minutes are spent."""
    if not existing.is_dir():
        raise UserError(
            f"the run directory {directory} cannot be made: {existing} is a file; choose another --output_dir."
        )
    if runlog.occupied(directory) and not overwrite:
        raise UserError(
            f"the run directory {directory} already exists; continue it with `pgpo train --resume {directory}`, or "
            "choose another --output_dir, or replace it with --overwrite."
        )


def _new_name(parsed: Parsed) -> Path:
    """runs/<task>-<domain>-<objective>-<n>, the first n that is free."""
    parts = [parsed.run.task, parsed.run.domain, parsed.config.objective]
    stem = "-".join(file_name(p) for p in parts if p)
    number = 1
    while (Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return Path("runs") / f"{stem}-{number}"


def _take_resume(argv: list[str]) -> tuple[list[str], Path | None]:
    for i, word in enumerate(argv):
        if word == "--resume":
            if i + 1 >= len(argv):
                raise UserError("--resume needs the run directory to continue.")
            return argv[:i] + argv[i + 2 :], Path(argv[i + 1])
        if word.startswith("--resume="):
            return argv[:i] + argv[i + 1 :], Path(word.split("=", 1)[1])
    return argv, None


def _device(args: Any) -> str:
    return torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device.type)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


class _progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.line = self.bar.add_task(title, total=None, shown="")

    def __enter__(self) -> tuple[Progress, Any]:
        self.bar.start()
        return self.bar, self.line

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()


def quiet() -> None:
    """Only our own lines: no warnings and no loading bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def say(text: str) -> None:
    """One line to stderr, whole (rich would wrap and colour it when piped)."""
    if console.is_terminal:
        console.print(text, highlight=False, markup=False)
    else:
        print(text, file=sys.stderr, flush=True)
