"""Step modulation: one battery over the optimizers of torch, and the ways in which a step can go wrong."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from pgpo.core import modulate, modulate_reference
from pgpo.core.stepping import Modulation, ReferenceModulation

Handle = Modulation | ReferenceModulation
RHOS = [1.3, 0.7, 2.0, 1.0, 0.25, 1.9, 1.0 / 3.0]


@dataclass(frozen=True)
class Case:
    """One optimizer setting, on three parameters in two groups with their own lr and weight decay."""

    name: str
    optimizer: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.1
    tensor_lr: bool = False
    only_matrices: bool = False
    sparse: bool = False
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return self.name

    def build(self, **overrides: Any) -> tuple[list[Tensor], Optimizer]:
        shapes = [(3, 4), (2, 5), (4, 4) if self.only_matrices else (6,)]
        generator = torch.Generator().manual_seed(1)
        parameters: list[Tensor] = [
            torch.nn.Parameter(torch.randn(shape, dtype=self.dtype, generator=generator)) for shape in shapes
        ]
        options = {**self.options, **overrides}
        second: dict[str, Any] = {"params": parameters[1:], "lr": self._lr(self.lr / 2)}
        if "weight_decay" in options:
            second["weight_decay"] = options["weight_decay"] * 3
        return parameters, self.optimizer(
            [{"params": parameters[:1]}, second],
            lr=self._lr(self.lr),
            **options,  # type: ignore[call-arg]
        )

    def _lr(self, value: float) -> float | Tensor:
        return torch.tensor(value, dtype=self.dtype) if self.tensor_lr else value

    def set_gradients(self, parameters: list[Tensor], step: int) -> None:
        """The same for every run, and no function of the parameters: Muon's bfloat16 would amplify a last digit."""
        generator = torch.Generator().manual_seed(100 + step)
        for p in parameters:
            gradient = torch.randn(p.shape, dtype=self.dtype, generator=generator) + 0.3
            if self.sparse:
                gradient[1] = 0
            p.grad = gradient.to_sparse(1) if self.sparse else gradient


