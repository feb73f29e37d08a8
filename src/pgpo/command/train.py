"""`pgpo train`: task + model + trainer + run directory, from arguments to the last checkpoint."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import get_peft_config, get_quantization_config

from pgpo import runlog
from pgpo.command import directory as run_directory
from pgpo.command import hours
from pgpo.command.interrupt import INTERRUPTED, TERMINATED, stopped_by_sigterm
from pgpo.command.models import check_prompts, load_model, model_source, one_thread
from pgpo.command.session import Session
from pgpo.command.terminal import quiet, say
from pgpo.command.tracking import one_run
from pgpo.errors import UserError
from pgpo.runlog import BASE_FOLDER, RUN_ID, RunLog
from pgpo.settings.arguments import Parsed, parse
from pgpo.tasks import Row, Task
from pgpo.train import checkpoint as checkpoints
from pgpo.train.host import Host
from pgpo.train.trainer import PGPOTrainer

# What --resume may change: the length of the run, and what it logs.
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
# Fields that act in Python alone, and the flags that stand for them.
IN_PYTHON = {
    "model_init_kwargs": "use --dtype, --attn_implementation, --model_revision or --load_in_4bit",
    "resume_from_checkpoint": "use --resume with the run directory",
}
NOT_SAVED = 1  # the last checkpoint could not be written


def main(argv: Sequence[str]) -> tuple[int, Path]:
    """Run `pgpo train` with these flags; exit status and run directory.

    0: done. 130 or 143: stopped after a step, and saved, by Ctrl-C or SIGTERM. 1: the last checkpoint was not written.
    """
    with stopped_by_sigterm():
        return _main(argv)


def _main(argv: Sequence[str]) -> tuple[int, Path]:
    quiet()
    argv, resume = take_resume(list(argv))
    if resume is None:
        parsed = parse(argv)
        directory = Path(parsed.config.output_dir or "")
        if "output_dir" not in parsed.given:
            directory = run_directory.new_name(parsed)
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
        UserError: a mistake of the user. A new directory without a finished step is removed again.
    """
    for name, remedy in IN_PYTHON.items():
        if getattr(parsed.config, name) is not None:
            raise UserError(f"--{name} does nothing here; {remedy}.")
    if parsed.config.process_index != 0:  # the other ranks write no run log
        return _train(parsed, directory, resume)
    existing = run_directory.nearest_existing(directory)
    if not resume:
        run_directory.require_free(directory, existing, parsed.run.overwrite)
    with run_directory.locked(directory, existing):
        return _train(parsed, directory, resume)


def _train(parsed: Parsed, directory: Path, resume: bool) -> tuple[int, Path]:
    run, args = parsed.run, parsed.config
    suit_device(parsed)
    main = args.process_index == 0
    task = run.load()
    _prepare_selection(parsed, task)
    if len(task.train) < args.prompts_per_step:
        raise UserError(
            f"the task has {len(task.train)} training questions, fewer than prompts_per_step = "
            f"{args.prompts_per_step}; lower --prompts_per_step or give more questions."
        )
    if resume and main:
        run_directory.remove_leftovers(directory)
    run_id = runlog.read_run(directory).config.get(RUN_ID) if resume else uuid.uuid4().hex
    checkpoint = run_directory.last_checkpoint(directory) if resume else None
    with tempfile.TemporaryDirectory() as scratch:
        source = model_source(parsed, task, Path(scratch), directory if resume else None)
        model, tokenizer = load(parsed, task, source)
        args.disable_tqdm = True
        args.output_dir = scratch  # write nothing to the run directory before all arguments are checked
        host = Host(say=say, advice=lambda step: run_directory.after_a_lost_rank(directory, step, main))
        if main and args.device.type == "cpu" and parsed.model.model_name_or_path:
            evaluated = task.test[: run.test_rows] + ([] if resume else task.validation[: run.eval_rows])
            if (text := hours.warning(model, args, parsed.model.use_peft, len(evaluated))) is not None:
                say(text)
        trainer = _trainer(parsed, task, model, tokenizer, host)
        if source == Path(scratch) / BASE_FOLDER:
            _name_base(trainer.model, str(directory / BASE_FOLDER))
        args.output_dir = str(directory / runlog.CHECKPOINTS_FOLDER)
        host.run_id = run_id = trainer.engine.gather_objects([run_id])[0]
        log = RunLog(directory)
        if main:
            base = Path(scratch) / BASE_FOLDER
            log = run_directory.open_log(parsed, directory, base, run_id, None if checkpoint is None else checkpoint[0])
        try:
            with (
                trainer.rank_watch(),
                run_directory.full_disk_explained(directory),
                one_run(trainer, directory, run_id),
                log,
            ):
                status = Session(trainer, log, run, task).go(checkpoint)
        except BaseException:
            if main and checkpoint is None and trainer.state.global_step == 0:
                run_directory.discard(directory)
            raise
    return _conclude(trainer, directory, status) if main else status, directory


