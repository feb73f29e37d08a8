"""Measured trust in the trainer's step, against the weights before and after it and dense log-probabilities."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter

import pytest
import torch
import trainer_kit
from conftest import build_model
from peft import LoraConfig
from trainer_kit import bitwise_equal, largest_difference, parity_reward, train, weights
from transformers import TrainerCallback

from pgpo.errors import UserError
from pgpo.settings.arguments import parse
from pgpo.train.host import Host
from pgpo.train.probe import KEPT_TOKENS, Candidate, Probe, chosen

LOGGED = {"trust_rho", "trust_moved", "trust_budget", "agreement", "probes"}


def trainer(path, **options):
    """Steps that are much too long, at first by a factor of several hundred."""
    defaults = dict(trust="measured", objective="sdpo", max_steps=4, learning_rate=0.1, temperature=0.8)
    return trainer_kit.trainer(path, **(defaults | options))


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def never(prompts, completions, **kwargs):
    return [0.0] * len(prompts)


class Watch(TrainerCallback):
    """Of each step: weights before it, behind the optimizer, at its end; Adam's moments at the two; rows probed."""

    def __init__(self, t):
        self.t, self.old, self.new, self.kept, self.rows, self.moments = t, [], [], [], [], []
        t.add_callback(self)
        plain = t.trust._rows
        t.trust._rows = lambda batch: self.rows.append((batch, found := plain(batch))) or found

    def on_train_begin(self, args, state, control, **kwargs):
        inner = self.t.optimizer.optimizer
        inner.register_step_pre_hook(lambda *_: self.old.append(weights(self.t.model)))
        inner.register_step_post_hook(lambda *_: (self.new.append(weights(self.t.model)), self._moments()))

    def on_step_end(self, *args, **kwargs):
        self.kept.append(weights(self.t.model))
        self._moments()

    def _moments(self):
        self.moments.append(copy.deepcopy(list(self.t.optimizer.optimizer.state.values())))


def policy(t, values, batch, rows):
    """Log-probabilities of the whole vocabulary behind the rows' own tokens, one row at a time, by the model itself."""
    model = t.model.eval()  # trained already
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    found = []
    for i in rows:
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].float()
        own = batch["tool_mask"][i][: len(completion)].bool() if "tool_mask" in batch else slice(None)
        found.append(torch.log_softmax(logits / t.args.temperature, -1)[own])
    return torch.cat(found)


def dense_kl(before, after):
    return float((before.exp() * (before - after)).sum(-1).mean())


