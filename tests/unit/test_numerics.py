"""nan and inf in weights, logits, entropies, rewards and gradients; steps that are skipped or raise; extreme batches.

Faults strike at steps drawn from a seed. After each step the whole state is compared, bit for bit where it must stay.
Run under torchrun with a folder as its argument, this file is what two ranks do (`test_all_ranks_decide_alike`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import trainer_kit
from conftest import build_model
from processes import torchrun
from torch import nn
from transformers import TrainerCallback

from pgpo.command.models import load_model
from pgpo.core import modulate, modulate_reference
from pgpo.errors import UserError
from pgpo.train import state as train_state
from pgpo.train.gate import torch_optimizer
from pgpo.train.seam import MOST_SKIPS, nonfinite_parameter

STEPS = 4
ROWS = 16  # 4 prompts x 4 completions


# State ----------------------------------------------------------------------------------------------------------------


def tensors(value, path: str = "") -> dict[str, torch.Tensor | float | None]:
    """Every leaf of nested dicts and lists, tensors copied."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors(item, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in tensors(item, f"{path}/{i}").items()}
    return {path: value.detach().clone() if isinstance(value, torch.Tensor) else value}


def state(t) -> dict[str, dict]:
    """All that a skipped step must leave as it was."""
    own = {k: v for k, v in train_state.collected(t).items() if k != "skips_in_a_row"}
    own["modulation"] = own["modulation"] or {"steps": 0, "last_rho": None}  # made when first used
    return {
        "student": trainer_kit.weights(t.model),
        "teacher": trainer_kit.weights(t.teacher.module) if t.teacher else {},
        "average": tensors(t.teacher.state_dict()) if t.teacher else {},
        "optimizer": tensors(t.optimizer.state_dict()),
        "schedule": tensors(t.lr_scheduler.state_dict()),
        "signal": tensors(own),
    }


def differing(a: dict[str, dict], b: dict[str, dict]) -> set[str]:
    """Parts of the state with a bit that differs."""

    def same(x, y) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(torch.nan_to_num(x, nan=1e30), torch.nan_to_num(y, nan=1e30))
        return x is y or x == y

    return {
        part for part in a if a[part].keys() != b[part].keys() or not all(same(a[part][k], b[part][k]) for k in a[part])
    }


class Watch(TrainerCallback):
    """State before every step and after it."""

    def __init__(self, t) -> None:
        self.trainer, self.before, self.after = t, {}, {}
        t.add_callback(self)

    def on_step_begin(self, args, state_, control, **kwargs):
        self.before[state_.global_step + 1] = state(self.trainer)

    def on_step_end(self, args, state_, control, **kwargs):
        self.after[state_.global_step] = state(self.trainer)


# Faults ---------------------------------------------------------------------------------------------------------------


def at_steps(t, steps) -> bool:
    return t.state.global_step + 1 in steps


def spoil_hidden(module: nn.Module, t, steps, value: float) -> None:
    """One number of the last hidden states."""

    def hook(module, args, output):
        if at_steps(t, steps):
            output = output.clone()
            output[:, -1, 0] = value  # the longest row's last place is no padding
        return output

    module.register_forward_hook(hook)


def spoil_gradient(t, steps, value: float) -> None:
    def hook(gradient):
        if at_steps(t, steps):
            gradient = gradient.clone()
            gradient.view(-1)[3] = value
        return gradient

    t.model.model.layers[1].mlp.down_proj.weight.register_hook(hook)


def spoil_information(t, steps, value: float) -> None:
    for meter in t.signal.meters:
        add = meter.add

        def spoiled(student, teacher, mask, add=add):
            add(student + value if at_steps(t, steps) else student, teacher, mask)

        meter.add = spoiled