O = torch.optim  # noqa: E741
CASES = [
    Case("SGD", O.SGD),
    Case("SGD-momentum", O.SGD, {"momentum": 0.9, "dampening": 0.1}),
    Case("SGD-nesterov", O.SGD, {"momentum": 0.9, "nesterov": True}),
    Case("SGD-L2", O.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    Case("SGD-foreach", O.SGD, {"momentum": 0.9, "foreach": True}),
    Case("SGD-fused", O.SGD, {"momentum": 0.9, "fused": True}),
    Case("Adam", O.Adam),
    Case("Adam-L2", O.Adam, {"weight_decay": 0.1}),
    Case("Adam-decoupled", O.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("AdamW-loop", O.AdamW, {"weight_decay": 0.1, "foreach": False}),
    Case("AdamW-foreach", O.AdamW, {"weight_decay": 0.1, "foreach": True}),
    Case("AdamW-fused", O.AdamW, {"weight_decay": 0.1, "fused": True}),
    Case("AdamW-amsgrad", O.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    Case("AdamW-maximize", O.AdamW, {"weight_decay": 0.1, "maximize": True}),
    Case("NAdam", O.NAdam),
    Case("NAdam-L2", O.NAdam, {"weight_decay": 0.1}),
    Case("NAdam-decoupled", O.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("RAdam", O.RAdam),
    Case("RAdam-decoupled", O.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("RMSprop", O.RMSprop),
    Case("RMSprop-momentum", O.RMSprop, {"momentum": 0.9}),
    Case("RMSprop-centered", O.RMSprop, {"momentum": 0.9, "centered": True}),
    Case("Adagrad", O.Adagrad, {"lr_decay": 0.1}),
    Case("Adamax", O.Adamax),
    Case("Adadelta", O.Adadelta, lr=1.0),
    Case("Adafactor", O.Adafactor, {"weight_decay": 0.1}),
    Case("Muon", O.Muon, {"weight_decay": 0.1}, only_matrices=True),
    Case("SparseAdam", O.SparseAdam, sparse=True),
    Case("SGD-tensor-lr", O.SGD, {"momentum": 0.9, "weight_decay": 0.1, "foreach": False}, tensor_lr=True),
    Case("Adam-tensor-lr", O.Adam, {"foreach": False}, tensor_lr=True),
    Case("AdamW-tensor-lr", O.AdamW, {"weight_decay": 0.1, "foreach": False}, tensor_lr=True),
    Case("AdamW-fused-tensor-lr", O.AdamW, {"weight_decay": 0.1, "fused": True}, tensor_lr=True),
    Case("Adagrad-tensor-lr", O.Adagrad, {"foreach": False}, tensor_lr=True),
    Case("Adafactor-tensor-lr", O.Adafactor, {"weight_decay": 0.1, "foreach": False}, tensor_lr=True),
]
ADAMW = next(case for case in CASES if case.name == "AdamW-loop")
DECOUPLED = [c for c in CASES if c.optimizer in (O.AdamW, O.Adafactor, O.Muon) or "decoupled" in c.name]
COUPLED = [c for c in CASES if c.name.endswith("L2")]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
both_twins = pytest.mark.parametrize("twin", [modulate, modulate_reference])


def run(
    case: Case, parameters: list[Tensor], optimizer: Optimizer, rhos: list[float], handle: Handle | None, start: int = 0
) -> None:
    for step, rho in enumerate(rhos, start):
        case.set_gradients(parameters, step)
        if handle is not None:
            handle.arm(rho)
        optimizer.step()


def copies(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, through nested containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def everything(parameters: list[Tensor], optimizer: Optimizer) -> Any:
    """A deep copy of all that a step may change."""
    return copy.deepcopy([copies(parameters), optimizer.state_dict()])


Step = Callable[[Case, list[Tensor], Optimizer, float], None]


def disagreement(case: Case, step: Step) -> float:
    """Largest distance from the reference twin's trajectory, relative to how far that one has moved."""
    expected, plain = case.build()
    start = copies(expected)
    reference = modulate_reference(plain)
    parameters, optimizer = case.build()
    worst = 0.0
    for k, rho in enumerate(RHOS):
        case.set_gradients(expected, k)
        reference.arm(rho)
        plain.step()
        case.set_gradients(parameters, k)
        step(case, parameters, optimizer, rho)
        moved = max((p - s).abs().max().item() for p, s in zip(expected, start, strict=True))
        apart = max((p - q).abs().max().item() for p, q in zip(expected, parameters, strict=True))
        worst = max(worst, apart / moved)
    return worst


def fast_twin(case: Case, parameters: list[Tensor], optimizer: Optimizer, rho: float) -> None:
    handle = modulate(optimizer)
    handle.arm(rho)
    optimizer.step()
    handle.remove()


# ------------------------------------------------------------------------------------------------ the definition


@every_case
def test_the_twins_agree(case: Case) -> None:
    assert disagreement(case, fast_twin) < 1e-12


@every_case
@both_twins
def test_the_optimizer_state_never_sees_rho(case: Case, twin: Callable[[Optimizer], Handle]) -> None:
    """Bit-identical to a plain optimizer that meets the same parameters and gradients at every step."""
    parameters, optimizer = case.build()
    handle = twin(optimizer)
    shadow_parameters, shadow = case.build()
    for k, rho in enumerate([*RHOS, 0.0]):
        for p, q in zip(parameters, shadow_parameters, strict=True):
            q.data.copy_(p.data)
        before = copies(parameters)
        run(case, shadow_parameters, shadow, [1.0], None, start=k)
        run(case, parameters, optimizer, [rho], handle, start=k)
        assert equal(optimizer.state_dict(), shadow.state_dict())
        for old, p, q in zip(before, parameters, shadow_parameters, strict=True):  # theta + rho * (plain update)
            torch.testing.assert_close(p.data, old + rho * (q.data - old), rtol=1e-13, atol=1e-13)


@every_case
@both_twins
def test_rho_one_is_the_plain_optimizer_bit_for_bit(case: Case, twin: Callable[[Optimizer], Handle]) -> None:
    plain_parameters, plain = case.build()
    run(case, plain_parameters, plain, [1.0] * 6, None)
    parameters, optimizer = case.build()
    run(case, parameters, optimizer, [1.0] * 6, twin(optimizer))
    assert equal(everything(parameters, optimizer), everything(plain_parameters, plain))


@pytest.mark.parametrize("case", [c for c in CASES if c.optimizer is O.AdamW], ids=str)
def test_constant_rho_is_adamw_with_that_learning_rate_bit_for_bit(case: Case) -> None:
    parameters, optimizer = case.build()
    run(case, parameters, optimizer, [2.0] * 6, modulate(optimizer))
    doubled_parameters, doubled = case.build()
    for group in doubled.param_groups:
        group["lr"] = group["lr"] * 2
    run(case, doubled_parameters, doubled, [1.0] * 6, None)
    assert equal(copies(parameters), copies(doubled_parameters))
    assert equal(optimizer.state_dict()["state"], doubled.state_dict()["state"])


def scale_the_gradient(case: Case, parameters: list[Tensor], optimizer: Optimizer, rho: float) -> None:
    for p in parameters:
        assert p.grad is not None
        p.grad.mul_(rho)
    optimizer.step()


def scale_the_loss(case: Case, parameters: list[Tensor], optimizer: Optimizer, rho: float) -> None:
    gradients = [p.grad for p in parameters]
    optimizer.zero_grad()
    (rho * sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True) if g is not None)).backward()  # type: ignore[union-attr]
    optimizer.step()


def scale_the_first_moment(case: Case, parameters: list[Tensor], optimizer: Optimizer, rho: float) -> None:
    for p in parameters:
        assert p.grad is not None
        p.grad.mul_(rho)
        if optimizer.state[p]:
            optimizer.state[p]["exp_avg"].mul_(rho)
    optimizer.step()


def scale_the_update_of_a_scaled_gradient(
    case: Case, parameters: list[Tensor], optimizer: Optimizer, rho: float
) -> None:
    before = copies(parameters)
    scale_the_gradient(case, parameters, optimizer, rho)
    for p, old in zip(parameters, before, strict=True):
        p.data.copy_(old + rho * (p.data - old))


def leave_the_learning_rate_scaled(case: Case, parameters: list[Tensor], optimizer: Optimizer, rho: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= rho
    optimizer.step()


def modulate_the_first_group_only(case: Case, parameters: list[Tensor], optimizer: Optimizer, rho: float) -> None:
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = lr * rho
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr


WRONG: list[Step] = [
    scale_the_gradient,
    scale_the_loss,
    scale_the_first_moment,
    scale_the_update_of_a_scaled_gradient,
    leave_the_learning_rate_scaled,
    modulate_the_first_group_only,
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["Adam", "AdamW-loop"])
def test_the_battery_rejects_what_is_not_the_method(wrong: Step, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    assert disagreement(case, wrong) > 0.02


@pytest.mark.parametrize("same", [scale_the_gradient, scale_the_loss])
def test_only_without_moments_is_scaling_the_gradient_the_same(same: Step) -> None:
    """Eq. 9 for plain SGD; hence the rejections above are Adam's doing, not the measure's."""
    assert disagreement(CASES[0], same) < 1e-12


# ------------------------------------------------------------------------------------------------ learning rate, decay


@every_case
@both_twins
@pytest.mark.parametrize("rho", [3.0, 0.1, 0.0])
def test_learning_rate_and_decay_come_back(case: Case, twin: Callable[[Optimizer], Handle], rho: float) -> None:
    """The very same objects with the very same values: lr * rho / rho would not be, nor survive rho = 0."""
    parameters, optimizer = case.build()
    handle = twin(optimizer)
    before = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    values = copy.deepcopy(before)
    run(case, parameters, optimizer, [rho], handle)
    for group, old, value in zip(optimizer.param_groups, before, values, strict=True):
        assert group.keys() == {*old, "params"}
        for key in old:
            assert group[key] is old[key]
            assert equal(group[key], value[key])


SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "linear": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=8),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.CosineAnnealingLR(o, T_max=7)], milestones=[3]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("name", ["SGD-momentum", "AdamW-loop", "AdamW-tensor-lr"])
@pytest.mark.parametrize("scheduler_first", [True, False])
@both_twins
def test_schedulers_never_see_rho(
    schedule: str, name: str, scheduler_first: bool, twin: Callable[[Optimizer], Handle]
) -> None:
    case = next(case for case in CASES if case.name == name)

    def rates(modulated: bool) -> list[list[float]]:
        parameters, optimizer = case.build()
        handle = twin(optimizer) if modulated and not scheduler_first else None
        scheduler = SCHEDULERS[schedule](optimizer)
        if modulated and scheduler_first:
            handle = twin(optimizer)
        seen = []
        for k in range(10):
            run(case, parameters, optimizer, [2.0 - k / 7], handle, start=k)
            scheduler.step()
            seen.append([float(group["lr"]) for group in optimizer.param_groups])
            assert seen[-1] == [float(lr) for lr in scheduler.get_last_lr()]
        return seen

    assert rates(modulated=True) == rates(modulated=False)


@pytest.mark.parametrize("case", DECOUPLED, ids=str)
def test_fixed_decay_modulates_the_data_term_alone(case: Case) -> None:
    """theta (1 - lr wd) + rho * (update without decay), the latter from a plain optimizer with weight_decay = 0."""
    parameters, optimizer = case.build()
    handle = modulate(optimizer, weight_decay="fixed")
    shadow_parameters, shadow = case.build(weight_decay=0.0)
    decays = [float(g["lr"]) * g["weight_decay"] for g in optimizer.param_groups for _ in g["params"]]
    assert all(decay > 0 for decay in decays)
    for k, rho in enumerate(RHOS):
        before = copies(parameters)
        for p, q in zip(parameters, shadow_parameters, strict=True):
            q.data.copy_(p.data)
        run(case, parameters, optimizer, [rho], handle, start=k)
        run(case, shadow_parameters, shadow, [1.0], None, start=k)
        for p, q, old, decay in zip(parameters, shadow_parameters, before, decays, strict=True):
            torch.testing.assert_close(p.data, old * (1 - decay) + rho * (q.data - old), rtol=1e-12, atol=1e-13)
        assert equal(optimizer.state_dict()["state"], shadow.state_dict()["state"])


@pytest.mark.parametrize("case", DECOUPLED, ids=str)
def test_fixed_decay_is_restored_and_bit_identical_at_rho_one(case: Case) -> None:
    plain_parameters, plain = case.build()
    run(case, plain_parameters, plain, [1.0] * 4, None)
    parameters, optimizer = case.build()
    handle = modulate(optimizer, weight_decay="fixed")
    run(case, parameters, optimizer, [1.0] * 4, handle)
    assert equal(everything(parameters, optimizer), everything(plain_parameters, plain))
    run(case, parameters, optimizer, [0.3], handle, start=4)
    assert equal(optimizer.state_dict()["param_groups"], plain.state_dict()["param_groups"])


@pytest.mark.parametrize("case", COUPLED, ids=str)
def test_fixed_leaves_coupled_decay_alone(case: Case) -> None:
    """L2 decay is part of the gradient: dividing it by rho would let rho into the moments."""
    results = []
    for weight_decay in ("scaled", "fixed"):
        parameters, optimizer = case.build()
        run(case, parameters, optimizer, RHOS, modulate(optimizer, weight_decay))
        results.append(everything(parameters, optimizer))
    assert equal(*results)


def test_fixed_decay_cannot_be_divided_by_zero() -> None:
    parameters, optimizer = ADAMW.build()
    run(ADAMW, parameters, optimizer, [1.5], handle := modulate(optimizer, weight_decay="fixed"))
    before = everything(parameters, optimizer)
    handle.arm(0.0)
    with pytest.raises(ValueError, match="rho_min"):
        optimizer.step()
    assert equal(everything(parameters, optimizer), before)


# ------------------------------------------------------------------------------------------------ checkpoints


@every_case
@both_twins
def test_a_checkpoint_continues_bit_for_bit(case: Case, twin: Callable[[Optimizer], Handle]) -> None:
    # float32: loading casts the state's fp32 scalars to the parameters' dtype, by which plain NAdam drifts in float64
    case = replace(case, dtype=torch.float32)
    parameters, optimizer = case.build()
    handle = twin(optimizer)
    run(case, parameters, optimizer, RHOS[:3], handle)
    file = io.BytesIO()
    torch.save([copies(parameters), optimizer.state_dict(), handle.state_dict()], file)
    run(case, parameters, optimizer, RHOS[3:], handle, start=3)

    file.seek(0)
    saved, optimizer_state, handle_state = torch.load(file, weights_only=True)
    resumed, fresh = case.build()
    for p, value in zip(resumed, saved, strict=True):
        p.data.copy_(value)
    fresh_handle = twin(fresh)
    fresh_handle.load_state_dict(handle_state)
    fresh.load_state_dict(optimizer_state)
    assert (fresh_handle.steps, fresh_handle.last_rho) == (3, RHOS[2])
    run(case, resumed, fresh, RHOS[3:], fresh_handle, start=3)
    assert equal(everything(resumed, fresh), everything(parameters, optimizer))
    assert fresh_handle.state_dict() == handle.state_dict() == {"steps": len(RHOS), "last_rho": RHOS[-1]}


@every_case
@both_twins
def test_the_optimizers_checkpoint_is_a_plain_one(case: Case, twin: Callable[[Optimizer], Handle]) -> None:
    plain_parameters, plain = case.build()
    run(case, plain_parameters, plain, [1.0] * 2, None)
    parameters, optimizer = case.build()
    handle = twin(optimizer)
    run(case, parameters, optimizer, [2.0, 0.5], handle)
    handle.arm(1.7)  # saved between arm and step
    assert structure(optimizer.state_dict()) == structure(plain.state_dict())
    assert equal(optimizer.state_dict()["param_groups"], plain.state_dict()["param_groups"])


def structure(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: structure(value) for key, value in tree.items()}
    return type(tree)


def test_an_armed_rho_does_not_survive_a_checkpoint() -> None:
    parameters, optimizer = ADAMW.build()
    handle = modulate(optimizer)
    state = handle.state_dict()
    handle.arm(2.0)
    handle.load_state_dict(state)
    ADAMW.set_gradients(parameters, 0)
    with pytest.raises(RuntimeError, match="arm"):
        optimizer.step()


@pytest.mark.parametrize("missing", ["steps", "last_rho"])
def test_a_foreign_modulation_state_is_refused(missing: str) -> None:
    handle = modulate(ADAMW.build()[1])
    with pytest.raises(ValueError, match=missing):
        handle.load_state_dict({k: v for k, v in handle.state_dict().items() if k != missing})


# ------------------------------------------------------------------------------------------------ the arm-step protocol


@every_case
@both_twins
def test_a_step_without_a_fresh_rho_changes_nothing(case: Case, twin: Callable[[Optimizer], Handle]) -> None:
    parameters, optimizer = case.build()
    handle = twin(optimizer)
    case.set_gradients(parameters, 0)
    before = everything(parameters, optimizer)
    with pytest.raises(RuntimeError, match=r"arm\(rho\)"):  # never armed
        optimizer.step()
    assert equal(everything(parameters, optimizer), before)

    run(case, parameters, optimizer, [2.0], handle)
    before = everything(parameters, optimizer)
    with pytest.raises(RuntimeError, match=r"arm\(rho\)"):  # used up
        optimizer.step()
    assert equal(everything(parameters, optimizer), before)
    assert handle.state_dict() == {"steps": 1, "last_rho": 2.0}


@pytest.mark.parametrize("rho", [math.nan, math.inf, -math.inf, -0.5, torch.tensor(math.nan)])
@both_twins
def test_an_unusable_rho_changes_nothing_and_disarms(twin: Callable[[Optimizer], Handle], rho: Any) -> None:
    parameters, optimizer = ADAMW.build()
    handle = twin(optimizer)
    run(ADAMW, parameters, optimizer, [1.5], handle)
    before = everything(parameters, optimizer)
    handle.arm(1.2)
    with pytest.raises(ValueError, match="rho is"):
        handle.arm(rho)
    with pytest.raises(RuntimeError, match="without a fresh rho"):  # not the 1.2 of before either
        optimizer.step()
    assert equal(everything(parameters, optimizer), before)


@both_twins
def test_arming_again_replaces_rho(twin: Callable[[Optimizer], Handle]) -> None:
    parameters, optimizer = ADAMW.build()
    handle = twin(optimizer)
    ADAMW.set_gradients(parameters, 0)
    handle.arm(2.0)
    handle.arm(0.5)
    optimizer.step()
    assert handle.state_dict() == {"steps": 1, "last_rho": 0.5}
    once_parameters, once = ADAMW.build()
    run(ADAMW, once_parameters, once, [0.5], twin(once))
    assert equal(everything(parameters, optimizer), everything(once_parameters, once))


@both_twins
def test_a_gradient_scaler_may_skip_the_step(twin: Callable[[Optimizer], Handle]) -> None:
    parameters, optimizer = ADAMW.build()
    handle = twin(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, (rho, bad) in enumerate([(1.7, math.inf), (0.5, 1.0), (1.3, math.nan), (2.0, 1.0)]):
        optimizer.zero_grad()
        ADAMW.set_gradients(parameters, step)
        gradients = [p.grad for p in parameters]
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True) if g is not None)
        scaler.scale(torch.as_tensor(loss) * bad).backward()
        handle.arm(rho)
        scaler.step(optimizer)
        scaler.update()
    assert handle.state_dict() == {"steps": 2, "last_rho": 2.0}
    taken_parameters, taken = ADAMW.build()
    taken_handle = twin(taken)
    run(ADAMW, taken_parameters, taken, [0.5], taken_handle, start=1)
    run(ADAMW, taken_parameters, taken, [2.0], taken_handle, start=3)
    for p, q in zip(parameters, taken_parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["SGD-momentum", "AdamW-loop", "AdamW-fused-tensor-lr"])
@pytest.mark.parametrize("recover", ["arm", "step", "remove"])
@both_twins
def test_a_step_that_raised_leaves_no_trace(name: str, recover: str, twin: Callable[[Optimizer], Handle]) -> None:
    """Left scaled, the next step would run at lr * 2 * 1.5, and a plain one after remove() at lr * 2."""
    case = next(case for case in CASES if case.name == name)

    def fail() -> float:  # Ctrl-C: not an Exception
        raise KeyboardInterrupt

    parameters, optimizer = case.build()
    rates = [group["lr"] for group in optimizer.param_groups]
    handle = twin(optimizer)
    case.set_gradients(parameters, 0)
    handle.arm(2.0)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    assert handle.state_dict() == {"steps": 0, "last_rho": None}

    clean_parameters, clean = case.build()
    if recover == "remove":
        handle.remove()
        run(case, parameters, optimizer, [1.0], None)
        run(case, clean_parameters, clean, [1.0], None)
    else:
        if recover == "arm":
            handle.arm(1.5)
            assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, rates, strict=True))
        optimizer.step()  # the rho of a step that never happened is still there
        run(case, clean_parameters, clean, [1.5 if recover == "arm" else 2.0], twin(clean))
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, rates, strict=True))
    assert equal(everything(parameters, optimizer), everything(clean_parameters, clean))


