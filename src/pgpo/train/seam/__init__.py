"""The seam to TRL: the ONLY folder that names private members of trl.GRPOTrainer (1.16) and transformers.Trainer.

It turns them into a handful of public hooks, so that `trainer.py` reads as the method and an upgrade of TRL is a
change of this folder. `tests/contract/test_trl_seam.py` checks every name used here against the installed TRL.

    rollouts.py   prompts -> completions -> rewards
    held_out.py   the same for held-out rows
    policy.py     the policy loss, in parts
    step.py       a step: generation, gradient, gradient norm
    resume.py     checkpoints: write, verify, continue

Each file is one link of a chain of classes, the first of which subclasses GRPOTrainer.
"""

from pgpo.train.seam.policy import Scores
from pgpo.train.seam.resume import SeamTrainer
from pgpo.train.seam.rollouts import Batch, Prompt, Rollout, function_name, nonfinite_parameter, sampling_explained
from pgpo.train.seam.step import MOST_SKIPS

__all__ = [
    "MOST_SKIPS",
    "Batch",
    "Prompt",
    "Rollout",
    "Scores",
    "SeamTrainer",
    "function_name",
    "nonfinite_parameter",
    "sampling_explained",
]
