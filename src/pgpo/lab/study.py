"""`pgpo study`: methods x settings x seeds from one YAML file, trained by the code of `pgpo train`; resumable.

    STUDY.yaml -> Study, a queue of runs -> workers -> records.jsonl.gz -> summary.json, tables.md

A study resumes from `records.jsonl.gz` (study_files.py): a run that is recorded there is done, even if its directory is
gone. Each worker process trains one run at a time on one thread.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pgpo import runlog
from pgpo.errors import UserError
from pgpo.files import write_atomically
from pgpo.lab.alarms import alarm_study, alarm_table
from pgpo.lab.analysis import summarize_study, tables_markdown
from pgpo.lab.plan import Arm, Study, StudyRun, argv, read_study
from pgpo.lab.workers import Job, Pool, Result
from pgpo.provenance import environment
from pgpo.runlog import lock
from pgpo.study_files import (
    BASES_FOLDER,
    RECORDS_FILE,
    RUNS_FOLDER,
    SUMMARY_FILE,
    TABLES_FILE,
    accuracy_curve,
    multipliers,
    read_records,
    selected_step,
    write_records,
)

ALARMS_HEADING = """
## Alarms

Signals of the guard, smoothed, against the accuracy that falls. *In time* = the alarm comes before the fall is seen;
lead = steps between; limits = the worst of the healthy runs of the other seeds, times 1.05. Read the ROC area against
that of the step number alone, in the first row.
"""
DIGITS = 5  # significant digits of the floats in a record

# Metrics that a record keeps: those that differ between runs and do not follow from the others.
METRICS_KEPT = (
    runlog.INFORMATION,
    runlog.RHO,
    runlog.STUDENT_ENTROPY,
    runlog.TEACHER_ENTROPY,
    runlog.DIVERGENCE,
    runlog.ACTIVE_SHARE,
    runlog.REWARD,
    runlog.COMPLETION_LENGTH,
    runlog.GRAD_NORM,
    # The signals of the collapse guard (alarms.py), for the study of its alarms.
    runlog.CLIPPED_SHARE,
    runlog.SAMPLED_KL,
    runlog.SAMPLED_KL_WRONG,
    runlog.LENGTH_TAIL,
    runlog.DEMONSTRATION_LOGPROB,
    # Measured trust.
    runlog.TRUST_RHO,
    runlog.TRUST_MOVED,
    runlog.TRUST_BUDGET,
    runlog.TRUST_RATIO,
    runlog.AGREEMENT,
    runlog.PROBES,
)

# ---------------------------------------------------------------- records


def check_unchanged(study: Study, records: Mapping[str, dict[str, Any]]) -> None:
    """Raise UserError for the first finished run whose flags differ from those that the study has now."""
    for run in study.queue:
        record = records.get(run.name)
        if record is None or record["status"] != "ok":
            continue
        before, now = _comparable(record["flags"]), _comparable(run.arm.identity)
        now["test_k"], before["test_k"] = study.test_k, record["test_k"]
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"the run {run.name} was finished with {name} = {before.get(name)}, the study now says "
                    f"{now.get(name)}; undo the change, name the changed arm differently, or choose another --out."
                )


def _comparable(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags with numbers as floats: YAML reads 1e-3 as text and 0.001 as a number."""

    def number(value: Any) -> Any:
        try:
            return value if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return value

    return {k: number(v) for k, v in flags.items()}


def rounded(value: Any) -> Any:
    """Round the floats in lists and mappings to DIGITS significant digits; non-finite ones become None."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return value


# ---------------------------------------------------------------- one run, in a worker


def arguments_of(run: StudyRun, records: Mapping[str, dict[str, Any]], out: Path) -> dict[str, Any]:
    """Flags of `pgpo train` for this run, with those that depend on an earlier run of the study."""
    arm = run.arm
    flags = arm.flags | {"seed": run.seed}
    if arm.base_seed is not None:
        flags["model_name_or_path"] = str(base_folder(arm, out))
    for flag in ("learning_rate", "teacher_rate"):
        if getattr(arm, f"{flag.replace('learning_rate', 'lr')}_times_mean_rho_of"):
            mean = statistics.fmean(multipliers(records[str(run.needs)]["metrics"]))
            flags[flag] = float(f"{getattr(arm, flag) * mean:.6g}")
    if arm.rho_shuffled_from:
        flags["rho_file"] = str(out / RUNS_FOLDER / arm.name / f"seed-{run.seed}.rho.json")
    return flags


def shuffled_rho(run: StudyRun, records: Mapping[str, dict[str, Any]]) -> list[float]:
    """The multipliers of the run that this one needs, in an order drawn from this run's seed."""
    rho = multipliers(records[str(run.needs)]["metrics"])
    random.Random(f"shuffled rho {run.seed}").shuffle(rho)
    return rho