def test_a_closure_and_its_loss_pass_through() -> None:
    parameters, optimizer = CASES[0].build()
    CASES[0].set_gradients(parameters, 0)
    handle = modulate(optimizer)
    handle.arm(1.5)
    assert optimizer.step(lambda: 0.25) == 0.25


@both_twins
def test_a_group_added_later_is_modulated_too(twin: Callable[[Optimizer], Handle]) -> None:
    optimizer = CASES[0].build()[1]
    handle = twin(optimizer)
    late = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    late.grad = torch.ones_like(late)
    handle.arm(3.0)
    optimizer.step()
    assert late.tolist() == [-1.5, -1.5]


@both_twins
def test_parameters_without_a_gradient_stay_where_they_are(twin: Callable[[Optimizer], Handle]) -> None:
    parameters, optimizer = ADAMW.build()
    handle = twin(optimizer)
    ADAMW.set_gradients(parameters, 0)
    parameters[1].grad = None
    before = copies(parameters)
    handle.arm(1.7)
    optimizer.step()
    assert [torch.equal(p.data, old) for p, old in zip(parameters, before, strict=True)] == [False, True, False]


# ------------------------------------------------------------------------------------------------ which optimizers


@pytest.mark.parametrize(
    ("twin", "again"), itertools.product([modulate, modulate_reference], [modulate, modulate_reference])
)
def test_double_modulation_is_refused(
    twin: Callable[[Optimizer], Handle], again: Callable[[Optimizer], Handle]
) -> None:
    parameters, optimizer = ADAMW.build()
    handle = twin(optimizer)
    with pytest.raises(ValueError, match=r"AdamW is modulated already.*remove\(\)"):
        again(optimizer)
    run(ADAMW, parameters, optimizer, [2.0], handle)  # the refusal left the first one working, once
    single_parameters, single = ADAMW.build()
    run(ADAMW, single_parameters, single, [2.0], twin(single))
    assert equal(copies(parameters), copies(single_parameters))


