"""`pgpo plan`: the peak at a token budget, the largest budget that fits, and what to change where none does."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from pgpo.errors import UserError
from pgpo.memory.moments import Step
from pgpo.memory.shapes import GIB, ModelShape, TrainingSetting, check, fitted, read_model
from pgpo.runlog import write_atomically

MOST_CHANGES = 3  # advised together


def main(source: str, setting: TrainingSetting, memory: float, budget: int, json_out: Path | None) -> int:
    """`pgpo plan`: the table, the answers, and the JSON file. Exit status 0 whether it fits or not.

    Args:
        memory: GiB per GPU.
    """
    if json_out is not None and not json_out.parent.is_dir():
        raise UserError(f"there is no folder {json_out.parent} for {json_out.name}; create it first.")
    result = plan(read_model(source), setting, memory * GIB, budget)
    if json_out is not None:
        write_atomically(json_out, json.dumps(asdict(result), indent=2) + "\n")
    _print(result)
    shortened = result.setting.teacher_prompt_length
    if shortened < setting.teacher_prompt_length:
        print(
            f"teacher prompts are shortened to {shortened} tokens: the model has {result.model.positions} positions, "
            f"of which a completion may take {setting.max_completion_length}"
        )
    return 0


@dataclass(frozen=True)
class Plan:
    """The answers of `pgpo plan`, in bytes and tokens.

    Attributes:
        setting: with teacher prompts as `fitted` has them.
        moments: {moment: {item: bytes}} at `budget`.
        largest_budget: largest max_tokens_per_microbatch that fits; None: one completion of full length does not.
        advice: what to change, where it does not.
    """

    model: ModelShape
    setting: TrainingSetting
    memory: float
    budget: int
    moments: dict[str, dict[str, float]]
    peak_moment: str
    peak: float
    largest_budget: int | None
    advice: str | None


def plan(model: ModelShape, setting: TrainingSetting, memory: float, budget: int = 16384) -> Plan:
    """Peak at a token budget (by default PGPOConfig's), the largest budget, and what to change if nothing fits.

    Args:
        memory: bytes per GPU.

    Raises:
        UserError: a value outside its range, or a setting that the trainer refuses.
    """
    if not (math.isfinite(memory) and memory > 0):
        raise UserError(f"memory is {memory / GIB:g} GiB per GPU; it must be a positive number.")
    if budget < 1:
        raise UserError(f"max_tokens_per_microbatch is {budget}; it must be at least 1.")
    check(model, setting)
    step = Step(model, fitted(model, setting), budget)
    moment, size = peak(step, memory)
    largest = largest_budget(model, step.setting, memory)
    hint = advice(model, setting, memory) if largest is None else None
    return Plan(model, step.setting, memory, budget, step.moments(memory), moment, size, largest, hint)


def peak(step: Step, memory: float = 0.0) -> tuple[str, float]:
    """The moment that takes most, and how much, in bytes."""
    sums = {name: sum(items.values()) for name, items in step.moments(memory).items()}
    moment = max(sums, key=lambda name: sums[name])
    return moment, sums[moment]


def largest_budget(model: ModelShape, setting: TrainingSetting, memory: float) -> int | None:
    """Largest max_tokens_per_microbatch whose peak fits `memory` bytes, at most all rows; None if not even one row."""

    def fits(budget: int) -> bool:
        return peak(Step(model, setting, budget), memory)[1] <= memory

    one = Step(model, setting, 1)  # every row alone
    low, high = 1, one.rows * one.row
    if not fits(low):
        return None
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def advice(model: ModelShape, setting: TrainingSetting, memory: float) -> str:
    """One sentence: changes with which one completion of full length fits, or that none was found.

    First changes that leave the method as it is, on these GPUs, then on more of them. If these GPUs are not enough,
    also departures: adapters, the student as its own teacher, shorter completions.
    """
    same = _same_method(setting)
    if found := _search(model, setting, memory, same):
        return f"it fits with {', or with '.join(found)}."
    ways = []
    for gpus in (2, 4, 8, 16, 32):
        if gpus > setting.gpus and (found := _search(model, replace(setting, gpus=gpus), memory, same)):
            ways.append(f"--gpus {gpus} {found[0]}".rstrip())
            break
    departures = _search(model, setting, memory, same | _DEPARTURES, frozenset(_DEPARTURES))
    if (shorter := _shorter(model, setting, memory)) is not None:
        departures.append(f"--max-completion-length {shorter}")
    if departures:
        ways.append("another setting than the paper's: " + ", or with ".join(departures))
    if not ways:
        return "none of the changes tried is enough: take a smaller model, or GPUs with more memory."
    return f"it fits with {', or with '.join(ways)}."


Changes = dict[str, dict[str, Any]]  # flags -> fields of TrainingSetting
_DEPARTURES: Changes = {"--lora 16": {"lora": 16}, "--teacher live": {"teacher": "live"}}


def _same_method(setting: TrainingSetting) -> Changes:
    return {
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "--fused-head": {"fused_head": True},
        "--vllm-share 0.3": {"vllm_share": 0.3},
        "--attention flash": {"attention": "flash"},
        "--fsdp" + (f" instead of --zero {setting.zero}" if setting.zero else ""): {"fsdp": True, "zero": None},
        "--zero 3": {"zero": 3},
        "--zero 2": {"zero": 2},
        "--dtype bfloat16": {"parameter_bytes": 2},
    }


def _search(
    model: ModelShape,
    start: TrainingSetting,
    memory: float,
    changes: Changes,
    wanted: frozenset[str] = frozenset(),
) -> list[str]:
    """Up to three of the smallest sets of changes that fit, each with one of `wanted` if there are any; "" where none
    is needed."""
    useful = [flags for flags, values in changes.items() if replace(start, **values) != start]
    for size in range(MOST_CHANGES + 1):
        found = []
        for chosen in combinations(useful, size):
            if wanted and not wanted & set(chosen):
                continue
            changed = replace(start, **{k: v for flags in chosen for k, v in changes[flags].items()})
            if _fits(model, changed, memory):
                found.append(" ".join(chosen))
        if found:
            return found[:3]
    return []


def _shorter(model: ModelShape, setting: TrainingSetting, memory: float) -> int | None:
    """The longest completion that fits, among halves, quarters, ... of the length; or None."""
    length = setting.max_completion_length
    lengths = (length // 2**i for i in range(1, length.bit_length()))
    return next((n for n in lengths if _fits(model, replace(setting, max_completion_length=n), memory)), None)


def _fits(model: ModelShape, setting: TrainingSetting, memory: float) -> bool:
    """Whether the trainer takes the setting, and one completion of full length fits."""
    try:
        check(model, setting)
    except UserError:
        return False
    return peak(Step(model, fitted(model, setting), 1), memory)[1] <= memory


def _largest(result: Plan, largest: int) -> str:
    """What to set max_tokens_per_microbatch to."""
    step = Step(result.model, result.setting, 1)
    if largest == step.rows * step.row:
        return f"so do all rows of a step together, {largest} tokens: max_tokens_per_microbatch needs no limit"
    lower = f", so lower it from {result.budget}" if largest < result.budget else ""
    return f"the largest max_tokens_per_microbatch that fits is {largest}{lower}"


def _print(result: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    m, s = result.model, result.setting
    unit, name = (GIB, "GiB") if result.peak >= GIB else (2**20, "MiB")
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{m.name}: {m.parameters:,} parameters; {name} per GPU", title_justify="left"
    )
    table.add_column("")
    for moment in result.moments:
        table.add_column(moment, justify="right")
    columns = list(result.moments.values())
    for item in dict.fromkeys(name for items in columns for name, size in items.items() if size):
        table.add_row(item, *(f"{items[item] / unit:.2f}" if items.get(item) else "" for items in columns))
    table.add_section()
    table.add_row("sum", *(f"{sum(items.values()) / unit:.2f}" for items in columns))
    console = Console()
    console.print(table)
    verdict = "fits" if result.peak <= result.memory else "does not fit"
    lines = [
        f"at max_tokens_per_microbatch = {result.budget} the peak is {result.peak / unit:.2f} {name} "
        f"({result.peak_moment}), which {verdict} in {result.memory / unit:g} {name}",
    ]
    row = f"a prompt of {s.max_prompt_length} and a completion of {s.max_completion_length} tokens"
    if result.largest_budget is None:
        lines.append(f"{row} do not fit: {result.advice}")
    else:
        lines.append(f"{row} fit, one row at a time; {_largest(result, result.largest_budget)}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
