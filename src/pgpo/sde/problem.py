"""A minimal language model with every object of the method, and the real optimizer step on it.

    student   pi_theta(. | x)        = softmax(phi[x] theta)
    teacher   pi_thetabar(. | x, f)  ~ pi_thetabar(. | x) * l(f | x, .)         same network, reading the feedback f
    sample    x uniform over prompts, y ~ pi_theta(. | x)                       on-policy: p_B depends on theta
    gradient  g = -A(x, y) grad log pi_theta(y | x) + decay * theta,   A = log-ratio minus its exact mean
    signal    I_B = mean over the batch's prompts of H(student) - H(teacher)    nats

`Bandit.sample_law` is the closed form by enumeration, from which the theorem's fields are computed. `TorchStep` is the
package's own path (autograd, token_entropy, the law, modulate, torch.optim.SGD), used as a black box; the chain under
test consists of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgpo.core import CrossFit, EarlierInformation, modulate, token_entropy

Law = Callable[[float], float]


@dataclass(frozen=True)
class Bandit:
    """Prompts with one-token completions.

    Attributes:
        phi: features, [prompts, V, d].
        feedback: log l(f | x, y), [prompts, V].
        decay: L2 coefficient; keeps the drift pointing into the box.
    """

    phi: Tensor
    feedback: Tensor
    decay: float

    @property
    def dim(self) -> int:
        return self.phi.shape[-1]

    def sample_law(self, theta: Tensor, theta_bar: Tensor) -> SampleLaw:
        """All (prompt, token) samples at the states theta, theta_bar [M, d]."""
        log_student = torch.log_softmax(torch.einsum("xvd,md->mxv", self.phi, theta), -1)
        log_teacher = torch.log_softmax(torch.einsum("xvd,md->mxv", self.phi, theta_bar) + self.feedback, -1)
        pi = log_student.exp()
        ratio = log_teacher - log_student
        advantage = ratio - (pi * ratio).sum(-1, keepdim=True)
        score = self.phi - torch.einsum("mxv,xvd->mxd", pi, self.phi).unsqueeze(2)
        gradient = -advantage.unsqueeze(-1) * score + self.decay * theta[:, None, None, :]
        gap = -(pi * log_student).sum(-1) + (log_teacher.exp() * log_teacher).sum(-1)
        vocabulary = self.phi.shape[1]
        return SampleLaw(
            probability=(pi / self.phi.shape[0]).flatten(1),
            gradient=gradient.flatten(1, 2),
            information=gap.repeat_interleave(vocabulary, dim=1),
        )


@dataclass(frozen=True)
class SampleLaw:
    """The law of one sample at M states.

    Attributes:
        probability: [M, B].
        gradient: [M, B, d].
        information: I of the sample, nats, [M, B].
    """

    probability: Tensor
    gradient: Tensor
    information: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """E[values] over the batch; values [M, B] or [M, B, d]."""
        return torch.einsum("mb,mb...->m...", self.probability, values)

    def covariance(self, values: Tensor) -> Tensor:
        """Cov of values [M, B, d], [M, d, d]."""
        centred = values - self.mean(values).unsqueeze(1)
        return torch.einsum("mb,mbi,mbj->mij", self.probability, centred, centred)


def apply_law(law: Law, information: Tensor) -> Tensor:
    """Apply the law, a function of one float, to every entry."""
    flat = [law(value) for value in information.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.float64).reshape(information.shape)


class SoftmaxModel(nn.Module):
    """Next-token logits phi[x] theta, plus the feedback's log-likelihood when the model reads it."""

    phi: Tensor
    feedback: Tensor

    def __init__(self, bandit: Bandit) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(bandit.dim, dtype=torch.float64))
        self.register_buffer("phi", bandit.phi)
        self.register_buffer("feedback", bandit.feedback)

    def forward(self, prompts: Tensor, reads_feedback: bool = False) -> Tensor:
        """Logits [m, V] of prompts [m]."""
        logits = self.phi[prompts] @ self.theta
        return logits + self.feedback[prompts] if reads_feedback else logits


