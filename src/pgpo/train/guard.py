"""Collapse guard: what an alarm (alarms.py) does to a trainer.

It freezes or rolls back the teacher, halves the steps, or rolls the whole run back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pgpo.alarms import GUARDS, CollapseGuard, SignalState, calibrate
from pgpo.teacher.weights import FOLLOWERS

__all__ = ["GUARDS", "GuardActions", "calibrate"]

SNAPSHOT_FILE = "pgpo_guard.pt"

HALF = 0.5
MIN_STEP_FACTOR = 0.125  # ours: three halvings; a run that still gets worse does so for another reason
SNAPSHOT_INTERVAL = 5  # ours: copies the weights at most every fifth step; the smoothed value moves no faster


@dataclass
class Snapshot:
    """State of the run after `step`, on the CPU; None for parts that the action does not restore, or that the run does
    not have."""

    step: int
    tracks: dict[str, dict[str, Any]]
    teacher: dict[str, Any] | None
    student: dict[str, Any] | None  # parameters that train, and buffers
    optimizer: dict[str, Any] | None
    trust: dict[str, Any] | None = None
    clip: dict[str, Any] | None = None


class GuardActions:
    """Carries out the action of an alarm on a trainer, at the end of a step.

    warn              nothing
    freeze_teacher    the teacher does not follow the student any more
    rollback_teacher  the teacher returns to its best snapshot and is frozen (the prototype's guard: 8 runs, none
                      collapsed)
    halve_step        all later steps * .5, down to 1/8
    rollback          student, optimizer and teacher return to the best snapshot, and with them what measured trust
                      and the adaptive clip remember of the steps. So that the run does not repeat itself, the teacher
                      is frozen too, or the steps are halved if it is frozen already or never moved

    "Best" is the best smoothed value of the guard's first signal; a snapshot is taken at a new best, at most every
    fifth step. It lives in CPU memory (weights that train, fp32 teacher, optimizer state) and in checkpoints. A
    rollback does not touch the data order, the random numbers, the learning-rate schedule and the state of the step
    multiplier: the run continues with new questions. All ranks see the same metrics, hence act alike.

    Args:
        trainer: a PGPOTrainer; an action uses its model, teacher and torch optimizer, an alarm tells its host.
        kind: one of GUARDS but "off".
        max_actions: after this many actions, alarms only warn.

    Attributes:
        step_factor: multiplies every step, 1, 1/2, 1/4 or 1/8.
        teacher_frozen: the teacher does not follow the student any more.
    """

    def __init__(self, trainer: Any, kind: str, guard: CollapseGuard, max_actions: int) -> None:
        self.trainer, self.kind, self.guard, self.max_actions = trainer, kind, guard, max_actions
        self.step_factor = 1.0
        self.teacher_frozen = False
        self.taken = 0
        self.snapshot: Snapshot | None = None

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Check the metrics of the step that has just ended; several alarms cause one action."""
        alarms = self.guard.update(step, metrics)
        if not alarms:
            self._keep_best(step)
        for i, alarm in enumerate(alarms):
            action, done = self._act() if i == 0 else ("warn", f"the action of {alarms[0].signal} stands for it")
            text = f"{alarm.reason}: {done}"
            if self.trainer.accelerator.is_main_process:
                self.trainer.host.alarm(asdict(alarm) | {"action": action, "reason": text}, f"step {step}: {text}")

    def _act(self) -> tuple[str, str]:
        """The action taken ("warn" for none), and a phrase for what was done or why nothing was."""
        if self.kind == "warn":
            return "warn", "no action asked for"
        obstacle = self._obstacle()
        if obstacle is not None:
            return "warn", f"no action, {obstacle}"
        self.taken += 1
        if self.kind == "freeze_teacher":
            return self.kind, self._freeze()
        if self.kind == "halve_step":
            return self.kind, self._halve()
        assert self.snapshot is not None
        self._restore(self.snapshot)
        back = f"back to step {self.snapshot.step}"
        if self.kind == "rollback_teacher":
            self.snapshot = None  # it is used once
            return self.kind, f"teacher {back}, {self._freeze()}"
        change = self._freeze() if self._can_freeze else self._halve()
        what = "student and optimizer" if self.snapshot.teacher is None else "student, optimizer and teacher"
        return self.kind, f"{what} {back}, {change}"

    def _obstacle(self) -> str | None:
        """Why the action cannot be taken."""
        if self.taken >= self.max_actions:
            return f"guard_max_actions = {self.max_actions} were taken"
        if self.kind.endswith("teacher") and self.teacher_frozen:
            return "the teacher is frozen already"
        if not self.kind.endswith("teacher") and not self._can_freeze and self.step_factor <= MIN_STEP_FACTOR:
            return f"the steps are at {self.step_factor:g} of their size already"
        if self.kind.startswith("rollback") and self.snapshot is None:
            return f"{next(iter(self.guard.limits))} has no best value to return to yet"
        return None

    @property
    def _can_freeze(self) -> bool:
        """A rollback would freeze the teacher rather than halve the steps."""
        return self.kind == "rollback" and self._teacher_moves and not self.teacher_frozen

    @property
    def _teacher_moves(self) -> bool:
        return self.trainer.teacher is not None and self.trainer.teacher.kind in FOLLOWERS

    def _freeze(self) -> str:
        self.teacher_frozen = True
        return "teacher frozen"

    def _halve(self) -> str:
        self.step_factor *= HALF
        return f"steps now x {self.step_factor:g}"

    # Snapshots ------------------------------------------------------------------------------------------------------

    def _keep_best(self, step: int) -> None:
        if not self.kind.startswith("rollback") or self.guard.best_step != step or self._obstacle_for_good:
            return
        if self.snapshot is not None and step - self.snapshot.step < SNAPSHOT_INTERVAL:
            return
        whole = self.kind == "rollback"
        self.snapshot = Snapshot(
            step=step,
            tracks=copy.deepcopy(self.guard.state_dict()["tracks"]),
            teacher=self.trainer.teacher.state_dict() if self._teacher_moves else None,
            student=_on_cpu(_student_tensors(self.trainer.model)) if whole else None,
            optimizer=_on_cpu(self._optimizer().state_dict()) if whole else None,
            **{name: copy.deepcopy(part.state_dict()) for name, part in self._memories().items() if whole},
        )

    @property
    def _obstacle_for_good(self) -> bool:
        """No later alarm can use a snapshot."""
        return self.taken >= self.max_actions or (self.kind == "rollback_teacher" and self.teacher_frozen)

    def _restore(self, snapshot: Snapshot) -> None:
        if snapshot.teacher is not None:
            self.trainer.teacher.load_state_dict(snapshot.teacher)
        if snapshot.student is None:
            return
        with torch.no_grad():
            for name, tensor in _student_tensors(self.trainer.model).items():
                tensor.copy_(snapshot.student[name])
        optimizer = self._optimizer()
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))  # it would keep writing into the snapshot
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the schedule continues
        for name, part in self._memories().items():
            if (state := getattr(snapshot, name)) is not None:  # None in a checkpoint of an earlier version
                part.load_state_dict(copy.deepcopy(state))
        # The weights are those of that step, so its signals continue from there.
        self.guard.tracks = {name: SignalState(**track) for name, track in snapshot.tracks.items()}

    def _memories(self) -> dict[str, Any]:
        """What remembers earlier steps beside the optimizer."""
        t = self.trainer
        trust = {"trust": t.trust.form} if t.args.trust != "off" else {}
        return trust | ({} if t.clip is None else {"clip": t.clip})

    def _optimizer(self) -> Any:
        from pgpo.train.gate import torch_optimizer

        return torch_optimizer(self.trainer.optimizer)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON; the snapshot's tensors go to a file of their own."""
        return {
            "kind": self.kind,
            "guard": self.guard.state_dict(),
            "step_factor": self.step_factor,
            "teacher_frozen": self.teacher_frozen,
            "taken": self.taken,
            "snapshot_step": None if self.snapshot is None else self.snapshot.step,
        }

    def save_snapshot(self, directory: Path) -> None:
        if self.snapshot is not None:
            torch.save(vars(self.snapshot), directory / SNAPSHOT_FILE)

    def load(self, state: Mapping[str, Any], directory: Path) -> None:
        """Restore from a checkpoint. Raises ValueError or OSError if it does not fit or lacks its snapshot."""
        if state["kind"] != self.kind:
            raise ValueError(f"the saved guard is {state['kind']!r}, this one {self.kind!r}")
        snapshot = None
        if state["snapshot_step"] is not None:
            snapshot = Snapshot(**torch.load(directory / SNAPSHOT_FILE, map_location="cpu", weights_only=True))
        self.guard.load_state_dict(state["guard"])
        self.step_factor, self.teacher_frozen = state["step_factor"], state["teacher_frozen"]
        self.taken, self.snapshot = state["taken"], snapshot


def _student_tensors(model: Any) -> dict[str, Any]:
    """What training changes: parameters with a gradient, and buffers."""
    parameters = {f"parameters/{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return parameters | {f"buffers/{n}": b for n, b in model.named_buffers()}


def _on_cpu(value: Any) -> Any:
    """A deep copy with its tensors on the CPU."""
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value.detach().to("cpu", copy=True) if hasattr(value, "detach") else copy.deepcopy(value)
