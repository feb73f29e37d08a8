"""The plan of a study: from its YAML file to a queue of runs, checked before anything runs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgpo.errors import UserError
from pgpo.settings.yaml_file import read_yaml
from pgpo.study_files import run_name

_STUDY_KEYS = {"name", "seeds", "test_k", "common", "settings", "methods", "groups", "compare", "reference", "alarms"}
_GROUP_KEYS = {"settings", "methods", "seeds"}
_NEEDS = ("lr_times_mean_rho_of", "teacher_rate_times_mean_rho_of", "rho_shuffled_from")  # each names a method
_METHOD_KEYS = {"train", *_NEEDS}  # of a method, besides flags
_SETTING_KEYS = {"base_seed"}
# Flags of `pgpo train` that the study sets itself.
_OWN_FLAGS = {"output_dir", "overwrite", "seed", "save_strategy", "save_steps", "save_total_limit", "rho_file"}
_OWN_FLAGS |= {"metric_for_best_model", "greater_is_better"}
_NAME = re.compile(r"\w[\w.-]*")  # settings and methods are names of folders

# A first guess at the time left, measured on one core of the lab (64 completions a step: .14 s; 1024 evaluated: .55 s).
# Of another model they say nothing but how its runs compare; the first finished run gives the scale.
SECONDS_PER_COMPLETION = 0.0022
SECONDS_PER_EVALUATED = 0.00054
SECONDS_PER_RUN = 1.5


@dataclass(frozen=True)
class Arm:
    """One method in one setting.

    Attributes:
        flags: of `pgpo train`.
        train: false evaluates the initial model and does nothing else.
        lr_times_mean_rho_of: method of the same setting; the mean multiplier of its run with the same seed multiplies
            the learning rate.
        teacher_rate_times_mean_rho_of: the same for the rate of the averaged teacher, which follows by rho under
            measured trust.
        rho_shuffled_from: method of the same setting; the multipliers of its run with the same seed are applied in
            another order.
        base_seed: train the lab's base model that is rebuilt from this seed.
        seconds: estimated, of one run; of the lab's model, or on the scale of it.
        own_model: whether the model is another than the lab's.
    """

    setting: str
    method: str
    flags: dict[str, Any]
    train: bool = True
    lr_times_mean_rho_of: str | None = None
    teacher_rate_times_mean_rho_of: str | None = None
    rho_shuffled_from: str | None = None
    base_seed: int | None = None
    # From the parsed flags; objective "" does not train.
    objective: str = ""
    trust: str = "off"
    learning_rate: float = 0.0
    teacher_rate: float = 0.0
    slows_teacher: bool = False  # its averaged teacher follows by rho
    max_steps: int = 0
    eval_steps: int = 0
    seconds: float = 0.0
    own_model: bool = False

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.method}"

    @property
    def identity(self) -> dict[str, Any]:
        """The arm as the YAML sets it. A finished run records it, and a study that differs from it is refused."""
        special = {name: getattr(self, name) for name in sorted(_METHOD_KEYS | _SETTING_KEYS)}
        defaults = {"train": True}
        return self.flags | {k: v for k, v in special.items() if v != defaults.get(k)}


@dataclass(frozen=True)
class StudyRun:
    """One training run of the queue."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return run_name(self.arm.setting, self.arm.method, self.seed)

    @property
    def needs(self) -> str | None:
        """Name of the run that must be finished first."""
        method = next((found for key in _NEEDS if (found := getattr(self.arm, key))), None)
        return run_name(self.arm.setting, method, self.seed) if method else None


@dataclass(frozen=True)
class Study:
    """A study as read from its file; the queue is in the order of work."""

    name: str
    seeds: list[int]
    test_k: int
    queue: list[StudyRun]
    compare: dict[str, list[str]]  # reference method -> methods compared with it
    document: dict[str, Any] = field(repr=False)
    # method whose signals are studied -> healthy method that gives the limits
    alarms: dict[str, str] = field(default_factory=dict)