def make(tmp_path, fault: str, steps, value: float, **options):
    """A trainer with a fault at these steps, and what it says."""
    options = dict(max_steps=STEPS, lr_scheduler_type="linear") | options
    holder = []

    def reward(prompts, completions, **kwargs):
        rewards = trainer_kit.parity_reward(prompts, completions)
        return [*rewards[:-1], value] if fault == "reward" and at_steps(holder[0], steps) else rewards

    reward.__name__ = "verdict"
    t = trainer_kit.trainer(tmp_path, reward=reward, **options)
    holder.append(t)
    if fault == "logits":
        spoil_hidden(t.model.model.norm, t, steps, value)
    elif fault == "teacher":
        spoil_hidden(t.teacher.module.model.norm, t, steps, value)
    elif fault == "gradient":
        spoil_gradient(t, steps, value)
    elif fault == "information":
        spoil_information(t, steps, value)
    said: list[str] = []
    t.host.say = said.append
    return t, said


CAUSE = {
    "logits": r"the information signal is not finite .* \(rank 0\)",
    "teacher": r"the information signal is not finite .* \(rank 0\)",
    "information": r"the information signal is not finite .* \(rank 0\)",
    "gradient": r"the gradient norm is (nan|inf) \(rank 0\)",
    "reward": r"reward function 'verdict' returned (nan|inf|-inf) for sample 15 at step \d",
}
RNG = random.Random(8)
FAULTS = [(fault, RNG.choice([math.nan, math.inf, -math.inf]), RNG.randint(1, STEPS), "pgpo") for fault in CAUSE]


@pytest.mark.parametrize(("fault", "value", "step", "objective"), [*FAULTS, ("gradient", math.nan, 1, "sdpo")])
def test_stop_ends_before_the_update(tmp_path, fault, value, step, objective):
    t, said = make(tmp_path, fault, {step}, value, objective=objective)
    watch = Watch(t)
    with pytest.raises(UserError, match=CAUSE[fault]) as caught:
        trainer_kit.train(t)
    assert f"at step {step}" in str(caught.value) and "\n" not in str(caught.value)
    assert t.state.global_step == step - 1 and said == []
    # What the information of the step was has been noted if it is finite; nothing was updated.
    assert differing(watch.before[step], state(t)) <= ({"signal"} if fault == "gradient" else set())


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("logits", {}),
        ("teacher", {"optim": "sgd"}),
        ("information", {"information_source": "cross_fit"}),
        ("gradient", {"information_source": "lagged", "information_baseline": "running_mean"}),
        ("gradient", {"objective": "sdpo", "optim": "sgd", "max_grad_norm": 0.0}),
        ("gradient", {"objective": "grpo"}),
        ("reward", {"modulated_weight_decay": "fixed"}),
        ("reward", {"objective": "grpo"}),
    ],
)
def test_skip_leaves_everything_and_goes_on(tmp_path, fault, options):
    rng = random.Random(f"{fault} {options}")
    steps, value = set(rng.sample(range(1, STEPS + 1), 2)), rng.choice([math.nan, math.inf])
    t, said = make(tmp_path, fault, steps, value, on_nonfinite="skip", **options)
    watch = Watch(t)
    logs = trainer_kit.train(t)
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert [log["skipped_share"] for log in logs] == [float(s in steps) for s in range(1, STEPS + 1)]
    assert len(said) == 2
    for text, step in zip(said, sorted(steps), strict=True):
        assert text.startswith(f"step {step} is skipped: ") and "\n" not in text
        assert re.search(CAUSE[fault], text), text
    moving = {"student", "optimizer", "schedule"}
    if t.teacher is not None:
        moving |= {"teacher", "average", "signal"}
    for step in range(1, STEPS + 1):
        changed = differing(watch.before[step], watch.after[step])
        assert changed == (set() if step in steps else moving), step
    assert all(torch.isfinite(p).all() for p in t.model.parameters())


def test_five_skips_in_a_row_stop(tmp_path):
    t, said = make(tmp_path, "reward", range(1, 100), math.nan, on_nonfinite="skip", max_steps=9)
    watch = Watch(t)
    with pytest.raises(UserError, match=rf"step {MOST_SKIPS} is skipped: .*nan.*the {MOST_SKIPS} last steps .*stops"):
        trainer_kit.train(t)
    assert MOST_SKIPS == 5 and t.state.global_step == 4 and len(said) == 4
    assert differing(watch.before[1], state(t)) == set()