def base_folder(arm: Arm, out: Path) -> Path:
    """Folder of the rebuilt base model of an arm."""
    return out / BASES_FOLDER / f"{arm.flags.get('variant', 'plain')}-seed-{arm.base_seed}"


def execute(job: Job) -> Result:
    """Do one job: {"base": ...} builds a base model, any other job trains and tests one run."""
    if "base" in job:
        return _build_base(**job["base"])
    from pgpo.command.terminal import quiet
    from pgpo.settings.arguments import parse

    quiet()
    started = time.monotonic()
    directory = Path(job["directory"])
    shutil.rmtree(directory, ignore_errors=True)  # what a killed run left
    parsed = parse(job["argv"])
    do = _train_and_test if job["train"] else _test_initial
    result = rounded(do(parsed, directory, job["test_k"]))
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def _train_and_test(parsed: Any, directory: Path, test_k: int) -> Result:
    """Train with `pgpo train`; test the last step and the one that validation selects (the first best)."""
    from pgpo.command.models import model_source
    from pgpo.command.train import train

    task = parsed.run.load()
    train(parsed, directory)
    run = runlog.read_run(directory)
    curve = accuracy_curve(run.evaluations)
    last, selected = curve[0][-1], selected_step(*curve)

    def scores(step: int) -> dict[str, float]:
        if step:
            return _test_scores(parsed, task, directory / runlog.CHECKPOINTS_FOLDER / f"checkpoint-{step}", test_k)
        made = directory / runlog.BASE_FOLDER
        return _test_scores(
            parsed, task, made if made.exists() else model_source(parsed, task, directory, None), test_k
        )

    final = scores(last)
    chosen = final if selected == last else scores(selected)
    metrics = {name: [line.get(name) for line in run.metrics] for name in METRICS_KEPT}
    for name in (runlog.RHO, runlog.INFORMATION, runlog.GRAD_NORM):
        if not all(value is None or math.isfinite(value) for value in metrics[name]):
            raise ArithmeticError(f"{name} is not finite")
    shutil.rmtree(directory / runlog.CHECKPOINTS_FOLDER, ignore_errors=True)
    (directory / runlog.TEST_RECORDS_FILE).unlink(missing_ok=True)  # a megabyte of completions at the trainer's own k
    return {
        "environment": run.environment,
        "steps": [line[runlog.STEP] for line in run.metrics],
        "metrics": {name: values for name, values in metrics.items() if any(v is not None for v in values)},
        "evaluations": run.evaluations,
        "test_scores": final,
        "selected_step": selected,
        "selected_test_scores": chosen,
        "seconds_per_step": statistics.median(run.series(runlog.STEP_SECONDS)[1]),
    }


def _test_initial(parsed: Any, directory: Path, test_k: int) -> Result:
    """The model before training."""
    from pgpo.command.models import model_source
    from pgpo.evaluate import summarize

    task = parsed.run.load()
    with tempfile.TemporaryDirectory() as scratch:
        source = model_source(parsed, task, Path(scratch), None)
        k = parsed.config.eval_k
        validation = summarize(_sample(parsed, task, source, task.validation[: parsed.run.eval_rows], k), k)
        scores = _test_scores(parsed, task, source, test_k)
    return {
        "environment": environment({"device": parsed.config.device.type}),
        "steps": [],
        "metrics": {},
        "evaluations": [{runlog.STEP: 0, runlog.SPLIT: runlog.VALIDATION, **validation.as_dict()}],
        "test_scores": scores,
        "selected_step": 0,
        "selected_test_scores": scores,
        "seconds_per_step": None,
    }


def _test_scores(parsed: Any, task: Any, source: Path | str, k: int) -> dict[str, float]:
    from pgpo.evaluate import avg_scores

    return avg_scores(_sample(parsed, task, source, task.test[: parsed.run.test_rows], k), k)


