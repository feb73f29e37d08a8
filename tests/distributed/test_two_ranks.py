"""Two processes give what one gives, whatever each of them holds, and none waits for the other forever.

Under DDP each holds everything; under FSDP2 half of the student and half of the teacher; under DeepSpeed's ZeRO-2 half
of gradient and optimizer, under ZeRO-3 of the student too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from processes import torchrun
from trainer_kit import bitwise_equal, largest_difference
from two_ranks import CASES, REFUSED

from pgpo.memory.moments import MAX_LIVE, SUB_GROUP, Step
from pgpo.memory.parameters import REDUCE_BUCKET, gradients, static, trained_parameters
from pgpo.memory.shapes import TrainingSetting, read_model

DEEPSPEED = Path(sys.prefix, "deepspeed")  # `make test` puts it there, apart from what all other tests see
SCRIPT = Path(__file__).with_name("two_ranks.py")
KINDS = ("ddp", "fsdp2", "zero2", "zero3")
NOT_COMPARED = ("seconds", "step_time", "epoch", "num_tokens")


def launch(out: Path, ranks: int, *arguments: str) -> list[dict]:
    more = {}
    if {"zero2", "zero3"} & set(arguments):
        places = [str(DEEPSPEED), *filter(None, [os.environ.get("PYTHONPATH")])]
        more = {"PYTHONPATH": os.pathsep.join(places), "DS_ACCELERATOR": "cpu"}
    torchrun(SCRIPT, out, *arguments, ranks=ranks, quiet=100, **more)
    return [torch.load(f"{out}.{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder):
    return launch(folder / "one", 1)[0]


@pytest.fixture(scope="module")
def ddp(folder):
    return launch(folder / "ddp", 2)


@pytest.fixture(scope="module")
def fsdp2(folder):
    return launch(folder / "fsdp2", 2, "fsdp2")


def with_deepspeed(folder, kind):
    if not (DEEPSPEED / "deepspeed").is_dir() and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    return launch(folder / kind, 2, kind)


@pytest.fixture(scope="module")
def zero2(folder):
    return with_deepspeed(folder, "zero2")


@pytest.fixture(scope="module")
def zero3(folder):
    return with_deepspeed(folder, "zero3")


@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind in KINDS for case in CASES if case not in REFUSED.get(kind, ())],
)
def test_two_ranks_equal_one(kind, case, one, request):
    a, (b, c) = one[case], [results[case] for results in request.getfixturevalue(kind)]
    assert [b["ranks"], c["ranks"]] == [2, 2]
    assert largest_difference(b["weights"], c["weights"]) == 0
    assert largest_difference(a["weights"], b["weights"]) < 1e-5
    if a["teacher"]:
        assert largest_difference(a["teacher"], b["teacher"]) < 1e-5
    assert [len(x["records"]) for x in (a, b, c)] == [20, 20, 20]  # 5 questions x 4, gathered
    assert len(a["logs"]) == len(b["logs"]) == CASES[case].get("max_steps", 3)
    for x, y in zip(a["logs"], b["logs"], strict=True):
        for name in x:
            if not name.endswith(NOT_COMPARED):
                assert x[name] == pytest.approx(y[name], abs=1e-5, rel=1e-4), (case, name)


def test_the_cases_are_what_they_claim(one, ddp):
    first, second = ddp
    empty = first["one_rank_without_teacher"]["active_rows"]
    assert empty == [0, 0, 0] and min(second["one_rank_without_teacher"]["active_rows"]) > 0
    assert first["nobody"]["active_rows"] == second["nobody"]["active_rows"] == [0, 0, 0]
    assert min(first["split_groups"]["active_rows"]) > 0
    for case in ("plain", "split_groups", "one_rank_without_teacher", "micro_batches"):
        assert one[case]["logs"][0]["rho"] > 1.001
    assert one["untied"]["logs"][0]["grad_norm"] > 0.1  # it is clipped
    for case in ("trust", "trust_one_rank", "trust_lora"):
        assert min(log["trust_rho"] for log in one[case]["logs"]) < 0.9, case  # a step is shortened
    assert one["trust_lagged"]["logs"][2]["trust_rho"] != 1
    assert "lm_head.weight" in one["untied"]["weights"] and "lm_head.weight" not in one["plain"]["weights"]


@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind in KINDS for case in ("untied", "seen_ids", "sampled") if case not in REFUSED.get(kind, ())],
)
def test_ranks_evaluate_as_one(kind, case, one, request):
    """Greedy: the same completions and rewards in the same order, though of 5 questions one rank has 3, the other 2.

    Red if a rank that repeats a question counts it, or if rewards come from other ids than those sampled.
    """
    for results in request.getfixturevalue(kind):
        assert results[case]["records"] == one[case]["records"]
        assert results[case]["evaluation"] == pytest.approx(one[case]["evaluation"])
    assert 0 < one["seen_ids"]["evaluation"]["reward"] - 0.25 < 1


# FSDP2 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(CASES.keys() - REFUSED["fsdp2"]))
def test_each_rank_holds_half_of_student_and_teacher(case, one, fsdp2):
    assert one[case]["held"] == [1.0] * len(one[case]["held"])
    assert len(one[case]["held"]) == (1 if case in ("grpo", "grpo_terms", "live", "lora", "trust_lora") else 2)
    for held in zip(*(results[case]["held"] for results in fsdp2), strict=True):
        assert sum(held) == pytest.approx(1) and max(held) < 0.51


def test_no_gradient_waits_whole_for_the_last_micro_batch(ddp, fsdp2):
    assert ddp[0]["micro_batches"]["deferred"] > 0
    assert fsdp2[0]["micro_batches"]["deferred"] == 0


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_resumed_run_equals_one_that_was_never_stopped(kind, fsdp2):
    for results in fsdp2:
        first, second = results[kind]["first"], results[kind]["second"]
        for part in ("weights", "teacher"):
            assert bitwise_equal(first[part], second[part])
        assert largest_difference(first["weights"], first["teacher"]) > 1e-3


def test_a_full_checkpoint_is_a_plain_model(fsdp2):
    full = fsdp2[0]["full"]
    assert bitwise_equal({n: full["saved"][n] for n in full["first"]["weights"]}, full["first"]["weights"])
    assert fsdp2[0]["sharded"]["saved"] == {}


def test_in_half_precision_student_and_teacher_compute_alike(fsdp2):
    """The same prompt, the same weights: not one bit of information. What the loss returns is not rounded to bf16."""
    for results in fsdp2:
        got = results["half_precision"]
        assert got["first_step"]["information"] == 0.0 and abs(got["first_step"]["divergence"]) < 1e-8
        assert got["autocasts"] == [False] * 6  # three steps of teacher and student
        assert set(got["dtypes"]) == {torch.float32}
        assert max(got["held"]) < 0.51  # bf16 weights and fp32 average


def test_weights_that_rank_0_alone_has_read_reach_student_and_teacher(one, fsdp2):
    for results in fsdp2:
        for part in ("weights", "teacher"):
            assert largest_difference(results["loaded_by_rank_0"][part], one["plain"][part]) < 1e-5


def test_weights_that_stay_whole_until_the_backward_change_nothing(one, fsdp2):
    """As in ZeRO-2; the teacher reads its new average, not what was gathered before."""
    for results in fsdp2:
        for part in ("weights", "teacher"):
            assert largest_difference(results["kept_whole"][part], one["plain"][part]) < 1e-5
        assert max(results["kept_whole"]["held"]) <= 1.0


def test_what_cannot_be_sharded_is_refused(fsdp2):
    refusals = fsdp2[0]["refusals"]
    assert "set fsdp_offload_params: false" in refusals["offload"]
    assert "set eval_on_start" in refusals["evaluation"]


# DeepSpeed's ZeRO -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["zero2", "zero3"])
def zero(request):
    """The kind, and what its two ranks saw."""
    return request.param, request.getfixturevalue(request.param)


def test_zero3_holds_half_of_the_student_and_the_whole_teacher(zero3):
    for results in zero3:
        assert results["plain"]["held"] == results["untied"]["held"] == [0.5, 1.0]


@pytest.mark.parametrize("run", ["resumed", "resumed_lora", "resumed_half"])
def test_zero_resumes_as_if_never_stopped(run, zero):
    """Also the fp32 weights and Adam's moments, of which each rank holds its own half."""
    kind, ranks = zero
    if run == "resumed_lora" and kind == "zero3":
        assert "use stage 2 or FSDP2" in ranks[0]["refusals"]["lora"]
        return
    for results in ranks:
        first, second = results[run]["first"], results[run]["second"]
        for part in ("weights", "teacher", "parts", "moments"):
            assert first[part] and bitwise_equal(first[part], second[part])
    a, b = (results["resumed"]["first"] for results in ranks)
    held = sum(t.numel() for t in a["parts"].values()) / sum(t.numel() for t in a["weights"].values())
    assert held == pytest.approx(0.5, abs=0.01)
    assert largest_difference(a["parts"], b["parts"]) > 1e-3
    assert largest_difference(a["weights"], a["teacher"]) > 1e-3
    saved = ranks[0]["resumed"]["saved"]
    assert bitwise_equal({n: saved[n] for n in a["weights"]}, a["weights"])