def test_a_good_step_starts_the_count_anew(tmp_path):
    t, said = make(tmp_path, "gradient", {1, 2, 3, 4, 6, 7, 8, 9}, math.inf, on_nonfinite="skip", max_steps=10)
    assert len(trainer_kit.train(t)) == 10 and len(said) == 8


def test_a_resumed_run_goes_on_counting(tmp_path):
    first, _ = make(tmp_path, "reward", {2, 3, 4}, math.nan, on_nonfinite="skip", save_strategy="steps", save_steps=4)
    trainer_kit.train(first)
    second, said = make(tmp_path, "reward", {5, 6}, math.nan, on_nonfinite="skip", max_steps=8)
    with pytest.raises(UserError, match="step 6 is skipped"):
        trainer_kit.train(second, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(said) == 1


def test_completions_that_are_used_again_keep_their_verdict(tmp_path):
    """Two steps take one rollout whose rewards are not finite: both are skipped."""
    t, said = make(tmp_path, "reward", {3}, math.nan, on_nonfinite="skip", steps_per_generation=2)
    logs = trainer_kit.train(t)
    assert [log["skipped_share"] for log in logs] == [0.0, 0.0, 1.0, 1.0] and len(said) == 2


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "on_nonfinite", "rollout"),
    [
        (1, "stop", trainer_kit.fake_rollout),
        *((2, on, rollout) for on in ("stop", "skip") for rollout in (None, trainer_kit.fake_rollout)),
    ],
)
def test_a_spoiled_weight_stops_before_anything_is_sampled(tmp_path, step, on_nonfinite, rollout):
    t = trainer_kit.trainer(tmp_path, rollout=rollout, on_nonfinite=on_nonfinite, max_steps=3)
    name, parameter = random.Random(3).choice(list(t.model.named_parameters()))

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state_, control, **kwargs):
            if state_.global_step + 1 == step:
                with torch.no_grad():
                    parameter.view(-1)[-1] = -math.inf

    t.add_callback(Spoil())
    watch = Watch(t)
    says = rf"at step {step}: the weight {re.escape(name)} holds nan or inf \(rank 0\), so nothing can be sampled"
    with pytest.raises(UserError, match=says):
        trainer_kit.train(t)
    assert t.state.global_step == step - 1 and differing(watch.before[step], state(t)) == set()


@pytest.mark.parametrize("during", ["training", "evaluation"])
def test_logits_that_cannot_be_sampled_from_are_explained(tmp_path, during):
    """Finite weights whose activations overflow: torch's own RuntimeError, in one sentence."""
    t = trainer_kit.trainer(tmp_path, rollout=None, on_nonfinite="skip")
    t.model.model.norm.register_forward_hook(lambda module, args, output: output * math.inf)
    says = ("at step 1" if during == "training" else "after step 0") + ": the model's logits hold nan or inf"
    with pytest.raises(UserError, match=says):
        trainer_kit.train(t) if during == "training" else t.evaluate(list(trainer_kit.dataset(4)))


def test_other_errors_of_generation_are_not_touched(tmp_path):
    def fail(prompts, trainer):
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="the disk is on fire"):
        trainer_kit.train(trainer_kit.trainer(tmp_path, rollout=fail))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_spoiled_parameter_is_found_in_every_precision(dtype):
    model = build_model(dtype=dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(100.0)  # the sum is beyond half precision
    assert nonfinite_parameter(model) is None
    for value, name in ((math.inf, "model.norm.weight"), (math.nan, "model.layers.0.mlp.up_proj.weight")):
        model.get_parameter(name).data.view(-1)[1] = value
        assert nonfinite_parameter(model) == name


def test_a_model_with_a_spoiled_weight_is_not_trained(tmp_path):
    model = build_model()
    model.model.layers[1].self_attn.q_proj.weight.data[3, 3] = math.nan
    model.save_pretrained(tmp_path)
    trainer_kit.build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"weight model.layers.1.self_attn.q_proj.weight of the model .* nan or inf"):
        load_model(tmp_path)


# fp16: a gradient scaler skips by itself ------------------------------------------------------------------------------


