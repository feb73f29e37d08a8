"""PGPO: Physics-Guided Policy Optimization with Self-Distillation (arXiv 2606.03620).

    from pgpo import PGPOConfig, PGPOTrainer     # drop-in for trl.GRPOConfig, trl.GRPOTrainer
    from pgpo.core import InformationMeter, ExponentialLaw, modulate     # for any torch loop

Names are imported on first use, so that `import pgpo` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgpo.core import ExponentialLaw, InformationMeter, divergence, modulate, token_entropy
    from pgpo.errors import UserError
    from pgpo.settings.config import PGPOConfig
    from pgpo.tasks import load_task
    from pgpo.teacher import build_contexts
    from pgpo.train.trainer import PGPOTrainer

__version__ = "0.1.0"

_HOME = {
    "PGPOConfig": "pgpo.settings.config",
    "PGPOTrainer": "pgpo.train.trainer",
    "ExponentialLaw": "pgpo.core",
    "InformationMeter": "pgpo.core",
    "divergence": "pgpo.core",
    "modulate": "pgpo.core",
    "token_entropy": "pgpo.core",
    "build_contexts": "pgpo.teacher",
    "load_task": "pgpo.tasks",
    "UserError": "pgpo.errors",
}

__all__ = [
    "ExponentialLaw",
    "InformationMeter",
    "PGPOConfig",
    "PGPOTrainer",
    "UserError",
    "build_contexts",
    "divergence",
    "load_task",
    "modulate",
    "token_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pgpo' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
