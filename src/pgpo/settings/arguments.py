"""`pgpo train`'s arguments: what to train on, then TRL's model arguments and `PGPOConfig`, from YAML and flags.

Lowest to highest priority: dataclass defaults, the task's preset below, the YAML recipe, the command line.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import HfArgumentParser
from trl import ModelConfig

from pgpo.errors import SentenceParser, UserError, reason
from pgpo.settings.config import PAPER, PGPOConfig, yielding
from pgpo.settings.field_types import fit, huge, shown
from pgpo.settings.yaml_file import read_yaml
from pgpo.tasks import Task, family, load_task

T = TypeVar("T")

PROTOCOLS = ("last", "strict", "paper")

# Laptop settings, measured on the prototype of the lab: 8 x 8 completions of at most 24 tokens per step; bf16 and
# gradient checkpointing cost 1.27x and 1.37x on a CPU. Evaluated at the training temperature, like its base model.
_SMALL: dict[str, Any] = {
    "prompts_per_step": 8,
    "max_prompt_length": PAPER["max_prompt_length"],
    "warmup_steps": 0,
    "bf16": False,
    "gradient_checkpointing": False,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "report_to": "none",
}
PRESETS: dict[str, dict[str, Any]] = {
    "lab_world": {
        **_SMALL,
        "learning_rate": 1e-3,
        "max_steps": 100,
        "max_completion_length": 24,
        "max_teacher_prompt_length": 232,  # the model's 256 positions less these
        "eval_temperature": 1.0,
        "eval_top_p": 1.0,
        "eval_steps": 20,
        "save_steps": 50,
    },
    # For the model made on the spot (warm_start.py); a real model takes the paper's values.
    "science_qa": {
        **_SMALL,
        "prompt_style": "sdpo",
        "learning_rate": 3e-4,
        "max_steps": 60,
        "max_completion_length": 64,
        "max_teacher_prompt_length": 4032,  # the model's 4096 positions less these
        "eval_steps": 20,
        "save_steps": 30,
        "eval_batch_size": 128,
    },
}


# What loads a task -> {option of its `load`: field of TaskArguments}. A field that a task does not take is refused.
OPTIONS: dict[str, dict[str, str]] = {
    "lab_world": {"variant": "variant", "domain": "domain"},
    "science_qa": {
        "domain": "domain",
        "path": "data_path",
        "revision": "data_revision",
        "style": "prompt_style",
        "validation_fraction": "validation_fraction",
        "check": "data_check",
    },
    "reasoning_gym": {"options": "task_options", "style": "prompt_style"},
    "math": {"path": "data_path", "validation_fraction": "validation_fraction"},
    ".py": {"": "task_options"},  # its names are the options
}

# Beside those of the task, by its variant: a base of the feedback world reads remarks and no solutions.
VARIANT_PRESETS: dict[str, dict[str, Any]] = {"feedback": {"use_successful_as_teacher": False}}


@dataclass
class TaskArguments:
    """Which questions."""

    task: str = field(
        default="lab_world",
        metadata={
            "help": "'lab_world' (needs no network), 'science_qa', 'reasoning_gym:NAME', 'math', or a Python file "
            "(docs/TASKS.md)."
        },
    )
    domain: str | None = field(
        default=None, metadata={"help": "science_qa: chemistry, physics, biology or materials; lab_world: one or all."}
    )
    variant: str = field(default="plain", metadata={"help": "lab_world: 'plain', 'style', 'misleading' or 'feedback'."})
    data_path: str | None = field(
        default=None,
        metadata={
            "help": "science_qa: local JSONL file or folder; default: $PGPO_SCIENCE_DATA, else the hub. math: JSONL "
            "file with prompt and solution, or a folder with train.jsonl and test.jsonl."
        },
    )
    data_revision: str | None = field(default=None, metadata={"help": "science_qa: revision on the hub."})
    prompt_style: str = field(
        default="boxed",
        metadata={
            "help": "science_qa: 'boxed' (PGPO) or 'sdpo' (tags); reasoning_gym: 'boxed' or 'plain' (the answer alone)."
        },
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={"help": "science_qa, math: share of the training questions kept for validation; paper: 0."},
    )
    data_check: bool = field(default=True, metadata={"help": "science_qa: compare the data with the manifest."})
    task_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "reasoning_gym: options of the generator, as JSON: '{\"max_digits\": 2}'; of a Python file: the "
            "arguments of its load()."
        },
    )

    def __post_init__(self) -> None:
        fit(self)
        kind = family(self.task)
        self.task_options = _mapping("task_options", self.task_options)
        if kind == "science_qa":
            if self.domain is None:
                raise UserError("science_qa needs --domain: chemistry, physics, biology or materials (one task each).")
            if self.data_path is None:
                self.data_path = os.environ.get("PGPO_SCIENCE_DATA")
        if kind == "math" and self.data_path is None:
            raise UserError("the task math needs --data_path: a JSONL file with prompt and solution, or a folder.")
        taken = {"task", *OPTIONS[kind].values()}
        for f in dataclasses.fields(TaskArguments):
            if f.name not in taken and getattr(self, f.name) != f.default:
                raise UserError(f"{f.name} does nothing for the task {self.task}; leave it out.")

    def load(self) -> Task:
        """The task these arguments name."""
        options = {option: getattr(self, name) for option, name in OPTIONS[family(self.task)].items()}
        if "" in options:
            options = options.pop("") or {}
        return load_task(self.task, **options)


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping, from JSON if it is a text. Raises UserError."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError as error:
        raise UserError(f'{name} is {shown(value)}, which is no JSON ({error}); write {{"option": value}}.') from error
    if not isinstance(found, dict):
        raise UserError(f'{name} is {shown(value)}; give a JSON mapping, {{"option": value}}.')
    return found


@dataclass
class RunArguments(TaskArguments):
    """Which questions, and what to write."""

    eval_rows: int | None = field(default=None, metadata={"help": "Validation questions per evaluation; default all."})
    test_rows: int | None = field(default=None, metadata={"help": "Test questions, first and last; default all."})
    protocol: str = field(
        default="last",
        metadata={
            "help": "Which model is tested: 'last'; 'strict' (also the one that the validation questions select, each "
            "tested once); 'paper' (no validation split, the curve is that of the test questions and its best step is "
            "reported, as in the paper)."
        },
    )
    samples_per_step: int = field(default=4, metadata={"help": "Completions kept per step in samples.jsonl."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run in output_dir."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol not in PROTOCOLS:
            raise UserError(f"protocol is {self.protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
        if self.protocol == "paper":
            self.validation_fraction = 0.0
        for name in ("eval_rows", "test_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1, or left out for all questions.")
        if self.samples_per_step < 0:
            raise UserError(f"samples_per_step is {self.samples_per_step}; it must be 0 or more.")


@dataclass
class ModelArguments(ModelConfig):
    """TRL's arguments of a model, their types checked."""

    def __post_init__(self) -> None:
        fit(self)
        super().__post_init__()


