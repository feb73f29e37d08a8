"""The seam to TRL: the ONLY folder that names private members of trl.GRPOTrainer (1.16) and transformers.Trainer.

It turns them into a handful of public hooks, so that `trainer.py` reads as the method and an upgrade of TRL is a
change of this folder. `tests/contract/test_trl_seam.py` checks every name used here against the installed TRL.

    step.py     a step: rollouts, rewards, gradient norm
    resume.py   checkpoints: write, verify, continue
"""

from pgpo.train.seam.resume import SeamTrainer
from pgpo.train.seam.step import MOST_SKIPS, Batch, Prompt, Rollout, Scores, nonfinite_parameter, sampling_explained

__all__ = [
    "MOST_SKIPS",
    "Batch",
    "Prompt",
    "Rollout",
    "Scores",
    "SeamTrainer",
    "nonfinite_parameter",
    "sampling_explained",
]
