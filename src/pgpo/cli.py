"""The `pgpo` command. Each subcommand imports its part when called, so that `pgpo --help` imports no torch.

Exit status: 0 ok; 2 bad input, explained in one sentence; 130 stopped by Ctrl-C, 143 by SIGTERM; 1 any other failure.
"""

from __future__ import annotations

import os
import sys
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pgpo import __version__
from pgpo.errors import LostRankError, SentenceParser, UserError

HELP = f"""pgpo {__version__}: Physics-Guided Policy Optimization with Self-Distillation

usage: pgpo COMMAND [arguments]

  demo        train the tiny lab model at too large a rate with SDPO, PGPO and measured trust, and draw all three
  train       train a model: the lab by default; --task science_qa --domain physics; --config recipe.yaml
  probe       ten minutes before ten hours: is there anything to distil? pgpo probe MODEL --flags of the run
  eval        avg@k, pass@k, maj@k of a model, without and with a right solution in its prompt
  study       methods x settings x seeds from one YAML, resumable, with tables: recipes/lab-study.yaml
  plan        memory per GPU of a training step, from a model's config alone: pgpo plan MODEL --memory 80
  report      one HTML page or Markdown, and figures, from run directories and study folders
  sde         check the order of weak approximation of the real step
  env         versions, devices and paths for a bug report, without secrets
  lab-base    rebuild the lab's base checkpoint from a seed

`pgpo COMMAND --help` lists the arguments of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    try:
        if words[0] not in COMMANDS:
            raise UserError(f"there is no command {words[0]!r}; choose one of {', '.join(COMMANDS)}.")
        return COMMANDS[words[0]](words[1:])
    except UserError as error:
        print(f"pgpo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except LostRankError as error:
        print(f"pgpo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("pgpo: stopped.", file=sys.stderr)
        return getattr(stop, "status", 130)


# A rate at which SDPO falls (docs/RESULTS.md), and steps enough to see it.
DEMO_FLAGS = ("--learning_rate", "2e-3", "--max_steps", "150", "--eval_steps", "15", "--save_steps", "150")
DEMO_METHODS = {
    "SDPO": ("--objective", "sdpo"),
    "PGPO": ("--objective", "pgpo"),
    "Measured trust": ("--objective", "sdpo", "--trust", "measured"),
}


def _demo(argv: list[str]) -> int:
    """Three runs in one folder, the same seed, at twice the lab's learning rate, and one picture of all."""
    _parser(
        "demo", "Train the tiny lab model by SDPO, PGPO and measured trust, and draw them in runs/demo-N."
    ).parse_args(argv)
    number = 1
    while (folder := Path("runs") / f"demo-{number}").exists():
        number += 1
    runs = []
    for name, flags in DEMO_METHODS.items():
        from pgpo.command.train import main as train

        print(f"\n{name} on the lab world, seed 42, twice the usual learning rate", file=sys.stderr)
        status, run = train([*flags, *DEMO_FLAGS, "--output_dir", str(folder / name.lower().replace(" ", "-"))])
        if status:
            return status
        _draw([run], run)
        runs.append(run)
    _draw(runs, folder)
    return 0


def _train(argv: list[str]) -> int:
    from pgpo.command.train import main as train

    status, run = train(argv)
    _draw([run], run)
    return status


def _probe(argv: list[str]) -> int:
    from pgpo.command.probe import main as probe

    status, folder = probe(argv)
    from pgpo.report.probe_figure import plot_probe

    _drawn(lambda: plot_probe(folder))
    return status


def _draw(runs: Sequence[Path], folder: Path) -> None:
    from pgpo.report.figures import plot_runs
    from pgpo.runlog import FIGURE_FILE, read_run

    if os.environ.get("RANK", "0") != "0":  # one of several processes of torchrun
        return

    def plot() -> Path:
        plot_runs([read_run(run) for run in runs], folder / FIGURE_FILE)
        return folder / FIGURE_FILE

    _drawn(plot)


