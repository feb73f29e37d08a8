"""The method without a trainer: torch and the standard library, no I/O, no logging, no torch.distributed.

entropies   -> information I_k      information.py
I_k         -> multiplier rho_k     viscosity.py
whose I_k scales which gradient     sources.py
rho_k       -> optimizer step       stepping.py
the loss from logits                divergence.py
all of it from hidden states        head.py
"""

from .divergence import divergence, sampled_token_divergence
from .head import HeadOutput, dense_distillation_head, distillation_of_logits, fused_distillation_head
from .information import Information, InformationMeter, token_entropy
from .sources import CrossFit, EarlierInformation
from .stepping import modulate, modulate_reference
from .viscosity import ExponentialLaw, SmoothExponentialLaw, linear_schedule

__all__ = [
    "CrossFit",
    "EarlierInformation",
    "ExponentialLaw",
    "HeadOutput",
    "Information",
    "InformationMeter",
    "SmoothExponentialLaw",
    "dense_distillation_head",
    "distillation_of_logits",
    "divergence",
    "fused_distillation_head",
    "linear_schedule",
    "modulate",
    "modulate_reference",
    "sampled_token_divergence",
    "token_entropy",
]