@both_twins
def test_removal_is_idempotent_and_complete(twin: Callable[[Optimizer], Handle]) -> None:
    parameters, optimizer = ADAMW.build()
    attributes = set(vars(optimizer))
    handle = twin(optimizer)
    run(ADAMW, parameters, optimizer, [1.7], handle)
    handle.arm(2.0)
    handle.remove()
    handle.remove()
    assert set(vars(optimizer)) == attributes
    plain_parameters, plain = ADAMW.build()
    for p, q in zip(parameters, plain_parameters, strict=True):
        q.data.copy_(p.data)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(ADAMW, parameters, optimizer, [1.0] * 3, None, start=1)
    run(ADAMW, plain_parameters, plain, [1.0] * 3, None, start=1)
    assert equal(everything(parameters, optimizer), everything(plain_parameters, plain))


@both_twins
def test_a_removed_handle_cannot_be_armed(twin: Callable[[Optimizer], Handle]) -> None:
    """It would be the one way for a rho to be ignored in silence."""
    handle = twin(ADAMW.build()[1])
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"):
        handle.arm(2.0)


def test_removing_an_old_handle_spares_the_new_one() -> None:
    parameters, optimizer = ADAMW.build()
    old = modulate(optimizer)
    old.remove()
    modulate(optimizer)
    old.remove()
    ADAMW.set_gradients(parameters, 0)
    with pytest.raises(RuntimeError, match="without a fresh rho"):
        optimizer.step()
    with pytest.raises(ValueError, match="modulated already"):
        modulate(optimizer)


