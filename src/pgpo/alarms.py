"""Alarms of a training run: a metric has become worse than in healthy runs. Pure: numbers in, alarms out.

    WatchedMetric, SIGNALS    a metric, the direction in which it goes when training collapses, and a limit
    CollapseGuard             smoothed value against its own running best -> alarms
    calibrate                 limits from healthy runs

A signal is smoothed, s_k = .8 s_{k-1} + .2 x_k, and compared with its best value so far: an alarm means that it has
been worse by more than its limit for `patience` steps. Smoothing, warm-up and the default limits come from a prototype
study in the tiny language world (style variant, lr 3e-4: 8 runs with an EMA teacher, 6 of which decline, and 8 healthy
ones with a frozen teacher). There the best alarms led the decline by a median of 2.5 steps, with 1 false alarm in 8
healthy runs. Its limits are values OF THAT WORLD: on another model, calibrate on runs with a frozen teacher.

    runs = [read_run(directory).metrics for directory in frozen_teacher_runs]
    Path("limits.json").write_text(json.dumps(calibrate(runs)))         # then --guard_limits limits.json

What an alarm does to a trainer is in guard.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgpo.errors import UserError

GUARDS = (
    "off",
    "warn",
    "freeze_teacher",
    "rollback_teacher",
    "halve_step",
    "rollback",
)
SMOOTHING = 0.8  # prototype study, all signals
WARMUP = 5  # its running best starts at step 5
MARGIN = 1.05  # its limits: the worst of the healthy runs times 1.05


@dataclass(frozen=True)
class WatchedMetric:
    """A metric to watch.

    Attributes:
        metric: its name in runlog.METRICS.
        per: a metric that it is divided by, or None.
        falls: it falls in a collapse; otherwise it rises.
        unit: of the metric, "" for a share or a number without unit.
        relative: the limit is a share of the best value; otherwise it is in the metric's unit.
        limit: default from the prototype study, or None where it gives no number: calibrate.
        distills: measured only in steps with a teacher.
    """

    name: str
    metric: str
    per: str | None = None
    falls: bool = False
    unit: str = ""
    relative: bool = False
    limit: float | None = None
    distills: bool = False

    def excess(self, value: float, best: float) -> float:
        """How much worse than its best a value is, in the metric's unit or as a share of the best; negative: better."""
        worse = best - value if self.falls else value - best
        if self.relative and best <= 0:  # only a ratio can be: until it has been above 0, there is no scale
            return -1.0 if worse < 0 else 0.0
        return worse / best if self.relative else worse

    def read(self, metrics: Mapping[str, Any]) -> float | None:
        """Its value in the metrics of a step; None if the step does not measure it.

        That is: missing, None or not finite (no wrong sample; a gradient that overflowed in fp16), a mean over no
        tokens, or a relative signal of 0 (the gradient of a batch without a loss), beside which any value is large.
        """
        x = metrics.get(self.metric)
        if self.per is not None:
            unit = metrics.get(self.per)
            x = x / unit if x is not None and unit else None
        if x is None or not math.isfinite(x) or (self.relative and self.per is None and x <= 0):
            return None
        return None if self.distills and metrics.get("active_share") == 0 else float(x)


SIGNALS: dict[str, WatchedMetric] = {
    s.name: s
    for s in (
        # Its guard on the batch reward fired at a fall of .06 (and too late).
        WatchedMetric("reward", "reward", falls=True, limit=0.06),
        WatchedMetric("length_tail", "length_tail", unit="tokens", relative=True),
        WatchedMetric("clipped_share", "clipped_share"),
        WatchedMetric("student_entropy_low", "student_entropy", falls=True, unit="nats", relative=True, distills=True),
        WatchedMetric("student_entropy_high", "student_entropy", unit="nats", relative=True, distills=True),
        # The norm "triples" in a collapse: three times its best is 200 % above it.
        WatchedMetric("grad_norm", "grad_norm", relative=True, limit=2.0),
        WatchedMetric("divergence", "divergence", unit="nats", distills=True),
        # .044 was fitted to the exact KL(S||T); the sampled one has the same mean and more noise.
        WatchedMetric("sampled_kl", "sampled_kl", unit="nats", limit=0.044, distills=True),
        WatchedMetric("sampled_kl_wrong", "sampled_kl_wrong", unit="nats", limit=0.27, distills=True),
        # No limit: at half of its best it is in time for 11 of 17 declines of lab-study, and wrong in 30 of 31 healthy
        # runs, since it falls in these too (docs/LOG.md).
        WatchedMetric(
            "information_per_divergence", "information", per="divergence", falls=True, relative=True, distills=True
        ),
        # .04 to .06 kept all 6 true alarms, with 2 and 1 false ones in 8 healthy runs.
        WatchedMetric(
            "demonstration_logprob", "demonstration_logprob", falls=True, unit="nats", limit=0.06, distills=True
        ),
    )
}