class TorchStep:
    """One real optimizer step of PGPO on a Bandit, from any state: (theta, theta_bar, batch) -> theta'.

    Args:
        bandit: the problem.
        law: information -> rho; None = plain SGD without modulation.
        scope: whose information: "batch" = the mini-batch's own (the method), "all" = over all prompts (rho does not
            depend on the batch), "lagged" = that of `earlier`, "cross_fit" = each half of the batch by the other's.
        lr: eta of the step.
    """

    def __init__(self, bandit: Bandit, law: Law | None, scope: str = "batch", lr: float = 1.0) -> None:
        self.student, self.teacher = SoftmaxModel(bandit), SoftmaxModel(bandit)
        self.law, self.scope = law, scope
        self.everything = torch.arange(bandit.phi.shape[0])
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=lr, weight_decay=bandit.decay)
        self.handle = modulate(self.optimizer) if law is not None else None
        self.earlier = EarlierInformation()
        self.halves = CrossFit(self.student.parameters())

    def __call__(self, theta: Tensor, theta_bar: Tensor, prompts: Tensor, tokens: Tensor) -> Tensor:
        """theta' [d] after the batch prompts [m], tokens [m]; with "cross_fit" m is even and the first half is A."""
        with torch.no_grad():
            self.student.theta.copy_(theta)
            self.teacher.theta.copy_(theta_bar)
        self.optimizer.zero_grad()
        rho = self._backward(prompts, tokens)
        if self.handle is not None:
            self.handle.arm(rho)
        self.optimizer.step()
        return self.student.theta.detach().clone()

    def _backward(self, prompts: Tensor, tokens: Tensor) -> float:
        """Add the batch's gradient to .grad and return its multiplier."""
        if self.law is None:
            self._differentiate(prompts, tokens)
            return 1.0
        if self.scope == "cross_fit":
            half = len(prompts) // 2
            self._differentiate(prompts[:half], tokens[:half], share=0.5)
            self.halves.stash()
            self._differentiate(prompts[half:], tokens[half:], share=0.5)
            return self.halves.combine(self.law(self._gap(prompts[:half])), self.law(self._gap(prompts[half:])))
        self._differentiate(prompts, tokens)
        information = self._gap(self.everything if self.scope == "all" else prompts)
        if self.scope == "lagged":
            earlier = self.earlier.exchange(information)
            return 1.0 if earlier is None else self.law(earlier)
        return self.law(information)

    def _differentiate(self, prompts: Tensor, tokens: Tensor, share: float = 1.0) -> None:
        """Add `share` of the mean loss's gradient to .grad."""
        with torch.no_grad():
            teacher_logits = self.teacher(prompts, reads_feedback=True)
        log_student = torch.log_softmax(self.student(prompts), -1)
        ratio = (torch.log_softmax(teacher_logits, -1) - log_student).detach()
        advantage = ratio - (log_student.detach().exp() * ratio).sum(-1, keepdim=True)
        pick = tokens.unsqueeze(-1)
        loss = -(advantage.gather(-1, pick) * log_student.gather(-1, pick)).mean()
        (share * loss).backward()

    @torch.no_grad()
    def _gap(self, prompts: Tensor) -> float:
        """Mean over the prompts of H(student) - H(teacher), nats."""
        gap = token_entropy(self.student(prompts)) - token_entropy(self.teacher(prompts, reads_feedback=True))
        return float(gap.mean())

    def displacement(self, theta: Tensor, theta_bar: Tensor) -> Tensor:
        """H_B = (theta' - theta) / lr for every one-sample batch at every state [M, d]; returns [M, B, d].

        With "cross_fit" a batch is two samples, so there are B^2 batches.
        """
        samples = self._samples()
        batches = [(a, b) for a in samples for b in samples] if self.scope == "cross_fit" else [(a,) for a in samples]
        pairs = [torch.tensor(batch).T for batch in batches]  # prompts and tokens
        moved = [self(state, bar, *pair) for state, bar in zip(theta, theta_bar, strict=True) for pair in pairs]
        return (torch.stack(moved).reshape(len(theta), len(batches), -1) - theta.unsqueeze(1)) / self.lr

    def lagged(self, theta: Tensor, theta_bar: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """H_B [M, B, d] after a batch with information `last` [M], and the information remembered then [M, B]."""
        moved, remembered = [], []
        for state, bar, value in zip(theta, theta_bar, last.tolist(), strict=True):
            for x, y in self._samples():
                self.earlier.value = value
                moved.append(self(state, bar, torch.tensor([x]), torch.tensor([y])))
                remembered.append(self.earlier.value)
        displacement = (torch.stack(moved).reshape(len(theta), -1, theta.shape[1]) - theta.unsqueeze(1)) / self.lr
        return displacement, torch.tensor(remembered, dtype=torch.float64).reshape(len(theta), -1)

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _samples(self) -> list[tuple[int, int]]:
        prompts, vocabulary, _ = self.student.phi.shape
        return [(x, y) for x in range(prompts) for y in range(vocabulary)]


def _table(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Arbitrary numbers of order one (ours). The feedback of prompt 0 is informative, that of prompt 2 hardly: I and the
# gradient differ between prompts, so that Cov(rho, g) is large enough to measure.
FEEDBACK = _table(
    [
        [1.6, -0.7, 0.1, -0.9, 0.2],
        [-0.5, 0.8, -0.3, 0.4, -0.6],
        [0.1, -0.2, 0.3, -0.1, 0.0],
    ]
)
PHI_1 = _table(
    [
        [0.9, -0.4, 0.3, -0.7, 0.1],
        [0.6, -0.8, 0.5, -0.2, 0.4],
        [-0.5, 0.7, -0.1, 0.8, -0.6],
    ]
).unsqueeze(-1)
PHI_2 = torch.stack(
    [
        PHI_1[..., 0],
        _table(
            [
                [-0.3, 0.6, 0.8, -0.5, 0.2],
                [0.7, 0.1, -0.9, 0.5, -0.4],
                [0.4, 0.9, -0.6, -0.2, 0.3],
            ]
        ),
    ],
    dim=-1,
)