def suit_device(parsed: Parsed) -> None:
    """What a CPU wants otherwise."""
    args = parsed.config
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
        one_thread()


def load(parsed: Parsed, task: Task, source: Path | str) -> tuple[Any, Any]:
    """Model and tokenizer, checked against all questions of the task."""
    m, args = parsed.model, parsed.config
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
    return model, tokenizer


def _name_base(model: Any, name: str) -> None:
    """Where the initial model will lie. Until now it was named by its scratch folder, from which vLLM loads it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.name_or_path = name
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.base_model_name_or_path = name


def _conclude(trainer: PGPOTrainer, directory: Path, status: int) -> int:
    """Say where the run is and how to continue; the exit status."""
    if trainer.failed_save is not None:
        saved = checkpoints.steps(directory / runlog.CHECKPOINTS_FOLDER)
        say(
            f"step {trainer.state.global_step} is not saved ({trainer.failed_save}), the newest checkpoint is of step "
            f"{saved[-1] if saved else 0}; the log is complete. Free some space, then: pgpo train --resume {directory}"
        )
        return NOT_SAVED
    if status in (INTERRUPTED, TERMINATED):
        say(f"stopped after step {trainer.state.global_step}; continue with: pgpo train --resume {directory}")
    else:
        say(f"run directory: {directory}")
    return status


def _prepare_selection(parsed: Parsed, task: Task) -> None:
    """Set up the trainer for `--protocol`: a checkpoint at every evaluation, of which the best one is kept."""
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


def rewards_of(task: Task, seed: int = 0) -> Any:
    """The task's verdicts as a TRL reward function: its grader's, or what training sees in its place."""

    def grade(
        prompts: list[Any],
        completions: list[Any],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        texts, rows = [c[-1]["content"] for c in completions], _rows(columns, len(prompts))
        if task.rewards is None:
            return [task.grade(text, row).reward for text, row in zip(texts, rows, strict=True)]
        rewards, facts = task.rewards(texts, rows, seed, 0 if trainer_state is None else trainer_state.global_step)
        for name, value in facts.items():
            if log_metric is not None:
                log_metric(name, value)
        return rewards

    grade.__name__ = f"{task.name}_grade"
    return grade


def feedback_of(task: Task, right: float = 1.0) -> Any:
    """The task's remarks on failed attempts, of a reward below `right`, as a feedback function; None if it has none."""
    if (remark := task.feedback) is None:
        return None

    def feedback(prompts: list[Any], completions: list[Any], **columns: Any) -> list[str | None]:
        texts, rows = [c[-1]["content"] for c in completions], _rows(columns, len(prompts))
        failed = [task.grade(text, row).reward < right for text, row in zip(texts, rows, strict=True)]
        return [remark(t, row) if wrong else None for t, row, wrong in zip(texts, rows, failed, strict=True)]

    return feedback


def _rows(columns: dict[str, Any], count: int) -> list[Row]:
    return [{k: v[i] for k, v in columns.items() if isinstance(v, list)} for i in range(count)]


def _trainer(parsed: Parsed, task: Task, model: Any, tokenizer: Any, host: Host) -> PGPOTrainer:
    validation = task.validation[: parsed.run.eval_rows]
    if parsed.run.protocol == "paper":
        validation = task.test[: parsed.run.test_rows]
    elif not validation:
        validation = task.test[: parsed.run.eval_rows]
    return build_trainer(parsed, task, model, tokenizer, host, validation)


def build_trainer(
    parsed: Parsed, task: Task, model: Any, tokenizer: Any, host: Host, held_out: Sequence[Row]
) -> PGPOTrainer:
    """The trainer of these arguments. Raises UserError where they cannot be used."""
    if task.name == "math" and parsed.config.reward_timeout is not None:
        raise UserError(
            f"reward_timeout is {parsed.config.reward_timeout:g}, but math-verify sets the same timer for its own "
            "limits; leave it out."
        )
    try:
        trainer = PGPOTrainer(
            model,
            rewards_of(task, parsed.config.seed),
            parsed.config,
            Dataset.from_list(task.train),
            eval_dataset=held_out,
            processing_class=tokenizer,
            grade=task.grade,
            feedback_funcs=feedback_of(task, parsed.config.success_threshold),
            host=host,
            peft_config=get_peft_config(parsed.model),
        )
    except UserError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:  # vLLM, PEFT or a logger, missing or with a wrong value
        raise UserError(f"these arguments cannot be used: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def take_resume(argv: list[str]) -> tuple[list[str], Path | None]:
    """The flags without `--resume FOLDER`, and the folder."""
    for i, word in enumerate(argv):
        if word == "--resume":
            if i + 1 >= len(argv):
                raise UserError("--resume needs the run directory to continue.")
            return argv[:i] + argv[i + 2 :], Path(argv[i + 1])
        if word.startswith("--resume="):
            return argv[:i] + argv[i + 1 :], Path(word.split("=", 1)[1])
    return argv, None