@dataclass(frozen=True)
class Alarm:
    """A signal beyond its limit. value: smoothed; limit: the one crossed, as a share of the best if relative."""

    step: int
    signal: str
    value: float
    best: float
    best_step: int
    limit: float

    @property
    def reason(self) -> str:
        """'sampled_kl 0.31 nats is 0.05 above its best 0.26 (step 30)'"""
        signal = SIGNALS[self.signal]
        unit = f" {signal.unit}" if signal.unit else ""
        excess = signal.excess(self.value, self.best)
        by = f"{100 * excess:.3g} %" if signal.relative else f"{excess:.3g}"
        side = "below" if signal.falls else "above"
        return f"{self.signal} {self.value:.3g}{unit} is {by} {side} its best {self.best:.3g} (step {self.best_step})"


@dataclass
class SignalState:
    """The state of one signal: all that its next alarm depends on."""

    seen: int = 0  # finite values so far
    value: float | None = None  # smoothed
    best: float | None = None  # of the smoothed values after the warm-up
    best_step: int | None = None
    beyond: int = 0  # steps in a row beyond the limit
    alarms: int = 0  # since the value was last within its limit

    def follow(self, signal: WatchedMetric, step: int, x: float, warmup: int) -> float | None:
        """Add a value. Returns how much worse than its best the smoothed value is; None during the warm-up."""
        self.seen += 1
        self.value = x if self.value is None else SMOOTHING * self.value + (1 - SMOOTHING) * x
        if self.seen <= warmup:
            return None
        if self.best is None or signal.excess(self.value, self.best) < 0:
            self.best, self.best_step = self.value, step
        return signal.excess(self.value, self.best)


