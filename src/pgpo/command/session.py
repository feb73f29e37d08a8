"""A run of `pgpo train`, from its first evaluation to its last. The callback writes the run log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback

from pgpo import runlog
from pgpo.command.interrupt import Interruption
from pgpo.command.terminal import Heartbeat, console, progress, say
from pgpo.evaluate.run import write_records
from pgpo.files import json_line, write_atomically
from pgpo.runlog import RunLog
from pgpo.settings.arguments import RunArguments
from pgpo.study_files import accuracy_curve, narrowed, narrowing, selected_step
from pgpo.tasks import Row, Task
from pgpo.train.trainer import PGPOTrainer

SAMPLE_TOKENS = 1000  # ours: a sample's tokens after these are kept as text alone


class Session(TrainerCallback):
    """One call of `train`: evaluates, writes the run log, shows progress, stops after a step on Ctrl-C."""

    def __init__(self, trainer: PGPOTrainer, log: RunLog, run: RunArguments, task: Task) -> None:
        self.trainer, self.log, self.run, self.task = trainer, log, run, task
        self.main = trainer.accelerator.is_main_process
        self.curve = runlog.TEST if run.protocol == "paper" else runlog.VALIDATION
        self.accuracy = float("nan")
        self.first: dict[str, dict[str, Any]] = {}  # split -> the first evaluation of the run on it
        self.untouched = False  # neither trained nor evaluated yet
        self.interruption = Interruption()
        self.bar: Progress | None = None
        self.steps_shown, self.shown = Heartbeat(), Heartbeat()
        self.doing, self.forwards = "", 0
        rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        host = trainer.host
        host.before_seal, host.alarm = log.sync, self._alarm
        host.watched = set(self._sampled_rows(rows * trainer.accelerator.num_processes))
        trainer.add_callback(self)
        if self.main:
            trainer.model.register_forward_hook(self._forward)

    def _begin(self, what: str) -> None:
        self.doing, self.forwards = what, 0

    def _forward(self, *_: Any) -> None:
        """A sign that something long is under way, where no bar shows it."""
        self.forwards += 1
        if self.bar is None or not console.is_terminal:
            self.shown(lambda: f"{self.doing}: {self.forwards} forwards so far")

    def go(self, checkpoint: tuple[int, Path] | None) -> int:
        """Evaluate, train from the checkpoint (step, path) if there is one, evaluate again; the exit status."""
        test, records = self.task.test[: self.run.test_rows], self.log.directory / runlog.TEST_RECORDS_FILE
        self.untouched = checkpoint is None
        if not self.trainer.is_fsdp_enabled:  # FSDP places the model when training begins
            self._evaluate_untouched()
        args = self.trainer.args
        if checkpoint is not None and 0 < args.max_steps <= checkpoint[0]:
            # All steps are done. The Trainer would do one more; with no epochs to do it only loads the checkpoint.
            say(f"all {args.max_steps} steps are done; raise --max_steps to continue.")
            args.max_steps, args.num_train_epochs = -1, 0
        elif self.main:
            records.unlink(missing_ok=True)  # of a run that ended earlier and now continues
        self.trainer.host.trusted = None if checkpoint is None else checkpoint[1].resolve()
        try:
            with self.interruption.handled(), progress(args.objective) as (self.bar, self.line):
                self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint[1]))
        finally:
            self.bar = None
        if self.interruption.asked:
            return self.interruption.status
        step = self.trainer.state.global_step
        tested = records.exists() and self._evaluated(runlog.TEST, step)
        if checkpoint is None or step > checkpoint[0] or not tested:
            self._evaluate(test, runlog.TEST, step, runlog.TEST_RECORDS_FILE)
        if self.run.protocol != "last":
            self._select(test, step)
        return 0

    def _select(self, test: list[Row], last: int) -> None:
        """Test the step that the curve selects (0 included), unless it is tested already, and write result.json."""
        step, tested = self.trainer.engine.gather_objects([self._selection()])[
            0
        ]  # the main process has read what it wrote
        if not tested:
            self.trainer.load_weights(self.log.directory / runlog.CHECKPOINTS_FOLDER / f"checkpoint-{step}")
            self._evaluate(test, runlog.TEST_SELECTED, step)
        if not self.main:
            return
        found = {line[runlog.STEP]: line for line in self._evaluations(runlog.TEST, runlog.TEST_SELECTED)}
        result = {
            "protocol": self.run.protocol,
            "selected_by": self.curve,
            "last": found[last],
            "selected": found[step],
        }
        write_atomically(self.log.directory / runlog.RESULT_FILE, json_line(result))
        at_last, at_best = found[last][runlog.AVG_AT_K], found[step][runlog.AVG_AT_K]
        say(
            f"{self.run.protocol}: test avg@{self.trainer.args.eval_k} {at_last:.3f} at the last step {last}, "
            f"{at_best:.3f} at step {step}, which the {self.curve} questions select"
        )

    def _selection(self) -> tuple[int, bool]:
        """The selected step, and whether it has a test accuracy."""
        step = selected_step(*accuracy_curve(self._evaluations(self.curve), self.curve))
        return step, any(line[runlog.STEP] == step for line in self._evaluations(runlog.TEST, runlog.TEST_SELECTED))

    def _evaluate_untouched(self) -> None:
        if not self.untouched:
            return
        self.untouched = False
        self._evaluate(self.task.test[: self.run.test_rows], runlog.TEST, 0)
        if self.curve == runlog.VALIDATION:
            self._evaluate(self.trainer.eval_dataset, runlog.VALIDATION, 0)

    def _evaluated(self, split: str, step: int) -> bool:
        """Whether the log has this evaluation already, as after a resume."""
        return any(line[runlog.STEP] == step for line in self._evaluations(split))

    def _evaluations(self, *splits: str) -> list[dict[str, Any]]:
        """Those that the log has on these splits."""
        return [line for line in runlog.read_run(self.log.directory).evaluations if line[runlog.SPLIT] in splits]

    def _evaluate(self, rows: list[Row], split: str, step: int, file: str | None = None) -> None:
        self._begin(f"evaluating {len(rows)} {split} questions")
        records = self.trainer.held_out_records(rows)
        if file is not None and self.main:  # before the line that says that it is done
            write_records(self.log.directory / file, records)
        of_the_curve = self.curve == split == runlog.TEST and step and self._evaluated(split, step)
        if not of_the_curve:
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
        split = values[runlog.SPLIT]
        if split not in self.first:
            self.first[split] = self._evaluations(split)[0]
        if narrowed(self.first[split], values):
            say(f"step {step:4d}  {split:10s} {narrowing(self.first[split], values)}")

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
        shown = f"acc {self.accuracy:.3f}"
        for name, form in (("reward", ".2f"), ("information", "+.3f"), ("rho", ".3f")):
            if name in values:  # no reward on a step that reuses completions, no rho with GRPO
                shown += f"  {name} {values[name]:{form}}"
        if self.bar is not None:
            self.bar.update(self.line, total=state.max_steps, completed=state.global_step, shown=shown)
        if not console.is_terminal:
            self.steps_shown(lambda: f"step {state.global_step:4d} of {state.max_steps}  {shown}")

    def _sampled_rows(self, count: int) -> list[int]:
        """Indices of the completions of a rollout that are logged, evenly spaced."""
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

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(f"step {state.global_step + 1} of {state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(f"after step {state.global_step}")
        self.interruption.asked = self.trainer.engine.on_any_rank(
            self.interruption.asked
        )  # ranks stop after the same step
        if self.interruption.asked:
            control.should_training_stop = True
            control.should_save = True