def scaled(t, init_scale: float = 64.0):
    """Put torch's gradient scaler where accelerate puts it with fp16, which it does on a GPU alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)

    class Install(TrainerCallback):
        def on_train_begin(self, args, state_, control, **kwargs):
            t.accelerator.scaler = scaler
            t.optimizer.__init__(t.optimizer.optimizer, device_placement=False, scaler=scaler)
            t.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(torch_optimizer(t.optimizer))
            t.args.fp16 = True

    t.add_callback(Install())
    return scaler


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adamw_torch_fused"])  # a fused one skips within its kernel
def test_what_a_scaler_skips_moves_nothing(tmp_path, optim):
    t, said = make(tmp_path, "gradient", {1, 3}, math.inf, optim=optim)
    scaler = scaled(t)
    watch = Watch(t)
    logs = trainer_kit.train(t)
    assert len(logs) == STEPS and said == [] and scaler.get_scale() == 16.0  # halved twice
    for step in range(1, STEPS + 1):
        changed = differing(watch.before[step], watch.after[step])
        # The information of a batch is known, whether or not its gradient could be used.
        expected = (
            {"signal"} if step in (1, 3) else {"student", "optimizer", "schedule", "teacher", "average", "signal"}
        )
        assert changed == expected, step
    assert train_state.collected(t)["modulation"]["steps"] == 2


def test_scaled_steps_are_the_plain_ones(tmp_path):
    """The scaler's own path changes nothing where nothing overflows: powers of two, bit for bit."""
    ends = []
    for use in (False, True):
        t, _ = make(tmp_path, "gradient", set(), 0.0)
        if use:
            scaled(t)
        trainer_kit.train(t)
        ends.append(state(t))
    assert differing(*ends) <= {"schedule"} and not differing({"s": ends[0]["student"]}, {"s": ends[1]["student"]})


def test_our_skip_and_the_scalers_go_together(tmp_path):
    t, said = make(tmp_path, "reward", {2}, math.nan, on_nonfinite="skip")
    spoil_gradient(t, {3}, math.inf)
    scaler = scaled(t)
    watch = Watch(t)
    assert len(trainer_kit.train(t)) == STEPS
    assert len(said) == 1 and said[0].startswith("step 2 is skipped") and scaler.get_scale() == 32.0
    assert [differing(watch.before[s], watch.after[s]) for s in (2, 3)] == [set(), {"signal"}]
    assert "student" in differing(watch.before[4], watch.after[4])


# Handles and wrappers of an optimizer's step --------------------------------------------------------------------------


def plain_sgd():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=0.5)


@pytest.mark.parametrize("make_handle", [modulate, modulate_reference])
def test_remove_gives_back_the_optimizers_own_step(make_handle):
    optimizer = plain_sgd()
    for wrapped in (False, True):
        if wrapped:
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
        before = vars(optimizer).get("step")
        handle = make_handle(optimizer)
        copied = copy.deepcopy(optimizer)
        assert "step" not in vars(copied)
        handle.remove()
        assert vars(optimizer).get("step") is before and (before is not None) == wrapped
        optimizer.step()