def read_study(path: Path) -> Study:
    """Read and check a study; every arm's flags are parsed as `pgpo train` would.

    Raises UserError for a file that is no YAML, unknown keys, flags or methods, and numbers that do not fit.
    """
    document = read_yaml(path, "study")
    try:
        return _study(document)
    except UserError as error:
        raise UserError(f"the study {path}: {error}") from error


def _study(document: Any) -> Study:
    if not isinstance(document, dict):
        raise UserError("it holds no `name: value` lines; see recipes/lab-study.yaml.")
    _known(document, _STUDY_KEYS, "the study")
    name = document.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"name is {name!r}; give one of letters, digits, '.', '_' and '-'.")
    seeds = _seeds(document.get("seeds"), "seeds")
    test_k = document.get("test_k", 16)
    if type(test_k) is not int or test_k < 1:
        raise UserError(f"test_k is {test_k!r}; it must be a whole number of completions per test question, 1 or more.")
    settings = {k: _flags(v, f"setting {k}") for k, v in _names(document, "settings").items()}
    methods = {k: _flags(v, f"method {k}") for k, v in _names(document, "methods").items()}
    queue = _queue(document, seeds, settings, methods, test_k)
    _check_reference(document.get("reference") or {}, settings, methods)
    compare = _compared(document.get("compare") or {}, methods)
    alarms = document.get("alarms") or {}
    if not isinstance(alarms, dict):
        raise UserError("alarms must map the method that is watched to the healthy one that gives the limits.")
    _chosen([*alarms, *alarms.values()], methods, "alarms", allow_empty=True)
    return Study(name, seeds, test_k, list(queue.values()), compare, document, alarms)


def _queue(
    document: Mapping[str, Any], seeds: list[int], settings: Mapping[str, Any], methods: Mapping[str, Any], test_k: int
) -> dict[str, StudyRun]:
    """The runs of all groups by name, in the order of work; each arm is parsed once."""
    common = _flags(document.get("common"), "common")
    groups = document.get("groups", [{}])
    if not isinstance(groups, list) or not groups:
        raise UserError("groups must be a list of {settings, methods, seeds}.")
    arms: dict[str, Arm] = {}
    queue: dict[str, StudyRun] = {}
    for number, group in enumerate(groups, 1):
        place = f"group {number}"
        if not isinstance(group, dict):
            raise UserError(f"{place} is not a mapping of settings, methods and seeds.")
        _known(group, _GROUP_KEYS, place)
        chosen_settings = _chosen(group.get("settings", "all"), settings, f"{place}: settings")
        chosen_methods = _chosen(group.get("methods", "all"), methods, f"{place}: methods")
        of_group = _seeds(group["seeds"], f"{place}: seeds") if "seeds" in group else seeds
        for seed, setting, method in itertools.product(of_group, chosen_settings, chosen_methods):
            key = f"{setting}/{method}"
            if key not in arms:
                arms[key] = _arm(setting, method, common, settings[setting], methods[method], test_k)
            run = StudyRun(arms[key], seed)
            queue.setdefault(run.name, run)
    for run in queue.values():
        _check_needs(run, queue)
    return queue


def _compared(compare: Any, methods: Mapping[str, Any]) -> dict[str, list[str]]:
    """Reference method -> the methods that are compared with it."""
    if not isinstance(compare, dict):
        raise UserError("compare must map a method to `all` or to the methods compared with it.")
    _chosen(list(compare), methods, "compare", allow_empty=True)
    return {
        reference: [m for m in _chosen(compared, methods, f"compare: {reference}") if m != reference]
        for reference, compared in compare.items()
    }