Run = TypeVar("Run", bound=TaskArguments)


@dataclass(frozen=True)
class Parsed(Generic[Run]):
    """Arguments as objects, and `given`: the flat values that differ from the dataclass defaults, for config.json."""

    run: Run
    config: PGPOConfig
    model: ModelConfig
    given: dict[str, Any]


class Parser(SentenceParser, HfArgumentParser):
    """The fields of argument dataclasses as flags; further arguments may be added."""

    def set_type(self, name: str, read: Callable[[str], Any]) -> None:
        """Read the flag of this field by another function than its annotation's."""
        for action in self._actions:
            if action.dest == name:
                action.type = read


def rate(text: str) -> float | str:
    """A learning rate: a number, or auto."""
    return text if text == "auto" else float(text)


def parse(argv: Sequence[str], stored: dict[str, Any] | None = None) -> Parsed[RunArguments]:
    """The arguments of `pgpo train`; see `parse_as`."""
    return parse_as(RunArguments, "pgpo train", argv, stored)


def parse_as(cls: type[Run], prog: str, argv: Sequence[str], stored: dict[str, Any] | None = None) -> Parsed[Run]:
    """Parse flags over an optional `--config recipe.yaml`, or over the `given` of an earlier run.

    Args:
        cls: which questions, and what else the command `prog` takes beside the arguments of model and training.

    Raises:
        UserError: an unreadable recipe, an unknown name, or a value that does not fit.
    """
    chosen = _choosing(prog).parse_known_args(argv)[0]
    recipe = {} if chosen.config is None else _recipe(chosen.config)
    if recipe and stored is not None:
        raise UserError("--resume continues the run with its own arguments; leave --config out, or start a new run.")
    parser = Parser([cls, PGPOConfig, ModelArguments], prog=prog)
    _add_config(parser)
    parser.set_type("learning_rate", rate)
    # Reversed: --no_x follows --x with the same name and a default that argparse never uses.
    defaults = {action.dest: action.default for action in reversed(parser._actions)}
    known = set(defaults) - {"help", "config"}
    unknown = sorted(name if isinstance(name, str) else shown(name) for name in set(recipe) - known)
    if unknown:
        raise UserError(f"the recipe has unknown names: {', '.join(unknown)}; see `{prog} --help`.")
    base = recipe if stored is None else {name: value for name, value in stored.items() if name in known}
    preset = _preset(base | {name: value for name, value in vars(chosen).items() if value is not None})
    if stored is None:
        # Numbers as text, so that argparse checks a recipe's like a flag's (YAML itself reads 1e-5 as text).
        base = {k: str(v) if type(v) in (int, float) and not huge(v) else v for k, v in recipe.items()}
    else:  # what an earlier version took by default, and so did not store
        defaults |= {name: value for name, value in preset.items() if name not in stored}
    parser.set_defaults(**(preset | base))
    namespace = vars(parser.parse_args(argv))
    del namespace["config"]
    given = {k: v for k, v in namespace.items() if v != defaults.get(k) or v != preset.get(k, v)}
    run, model = make(cls, namespace), make(ModelArguments, namespace)
    if run.task not in PRESETS and not model.model_name_or_path:
        raise UserError(f"the task {run.task} comes with no model; add --model_name_or_path.")
    return Parsed(run, make(PGPOConfig, namespace), model, given)