def _drawn(plot: Callable[[], Path]) -> None:
    """Draw a figure and say where it is, or why there is none."""
    try:
        print(f"figure: {plot()}", file=sys.stderr)
    except UserError as error:  # without matplotlib, or stopped before the first step, the run itself is whole
        print(f"no figure: {error}", file=sys.stderr)


def _parser(command: str, description: str) -> SentenceParser:
    return SentenceParser(prog=f"pgpo {command}", description=description)


def _eval(argv: list[str]) -> int:
    from pgpo.command.eval import main as evaluate

    return evaluate(argv)


def _study(argv: list[str]) -> int:
    parser = _parser("study", "Run or resume methods x settings x seeds, then write the tables.")
    parser.add_argument("study", type=Path, help="YAML file, for example recipes/lab-study.yaml")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/study-NAME")
    parser.add_argument(
        "--jobs", type=int, default=None, help="worker processes; default: physical cores, 1 with a GPU"
    )
    parser.add_argument("--nice", type=int, default=0, help="added to the workers' niceness")
    parser.add_argument(
        "--only", action="append", default=[], metavar="SETTING/METHOD", help="run these only; patterns, repeatable"
    )
    parser.add_argument("--list", action="store_true", help="show the plan and the estimated time; run nothing")
    parser.add_argument("--tables", action="store_true", help="write the tables from what is finished; run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run failed runs again")
    args = parser.parse_args(argv)
    from pgpo.lab.study import main as study

    return study(
        args.study,
        out=args.out,
        jobs=args.jobs,
        niceness=args.nice,
        only=args.only,
        list_only=args.list,
        tables_only=args.tables,
        retry_failed=args.retry_failed,
    )


def _plan(argv: list[str]) -> int:
    parser = _parser("plan", "Peak memory per GPU and the largest token budget, from the model's config alone.")
    from pgpo.memory.command import main as plan
    from pgpo.memory.shapes import MATRICES, TRUST_FORMS, TrainingSetting

    default = TrainingSetting()

    def add(name: str, help: str, **options: Any) -> None:
        options.setdefault("default", getattr(default, name.replace("-", "_"), None))
        if options["default"] is not None:
            help += f"; default: {options['default']}"
        parser.add_argument(f"--{name}", help=help, **options)

    parser.add_argument("model", help="folder with a config.json, or a hub id")
    add("gpus", "GPUs, one process each", type=int, metavar="N")
    add("memory", "GiB per GPU", type=float, required=True, metavar="G")
    add("max-completion-length", "tokens", type=int, metavar="L")
    add("max-prompt-length", "tokens", type=int, metavar="P")
    add("teacher-prompt-length", "tokens, the trainer's max_teacher_prompt_length", type=int, metavar="P")
    add("max-tokens-per-microbatch", "token budget of the table", type=int, default=16384, metavar="N")
    add("prompts-per-step", "questions per step, all GPUs together", type=int, metavar="N")
    add("num-generations", "completions per question", type=int, metavar="N")
    add("objective", "pgpo, sdpo or grpo", choices=("pgpo", "sdpo", "grpo"))
    add("teacher", "the teacher's weights", choices=("ema", "frozen", "live", "periodic", "gated"))
    add("trust", "measured: steps are measured by a short forward", choices=("off", "measured"))
    add("trust-form", "undo: adds a copy of what trains during the step", choices=TRUST_FORMS)
    add("trust-tokens", "completion tokens measured per step, all GPUs together", type=int, metavar="N")
    add("lora", "rank of the adapters; without it all parameters train", type=int, metavar="RANK")
    add(
        "lora-targets", "adapted matrices, separated by commas, or all-linear", default="q_proj,v_proj", metavar="NAMES"
    )
    add("dtype", "dtype of the parameters", choices=("float32", "bfloat16"), default="float32")
    add("autocast", "matmuls in bfloat16, the trainer's bf16", action=BooleanOptionalAction)
    add("optimizer", "optimizer of the step", choices=("adamw", "sgd"))
    add("gradient-checkpointing", "recompute activations in the backward pass", action=BooleanOptionalAction)
    add("fused-head", "logits in chunks", action=BooleanOptionalAction)
    add("attention", "flash packs rows", choices=("sdpa", "flash", "eager"))
    add(
        "join-siblings",
        "completions of one prompt share a row; default: on a CPU, as in training",
        action=BooleanOptionalAction,
    )
    add("vllm-share", "share of the memory for vLLM; without it transformers generates", type=float, metavar="F")
    add("fsdp", "shard over the GPUs with FSDP2 (not measured)", action=BooleanOptionalAction)
    add("zero", "shard with DeepSpeed's ZeRO, stage 2 or 3 (peaks not measured)", type=int, choices=(2, 3))
    add("device", "device of the run", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, default=None, help="write all numbers to this file", metavar="FILE")
    values = vars(parser.parse_args([_dashed(word) for word in argv]))
    source, memory, budget = values.pop("model"), values.pop("memory"), values.pop("max_tokens_per_microbatch")
    json_out = values.pop("json")
    values["parameter_bytes"] = 4 if values.pop("dtype") == "float32" else 2
    targets = values["lora_targets"]
    values["lora_targets"] = MATRICES if targets == "all-linear" else tuple(targets.split(","))
    return plan(source, TrainingSetting(**values), memory, budget, json_out)