def _arm(
    setting: str,
    method: str,
    common: dict[str, Any],
    of_setting: dict[str, Any],
    of_method: dict[str, Any],
    test_k: int,
) -> Arm:
    """One method in one setting, its flags parsed once; later parts override earlier ones."""
    from pgpo.settings.arguments import parse

    place = f"{setting}/{method}"
    for name in sorted(_METHOD_KEYS & (common.keys() | of_setting.keys())):
        raise UserError(f"{name} is set in a setting or in common; set it in a method.")
    merged = common | of_setting | of_method
    special = {k: merged.pop(k) for k in (*_METHOD_KEYS, *_SETTING_KEYS) if k in merged}
    _check_special(place, merged, special)
    # The file is written when the run starts; now the flags that it goes with are checked.
    later = {"rho_file": "to-come.json"} if "rho_shuffled_from" in special else {}
    try:
        parsed = parse(argv(merged | later))
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    config, train = parsed.config, special.get("train", True)
    if train and config.max_steps < 1:
        raise UserError(f"{place}: max_steps is {config.max_steps}; a study needs the number of steps, 1 or more.")
    if train and (config.eval_strategy != "steps" or config.eval_steps % 1 or config.max_steps % config.eval_steps):
        raise UserError(
            f"{place}: eval_steps is {config.eval_steps}, which does not divide max_steps = {config.max_steps}; the "
            "validation curve must end at the last step."
        )
    return Arm(
        setting,
        method,
        merged,
        objective=config.objective if train else "",
        trust=config.trust if train else "off",
        learning_rate=config.learning_rate,
        teacher_rate=config.teacher_rate,
        slows_teacher=config.trust != "off"
        and (config.trust_form, config.trust_clock, config.teacher) == ("undo", True, "ema"),
        max_steps=config.max_steps if train else 0,
        eval_steps=int(config.eval_steps) if train else 0,
        seconds=_estimated_seconds(parsed, train, test_k),
        own_model=bool(parsed.model.model_name_or_path),
        **special,
    )


def _check_special(place: str, flags: Mapping[str, Any], special: Mapping[str, Any]) -> None:
    """Raises UserError for what an arm sets apart from the flags of `pgpo train`, or beside what the study sets."""
    if refused := sorted(_OWN_FLAGS & flags.keys()):
        raise UserError(f"{place} sets {', '.join(refused)}, which the study sets itself; leave it out.")
    if type(special.get("train", True)) is not bool:
        raise UserError(f"{place}: train is {special['train']!r}; it must be true or false.")
    if "base_seed" in special:
        if type(special["base_seed"]) is not int or special["base_seed"] < 0:
            raise UserError(f"{place}: base_seed is {special['base_seed']!r}; it must be a whole number, 0 or more.")
        if "model_name_or_path" in flags or flags.get("task", "lab_world") != "lab_world":
            raise UserError(f"{place}: base_seed rebuilds the lab's own base model; leave other tasks and models out.")
    if "rho_shuffled_from" in special and len(special.keys() & _NEEDS) > 1:
        raise UserError(f"{place} shuffles multipliers and takes the mean of others; make two methods of it.")
    if len({special[key] for key in special.keys() & _NEEDS}) > 1:
        raise UserError(f"{place} takes multipliers of two methods; name one.")
    averages = flags.get("teacher", "ema") in ("ema", "trust_region") and flags.get("objective") != "grpo"
    if "teacher_rate_times_mean_rho_of" in special and not averages:
        raise UserError(f"{place} has teacher_rate_times_mean_rho_of and no teacher with a rate; leave it out.")