def test_a_handle_within_a_later_wrapper_can_be_removed():
    optimizer = plain_sgd()
    handle = modulate(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps ours
    handle.remove()
    optimizer.step()
    again = modulate(optimizer)
    again.arm(1.0)
    optimizer.step()
    assert again.steps == 1 and handle.steps == 0


# Extreme batches ------------------------------------------------------------------------------------------------------


def endings(keep: int):
    """The fake rollout with the last tokens of each completion alone."""

    def rollout(prompts, trainer):
        output = trainer_kit.fake_rollout(prompts, trainer)
        output["completion_ids"] = [ids[len(ids) - keep :] for ids in output["completion_ids"]]
        output["logprobs"] = [[0.0] * len(ids) for ids in output["completion_ids"]]
        return output

    return rollout


def endless(prompts, trainer):
    """Completions that never end."""
    output = trainer_kit.fake_rollout(prompts, trainer)
    return output | {
        "completion_ids": [[13 + i % 9] * 8 for i in range(len(prompts))],
        "logprobs": [[0.0] * 8] * len(prompts),
    }


def everyone(prompts, **kwargs):
    return [1.0] * len(prompts)


def nobody(prompts, **kwargs):
    return [0.0] * len(prompts)


def unasked(prompts, **kwargs):
    """None = the function does not apply (TRL)."""
    return [None] * len(prompts)


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
@pytest.mark.parametrize(
    "options",
    [
        dict(rollout=endings(1), reward=everyone),  # the end-of-text token alone: nothing to show
        dict(rollout=endless, reward=everyone, mask_truncated_completions=True),
        dict(reward=nobody),
        dict(reward=unasked),
    ],
    ids=["blank", "all masked", "no success", "no verdict"],
)
def test_a_batch_that_teaches_nothing_moves_nothing(tmp_path, objective, options):
    t = trainer_kit.trainer(tmp_path, objective=objective, weight_decay=0.0, **options)
    start = trainer_kit.weights(t.model)
    (log,) = trainer_kit.train(t)
    assert trainer_kit.bitwise_equal(start, trainer_kit.weights(t.model))
    assert log["grad_norm"] == 0 and log["loss"] == 0
    if objective == "pgpo":
        assert (log["active_share"], log["information"], log["rho"]) == (0.0, 0.0, 1.0)
        assert log["success_share"] == (options["reward"] is everyone)
        assert trainer_kit.bitwise_equal(start, trainer_kit.weights(t.teacher.module))


def test_groups_of_successes_alone(tmp_path):
    (log,) = trainer_kit.train(trainer_kit.trainer(tmp_path, reward=everyone))
    assert log["active_share"] == 1.0 and 0 < log["grad_norm"] < math.inf


@pytest.mark.parametrize("objective", ["pgpo", "sdpo", "grpo"])
def test_one_token_completions_of_the_model_itself(tmp_path, objective):
    def alternating(prompts, **kwargs):
        return [float(i % 2) for i in range(len(prompts))]

    t = trainer_kit.trainer(
        tmp_path, objective=objective, rollout=None, max_completion_length=1, max_steps=2, reward=alternating
    )
    logs = trainer_kit.train(t)
    assert all(log["completion_length"] == 1 and math.isfinite(log["grad_norm"]) for log in logs)


def test_no_completion_at_all_is_the_rollouts_mistake(tmp_path):
    with pytest.raises(UserError, match="rollout_func returned no token for sample 0 at step 1; return at least"):
        trainer_kit.train(trainer_kit.trainer(tmp_path, rollout=endings(0)))


@pytest.mark.parametrize("scale", [1e-30, 1.0, -1.0, 7.5, -1e30, 1e30])
def test_rewards_of_any_scale_teach_by_their_threshold_alone(tmp_path, scale):
    def verdict(prompts, completions, **kwargs):
        return [scale * r for r in trainer_kit.parity_reward(prompts, completions)]

    t = trainer_kit.trainer(tmp_path, reward=verdict, success_threshold=scale if scale > 0 else 1.0)
    (log,) = trainer_kit.train(t)
    assert math.isfinite(log["grad_norm"]) and (log["active_share"] > 0) == (scale > 0)


def test_rewards_that_single_precision_cannot_hold(tmp_path):
    t = trainer_kit.trainer(tmp_path, reward=lambda prompts, **kwargs: [3e38] * len(prompts), reward_weights=[2.0])
    with pytest.raises(UserError, match="the weighted sum of the rewards is inf at step 1; lower reward_weights"):
        trainer_kit.train(t)
    t = trainer_kit.trainer(
        tmp_path, reward=lambda prompts, **kwargs: [(i % 2) * 1e30 for i in range(len(prompts))], objective="grpo"
    )
    with pytest.raises(
        UserError, match=r"at step 1: the rewards, up to 1e\+30, have a variance beyond .*; divide them"
    ):
        trainer_kit.train(t)


def test_a_vocabulary_of_two(tmp_path):
    """top_k = 100 of two tokens, and the largest entropy is ln 2."""
    model = build_model()
    small = type(model)(copy.deepcopy(model.config))
    small.resize_token_embeddings(2)

    def rollout(prompts, trainer):
        output = trainer_kit.fake_rollout(prompts, trainer)
        ids = [[0] * (i % 3) + [1] for i in range(len(prompts))]
        return output | {
            "prompt_ids": [[0, 1]] * len(prompts),
            "completion_ids": ids,
            "logprobs": [[0.0] * len(c) for c in ids],
        }

    t = trainer_kit.trainer(tmp_path, model=small, rollout=rollout, reward=everyone, max_steps=2)
    t.render = lambda prompt: [0, 1, 0]
    t.tokenizer.batch_decode = t.processing_class.batch_decode = lambda ids, **kwargs: ["w1"] * len(ids)
    logs = trainer_kit.train(t)
    for log in logs:
        assert 0 <= log["student_entropy"] <= math.log(2) + 1e-6 and 0 <= log["teacher_entropy"] <= math.log(2) + 1e-6
        assert math.isfinite(log["grad_norm"]) and log["active_share"] == 1.0


# Ranks ----------------------------------------------------------------------------------------------------------------


def two_ranks(folder: Path) -> dict[str, dict]:
    """Faults on rank 1 alone; what this rank saw."""
    rank = int(os.environ["RANK"])
    seen: dict[str, dict] = {}

    def run(name: str, fault: str, step: int, value: float, reward=None, **options) -> None:
        steps = {step} if rank == 1 else set()
        t, said = make(folder / name, fault, steps, value, **options)
        if reward is not None:
            t.reward_funcs = [t._guarded(reward)]
        watch, error = Watch(t), None
        try:
            trainer_kit.train(t)
        except UserError as e:
            error = str(e)
        seen[name] = {
            "error": error,
            "said": said,
            "done": t.state.global_step,
            "changed": {k: sorted(differing(watch.before[k], watch.after[k])) for k in watch.after},
            "weights": sum(p.double().abs().sum().item() for p in t.model.parameters()),
        }

    def raising(prompts, completions, **kwargs):
        if rank == 1 and kwargs["trainer_state"].global_step == 1:
            raise KeyError("answer")
        return trainer_kit.parity_reward(prompts, completions)

    def slow(prompts, completions, **kwargs):
        time.sleep(30 if rank == 1 else 0)
        return trainer_kit.parity_reward(prompts, completions)

    run("reward, skip", "reward", 2, math.nan, on_nonfinite="skip", max_steps=3)
    run("gradient, skip", "gradient", 2, math.inf, on_nonfinite="skip", max_steps=3)
    run("logits, stop", "logits", 2, math.nan)
    run("reward, stop", "reward", 1, math.inf)
    run("raising", "none", 1, 0.0, reward=raising)
    run("slow", "none", 1, 0.0, reward=slow, reward_timeout=0.5)
    return seen


@pytest.mark.slow
def test_all_ranks_decide_alike(tmp_path):
    torchrun(__file__, tmp_path, quiet=60)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in first:
        for part in ("error", "done", "changed", "weights"):
            assert first[name][part] == second[name][part], (name, part)
        assert second[name]["said"] == []  # the main process speaks
    for name in ("reward, skip", "gradient, skip"):
        assert first[name]["done"] == 3 and first[name]["error"] is None
        assert [bool(changed) for changed in first[name]["changed"].values()] == [True, False, True]
        (text,) = first[name]["said"]
        assert text.startswith("step 2 is skipped: ")
    assert "returned nan for sample 7 at step 2 on rank 1;" in first["reward, skip"]["said"][0]
    assert "gradient norm is" in first["gradient, skip"]["said"][0]
    assert re.search(r"at step 2: .*not finite.*\(rank 1\)", first["logits, stop"]["error"])
    assert "'verdict' returned inf for sample 7 at step 1 on rank 1" in first["reward, stop"]["error"]
    says = "reward function 'raising' raised KeyError at step 2 on rank 1 on the batch of 8 samples: 'answer'."
    assert first["raising"]["error"] == says
    assert "'slow' did not return within reward_timeout = 0.5 seconds at step 1 on rank 1" in first["slow"]["error"]
    assert [first[n]["done"] for n in ("logits, stop", "reward, stop", "raising", "slow")] == [1, 0, 1, 0]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    result = json.dumps(two_ranks(out))
    (out / f"{os.environ['RANK']}.json").write_text(result)