def make(cls: type[T], values: dict[str, Any]) -> T:
    """An argument dataclass from the parsed values of its fields."""
    names = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    try:
        return cls(**{k: v for k, v in values.items() if k in names})
    except UserError:
        raise
    except Exception as error:  # transformers and TRL check values, each in its own way
        raise UserError(f"these arguments cannot be used: {reason(error)} ({type(error).__name__}).") from error


def _choosing(prog: str) -> Parser:
    """The flags that choose the defaults of all others."""
    parser = Parser([], prog=prog, add_help=False)
    _add_config(parser)
    for name in ("task", "variant", "model_name_or_path", "per_device_train_batch_size"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return parser


def _add_config(parser: Parser) -> None:
    parser.add_argument("--config", nargs="?", const="", metavar="FILE", help="YAML recipe: `name: value` lines.")


def _recipe(name: str) -> dict[str, Any]:
    if not name:
        raise UserError("--config needs the path of a YAML recipe.")
    recipe = read_yaml(Path(name), "recipe")
    if not isinstance(recipe, dict):
        raise UserError(f"the recipe {name} holds no `name: value` lines; see recipes/ for examples.")
    return recipe


def _preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the task that was chosen: of a small model, or the paper's for one of the user's."""
    task = given.get("task") or RunArguments.task
    small = PRESETS.get(task) if isinstance(task, str) else {}  # RunArguments refuses another type
    own_model = task == "science_qa" and given.get("model_name_or_path")
    variant = VARIANT_PRESETS.get(str(given.get("variant")), {}) if task == "lab_world" else {}
    return yielding(PAPER if own_model or small is None else small | variant, given)