class CollapseGuard:
    """Raises alarms from the metrics of each step.

    A signal raises one alarm when its excess crosses the limit, and a further one at 2, 3, ... times the limit. Once it
    is back within its limit, the count starts again; its best value is kept.

    Args:
        limits: {signal: limit}, most important first; the best step of the first is the best step of the run.
        warmup: number of first values of a signal that only feed its smoothing.
        patience: number of consecutive steps beyond the limit that make an alarm.

    Raises:
        ValueError: an unknown signal, no signal, or a number out of range.
    """

    def __init__(self, limits: Mapping[str, float], warmup: int = WARMUP, patience: int = 1) -> None:
        if not limits:
            raise ValueError("there is no signal to watch.")
        for name, limit in limits.items():
            if name not in SIGNALS:
                raise ValueError(f"there is no signal {name!r}; choose among {', '.join(SIGNALS)}.")
            if not (math.isfinite(limit) and limit > 0):
                raise ValueError(f"the limit of {name} is {limit!r}; it must be a positive number.")
        if warmup < 0 or patience < 1:
            raise ValueError(f"warmup is {warmup} and patience {patience}; they must be at least 0 and 1.")
        self.limits = dict(limits)
        self.warmup, self.patience = warmup, patience
        self.tracks = {name: SignalState() for name in limits}

    def update(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Add the metrics of one step (runlog.METRICS) and return its alarms, in the order of the limits.

        A step that does not measure a signal does not change it.
        """
        alarms = []
        for name, limit in self.limits.items():
            signal, track = SIGNALS[name], self.tracks[name]
            x = signal.read(metrics)
            excess = None if x is None else track.follow(signal, step, x, self.warmup)
            if excess is None:
                continue
            if excess <= limit:
                track.alarms = 0
            crossed = limit * (track.alarms + 1)
            track.beyond = track.beyond + 1 if excess > crossed else 0
            if track.beyond == self.patience:
                track.beyond, track.alarms = 0, track.alarms + 1
                assert track.value is not None and track.best is not None and track.best_step is not None
                alarms.append(Alarm(step, name, track.value, track.best, track.best_step, crossed))
        return alarms

    @property
    def best_step(self) -> int | None:
        """Step of the first signal's best value."""
        return next(iter(self.tracks.values())).best_step

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as JSON can hold it exactly."""
        return {
            "limits": self.limits,
            "warmup": self.warmup,
            "patience": self.patience,
            "tracks": {name: asdict(track) for name, track in self.tracks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`. Raises ValueError if it belongs to other signals, limits or settings."""
        for name in ("limits", "warmup", "patience"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the saved guard has {name} {state[name]}, this one {getattr(self, name)}")
        self.tracks = {name: SignalState(**state["tracks"][name]) for name in self.limits}


def excesses(signal: WatchedMetric, lines: Iterable[Mapping[str, Any]], warmup: int = WARMUP) -> list[float | None]:
    """How much worse than its own running best the smoothed signal is at each step of a run; None in the warm-up.

    lines: {"step": ..., metric: ...} as in metrics.jsonl. A step that does not measure it repeats the excess before.
    """
    track, excess, found = SignalState(), None, []
    for line in lines:
        if (x := signal.read(line)) is not None:
            excess = track.follow(signal, line["step"], x, warmup)
        found.append(excess)
    return found


def calibrate(runs: Iterable[Sequence[Mapping[str, Any]]], warmup: int = WARMUP) -> dict[str, float]:
    """Limits from healthy runs, best with a frozen teacher: their largest excess times 1.05.

    Args:
        runs: the lines of each run's metrics.jsonl ({"step": ..., metric: ...}).

    Returns:
        {signal: limit}, without the signals that were never worse than their own best, or never measured: these have
        no scale.

    Raises:
        ValueError: there is no run.
    """
    runs = list(runs)
    if not runs:
        raise ValueError("there is no healthy run to calibrate on.")
    limits = {}
    for name, signal in SIGNALS.items():
        worst = max((e for lines in runs for e in excesses(signal, lines, warmup) if e is not None), default=0.0)
        if worst > 0:
            limits[name] = MARGIN * worst
    return limits


# Settings -------------------------------------------------------------------------------------------------------------


def choose_limits(
    signals: str | Sequence[str] | None, limits_file: str | None, distills: bool, watch_demonstrations: bool
) -> dict[str, float]:
    """{signal: limit} of a configuration: the named signals or those that suit the objective; limits from the file,
    else the defaults.

    Raises:
        UserError: an unknown signal, one that this run does not measure or that has no limit, an unreadable file.
    """
    own = {} if limits_file is None else read_limits(limits_file)
    if signals is None:
        names = ["sampled_kl_wrong", "sampled_kl"] if distills else ["reward", "grad_norm"]
        if distills and watch_demonstrations:
            names.insert(0, "demonstration_logprob")
    else:
        names = signals.replace(",", " ").split() if isinstance(signals, str) else list(signals)
    if not names:
        raise UserError(f"guard_signals is {signals!r}; name at least one of {', '.join(SIGNALS)}.")
    limits: dict[str, float] = {}
    for name in names:
        if name not in SIGNALS:
            raise UserError(f"guard_signals names {name!r}; choose among {', '.join(SIGNALS)}.")
        if SIGNALS[name].distills and not distills:
            raise UserError(
                f"guard_signals names {name}, which objective='grpo' does not measure; take reward, length_tail, "
                "clipped_share or grad_norm."
            )
        if name == "demonstration_logprob" and not watch_demonstrations:
            raise UserError("guard_signals names demonstration_logprob; set watch_demonstrations to measure it.")
        limit = own.get(name, SIGNALS[name].limit)
        if limit is None:
            raise UserError(
                f"guard_signals names {name}, which has no default limit; calibrate one on healthy runs "
                "(pgpo.alarms.calibrate) and give the file as guard_limits."
            )
        limits[name] = limit
    return limits


def read_limits(path: str | Path) -> dict[str, float]:
    """{signal: limit} from a JSON file. Raises UserError when it cannot be read or holds anything else."""
    try:
        limits = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"guard_limits {path} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise UserError(f"guard_limits {path} is not valid JSON; write it with json.dumps(calibrate(...)).") from error
    if not isinstance(limits, dict) or not limits:
        raise UserError(f'guard_limits {path} is not a JSON object such as {{"sampled_kl": 0.05}}.')
    for name, limit in limits.items():
        if name not in SIGNALS:
            raise UserError(f"guard_limits {path} names {name!r}; choose among {', '.join(SIGNALS)}.")
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not (math.isfinite(limit) and limit > 0):
            raise UserError(f"guard_limits {path} gives {name} the limit {limit!r}; it must be a positive number.")
    return {name: float(limit) for name, limit in limits.items()}