def _sample(parsed: Any, task: Any, source: Path | str, rows: Any, k: int) -> Any:
    """Graded completions of a saved model, sampled as the trainer samples held-out questions."""
    from pgpo.command.models import load_model
    from pgpo.command.terminal import quiet
    from pgpo.evaluate import evaluate
    from pgpo.evaluate.runners import TransformersRunner

    quiet()
    args = parsed.config
    model, tokenizer = load_model(source, parsed.model.dtype, trust_remote_code=args.trust_remote_code)
    runner = TransformersRunner(
        model.to(args.device),
        tokenizer,
        temperature=args.eval_temperature,
        top_p=args.eval_top_p,
        max_new_tokens=args.max_completion_length,
        batch_size=args.eval_batch_size,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    return evaluate(rows, runner, task.grade, k, args.seed)


def _build_base(variant: str, seed: int, out: str) -> Result:
    """Build the lab's base model from a seed; an interruption leaves no unfinished folder under its name."""
    from pgpo.lab.base_model import main as build

    temporary = Path(f"{out}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    build(variant=variant, seed=seed, out=temporary)
    temporary.replace(out)
    return {}


# ---------------------------------------------------------------- the queue


def run_study(
    study: Study,
    out: Path,
    runs: Sequence[StudyRun],
    *,
    jobs: int,
    niceness: int = 0,
    retry_failed: bool = False,
    do: Callable[[Job], Result] = execute,
) -> dict[str, dict[str, Any]]:
    """Run what is not in the records yet, in the order of `runs` as far as needs allow; all records.

    The records are written after each run. A run that fails is recorded with its error and stops no other.
    Raises UserError before anything runs when a finished run was made with other flags, or `out` is in use.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(lock(out, f"another study is running in {out}; wait for it, or choose another --out."))
        records = read_records(out / RECORDS_FILE)
        check_unchanged(study, records)
        if retry_failed:
            names = {run.name for run in runs}
            records = {k: r for k, r in records.items() if r["status"] == "ok" or k not in names}
        pool = Pool(do, jobs, out, niceness)
        stack.callback(pool.close)
        queue = _Queue(study, out, runs, records)
        progress = stack.enter_context(_Progress(queue, jobs))
        while True:
            while pool.free and (job := queue.next_job()) is not None:
                pool.start(job)
            for run, record in queue.take_finished():
                write_records(out / RECORDS_FILE, records)
                progress.finished(run, record)
            if not pool.busy:
                return records
            progress.running(pool.running)
            for name, result, error in pool.finished(timeout=1.0):
                queue.finish(name, result, error)


class _Queue:
    """The runs to do, in order, and which of them can start now; adds finished runs to the records."""

    def __init__(self, study: Study, out: Path, runs: Sequence[StudyRun], records: dict[str, dict[str, Any]]) -> None:
        self.study, self.out, self.runs, self.records = study, out, runs, records
        self.waiting = [run for run in runs if run.name not in records]
        self._started: dict[str, tuple[StudyRun, dict[str, Any]]] = {}  # with the flags it got
        self._bases: dict[str, str | None] = {}  # base models asked for -> what went wrong
        self._finished: list[StudyRun] = []

    def next_job(self) -> Job | None:
        """The next job that can start, None if there is none; a run that needs a failed one is recorded as failed."""
        for run in list(self.waiting):
            folder = base_folder(run.arm, self.out)
            base = f"{BASES_FOLDER}/{folder.name}"
            if run.needs is not None and run.needs not in self.records:
                continue
            if run.needs is not None and self.records[run.needs]["status"] != "ok":
                self._fail(run, f"it needs {run.needs}, which failed")
            elif run.arm.base_seed is None or folder.exists():
                self.waiting.remove(run)
                return self._job(run)
            elif base not in self._bases:
                self._bases[base] = None
                variant = str(run.arm.flags.get("variant", "plain"))
                return {"name": base, "base": {"variant": variant, "seed": run.arm.base_seed, "out": str(folder)}}
            elif self._bases[base] is not None:
                self._fail(run, f"it needs {base}, which failed: {self._bases[base]}")
        return None

    def finish(self, name: str, result: Result | None, error: str | None) -> None:
        """Record how a job of `next_job` ended."""
        if name in self._bases:
            self._bases[name] = error
            return
        run, arguments = self._started.pop(name)
        self._record(run, arguments, result, error)

    def take_finished(self) -> list[tuple[StudyRun, dict[str, Any]]]:
        """Runs that were recorded since the last call."""
        runs, self._finished = self._finished, []
        return [(run, self.records[run.name]) for run in runs]

    def seconds_left(self, jobs: int) -> float:
        """Estimated wall time of the unfinished runs on `jobs` workers."""
        running = [run for run, _ in self._started.values()]
        return seconds_for([*running, *self.waiting], self.runs, self.records) / jobs

    def _fail(self, run: StudyRun, error: str) -> None:
        self.waiting.remove(run)
        self._record(run, {}, None, error)

    def _record(self, run: StudyRun, arguments: dict[str, Any], result: Result | None, error: str | None) -> None:
        """Add a record; paths in `arguments` are relative to the study folder, so that it can be moved."""
        self.records[run.name] = {
            "setting": run.arm.setting,
            "method": run.arm.method,
            "seed": run.seed,
            "status": "ok" if error is None else "failed",
            "error": error,
            "flags": run.arm.identity,
            "arguments": {
                k: str(v).replace(f"{self.out}{os.sep}", "") if isinstance(v, str) else v for k, v in arguments.items()
            },
            "commit": (result or {}).get("environment", {}).get("git_commit"),
            "test_k": self.study.test_k,
            **(result or {}),
        }
        self._finished.append(run)

    def _job(self, run: StudyRun) -> Job:
        arguments = arguments_of(run, self.records, self.out)
        self._started[run.name] = run, arguments
        if run.arm.rho_shuffled_from:
            path = Path(arguments["rho_file"])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(shuffled_rho(run, self.records)))
        directory = self.out / RUNS_FOLDER / run.name
        # A checkpoint at every evaluation (.05 s in the lab), of which the selected one and the last stay to be tested.
        saving = {
            **{"save_strategy": "steps", "save_steps": run.arm.eval_steps, "save_total_limit": 2},
            **{"metric_for_best_model": f"eval_{runlog.AVG_AT_K}", "greater_is_better": True},
        }
        return {
            "name": run.name,
            "argv": argv(arguments | (saving if run.arm.train else {}) | {"output_dir": directory}),
            "directory": str(directory),
            "train": run.arm.train,
            "test_k": self.study.test_k,
        }


def seconds_for(todo: Sequence[StudyRun], runs: Sequence[StudyRun], records: Mapping[str, dict[str, Any]]) -> float:
    """Estimated worker seconds of `todo`, scaled by the ratio of measured to estimated time of the finished runs."""
    done = [run for run in runs if records.get(run.name, {}).get("seconds")]
    measured = sum(records[run.name]["seconds"] for run in done)
    factor = measured / sum(run.arm.seconds for run in done) if done else 1.0
    return factor * sum(run.arm.seconds for run in todo)


class _Progress:
    """A bar on a terminal, elsewhere one line per finished run; both report failures."""

    def __init__(self, queue: _Queue, jobs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.queue, self.jobs = queue, jobs
        self.total = len(queue.runs)
        self.done = self.total - len(queue.waiting)
        console = Console(stderr=True)
        self.terminal = console.is_terminal
        columns = (TextColumn("study"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=console, disable=not self.terminal)
        self.line = self.bar.add_task("", total=self.total, completed=self.done)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def running(self, names: Sequence[str]) -> None:
        left = duration(self.queue.seconds_left(self.jobs))
        self.bar.update(self.line, completed=self.done, description=f"{left} left  {'  '.join(names)}")

    def finished(self, run: StudyRun, record: Mapping[str, Any]) -> None:
        self.done += 1
        if record["status"] == "ok":
            scores = record["test_scores"].values()
            text = f"{run.name}  test avg@{record['test_k']} {statistics.fmean(scores):.3f}  {record['seconds']:.0f} s"
        else:
            text = f"{run.name}  FAILED: {record['error']}"
        if self.terminal:
            if record["status"] != "ok":
                self.bar.console.print(text, markup=False, highlight=False)
        else:
            left = duration(self.queue.seconds_left(self.jobs))
            print(f"[{self.done}/{self.total}] {text}  {left} left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """The duration for people: '75 s', '12 min', '3 h 05 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


# ---------------------------------------------------------------- the command


def main(
    path: Path,
    *,
    out: Path | None = None,
    jobs: int | None = None,
    niceness: int = 0,
    only: Sequence[str] = (),
    list_only: bool = False,
    tables_only: bool = False,
    retry_failed: bool = False,
) -> int:
    """Run or continue a study, then write its summary and tables. Exit status 1 if a run failed."""
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be at least 1.")
    from pgpo.command.terminal import quiet

    quiet()
    study = read_study(path)
    out = out or Path("runs") / f"study-{study.name}"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out.")
    runs = selected_runs(study, only)
    jobs = jobs or default_jobs()
    if list_only:
        print(plan(study, runs, read_records(out / RECORDS_FILE), jobs))
        return 0
    if not tables_only:
        check_sources(runs)
        run_study(study, out, runs, jobs=jobs, niceness=niceness, retry_failed=retry_failed)
    records = read_records(out / RECORDS_FILE)
    check_unchanged(study, records)
    if not records:
        raise UserError(f"there are no finished runs in {out}; run the study first.")
    write_tables(study, out, records)
    failed = [run.name for run in study.queue if records.get(run.name, {}).get("status") == "failed"]
    for name in failed:
        print(f"failed: {name}: {records[name]['error']}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} runs failed; logs: {out}/worker-*.log; repeat them with --retry-failed", file=sys.stderr)
    print(f"tables: {out / TABLES_FILE}", file=sys.stderr)
    return 1 if failed else 0


def check_sources(runs: Sequence[StudyRun]) -> None:
    """Raises UserError for a model or a task's file that is not there, before any run starts and fails."""
    from pgpo.command.models import require_source

    flags = [run.arm.flags for run in runs]
    for model in {str(f["model_name_or_path"]): None for f in flags if f.get("model_name_or_path")}:
        require_source(model)
    for task in {str(f["task"]): None for f in flags if str(f.get("task")).endswith(".py")}:
        if not Path(task).is_file():
            raise UserError(f"there is no task file {task}; run the study in the folder from which its path is given.")


def write_tables(study: Study, out: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """summary.json and tables.md of the planned runs that are in the records."""
    planned = [records[run.name] for run in study.queue if run.name in records]
    summary = summarize_study(planned, study.name, study.document, study.compare)
    summary["alarms"] = _alarm_studies(study, planned)
    tables = [tables_markdown(summary)]
    if summary["alarms"]:
        tables += [ALARMS_HEADING, *map(alarm_table, summary["alarms"])]
    write_atomically(out / SUMMARY_FILE, _json(summary) + "\n")
    write_atomically(out / TABLES_FILE, "\n".join(tables))


def _alarm_studies(study: Study, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The alarm study of every setting where the watched method has a finished run."""
    found = []
    for setting in dict.fromkeys(run.arm.setting for run in study.queue):
        for watched, reference in study.alarms.items():
            try:
                found.append(alarm_study(records, setting, watched, reference))
            except UserError:  # not run there, or not yet
                continue
    return found


def _json(value: Any, indent: str = "") -> str:
    """JSON with one line per name of a mapping, and lists on one line."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + " "
    lines = [f"{inner}{json.dumps(str(k), ensure_ascii=False)}: {_json(v, inner)}" for k, v in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def selected_runs(study: Study, only: Sequence[str]) -> list[StudyRun]:
    """Runs whose setting/method matches a pattern (all without patterns), and those that they need, in queue order."""
    if not only:
        return study.queue
    chosen: set[str] = set()
    for pattern in only:
        full = pattern if "/" in pattern else f"{pattern}/*"
        found = [run for run in study.queue if fnmatch.fnmatchcase(run.arm.name, full)]
        if not found:
            raise UserError(f"--only {pattern!r} fits no setting/method of the study; --list shows them.")
        chosen |= {name for run in found for name in (run.name, run.needs) if name is not None}
    return [run for run in study.queue if run.name in chosen]


def plan(study: Study, runs: Sequence[StudyRun], records: Mapping[str, dict[str, Any]], jobs: int) -> str:
    """One line per arm in the order of the queue, and the estimated time of what is not done."""
    lines = []
    for name in dict.fromkeys(run.arm.name for run in runs):
        of_arm = [run for run in runs if run.arm.name == name]
        status = [records.get(run.name, {}).get("status") for run in of_arm]
        failed = f", {status.count('failed')} failed" if "failed" in status else ""
        todo = [run for run, s in zip(of_arm, status, strict=True) if s is None]
        lines.append(
            f"{name:40s} {len(of_arm):3d} runs  {status.count('ok'):3d} done{failed}  "
            f"{duration(seconds_for(todo, study.queue, records))} to do"
        )
    todo = [run for run in runs if run.name not in records]
    seconds = seconds_for(todo, study.queue, records)
    if any(run.arm.own_model for run in todo) and not any(r.get("seconds") for r in records.values()):
        lines = [line.rpartition("  ")[0] for line in lines]
        lines.append(f"{len(runs)} runs, {len(todo)} to do; how long is known when the first one is finished")
        return "\n".join(lines)
    known = "measured" if any(r.get("seconds") for r in records.values()) else "estimated, no run is finished"
    lines.append(
        f"{len(runs)} runs, {len(todo)} to do: {duration(seconds)} of one core, {duration(seconds / jobs)} on {jobs} "
        f"worker{'s' if jobs > 1 else ''} ({known}; without base models, about 3 minutes each)"
    )
    return "\n".join(lines)


def default_jobs() -> int:
    """Physical cores this process may use; 1 with a GPU, which the workers would share."""
    import torch

    if torch.cuda.is_available():
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    import psutil

    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))
