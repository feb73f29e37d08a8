"""The method without a trainer: torch and the standard library, no I/O, no logging, no torch.distributed.

entropies   -> information I_k      information.py
I_k         -> multiplier rho_k     viscosity.py
whose I_k scales which gradient     sources.py
rho_k       -> optimizer step       stepping.py
the loss from logits                divergence.py
all of it from hidden states        head.py

how far a step moved the policy     signals.py
how far it may move it              trust.py
how much of the step that leaves    step_length.py
"""

from .divergence import divergence, sampled_token_divergence
from .head import HeadOutput, dense_distillation_head, distillation_of_logits, fused_distillation_head
from .information import Information, InformationMeter, token_entropy
from .signals import AdaptiveClip, Agreement, gradient_cosine, kl_moved, token_mean
from .sources import CrossFit, EarlierInformation
from .step_length import StepLength, Verdict, expected_size
from .stepping import modulate, modulate_reference
from .trust import FixedBudget, KLAdaptiveRate, LaggedRate, MeasuredTrust, TrustBudget, kl_per_divergence, trust_budget
from .viscosity import ExponentialLaw, SmoothExponentialLaw, linear_schedule

__all__ = [
    "AdaptiveClip",
    "Agreement",
    "CrossFit",
    "EarlierInformation",
    "ExponentialLaw",
    "FixedBudget",
    "HeadOutput",
    "Information",
    "InformationMeter",
    "KLAdaptiveRate",
    "LaggedRate",
    "MeasuredTrust",
    "SmoothExponentialLaw",
    "StepLength",
    "TrustBudget",
    "Verdict",
    "dense_distillation_head",
    "distillation_of_logits",
    "divergence",
    "expected_size",
    "fused_distillation_head",
    "gradient_cosine",
    "kl_moved",
    "kl_per_divergence",
    "linear_schedule",
    "modulate",
    "modulate_reference",
    "sampled_token_divergence",
    "token_entropy",
    "token_mean",
    "trust_budget",
]