def _dashed(word: str) -> str:
    """Accept --max_prompt_length, the spelling of `pgpo train`, for --max-prompt-length."""
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def _report(argv: list[str]) -> int:
    parser = _parser("report", "Write one self-contained HTML page, or Markdown, about runs and studies.")
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN_OR_STUDY", help="run directories and study folders")
    parser.add_argument("--out", type=Path, default=None, help="replaced if it exists; default: report.html or .md")
    parser.add_argument(
        "--format", choices=("html", "markdown"), default=None, help="default: markdown if --out ends in .md, else html"
    )
    parser.add_argument("--figures", type=Path, default=None, help="folder for a PNG and an SVG of each setting")
    args = parser.parse_args(argv)
    from pgpo.report.page import main as report

    return report(args.paths, out=args.out, figures=args.figures, form=args.format)


def _sde(argv: list[str]) -> int:
    parser = _parser(
        "sde", "Measure the weak orders of the real step; exit status 1 if one differs from the theorem's."
    )
    parser.add_argument("--json", type=Path, default=None, help="write all numbers to this file")
    parser.add_argument("--figure", type=Path, default=None, help="draw error against step size (PNG or SVG)")
    parser.add_argument("--law", default=None, help="module:Name of a multiplier law of your own")
    parser.add_argument("--quick", action="store_true", help="one-dimensional rows only")
    args = parser.parse_args(argv)
    from pgpo.sde.verify import main as verify

    return verify(json_out=args.json, figure=args.figure, law=args.law, quick=args.quick)


def _env(argv: list[str]) -> int:
    _parser("env", "Versions, devices, settings and paths for a bug report, without secrets and home.").parse_args(argv)
    from pgpo.command.env import main as report

    return report()


def _lab_base(argv: list[str]) -> int:
    parser = _parser("lab-base", "Rebuild the lab's base checkpoint.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="plain", help="plain or style")
    parser.add_argument("--out", type=Path, default=None, help="default: lab-base-VARIANT-SEED")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    from pgpo.lab.base_model import main as build

    build(
        variant=args.variant,
        seed=args.seed,
        out=args.out or Path(f"lab-base-{args.variant}-{args.seed}"),
        overwrite=args.overwrite,
    )
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "train": _train,
    "probe": _probe,
    "eval": _eval,
    "study": _study,
    "plan": _plan,
    "report": _report,
    "sde": _sde,
    "env": _env,
    "lab-base": _lab_base,
}
