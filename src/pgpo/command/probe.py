"""`pgpo probe`: whether a training run has anything to distil, from a few samples of the untrained model.

It takes the flags of the run and builds its trainer, so that prompts, hints, I_k and divergence are those of the run;
no step is made. A folder keeps what is found:

    setting.json      the arguments, and the questions
    questions.jsonl   a line per question and temperature (evaluate/probe.py:Line), written as they are found
    probe.json        the numbers and the verdict
    probe.png         the picture
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pgpo import runlog
from pgpo.command.eval import model_folder
from pgpo.command.hints import Sampler
from pgpo.command.interrupt import stopped_by_sigterm
from pgpo.command.models import model_source
from pgpo.command.terminal import progress, quiet, say
from pgpo.command.train import build_trainer, load, suit_device, take_resume
from pgpo.errors import UserError
from pgpo.evaluate.probe import Line, gains, read, table
from pgpo.evaluate.runners import SAMPLING
from pgpo.evaluate.verdict import conclusion, judge
from pgpo.files import json_document, json_line, read_lines, write_atomically
from pgpo.settings.arguments import Parsed, TaskArguments, parse_as
from pgpo.tasks import Row
from pgpo.train.host import Host

SETTING_FILE, LINES_FILE, RESULT_FILE, FIGURE_FILE = "setting.json", "questions.jsonl", "probe.json", "probe.png"
ROUND = 8  # ours: questions that are worked on together, lend one another placebos, and are lost when it is stopped


@dataclass
class ProbeArguments(TaskArguments):
    """Which questions, and how many."""

    questions: int = field(default=32, metadata={"help": "Training questions, drawn by --seed."})
    hinted_samples: int = field(default=4, metadata={"help": "Completions per question and kind of hint."})
    temperatures: list[float] | None = field(
        default=None, metadata={"help": "To try beside --temperature; default: half of it. Only that one: repeat it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("questions", 2), ("hinted_samples", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        for value in self.temperatures or []:
            if not isinstance(value, int | float) or not value > 0:
                raise UserError(f"temperatures holds {value!r}; logits are divided by them, so each must be above 0.")


def main(argv: Sequence[str]) -> tuple[int, Path]:
    """Run `pgpo probe [MODEL] --flags of the run`, or `--resume FOLDER`; exit status and folder."""
    quiet()
    words, resume = take_resume(list(argv))
    parse = partial(parse_as, ProbeArguments, "pgpo probe")
    if resume is not None:
        if words:
            raise UserError(f"--resume goes on with what was asked, so {words[0]} cannot be given; start a new probe.")
        parsed = parse([], stored=_setting(resume)["arguments"])
        folder = resume
    else:
        named = [] if not words or words[0].startswith("-") else ["--model_name_or_path", words.pop(0)]
        parsed = parse([*named, *words])
        folder = Path(parsed.config.output_dir or "")
        if "output_dir" not in parsed.given:
            folder = _new_folder(parsed)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not empty; go on with `pgpo probe --resume {folder}`, or name another one.")
    _check(parsed)
    with stopped_by_sigterm(), runlog.lock(folder, f"another process is probing in {folder}; wait until it ends."):
        _probe(parsed, folder, resume is not None)
    return 0, folder


def _check(parsed: Parsed[ProbeArguments]) -> None:
    """Raise UserError for what a probe cannot follow."""
    args = parsed.config
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the probe runs in one process; start it without torchrun or accelerate launch.")
    if not args.distills:
        raise UserError(
            "objective is 'grpo', which distils nothing; leave it out, the probe says where GRPO is better."
        )
    if args.use_vllm:
        raise UserError("the probe samples with transformers; add --use_vllm false.")
    if args.num_generations < 2:
        raise UserError("num_generations is 1, so that no completion has a sibling; use 2 or more.")
    if args.eval_strategy != "no":
        args.eval_strategy = type(args.eval_strategy)("no")
    options = {name: value for name, value in (args.generation_kwargs or {}).items() if name in SAMPLING}
    filters = {"top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    options |= {
        name: getattr(args, name) for name, plain in filters.items() if getattr(args, name) not in (plain, None)
    }
    if options:
        names = ", ".join(options)
        raise UserError(f"the probe samples with temperature and top_p alone; leave {names} out.")


def _new_folder(parsed: Parsed[ProbeArguments]) -> Path:
    """runs/probe-<task>-<n>, the first n that is free."""
    number = 1
    while (folder := Path("runs") / f"probe-{parsed.run.task.replace('/', '_').replace(':', '-')}-{number}").exists():
        number += 1
    return folder


def _setting(folder: Path) -> dict[str, Any]:
    try:
        setting = json.loads((folder / SETTING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable {SETTING_FILE} of a probe; start a new one.") from error
    return dict(setting)


def _probe(parsed: Parsed[ProbeArguments], folder: Path, resumed: bool) -> None:
    run, args = parsed.run, parsed.config
    quiet()
    suit_device(parsed)
    task = run.load()
    if run.questions > len(task.train):
        raise UserError(f"the task has {len(task.train)} training questions, not {run.questions}; lower --questions.")
    rows = random.Random(f"probe {args.seed}").sample(task.train, run.questions)
    with tempfile.TemporaryDirectory() as scratch:
        source = model_source(parsed, task, Path(scratch), None)
        model, tokenizer = load(parsed, task, model_folder(str(source)))
        args.disable_tqdm, args.output_dir = True, scratch
        trainer = build_trainer(parsed, task, model, tokenizer, Host(say=say), rows)
        if not resumed:
            setting = {"arguments": {k: v for k, v in parsed.given.items() if k != "output_dir"}}
            write_atomically(folder / SETTING_FILE, json_document(setting))
        temperatures = list(dict.fromkeys([args.temperature, *(run.temperatures or [args.temperature / 2])]))
        lines = _collect(Sampler(trainer, task, run.hinted_samples), rows, temperatures, folder)
    taught = "right" if args.use_successful_as_teacher else "feedback"
    readings = [read(part, args.law(0), args.information_denominator, taught) for part in lines]
    verdict = judge(readings, [gains(part, taught) for part in lines], args.max_completion_length or 0)
    result = {
        "readings": [dataclasses.asdict(reading) for reading in readings],
        "verdict": dataclasses.asdict(verdict),
        "arguments": parsed.given,
    }
    write_atomically(folder / RESULT_FILE, json_document(result))
    for reading in readings:
        print("\n".join(table(reading)), end="\n\n")
    print("\n".join(conclusion(verdict)))
    say(f"probe: {folder}")


def _collect(sampler: Sampler, rows: Sequence[Row], temperatures: Sequence[float], folder: Path) -> list[list[Line]]:
    """The lines of each temperature; those that the folder has already are not made again."""
    path = folder / LINES_FILE
    known: list[Any] = read_lines(path, unfinished_end=True) if path.exists() else []
    rounds = [rows[i : i + ROUND] for i in range(0, len(rows), ROUND)]
    if len(rounds) > 1 and len(rounds[-1]) == 1:  # a question alone has no placebo
        rounds[-2:] = [[*rounds[-2], *rounds[-1]]]
    whole: list[Line] = []
    found: list[list[Line]] = []
    started, done, total = time.monotonic(), 0, len(temperatures) * len(rows)
    with progress("probe") as (bar, shown):
        for temperature in temperatures:
            found.append([])
            for number, part in enumerate(rounds):
                ids = [row["id"] for row in part]
                lines = [li for li in known if li["temperature"] == temperature and li["question_id"] in ids]
                if len(lines) < len(part):
                    write_atomically(path, "".join(map(json_line, whole)))  # without a part of a round
                    try:
                        lines = sampler.round(part, temperature, number)
                    except KeyboardInterrupt:
                        say(f"stopped after {done} of {total} questions; continue with: pgpo probe --resume {folder}")
                        raise
                    with path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                        file.writelines(map(json_line, lines))
                    _tell(bar, temperature, done + len(part), total, time.monotonic() - started)
                whole += lines
                found[-1] += lines
                done += len(part)
                bar.update(shown, total=total, completed=done, shown=f"temperature {temperature:g}")
    return found


def _tell(bar: Any, temperature: float, done: int, total: int, seconds: float) -> None:
    if bar.disable:  # off a terminal
        say(f"temperature {temperature:g}: {done} of {total} questions, {seconds:.0f} s")
