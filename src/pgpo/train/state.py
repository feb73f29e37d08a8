"""What a checkpoint holds beyond the Trainer's own state: the teacher, the signal, the guard, the gate and trust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

TEACHER_FILE = "pgpo_teacher.safetensors"
STATE_FILE = "pgpo_state.json"


def collected(trainer: Any) -> dict[str, Any]:
    """The state of earlier steps other than tensors, as JSON."""
    signal = trainer.signal.state_dict()
    measures = trainer.args.trust != "off"
    optional = {"trust": trainer.trust.form.state_dict()} if measures else {}
    if trainer.clip is not None:
        optional["clip"] = trainer.clip.state_dict()
    return {
        "negative_steps": signal["negative_steps"],
        "signal_steps": signal["signal_steps"],
        "skips_in_a_row": trainer.skips_in_a_row,
        "teacher_behind": trainer.teacher_behind,
        "modulation": trainer.gate.state_dict(),
        "multiplier": signal["multiplier"],
        "guard": None if trainer.guard is None else trainer.guard.state_dict(),
        **optional,
    }


def save(trainer: Any, directory: Path) -> None:
    """Every rank must call it; one writes."""
    from safetensors.torch import save_file

    state = collected(trainer)
    tensors: dict[str, Tensor] = {}
    if trainer.teacher is not None:
        saved = trainer.teacher.state_dict(keep=trainer.args.should_save)
        for part in ("parameters", "buffers"):
            tensors |= {f"{part}/{name}": t.contiguous() for name, t in saved.pop(part).items()}
        state["teacher"] = saved
    if trainer.args.should_save:
        if tensors:
            save_file(tensors, directory / TEACHER_FILE)
        if trainer.guard is not None:
            trainer.guard.save_snapshot(directory)
        (directory / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")


def load(trainer: Any, directory: Path) -> None:
    """Restore what `save` wrote. Raises KeyError or ValueError if it was written by another kind of run."""
    state = json.loads((directory / STATE_FILE).read_text())
    trainer.restore(state)
    if trainer.guard is not None and state.get("guard") is not None:  # else it starts here
        trainer.guard.load(state["guard"], directory)
    if trainer.args.trust != "off" and "trust" in state:  # else it starts here
        trainer.trust.load_state_dict(state["trust"])
    if trainer.clip is not None and "clip" in state:  # else it starts here
        trainer.clip.load_state_dict(state["clip"])
    if trainer.teacher is not None:
        trainer.teacher.load_state_dict(_teacher(state, directory))


def _teacher(state: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    if state.get("teacher") is None:
        raise ValueError("it was written by a run without a teacher")
    saved: dict[str, Any] = {**state["teacher"], "parameters": {}, "buffers": {}}
    if (directory / TEACHER_FILE).exists():
        for key, tensor in load_file(directory / TEACHER_FILE).items():
            part, name = key.split("/", 1)
            saved[part][name] = tensor
    return saved
