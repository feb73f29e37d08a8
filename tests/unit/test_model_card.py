"""The model card that `push_to_hub` and `create_model_card` write: method, settings, evaluations with intervals."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainer_kit import dataset, trainer

from pgpo.settings.config import PGPOConfig
from pgpo.train import model_card


def card(path: Path, **options) -> str:
    t = trainer(path, **options)
    t.train()
    t.create_model_card(model_name="mine", dataset_name="words")
    return (path / "README.md").read_text(encoding="utf-8")


def test_the_card_of_a_run_has_its_method_and_its_evaluations(tmp_path: Path) -> None:
    held_out = [dict(row, id=f"q{i}") for i, row in enumerate(dataset(3))]
    text = card(
        tmp_path,
        alpha=1.5,
        trust="measured",
        teacher_rate=0.02,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        eval_k=2,
        max_steps=2,
    )
    assert text.startswith("---") and "tags:" in text and "- pgpo" in text and "# Model Card for mine" in text
    settings = [
        f"`{name}` | {value} |" for name, value in (("objective", "pgpo"), ("alpha", "1.5"), ("teacher", "ema"))
    ]
    settings += ["`teacher_rate` | 0.02 |", "`trust` | measured |", "`trust_fraction` | ", "`max_steps` | 2 |"]
    assert [row for row in settings if f"| {row}" not in text] == []
    rows = [line for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(rows) == 2 and all(row.endswith("| 3 |") and row.count("[") == 2 for row in rows)
    assert "| step | avg@2 | pass@2 | questions |" in text
    assert text.index("### Method") < text.index("### Evaluation") < text.index("### Framework versions")
    assert text.count("### Framework versions") == 1


@pytest.mark.parametrize(
    ("objective", "named", "absent"),
    [
        ("pgpo", "trained with PGPO, a method introduced in [Physics-Guided", "trust_fraction"),
        ("sdpo", "trained with SDPO, a method introduced in [Reinforcement Learning via Self-Distillation]", "`alpha`"),
        ("grpo", "trained with GRPO, a method introduced in [DeepSeekMath", "`teacher`"),
    ],
)
def test_the_card_names_the_objective_and_only_its_settings(
    tmp_path: Path, objective: str, named: str, absent: str
) -> None:
    text = card(tmp_path, objective=objective)
    assert named in text and f"| `objective` | {objective} |" in text
    assert absent not in text and "### Evaluation" not in text


def test_many_evaluations_are_cut_and_counted(tmp_path: Path) -> None:
    lines = [{"step": step, "eval_avg_at_k": step / 100, "eval_k": 4} for step in range(30)]
    text = model_card.section(PGPOConfig(str(tmp_path), bf16=False, use_cpu=True), [{"loss": 1.0}, *lines])
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert rows == [f"| {step}" for step in (*range(11), 29)] and "18 evaluations before the last are left out" in text
