"""The closed form against independent derivatives, and the real torch step against the closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgpo.core import ExponentialLaw, modulate
from pgpo.sde.experiments import batch_fields, cross_fit_displacement, fixed_teacher, shared_fields
from pgpo.sde.problem import FEEDBACK, PHI_1, PHI_2, Bandit, TorchStep, apply_law

F64 = torch.float64
LAW = ExponentialLaw(alpha=0.8, rho_max=1.3)  # the cap is reached at some states: the step must apply it


def _states(dim: int) -> Tensor:
    return torch.tensor([[-1.3, 0.4], [0.2, -0.8], [2.1, 1.7]], dtype=F64)[:, :dim]


@pytest.mark.parametrize("phi", [PHI_1, PHI_2], ids=["1d", "2d"])
def test_mean_gradient_is_the_gradient_of_the_regularized_kl(phi: Tensor) -> None:
    """E[g] = grad( mean_x KL(student || teacher) + decay/2 |theta|^2 ) by autograd; catches a sign or baseline slip."""
    bandit = Bandit(phi, FEEDBACK, 0.3)
    for state in _states(bandit.dim):
        theta, bar = state.clone().requires_grad_(), torch.full_like(state, 0.5)
        student = torch.log_softmax(phi @ theta, -1)
        teacher = torch.log_softmax(phi @ bar + FEEDBACK, -1)
        loss = (student.exp() * (student - teacher)).sum(-1).mean() + 0.15 * theta.square().sum()
        loss.backward()
        law = bandit.sample_law(state[None], bar[None])
        torch.testing.assert_close(law.mean(law.gradient)[0], theta.grad, rtol=0, atol=1e-13)


def test_samples_are_on_policy_and_information_is_the_entropy_gap_of_their_prompt() -> None:
    theta = torch.tensor([[0.7]], dtype=F64)
    law = Bandit(PHI_1, FEEDBACK, 0.0).sample_law(theta, fixed_teacher(theta))
    student = torch.distributions.Categorical(logits=(PHI_1 @ theta[0]))
    teacher = torch.distributions.Categorical(logits=PHI_1 @ fixed_teacher(theta)[0] + FEEDBACK)
    torch.testing.assert_close(law.probability[0], student.probs.flatten() / 3)
    torch.testing.assert_close(law.information[0], (student.entropy() - teacher.entropy()).repeat_interleave(5))


@pytest.mark.parametrize("phi", [PHI_1, PHI_2], ids=["1d", "2d"])
@pytest.mark.parametrize("scope", ["batch", "all"])
def test_real_torch_step_is_the_closed_form(phi: Tensor, scope: str) -> None:
    bandit = Bandit(phi, FEEDBACK, 0.5)
    theta = _states(bandit.dim)
    bar = fixed_teacher(theta)
    fields = (batch_fields if scope == "batch" else shared_fields)(bandit, LAW, theta, bar)
    assert float(fields.rho.max()) == 1.3 or scope == "all"
    moved = TorchStep(bandit, LAW, scope, lr=0.25).displacement(theta, bar)
    torch.testing.assert_close(moved, -fields.rho.unsqueeze(-1) * fields.law.gradient, rtol=0, atol=1e-13)


def test_a_batch_of_two_takes_one_rho_from_the_mean_information() -> None:
    bandit = Bandit(PHI_1, FEEDBACK, 0.5)
    theta = torch.tensor([[0.4]], dtype=F64)
    law = bandit.sample_law(theta, fixed_teacher(theta))
    a, b = 0 * 5 + 3, 2 * 5 + 1  # prompt 0 token 3, prompt 2 token 1
    rho = LAW(float(law.information[0, a] + law.information[0, b]) / 2)
    expected = theta[0] - 0.1 * rho * (law.gradient[0, a] + law.gradient[0, b]) / 2
    moved = TorchStep(bandit, LAW, lr=0.1)(
        theta[0], fixed_teacher(theta)[0], torch.tensor([0, 2]), torch.tensor([3, 1])
    )
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-14)


def test_cross_fitting_is_two_armed_half_steps_of_a_real_optimizer() -> None:
    """Half-batch A's gradient is stepped with B's rho and the other way round, both gradients taken at theta."""
    bandit, lr = Bandit(PHI_1, FEEDBACK, 0.0), 0.2
    theta = torch.tensor([[0.4]], dtype=F64)
    law = bandit.sample_law(theta, fixed_teacher(theta))
    rho = apply_law(LAW, law.information)
    probability, h = cross_fit_displacement(law, rho)
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-14)
    a, b = 3, 11
    weight = torch.nn.Parameter(theta[0].clone())
    optimizer = torch.optim.SGD([weight], lr=lr / 2)
    handle = modulate(optimizer)
    for gradient, other in ((law.gradient[0, a], b), (law.gradient[0, b], a)):
        weight.grad = gradient.clone()
        handle.arm(float(rho[0, other]))
        optimizer.step()
    torch.testing.assert_close(theta[0] + lr * h[0, a * 15 + b], weight.detach(), rtol=0, atol=1e-14)


def test_cross_fitting_has_no_covariance_left() -> None:
    theta = _states(1)
    law = Bandit(PHI_1, FEEDBACK, 0.5).sample_law(theta, fixed_teacher(theta))
    rho = apply_law(LAW, law.information)
    probability, h = cross_fit_displacement(law, rho)
    mean = torch.einsum("mb,mbd->md", probability, h)
    torch.testing.assert_close(mean, -law.mean(rho).unsqueeze(-1) * law.mean(law.gradient), rtol=0, atol=1e-14)


def test_the_real_cross_fitted_step_is_the_closed_form() -> None:
    theta, bandit = _states(1), Bandit(PHI_1, FEEDBACK, 0.5)
    law = bandit.sample_law(theta, fixed_teacher(theta))
    _, h = cross_fit_displacement(law, apply_law(LAW, law.information))
    real = TorchStep(bandit, LAW, scope="cross_fit", lr=0.25).displacement(theta, fixed_teacher(theta))
    torch.testing.assert_close(real, h, rtol=0, atol=1e-13)


def test_the_real_lagged_step_is_scaled_by_what_was_remembered() -> None:
    theta, bandit = _states(1), Bandit(PHI_1, FEEDBACK, 0.5)
    last = torch.linspace(-0.3, 0.6, len(theta), dtype=F64)
    law = bandit.sample_law(theta, fixed_teacher(theta))
    h, remembered = TorchStep(bandit, LAW, scope="lagged", lr=0.25).lagged(theta, fixed_teacher(theta), last)
    torch.testing.assert_close(h, -apply_law(LAW, last)[:, None, None] * law.gradient, rtol=0, atol=1e-13)
    torch.testing.assert_close(remembered, law.information, rtol=0, atol=1e-14)