@pytest.mark.parametrize("optimizer", [O.ASGD, O.Rprop, O.LBFGS, type("MyRprop", (O.Rprop,), {})])
def test_updates_that_are_not_linear_in_lr_are_refused_with_a_remedy(optimizer: Any) -> None:
    instance = optimizer([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"not linear in the learning rate.*AdamW.*modulate_reference"):
        modulate(instance)
    modulate_reference(instance).remove()  # the remedy is not blocked by the refusal


@pytest.mark.parametrize("optimizer", [O.ASGD, O.Rprop])
def test_the_refusals_are_earned(optimizer: Any) -> None:
    """Twice the learning rate is not twice the step from the same warm state."""

    def last_step(factor: float) -> Tensor:
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        instance = optimizer([parameter], lr=0.1)
        for k in range(4):
            parameter.grad = torch.tensor([0.3, -1.0], dtype=torch.float64)
            old = parameter.detach().clone()
            if k == 3:
                instance.param_groups[0]["lr"] *= factor
            instance.step()
        return parameter.detach() - old

    single, double = last_step(1.0), last_step(2.0)
    assert ((double - 2 * single).abs() / single.abs()).max() > 0.1


class Unknown(Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


def test_an_optimizer_without_a_learning_rate_is_refused() -> None:
    # relative-step Adafactors have lr = None and choose their own: rho would have nothing to act on
    optimizer = O.SGD([torch.nn.Parameter(torch.zeros(2))])
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="set lr"):
        modulate(optimizer)


class KnownSubclass(O.AdamW):
    pass


def test_an_unknown_optimizer_works_with_a_warning_at_the_callers_line() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = Unknown([parameter])
    with pytest.warns(UserWarning, match="Unknown is not known to pgpo") as caught:
        handle = modulate(optimizer)
    assert caught[0].filename == __file__
    parameter.grad = torch.tensor([3.0, -2.0], dtype=torch.float64)
    handle.arm(2.0)
    optimizer.step()
    assert parameter.tolist() == [-0.2, 0.2]


@pytest.mark.parametrize("case", [*CASES, Case("subclass", KnownSubclass)], ids=str)
def test_known_optimizers_do_not_warn(case: Case) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        modulate(case.build()[1])
    assert [str(warning.message) for warning in caught] == []


class Wrapper(Optimizer):
    """As accelerate's: an Optimizer by name, whose constructor never ran."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


@both_twins
@pytest.mark.filterwarnings("ignore:Wrapper is not known")
def test_a_wrapper_without_hooks_is_refused_and_left_alone(twin: Callable[[Optimizer], Handle]) -> None:
    wrapper = Wrapper(ADAMW.build()[1])
    attributes = set(vars(wrapper))
    with pytest.raises(ValueError, match="inside"):
        twin(wrapper)
    assert set(vars(wrapper)) == attributes


def test_bad_weight_decay_mode_is_named_and_leaves_the_optimizer_alone() -> None:
    optimizer = ADAMW.build()[1]
    with pytest.raises(ValueError, match="weight_decay is 'off'"):
        modulate(optimizer, weight_decay="off")
    modulate(optimizer)


# ------------------------------------------------------------------------------------------------ Adafactor's cap


class MyAdafactor(O.Adafactor):
    pass


def adafactor(lr: float, steps: int, optimizer: type[Optimizer] = O.Adafactor) -> tuple[Tensor, Optimizer]:
    """After `steps` plain steps."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    instance = optimizer([parameter], lr=lr)  # type: ignore[call-arg]
    for k in range(steps):
        parameter.grad = torch.tensor([0.3, -1.0, 0.5 + k], dtype=torch.float64)
        instance.step()
    parameter.grad = torch.tensor([0.1, 0.7, -0.4], dtype=torch.float64)
    return parameter, instance


def test_adafactors_learning_rate_stops_acting_beyond_the_cap() -> None:
    """The premise of the refusal: min(lr, 1/sqrt(t)) at t = 9 gives lr = 1/2 and lr = 1 the same step."""
    steps = []
    for factor in (1.0, 2.0):
        parameter, optimizer = adafactor(lr=0.5, steps=8)
        old = parameter.detach().clone()
        optimizer.param_groups[0]["lr"] *= factor
        optimizer.step()
        steps.append(parameter.detach() - old)
    assert torch.equal(*steps)


@pytest.mark.parametrize("optimizer", [O.Adafactor, MyAdafactor])
@pytest.mark.parametrize(("lr", "rho"), [(0.5, 2.0), (0.5, 0.5), (0.3, 1.2)])
def test_adafactor_beyond_its_cap_is_refused_before_the_update(
    lr: float, rho: float, optimizer: type[Optimizer]
) -> None:
    """t = 9, cap 1/3: lr * rho above it is cut; lr above it makes lr * rho no multiple of the plain step."""
    parameter, instance = adafactor(lr, steps=8, optimizer=optimizer)
    handle = modulate(instance)
    before = everything([parameter], instance)
    handle.arm(rho)
    with pytest.raises(ValueError, match=r"Adafactor.*0\.333.*modulate_reference"):
        instance.step()
    assert equal(everything([parameter], instance), before)


@pytest.mark.parametrize(("lr", "rho"), [(0.3, 1.1), (0.3, 0.5), (0.5, 1.0)])
def test_adafactor_below_its_cap_or_at_rho_one_is_accepted(lr: float, rho: float) -> None:
    plain_parameter, plain = adafactor(lr, steps=8)
    old = plain_parameter.detach().clone()
    plain.step()
    parameter, optimizer = adafactor(lr, steps=8)
    handle = modulate(optimizer)
    handle.arm(rho)
    optimizer.step()
    expected = old + rho * (plain_parameter.detach() - old)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=1e-14)