CASES = {
    "adam": {},
    "pgpo": dict(objective="pgpo"),
    "sgd": dict(optim="sgd", learning_rate=20.0),
    "sgd_momentum": dict(optim="sgd", optim_args="momentum=0.9", learning_rate=20.0),
    "adafactor": dict(optim="adafactor", learning_rate=0.1),
    "decay": dict(weight_decay=5.0, max_grad_norm=0.01, lr_scheduler_type="linear"),
    "lora": dict(peft_config=lora()),
    "checkpointed": dict(gradient_checkpointing=True, micro_batch_size=3),
    "environment": dict(rollout=trainer_kit.environment_rollout),
    "all_logits": dict(fused_head=False, micro_batch_size=1, join_siblings=False),
    "cross_fit": dict(objective="pgpo", information_source="cross_fit"),
    "mixed": dict(distillation_weight=0.4),
    "reverse_kl": dict(divergence="reverse_kl", trust_budget="divergence"),
    "information": dict(trust_budget="information", trust_fraction=0.9),
    "live": dict(teacher="live"),
    "frozen": dict(teacher="frozen"),
    "guard": dict(guard="halve_step"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kept_part_moves_the_policy_by_its_budget(case, tmp_path):
    """Red if the weights are not at the rho that is logged, if K is of other rows, of another temperature or of the
    step before it was shortened, if it exceeds the budget, or if the optimizer's moments are shortened too."""
    t = trainer(tmp_path, **CASES[case])
    watch = Watch(t)
    logs = train(t)
    assert len(logs) == len(watch.old) == len(watch.kept) == 4
    assert min(log["trust_rho"] for log in logs) < 0.9, "no step was too long"
    for k, log in enumerate(logs):
        rho, old, new = log["trust_rho"], watch.old[k], watch.new[k]
        trained = [name for name in old if ".teacher." not in name]  # an adapter in the same model
        expected = {name: old[name] + rho * (new[name] - old[name]) for name in trained}
        assert largest_difference({name: watch.kept[k][name] for name in trained}, expected) < 1e-5
        batch, rows = watch.rows[k]
        before, after = (policy(t, values, batch, rows) for values in (old, watch.kept[k]))
        assert log["trust_moved"] == pytest.approx(dense_kl(before, after), rel=1e-3, abs=1e-6)
        assert log["trust_moved"] <= t.args.trust_tolerance * log["trust_budget"]
        for a, b in zip(watch.moments[2 * k], watch.moments[2 * k + 1], strict=True):
            assert a.keys() == b.keys()
            assert all(a[n] is b[n] or torch.equal(torch.as_tensor(a[n]), torch.as_tensor(b[n])) for n in a)
        assert log["effective_lr"] == pytest.approx(log["learning_rate"] * log["rho"] * rho)


def test_the_first_budget_is_the_divergence(tmp_path):
    """By hand: (.5)^2 4 D at the first step, and for the next ones lambda_k^2 4 times the mean of D."""
    logs = train(trainer(tmp_path, trust_budget="divergence", max_steps=3))
    assert {log["agreement"] for log in logs} == {1.0}  # five cosines before the first verdict
    total = weight = 0.0
    for k, log in enumerate(logs):
        total, weight = 0.9 * total + 0.1 * log["divergence"], 0.9 * weight + 0.1
        share = max(0.1, 0.5 / math.sqrt(1 + k))
        assert log["trust_budget"] == pytest.approx(share**2 * 4 * total / weight)
    assert logs[0]["trust_budget"] == pytest.approx(logs[0]["divergence"])
    assert logs[0]["trust_ratio"] > 1.5  # the whole step is measured first; K / D


def test_successive_gradients_are_compared_with_adams_memory(tmp_path):
    """Red if the cosine is taken behind the step, where the moment holds the gradient itself, or if nobody takes it."""
    t = trainer(tmp_path, max_steps=9)
    found = []
    plain = t.gate.settle

    def settle(callback, acts):
        step, state = callback.args[0], t.optimizer.optimizer.state
        if state:
            pairs = [(p.grad.flatten(), state[p]["exp_avg"].flatten()) for p in t.model.parameters()]
            g, m = (torch.cat(parts).double() for parts in zip(*pairs))
            found.append((step.cosine, float(g @ m / g.norm() / m.norm())))
        else:
            assert step.cosine is None
        plain(callback, acts)

    t.gate.settle = settle
    logs = train(t)
    assert len(found) == 8 and all(a == pytest.approx(b, abs=1e-5) for a, b in found)
    assert [log["agreement"] for log in logs[:6]] == [1.0] * 6
    mean, weight = 0.0, 0.0
    for cosine, _ in found[:6]:
        mean, weight = 0.9 * mean + 0.1 * cosine, 0.9 * weight + 0.1
    assert logs[6]["agreement"] == pytest.approx(min(max(mean / weight / 0.1, 0.1), 1.0))


@pytest.mark.parametrize("sync", [1, 2])
def test_the_teacher_follows_as_far_as_the_student_was_let(sync, tmp_path):
    """Red if the teacher follows before the step is shortened, or at its full rate, or forgets a step in between."""
    t = trainer(tmp_path, teacher_rate=0.3, teacher_sync_steps=sync)
    expected, seen, rhos = weights(t.model), [], []
    plain = t.teacher_follows

    def follows():
        plain()
        rhos.append(t.step_metrics()["trust_rho"])
        if t.state.global_step % sync == 0:
            rate = 0.3 * sum(rhos[-sync:]) / sync
            for name, p in t.model.named_parameters():
                expected[name] = expected[name] + rate * (p.detach() - expected[name])
        seen.append(largest_difference(expected, weights(t.teacher.module)))

    t.teacher_follows = follows
    train(t)
    assert len(seen) == 4 and max(seen) < 1e-5
    assert max(rhos) < 0.9


def test_the_lagged_form_undoes_nothing_and_sets_the_next_rate(tmp_path):
    """factor <- factor (B/K)^.15 from the logged numbers; Red if it acts on the step that it was measured in."""
    t = trainer(tmp_path, trust_form="lagged", objective="pgpo", guard="halve_step")
    watch = Watch(t)
    logs = train(t)
    factor = 1.0
    for k, log in enumerate(logs):
        assert log["trust_rho"] == pytest.approx(factor)
        assert log["effective_lr"] == pytest.approx(log["learning_rate"] * log["rho"] * factor)
        batch, rows = watch.rows[k]
        before, after = (policy(t, values, batch, rows) for values in (watch.old[k], watch.new[k]))
        assert log["trust_moved"] == pytest.approx(dense_kl(before, after), rel=1e-3)
        assert bitwise_equal(watch.new[k], watch.kept[k])
        factor = min(max(factor * (log["trust_budget"] / log["trust_moved"]) ** 0.15, 0.02), 10)
    assert factor < 0.9 and t.step_factor == pytest.approx(factor)
    assert t.trust.form.teacher_rate(0.05) == 0.05


def test_a_lagged_rate_rises_where_steps_are_short(tmp_path):
    logs = train(trainer(tmp_path, trust_form="lagged", learning_rate=1e-5, max_steps=3))
    assert 1.0 == logs[0]["trust_rho"] < logs[1]["trust_rho"] < logs[2]["trust_rho"]
    assert logs[2]["effective_lr"] == pytest.approx(1e-5 * logs[2]["trust_rho"])


def test_a_lagged_rate_waits_for_the_end_of_the_warm_up(tmp_path):
    """Steps of a rate that still rises are short whatever it rises to. Red if they raise the factor above 1."""
    options = dict(trust_form="lagged", learning_rate=1e-5, lr_scheduler_type="constant_with_warmup", warmup_steps=3)
    logs = train(trainer(tmp_path, max_steps=5, **options))
    assert [log["trust_rho"] for log in logs[:3]] == [1.0] * 3
    assert 1.0 < logs[3]["trust_rho"] < logs[4]["trust_rho"]  # the step at the full rate has been measured


@pytest.mark.parametrize("form", ["undo", "lagged"])
def test_lambda_waits_for_the_end_of_the_warm_up(form, tmp_path):
    """B / (4 D) = lambda^2: .25 until the rate is there. Red if short steps use it up."""
    options = dict(trust_form=form, trust_budget="divergence", trust_agreement=False, learning_rate=1e-6, max_steps=6)
    options |= dict(lr_scheduler_type="constant_with_warmup", warmup_steps=4)
    t = trainer(tmp_path, **options)
    lambdas, plain = [], t.trust.form.settle

    def settle(step, slope):
        values = plain(step, slope)
        lambdas.append(t.trust.form.correction.share)
        return values

    t.trust.form.settle = settle
    train(t)
    assert lambdas == pytest.approx([0.5] * 4 + [0.5 / 2**0.5, 0.5 / 3**0.5])


def test_the_learning_rate_may_be_left_to_trust(tmp_path):
    """From 1e-7 to a rate whose steps spend the budget, within 30 steps; the same from the command line."""
    t = trainer(tmp_path, learning_rate="auto", max_steps=30, trust_agreement=False, lr_scheduler_type="constant")
    assert (t.args.trust, t.args.trust_form, t.args.learning_rate, t.args.warmup_steps) == ("measured", "auto", 1e-7, 0)
    logs = train(t)
    assert logs[0]["effective_lr"] == 1e-7 and logs[-1]["effective_lr"] > 1e-4
    late = [math.log(log["trust_moved"] / log["trust_budget"]) for log in logs[-8:]]
    assert abs(sum(late) / len(late)) < math.log(4)
    parsed = parse(["--learning_rate", "auto"])
    assert parsed.config.trust_form == "auto" and parsed.given["learning_rate"] == "auto"
    assert parse([], stored=parsed.given).config.trust_form == "auto"
    assert parse(["--learning_rate", "2e-3"]).config.learning_rate == 2e-3
    with pytest.raises(UserError, match="learning_rate"):
        parse(["--learning_rate", "fast"])


def test_the_rate_of_robot_learning_moves_in_factors_of_one_and_a_half(tmp_path):
    options = dict(trust_form="kl_adaptive", trust_budget="fixed", trust_nats=1e-3)
    logs = train(trainer(tmp_path, max_steps=5, **options))
    factor = 1.0
    for log in logs:
        assert log["trust_budget"] == 1e-3 and "agreement" not in log
        assert log["trust_rho"] == pytest.approx(factor)
        factor *= 1 / 1.5 if log["trust_moved"] > 2e-3 else 1.5 if log["trust_moved"] < 0.5e-3 else 1.0
    assert factor < 0.3


def test_a_fixed_budget_is_kept_whatever_the_teacher_says(tmp_path):
    logs = train(trainer(tmp_path, trust_budget="fixed", trust_nats=1e-3))
    assert all(1e-4 < log["trust_moved"] <= 1.5e-3 and log["trust_budget"] == 1e-3 for log in logs)


def test_without_agreement_and_clock(tmp_path):
    """Red if the budget is still shortened by the cosine, or the teacher by rho."""
    t = trainer(tmp_path, trust_agreement=False, trust_clock=False, trust_budget="divergence", max_steps=8)
    rates = []
    plain = t.teacher.update
    t.teacher.update = lambda rate: rates.append(rate) or plain(rate=rate)
    logs = train(t)
    total = weight = 0.0
    for k, log in enumerate(logs):
        total, weight = 0.9 * total + 0.1 * log["divergence"], 0.9 * weight + 0.1
        assert log["trust_budget"] == pytest.approx(max(0.1, 0.5 / math.sqrt(1 + k)) ** 2 * 4 * total / weight)
    assert rates == [t.args.teacher_rate] * 8
    assert min(log["trust_rho"] for log in logs) < 0.9


# The adaptive clip, which needs no trust ------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0.0, 1e-3, 1e9], ids=["alone", "below max_grad_norm's", "above it"])
def test_the_gradient_is_clipped_at_a_multiple_of_its_mean_norm(most, tmp_path):
    """The norms that the optimizer sees, against AdaptiveClip by hand. Red if max_grad_norm is applied twice, never, or
    to what the other has left."""
    t = trainer_kit.trainer(tmp_path, objective="sdpo", adaptive_clip=1.5, max_grad_norm=most, max_steps=6)
    mean = t.clip.mean = 0.01  # as after quieter batches
    seen = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            seen.append(math.hypot(*(float(p.grad.norm()) for p in t.model.parameters() if p.grad is not None)))

    t.add_callback(Norm())
    logs = train(t)
    for log, norm in zip(logs, seen, strict=True):
        limit = 1.5 * mean
        mean = 0.95 * mean + 0.05 * min(log["grad_norm"], limit)
        assert norm == pytest.approx(min(log["grad_norm"], limit, most or math.inf), rel=1e-3)
    if most != 1e-3:
        assert any(norm < 0.99 * log["grad_norm"] for log, norm in zip(logs, seen, strict=True)), "nothing to clip"


# Trust is off ---------------------------------------------------------------------------------------------------------


def test_with_trust_off_some_steps_are_measured_and_none_is_touched(tmp_path):
    """K and K / D of every 2nd step, dense. Red if a step or its rate is changed, or all are measured."""
    plain = trainer_kit.trainer(tmp_path / "0", objective="pgpo", max_steps=5, diagnostics_step_interval=0)
    train(plain)
    t = trainer_kit.trainer(tmp_path / "2", objective="pgpo", max_steps=5, diagnostics_step_interval=2)
    watch = Watch(t)
    logs = train(t)
    assert bitwise_equal(weights(t.model), weights(plain.model))
    assert bitwise_equal(weights(t.teacher.module), weights(plain.teacher.module))
    assert ["trust_moved" in log for log in logs] == [True, False, True, False, True]
    assert not (LOGGED - {"trust_moved"}) & logs[0].keys()
    for k in (0, 2, 4):
        batch, rows = watch.rows[k // 2]
        before, after = (policy(t, values, batch, rows) for values in (watch.old[k], watch.kept[k]))
        assert logs[k]["trust_moved"] == pytest.approx(dense_kl(before, after), rel=1e-3, abs=1e-7)
        assert logs[k]["trust_ratio"] == pytest.approx(logs[k]["trust_moved"] / logs[k]["divergence"])


@pytest.mark.parametrize(("rate", "warns"), [(0.1, True), (1e-5, False)])
def test_a_warning_where_steps_go_further_than_the_teacher_asks(rate, warns, tmp_path):
    """After three such measurements in a row; once, for the warning's own interval is not reached."""
    said = []
    host = Host(say=said.append)
    t = trainer_kit.trainer(
        tmp_path, objective="sdpo", max_steps=8, diagnostics_step_interval=1, learning_rate=rate, host=host
    )
    logs = train(t)
    told = [text for text in said if "times as far as the teacher asks" in text]
    assert len(told) == warns
    if warns:
        a, b, c = (math.log(log["trust_ratio"]) for log in logs[:3])
        mean = math.exp((0.64 * a + 0.8 * b + c) / 2.44)
        assert told[0].startswith(f"at step 3, for 3 measured steps in a row: steps move the policy {mean:.1f} times")


# Which rows -----------------------------------------------------------------------------------------------------------


def test_one_completion_of_each_question_by_seed_and_step():
    """Red if a question is probed twice or never, if the order of the ranks tells, or if every step takes the same."""
    candidates = [Candidate(row, row // 4, 1 + row % 3) for row in range(12) if row != 5]
    found = chosen(candidates, seed=3, step=7, most=100)
    assert sorted(row // 4 for row in found) == [0, 1, 2]
    assert all(tokens == 1 + row % 3 for row, tokens in found.items())
    shuffled = random.Random(0).sample(candidates, len(candidates))
    assert chosen(shuffled, seed=3, step=7, most=100) == found
    assert len({tuple(sorted(chosen(candidates, 3, step, 100))) for step in range(20)}) > 10
    assert chosen(candidates, 4, 7, 100) != found or chosen(candidates, 5, 7, 100) != found
    often = Counter(row for step in range(600) for row in chosen(candidates, 0, step, 100))
    assert often.keys() == {c.row for c in candidates}
    assert all(110 < often[row] < 190 for row in (0, 1, 2, 3))


@pytest.mark.parametrize("most", [1, 7, 19, 10**6])
def test_no_more_tokens_than_asked_for(most):
    candidates = [Candidate(row, row // 2, 5) for row in range(8)]
    found = chosen(candidates, 0, 0, most)
    assert sum(found.values()) == min(most, 20)
    assert sum(tokens < 5 for tokens in found.values()) <= 1  # the last one is cut


def test_a_cut_completion_is_measured_to_there(tmp_path):
    """Red if the cut row's other tokens count, or if an environment's tokens are taken for the model's."""
    for rollout in (trainer_kit.fake_rollout, trainer_kit.environment_rollout):
        t = trainer(tmp_path, trust_tokens=5, max_steps=2, rollout=rollout)
        watch = Watch(t)
        logs = train(t)
        for k, log in enumerate(logs):
            batch, rows = watch.rows[k]
            assert sum(rows.values()) == 5
            pairs = [
                [policy(t, values, batch, [i])[:tokens] for values in (watch.old[k], watch.kept[k])]
                for i, tokens in rows.items()
            ]
            before, after = (torch.cat(parts) for parts in zip(*pairs))
            assert log["trust_moved"] == pytest.approx(dense_kl(before, after), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "runs"), [({}, 0), (dict(dropout=0.1), 1), (dict(dtype="bf16"), 1), (dict(hinted=False), 1)]
)
def test_the_loss_shows_the_policy_before_the_step(options, runs, tmp_path, monkeypatch):
    """Own forwards before the step: none where the loss has had one of every row; its rows, its tokens. Red if rows
    that have no teacher are forgotten, or if what dropout or bf16 changes is taken for motion."""
    model = build_model()
    model.config.attention_dropout = options.get("dropout", 0.0)
    t = trainer(
        tmp_path,
        model=model,
        reward=parity_reward
        if options.get("hinted") is False
        else lambda prompts, completions, **_: [1.0] * len(prompts),
        bf16=options.get("dtype") == "bf16",
        max_steps=1,
        trust_form="lagged",
    )
    counts = []
    plain, begin = Probe._run, Probe.begin
    monkeypatch.setattr(Probe, "_run", lambda *a: counts.append(1) or plain(*a))
    before = []
    monkeypatch.setattr(Probe, "begin", lambda probe: (begin(probe), before.append(len(counts))))
    watch = Watch(t)
    (log,) = train(t)
    assert before == [runs] and len(counts) == runs + 1
    if not options:
        batch, rows = watch.rows[0]
        first, last = (policy(t, values, batch, rows) for values in (watch.old[0], watch.new[0]))
        assert log["trust_moved"] == pytest.approx(dense_kl(first, last), rel=1e-3)


def test_no_random_number_is_drawn_for_it(tmp_path):
    """A budget without bound leaves every step as it is, and then all else is as without trust."""
    runs = []
    for options in (dict(trust="off"), dict(trust_fraction=2.0, trust_tolerance=1e9)):
        t = trainer(tmp_path, learning_rate=1e-3, rollout=None, max_completion_length=6, **options)
        logs = train(t)
        runs.append((weights(t.model), [log["reward"] for log in logs], torch.rand(1), random.random()))
        assert {log.get("trust_rho", 1.0) for log in logs} == {1.0}
        torch.manual_seed(0), random.seed(0)
    assert bitwise_equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


@pytest.mark.parametrize("form", ["undo", "lagged"])
def test_micro_batches_change_nothing(form, tmp_path):
    logs, ends = [], []
    for options in (dict(), dict(micro_batch_size=1), dict(max_tokens_per_microbatch=40)):
        t = trainer(tmp_path, trust_form=form, optim="sgd", learning_rate=2.0, **options)
        logs.append(train(t))
        ends.append(weights(t.model))
    for other, end in zip(logs[1:], ends[1:]):
        assert largest_difference(ends[0], end) < 1e-5
        for a, b in zip(logs[0], other, strict=True):
            for name in LOGGED:
                assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_a_large_vocabulary_is_measured_on_its_likely_tokens(tmp_path, monkeypatch):
    """Chunks and the most likely tokens by hand. Red if the tokens kept are those likely AFTER the step."""
    monkeypatch.setattr("pgpo.train.probe.KEPT_TOKENS", 8)
    monkeypatch.setattr("pgpo.train.probe._CHUNK_LOGITS", 200)
    t = trainer(tmp_path, max_steps=2)
    watch = Watch(t)
    logs = train(t)
    for k, log in enumerate(logs):
        batch, rows = watch.rows[k]
        before, after = (policy(t, values, batch, rows) for values in (watch.old[k], watch.kept[k]))
        top = before.topk(8, -1).indices
        p, q = (torch.gather(x.exp().double(), -1, top) for x in (before, after))
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        assert log["trust_moved"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
        assert log["trust_moved"] < dense_kl(before, after)
    assert KEPT_TOKENS >= 100


# Steps that are none --------------------------------------------------------------------------------------------------


def test_without_a_teacher_nothing_moves_and_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(Probe, "_run", lambda *args: pytest.fail("a probe"))
    t = trainer(tmp_path, reward=never)
    start, state = weights(t.model), copy.deepcopy(t.trust.form.state_dict())
    logs = train(t)
    assert bitwise_equal(start, weights(t.model)) and bitwise_equal(start, weights(t.teacher.module))
    assert not (LOGGED | {"trust_ratio"}) & logs[0].keys() and t.trust.form.state_dict() == state


@pytest.mark.parametrize("form", ["undo", "lagged"])
def test_a_policy_loss_trains_alone_until_the_first_teacher(form, tmp_path):
    """distillation_weight < 1: rewards that differ but never reach the threshold. Red if nothing moves, and so no
    completion ever gets right, or if the rate falls."""

    def graded(prompts, completions, **kwargs):
        return [r / 2 for r in parity_reward(prompts, completions)]

    t = trainer(tmp_path, reward=graded, distillation_weight=0.5, max_steps=2, trust_form=form)
    start = weights(t.model)
    logs = train(t)
    assert all(log["grad_norm"] > 0 and "trust_rho" not in log for log in logs)
    assert largest_difference(start, weights(t.model)) > 0.01 and t.step_factor == 1.0


def test_what_scales_a_step_scales_its_budget(tmp_path):
    """rho of Eq. 9 by rho_file. Red if trust brings every step back to the same length whatever rho says."""
    found = {}
    for rho in (0.5, 2.0):
        file = tmp_path / f"{rho}.json"
        file.write_text(json.dumps([rho] * 2))
        found[rho] = train(trainer(tmp_path / str(rho), objective="pgpo", rho_file=str(file), max_steps=2))
    first = {rho: logs[0]["trust_budget"] for rho, logs in found.items()}
    assert first[2.0] == pytest.approx(16 * first[0.5])
    assert found[2.0][0]["trust_moved"] > 4 * found[0.5][0]["trust_moved"]


def test_a_guard_that_halves_steps_halves_what_trust_keeps(tmp_path):
    """Red if trust brings the halved step back to its full length, and the guard has no effect."""
    found = {}
    for factor in (1.0, 0.5):
        t = trainer(tmp_path / str(factor), guard="halve_step", max_steps=1)
        t.guard.step_factor = factor
        (found[factor],) = train(t)
    assert found[0.5]["trust_budget"] == pytest.approx(found[1.0]["trust_budget"] / 4)
    assert found[0.5]["trust_moved"] < 0.5 * found[1.0]["trust_moved"]


def test_noise_in_the_loss_is_no_motion(tmp_path):
    """NEFTune shakes the embeddings of the loss's forward. At a rate of 0 nothing has moved."""
    logs = train(trainer(tmp_path, learning_rate=0.0, neftune_noise_alpha=5.0, max_steps=2))
    assert all(log["trust_moved"] < 1e-6 and log["trust_rho"] == 1.0 for log in logs)


def test_no_step_of_the_warm_up_is_measured_with_trust_off(tmp_path):
    options = dict(lr_scheduler_type="constant_with_warmup", warmup_steps=4, diagnostics_step_interval=1)
    logs = train(trainer_kit.trainer(tmp_path, objective="sdpo", max_steps=6, **options))
    assert ["trust_moved" in log for log in logs] == [False] * 3 + [True] * 3


def test_a_step_that_is_left_out_is_not_measured(tmp_path):
    """The gradient of step 2 is not finite. Red if trust learns of it, or settles the step after it twice."""
    t = trainer(tmp_path, on_nonfinite="skip", max_steps=3)
    plain, states = t.engine.backward, []
    t.engine.backward = lambda model, loss, last: plain(
        model, loss * (float("nan") if t.state.global_step == 1 else 1.0), last
    )

    class Note(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            states.append((copy.deepcopy(t.trust.form.state_dict()), weights(t.model)))

    t.add_callback(Note())
    logs = train(t)
    assert [log.keys() >= LOGGED for log in logs] == [True, False, True]
    assert states[0][0] == states[1][0] and bitwise_equal(states[0][1], states[1][1])
    assert states[2][0]["law"]["correction"]["steps"] == 2


def test_a_step_into_nothing_finite_is_undone(tmp_path):
    """Red if inf - inf reaches the weights, or if a K that is nan ends the run."""
    t = trainer(tmp_path, learning_rate=1e37, max_steps=1)
    start = weights(t.model)
    (log,) = train(t)
    assert log["trust_rho"] == log["trust_moved"] == 0 and log["probes"] == 6
    assert bitwise_equal(start, weights(t.model))


def test_a_step_that_moves_nothing_is_kept(tmp_path):
    logs = train(trainer(tmp_path, learning_rate=0.0, max_steps=2))
    assert [log["trust_rho"] for log in logs] == [1.0] * 2
    assert all(log["trust_moved"] < 1e-6 for log in logs)  # what the layouts of loss and probe round apart


def test_prompts_and_completions_of_one_token(tmp_path):
    def short(prompts, trainer):
        words = [[8 + (i + trainer.state.global_step) % 5] for i in range(len(prompts))]
        return {"prompt_ids": [[7] for _ in prompts], "completion_ids": words, "logprobs": [[0.0]] * len(prompts)}

    def some(prompts, completions, **kwargs):
        return [float(i % 4 > 0) for i in range(len(prompts))]

    for options in ({}, dict(packing=True) if torch.cuda.is_available() else dict(micro_batch_size=1)):
        logs = train(trainer(tmp_path, rollout=short, reward=some, max_steps=2, **options))
        assert all(0 < log["trust_moved"] <= 1.5 * log["trust_budget"] for log in logs)


# Resume, off, refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["undo", "lagged", "auto", "kl_adaptive"])
def test_a_resumed_run_goes_on_bit_for_bit(form, tmp_path):
    """From between two meetings of the teacher. Red if anything that trust remembers is lost."""
    options = dict(trust_form=form, objective="pgpo", max_steps=9, teacher_sync_steps=2, adaptive_clip=1.0)
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=7, **options)
    logs = train(whole)
    saved = json.loads((tmp_path / "whole/checkpoint-7/pgpo_state.json").read_text())
    assert saved["trust"]["form"] == form and saved["clip"]["mean"] > 0
    again = trainer(tmp_path / "again", **options)
    rest = train(again, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-7"))[-2:]
    assert bitwise_equal(weights(whole.model), weights(again.model))
    assert bitwise_equal(weights(whole.teacher.module), weights(again.teacher.module))
    for a, b in zip(logs[-2:], rest, strict=True):
        assert {n: a[n] for n in LOGGED} == {n: b[n] for n in LOGGED}
    other = trainer(tmp_path / "other", **options | dict(trust_form="lagged" if form == "undo" else "undo"))
    with pytest.raises(UserError, match="saved trust_form"):
        train(other, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-7"))


def test_off_knows_nothing_of_it(tmp_path):
    t = trainer_kit.trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, diagnostics_step_interval=0)
    (log,) = train(t)
    assert t.trust is None and t.args.trust == "off"
    assert not (LOGGED | {"trust_ratio"}) & log.keys()
    assert "trust" not in json.loads((tmp_path / "checkpoint-1/pgpo_state.json").read_text())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(trust="of"), "trust is 'of'; choose one of off, measured"),
        (dict(trust="measured", trust_form="redo"), "choose one of undo, lagged"),
        (dict(trust="measured", trust_budget="nats"), "choose one of auto, information, divergence"),
        (dict(trust="measured", trust_fraction=0.0), "trust_fraction is 0.0"),
        (dict(trust="measured", trust_fraction=2.1), "trust_fraction is 2.1"),
        (dict(trust="measured", trust_tokens=0), "trust_tokens is 0"),
        (dict(trust="measured", trust_tolerance=1.0), "trust_tolerance is 1.0"),
        (dict(trust_budget="divergence"), "trust_budget is 'divergence', but trust is 'off'"),
        (dict(trust_fraction=0.2), "trust_fraction is 0.2, but trust is 'off'"),
        (dict(trust_form="lagged"), "trust_form is 'lagged', but trust is 'off'"),
        (dict(trust_tokens=9), "trust_tokens is 9, but trust is 'off'"),
        (dict(trust_tolerance=2.0), "trust_tolerance is 2.0, but trust is 'off'"),
        (dict(trust="measured", objective="grpo"), "objective='grpo' has no teacher"),
        (dict(trust="measured", divergence="sampled_token"), "divergence='sampled_token' does not give"),
        (dict(trust="measured", objective="sdpo", optim="schedule_free_adamw"), "keeps weights of its own"),
        (dict(trust="measured", trust_form="lagged", trust_tolerance=2.0), "leaves every step as it is"),
        (dict(trust="measured", trust_form="kl_adaptive", trust_clock=False), "trust_clock is False, but trust_form="),
        (dict(trust_agreement=False), "trust_agreement is False, but trust is 'off'"),
        (dict(trust_nats=0.01), "trust_nats is 0.01, but trust is 'off'"),
        (dict(trust="measured", trust_nats=0.01), "trust_nats is 0.01 and trust_budget is 'auto'; give both"),
        (dict(trust="measured", trust_budget="fixed"), "trust_nats is None and trust_budget is 'fixed'; give both"),
        (dict(trust="measured", trust_budget="fixed", trust_nats=0.0), "trust_nats is 0.0; it must be"),
        (
            dict(trust="measured", trust_budget="fixed", trust_nats=0.1, trust_agreement=False),
            "trust_agreement is False, but trust_budget='fixed' looks at no batch",
        ),
        (dict(trust="measured", teacher="frozen", trust_clock=False), "teacher='frozen' averages nothing"),
        (dict(learning_rate="auto", trust_form="lagged"), "learning_rate is 'auto', which is trust_form='auto'"),
        (dict(learning_rate="auto", lr_scheduler_type="linear"), "a rate that is found has no schedule"),
        (dict(learning_rate="auto", warmup_steps=3), "a rate that is found has no schedule"),
        (dict(learning_rate="auto", objective="grpo"), "objective='grpo' has no teacher"),
        (dict(learning_rate="fast"), "learning_rate is 'fast'; it must be a number"),
        (dict(trust="measured", diagnostics_step_interval=5), "trust='measured' measures every step"),
        (dict(diagnostics_step_interval=-1), "diagnostics_step_interval is -1"),
        (dict(diagnostics_step_interval=5, objective="grpo"), "diagnostics_step_interval is 5, but steps are measured"),
        (dict(diagnostics_step_interval=5, divergence="sampled_token"), "diagnostics_step_interval is 5, but steps"),
        (dict(adaptive_clip=0.9), "adaptive_clip is 0.9; a limit below the mean norm"),
        (dict(adaptive_clip=2.0, fp16=True, bf16=False), "adaptive_clip is 2.0, but fp16"),
    ],
)
def test_refused_before_a_model_is_loaded(options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        trainer_kit.config(tmp_path, **options)


def test_a_fraction_over_one_half_is_that_of_the_first_step_too(tmp_path):
    t = trainer(tmp_path, trust_fraction=1.5)
    assert t.trust.form.correction.share == 1.5


def test_bf16_weights_cannot_keep_a_part_of_a_step(tmp_path):
    model = build_model(dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"bf16 rounds away, and the weight .* is bf16; load the model with"):
        trainer(tmp_path, model=model)
    logs = train(trainer(tmp_path, model=model, trust_form="lagged", max_steps=2))
    assert all(log["trust_moved"] > 0 for log in logs)


def test_matmuls_in_bf16(tmp_path):
    """The head runs in fp32, where its weight is; what is left is the rounding of the layers."""
    t = trainer(tmp_path, bf16=True, max_steps=3)
    watch = Watch(t)
    for k, log in enumerate(train(t)):
        before, after = (policy(t, v, *watch.rows[k]) for v in (watch.old[k], watch.kept[k]))
        assert log["trust_moved"] == pytest.approx(dense_kl(before, after), rel=0.2)


def test_an_optimizer_with_weights_of_its_own_is_refused(tmp_path):
    model = build_model()
    t = trainer_kit.trainer(tmp_path, model=model, trust="measured", objective="sdpo")
    t.optimizer = torch.optim.ASGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="ASGD cannot be modulated"):
        train(t)