def test_zero_checkpoints_run_no_foreign_code(zero):
    for results in zero[1]:
        found = results["foreign_code"]
        assert "names io.open" in found["foreign"] and not found["ran"]
        assert "written by 1 ranks, this run has 2" in found["missing"]


def test_zero_leaves_out_a_step_that_is_not_finite(zero):
    for results in zero[1]:
        got = results["skipped"]
        assert got["skipped"] == [0.0, 1.0, 0.0, 0.0]
        first, second, third, fourth = got["after"]
        for part in ("weights", "teacher", "parts", "moments"):
            assert bitwise_equal(first[part], second[part]) and bitwise_equal(second[part], third[part])
        for part in ("weights", "teacher"):
            assert 1e-5 < largest_difference(third[part], fourth[part]) < 0.1  # finite, and it goes on
        # The schedule stands still for the step that was left out, not for the one without any teacher.
        assert got["rates"] == pytest.approx([0.01, 0.0075, 0.0075, 0.005])
        assert "make a new trainer" in got["again"]


def test_zero_in_half_precision_adds_up_in_fp32(zero):
    for results in zero[1]:
        got = results["half_precision"]
        assert got["equal_at_first"] and got["dtypes"] == {torch.bfloat16} and got["buffers"] == {torch.float32}
        assert got["sums"] == got["between_ranks"] == torch.float32 and got["average"] == {torch.float32}
        assert got["logs"][0]["rho"] > 1.001 and got["logs"][0]["grad_norm"] > 0