def test_the_reference_twin_is_right_beyond_the_cap() -> None:
    plain_parameter, plain = adafactor(0.5, steps=8)
    old = plain_parameter.detach().clone()
    plain.step()
    parameter, optimizer = adafactor(0.5, steps=8)
    handle = modulate_reference(optimizer)
    handle.arm(2.0)
    optimizer.step()
    assert torch.equal(parameter.detach(), old + 2.0 * (plain_parameter.detach() - old))
    assert equal(optimizer.state_dict(), plain.state_dict())


class PerGroup:
    """Steps a torch optimizer once per parameter group, as DeepSpeed's ZeRO optimizer does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.failing = False

    def step(self) -> None:
        groups = self.optimizer.param_groups
        for group in groups:
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups
        if self.failing:
            raise RuntimeError("the link is down")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_stepper_that_steps_group_by_group(optimizer: type[Optimizer]) -> None:
    case = Case("per group", optimizer, {"weight_decay": 0.1})
    plain_parameters, plain = case.build()
    parameters, inner = case.build()
    stepper = PerGroup(inner)
    handle = modulate(inner, stepper=stepper)
    for k, rho in enumerate(RHOS):
        generator = torch.Generator().manual_seed(k)
        for p, q in zip(parameters, plain_parameters, strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            q.grad = p.grad.clone()
        handle.arm(rho)
        stepper.step()
        for group in plain.param_groups:
            group["lr"] *= rho
        plain.step()
        for group in plain.param_groups:
            group["lr"] /= rho
        for p, q in zip(parameters, plain_parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert (handle.steps, handle.last_rho) == (len(RHOS), RHOS[-1])
    rates = [group["lr"] for group in inner.param_groups]
    assert rates == [0.1, 0.05]

    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="without a fresh rho"):
        stepper.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    stepper.failing = True
    handle.arm(2.0)
    with pytest.raises(RuntimeError, match="the link is down"):
        stepper.step()
    assert [group["lr"] for group in inner.param_groups] == rates
    handle.remove()
    stepper.failing = False
    stepper.step()  # plainly
    assert "step" not in vars(stepper)
    with pytest.raises(RuntimeError, match="was removed"):
        handle.arm(1.0)


def test_a_wrapper_that_still_holds_the_step_steps_plainly_after_removal() -> None:
    """Red if the step that was wrapped in the meantime still asks for a rho."""
    parameters, inner = ADAMW.build()
    stepper = PerGroup(inner)
    handle = modulate(inner, stepper=stepper)
    held, calls = stepper.step, []
    stepper.step = lambda: (calls.append(1), held())
    handle.remove()
    ADAMW.set_gradients(parameters, 0)
    before = [p.detach().clone() for p in parameters]
    stepper.step()
    assert calls == [1] and not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
