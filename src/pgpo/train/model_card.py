"""What TRL's model card does not say: the method and its settings, and every held-out evaluation with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from pgpo import runlog
from pgpo.settings.config import PGPOConfig
from pgpo.train.seam import SeamTrainer

# objective -> what TRL's template calls it, and its paper; PGPO's are the class's own.
BASELINES: dict[str, dict[str, Any]] = {
    "sdpo": {
        "_name": "SDPO",
        "_paper": {"title": "Reinforcement Learning via Self-Distillation", "id": "2601.20802"},
    },
    "grpo": {"_name": "GRPO", "_paper": GRPOTrainer._paper},
}
MOST_EVALUATIONS = 12  # rows: the first ones and the last


class CardTrainer(SeamTrainer):
    """A trainer whose model card has our section."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card, with method, settings and evaluations."""
        self.__dict__.update(BASELINES.get(self.args.objective, {}))
        super().create_model_card(*args, **kwargs)
        extend(self)


def extend(trainer: SeamTrainer) -> None:
    """Adds our section to the trainer's card, before the versions, or at its end; on the main process."""
    if not trainer.is_world_process_zero():
        return
    path = Path(trainer.args.output_dir) / "README.md"
    text = path.read_text(encoding="utf-8")
    head, mark, rest = text.partition("### Framework versions")
    ours = section(trainer.args, trainer.state.log_history)
    path.write_text(f"{head.rstrip()}\n\n{ours}\n\n{mark}{rest}".rstrip() + "\n", encoding="utf-8")


def section(args: PGPOConfig, history: Sequence[Mapping[str, Any]]) -> str:
    """Method and evaluations as Markdown. history: the trainer's log, `TrainerState.log_history`."""
    lines = ["### Method", "", "| setting | value |", "| --- | --- |"]
    lines += [f"| `{name}` | {_short(getattr(args, name))} |" for name in _settings(args)]
    found = [line for line in history if f"eval_{runlog.AVG_AT_K}" in line]
    if found:
        lines += ["", "### Evaluation", "", *_evaluations(found)]
    return "\n".join(lines)


def _settings(args: PGPOConfig) -> list[str]:
    """The settings that the objective has."""
    names = ["objective"]
    if args.objective == "pgpo":
        names += ["alpha", "rho_max", "information_source"]
    if args.distills:
        names += ["divergence", "divergence_beta", "divergence_top_k", "teacher", "teacher_rate", "trust"]
        if args.trust != "off":
            names += ["trust_budget", "trust_fraction", "trust_form", "trust_tokens", "trust_tolerance"]
    return [
        *names,
        "learning_rate",
        "prompts_per_step",
        "num_generations",
        "max_completion_length",
        "max_steps",
        "seed",
    ]


def _evaluations(found: Sequence[Mapping[str, Any]]) -> list[str]:
    measures = [name for name in (runlog.AVG_AT_K, runlog.PASS_AT_K, runlog.MAJ_AT_K) if f"eval_{name}" in found[0]]
    k = found[0].get(f"eval_{runlog.K}", "k")
    names = [name.replace("_at_k", f"@{k:g}" if isinstance(k, (int, float)) else "@k") for name in measures]
    shown = [*found[: MOST_EVALUATIONS - 1], found[-1]] if len(found) > MOST_EVALUATIONS else found
    lines = [f"| {' | '.join(['step', *names, 'questions'])} |", "|" + " --- |" * (len(names) + 2)]
    for line in shown:
        cells = [_estimate(line, f"eval_{name}") for name in measures]
        lines.append(f"| {line['step']} | {' | '.join(cells)} | {line.get(f'eval_{runlog.QUESTIONS}', 0):g} |")
    note = "Held-out questions; in brackets the 95 % interval, clustered by question or by stem."
    if len(shown) < len(found):
        note += f" {len(found) - len(shown)} evaluations before the last are left out."
    return [*lines, "", note]


def _estimate(line: Mapping[str, Any], name: str) -> str:
    value, low, high = (line.get(name + end) for end in ("", runlog.LOW, runlog.HIGH))
    if not all(isinstance(number, (int, float)) for number in (value, low, high)):
        return "–"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