@pytest.mark.parametrize("run", ["float32", "bfloat16", "lora"])
def test_zero_holds_what_the_plan_says(run, zero, tmp_path):
    """Parameters, fp32 weights, moments, gradients, teacher and buckets of each rank, to the byte."""
    stage = int(zero[0][-1])
    lora = dict(lora=4, lora_targets=("q_proj", "down_proj")) if run == "lora" else {}
    if stage == 3 and lora:
        pytest.skip("ZeRO-3 refuses it: test_zero_says_what_it_cannot_do")
    build_model().config.save_pretrained(tmp_path)
    model = read_model(str(tmp_path))
    setting = TrainingSetting(gpus=2, zero=stage, autocast=run != "float32", device="cpu", **lora)
    for results in zero[1]:
        got = dict(results["memory"][run])
        assert got.pop("constants") == (REDUCE_BUCKET, SUB_GROUP, MAX_LIVE)
        step = Step(model, dataclasses.replace(setting, max_completion_length=8, max_prompt_length=8), 1)
        if stage == 2:  # beside it, slices of what it holds
            slices = trained_parameters(model, setting) * (6 if setting.autocast else 4)
            assert got.pop("bucket of a backward") + slices == step.moments()["backward"]["reduce bucket (ZeRO)"]
        expected = static(model, setting) | {"gradients": gradients(model, setting)}
        if stage == 2 and not setting.autocast:  # without an fp32 sum of its own it keeps a cut tensor whole
            assert expected["gradients"] <= got["gradients"] < 1.1 * expected["gradients"]
            expected["gradients"] = got["gradients"]
        assert {name: size for name, size in got.items() if size} == expected


def test_zero_says_what_it_cannot_do(zero):
    refusals = zero[1][0]["refusals"]
    assert "use stage 2 or 3" in refusals["stage 1"]
    assert "offload_optimizer_device: none" in refusals["offload"]
    assert "information_source='cross_fit'" in refusals["cross_fit"]
    assert "guard='rollback'" in refusals["rollback"]
    assert "or use trust_form='lagged'" in refusals["undo"]
    assert "use stage 2 or FSDP2" in refusals["trust_region"]