def _estimated_seconds(parsed: Any, train: bool, test_k: int) -> float:
    """Of one run, from the completions that it samples."""
    config, validation, test = parsed.config, parsed.run.eval_rows or 128, parsed.run.test_rows or 256
    evaluated = validation * config.eval_k + test * test_k
    if not train:
        return SECONDS_PER_RUN + SECONDS_PER_EVALUATED * evaluated
    evaluated += validation * config.eval_k * int(config.max_steps // config.eval_steps)
    evaluated += test * (2 * config.eval_k + test_k)
    trained = config.max_steps * config.prompts_per_step * (config.num_generations or 1)
    return SECONDS_PER_RUN + SECONDS_PER_EVALUATED * evaluated + SECONDS_PER_COMPLETION * trained


def _check_needs(run: StudyRun, queue: Mapping[str, StudyRun]) -> None:
    if run.needs is None:
        return
    if run.needs not in queue:
        raise UserError(f"{run.name} needs {run.needs}, which no group runs; add it to a group.")
    needed = queue[run.needs].arm
    if (needed.objective != "pgpo" and needed.trust == "off") or needed.rho_shuffled_from:
        raise UserError(
            f"{run.name} needs the multipliers of {run.needs}, which has none of its own; name a "
            "PGPO, or one with trust: measured."
        )
    if run.arm.lr_times_mean_rho_of and run.arm.learning_rate != needed.learning_rate:
        raise UserError(
            f"{run.name} has the learning rate {run.arm.learning_rate:g}, and the multipliers of {run.needs} are of "
            f"{needed.learning_rate:g}; make them equal."
        )
    if run.arm.teacher_rate_times_mean_rho_of and not needed.slows_teacher:
        raise UserError(
            f"{run.name} has teacher_rate_times_mean_rho_of, but the teacher of {run.needs} follows at its own rate; "
            "leave it out, or name one with trust: measured, an averaged teacher and trust_form: undo."
        )
    if run.arm.rho_shuffled_from and run.arm.max_steps != needed.max_steps:
        raise UserError(
            f"{run.name} has {run.arm.max_steps} steps, {run.needs} has {needed.max_steps}; make them equal."
        )


def _known(values: Mapping[Any, Any], known: set[str], place: str) -> None:
    unknown = sorted(str(k) for k in values.keys() - known)
    if unknown:
        raise UserError(f"{place} has unknown names: {', '.join(unknown)}; known are {', '.join(sorted(known))}.")


def _names(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    values = document.get(key)
    if not isinstance(values, dict) or not values:
        raise UserError(f"{key} is missing or empty; give at least one `name: {{flag: value}}`.")
    for name in values:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"{key} has the name {name!r}; use letters, digits, '.', '_' and '-' (in quotes if digits)."
            )
    return values


def _flags(values: Any, place: str) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{place} is {values!r}; give flags of `pgpo train`, {{flag: value}}.")
    for name, value in values.items():
        if not isinstance(value, (str, int, float, bool, dict)):
            raise UserError(f"{place}: {name} is {value!r}; give one text, number, true, false or mapping.")
    return values


def _seeds(values: Any, place: str) -> list[int]:
    if not isinstance(values, list) or not values or any(type(s) is not int or s < 0 for s in values):
        raise UserError(f"{place} is {values!r}; give a list of whole numbers, 0 or more.")
    if len(set(values)) != len(values):
        raise UserError(f"{place} has a number twice: {values}; each seed is one run.")
    return values


def _check_reference(reference: Any, settings: Any, methods: Any) -> None:
    """Published accuracies {setting: {method: share}}, shown beside the study's own."""
    if not isinstance(reference, dict):
        raise UserError("reference must map settings to {method: published accuracy}.")
    for setting in _chosen(list(reference), settings, "reference", allow_empty=True):
        published = reference[setting]
        if not isinstance(published, dict):
            raise UserError(f"reference: {setting} must map methods to published accuracies.")
        for method in _chosen(list(published), methods, f"reference: {setting}", allow_empty=True):
            value = published[method]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"reference: {setting}/{method} is {value!r}; give a share between 0 and 1.")


def _chosen(values: Any, known: Mapping[str, Any], place: str, allow_empty: bool = False) -> list[str]:
    if values == "all":
        return list(known)
    if not isinstance(values, list) or not (values or allow_empty):
        raise UserError(f"{place} is {values!r}; give a list of names, or all.")
    for name in values:
        if name not in known:
            raise UserError(f"{place} names {name!r}; known are {', '.join(known)}.")
    return values


def argv(flags: Mapping[str, Any]) -> list[str]:
    """As words of a command line; mappings are JSON there."""

    def word(value: Any) -> str:
        return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)

    return [f"--{name}={word(value)}" for name, value in flags.items()]
