"""`pgpo plan`: saved bytes against autograd, peaks against torch's allocator, constants against their sources."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
)

from pgpo.cli import main
from pgpo.core import _head_chunks, _head_kernels
from pgpo.errors import UserError
from pgpo.forward import passes
from pgpo.memory import activations, command, moments, parameters
from pgpo.memory.moments import Step
from pgpo.memory.shapes import (
    BLOCKS,
    GIB,
    MATRICES,
    TRUST_FORMS,
    ModelShape,
    TrainingSetting,
    check,
    fitted,
    read_model,
)
from pgpo.settings.config import PAPER, PGPOConfig
from pgpo.settings.rules import CHOICES
from pgpo.teacher import weights
from pgpo.train import forwards, probe

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ROWS, WIDTH = 2, 20


def config(kind: str = "qwen3", layers: int = 2, **changes):
    shape = dict(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    if kind != "qwen2":
        shape["head_dim"] = 8  # 6 * 8 = 48 queries, unlike the hidden size
    if kind == "mistral":
        shape["sliding_window"] = None
    return CLASSES[kind][0](**(shape | changes))


def read(tmp_path: Path, kind: str = "qwen3", **changes) -> ModelShape:
    config(kind, **changes).save_pretrained(tmp_path)
    return read_model(str(tmp_path))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> dict[str, ModelShape]:
    return {kind: read(tmp_path_factory.mktemp(kind), kind) for kind in CLASSES}


def large() -> ModelShape:
    """Qwen3-8B."""
    matrices = dict(zip(MATRICES, [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 12288)] * 2))
    matrices["up_proj"], matrices["down_proj"] = (4096, 12288), (12288, 4096)
    return ModelShape("8B", 36, 4096, 12288, 32, 8, 128, 151_936, 40_960, False, True, True, 8_190_735_360, matrices)


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_shapes_are_the_models_own(tmp_path, kind, tied):
    shape = read(tmp_path, kind, tie_word_embeddings=tied)
    model = CLASSES[kind][1](config(kind, tie_word_embeddings=tied))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.tied is tied
    assert shape.head == model.get_output_embeddings().weight.numel()
    assert shape.block == sum(
        part.weight.numel() for part in model.base_model.layers[0].modules() if isinstance(part, torch.nn.Linear)
    )
    assert set(shape.matrices) == set(MATRICES)
    assert shape.head_norms == (kind == "qwen3")
    assert not list(tmp_path.glob("*.safetensors"))  # nothing but a config was there


def test_a_model_with_a_window_shares_no_prompts(tmp_path):
    assert read(tmp_path / "a", "mistral").expandable
    assert not read(tmp_path / "b", "mistral", sliding_window=16).expandable


# What autograd saves --------------------------------------------------------------------------------------------------


def saved(model, masked: bool, autocast: bool) -> int:
    """Bytes of the storages that autograd keeps of a forward to the last hidden state, parameters apart."""
    ids = torch.randint(0, 64, (ROWS, WIDTH))
    mask = torch.ones_like(ids)
    if masked:
        mask[0, 0] = 0
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, found = [], {}

    def pack(tensor):
        kept.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False
        )
    return sum(found.values())


def build(kind: str, layers: int, attention: str, dtype: torch.dtype, lora: int | None, targets, dropout: float):
    model = CLASSES[kind][1](config(kind, layers, attn_implementation=attention)).to(dtype)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        peft = get_peft_model(model, LoraConfig(r=lora, target_modules=list(targets), lora_dropout=dropout))
        peft.enable_input_require_grads()
        model = peft.get_base_model()
    return model.train()


PRECISIONS = ("float32", "float32 autocast", "bfloat16", "bfloat16 autocast")


@pytest.mark.parametrize(
    "kind, precision",
    [
        *((kind, p) for kind in ("qwen3", "llama") for p in PRECISIONS),
        ("qwen2", PRECISIONS[1]),
        ("mistral", PRECISIONS[1]),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "masked, lora, targets, dropout",
    [
        (False, None, (), 0.0),
        (True, None, (), 0.0),
        (False, 4, ("q_proj", "v_proj"), 0.0),
        (True, 4, MATRICES, 0.0),
        (False, 4, MATRICES, 0.1),
    ],
)
def test_a_block_saves_what_the_plan_says(shapes, kind, attention, precision, masked, lora, targets, dropout):
    dtype, autocast = getattr(torch, precision.split()[0]), "autocast" in precision
    setting = TrainingSetting(
        lora=lora,
        lora_targets=targets or ("q_proj",),
        lora_dropout=dropout > 0,
        parameter_bytes=dtype.itemsize,
        autocast=autocast,
        attention=attention,
        device="cpu",
    )
    two, three = (saved(build(kind, n, attention, dtype, lora, targets, dropout), masked, autocast) for n in (2, 3))
    shape = shapes[kind]
    casts = 0  # copies of weights, which the plan counts by themselves
    if autocast:
        adapters = parameters.adapter_parameters(dataclasses.replace(shape, layers=1), setting)
        casts = 2 * ((shape.block if dtype == torch.float32 else 0) + adapters)
    assert three - two == ROWS * WIDTH * activations.layer_activations(shape, setting, WIDTH, masked) + casts
    if lora is None:
        last = activations.last_activations(shape, setting) - setting.stream * shape.hidden  # its output is not saved
        assert two - 2 * (three - two) == ROWS * WIDTH * last


# Constants ------------------------------------------------------------------------------------------------------------


def test_copied_constants_are_those_of_the_code():
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert moments.HELD == forwards.HELD
    assert moments.CACHED == passes._CACHED
    assert moments.BUCKET == weights._BUCKET
    assert moments.CHUNK_LOGITS == {**_head_chunks._CHUNK_LOGITS, "cuda": _head_chunks._CHUNK_LOGITS_ELSEWHERE}
    assert moments.COMPILE_FROM == _head_kernels._COMPILE_FROM_VOCABULARY
    assert _head_kernels._EAGER_LOGITS["cpu"] == moments.EAGER_LOGITS
    assert (moments.KEPT, moments.PROBE_LOGITS) == (probe.KEPT_TOKENS, probe._CHUNK_LOGITS)
    assert CHOICES["trust_form"] == TRUST_FORMS
    assert moments.TRL_TILE == (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def test_defaults_are_the_papers_and_the_trainers():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets

    theirs = {field.name: field.default for field in dataclasses.fields(PGPOConfig)} | PAPER
    ours = TrainingSetting()
    for name in (
        "max_completion_length",
        "max_prompt_length",
        "prompts_per_step",
        "num_generations",
        "objective",
        "teacher",
        "trust",
        "trust_form",
        "trust_tokens",
        "fused_head",
        "gradient_checkpointing",
    ):
        assert getattr(ours, name) == theirs[name], name
    assert ours.teacher_prompt_length == theirs["max_teacher_prompt_length"]
    assert all(targets[kind] == list(ours.lora_targets) for kind in BLOCKS)


@pytest.mark.parametrize("changes", [dict(zero=2, gpus=2), dict(zero=3, gpus=2), dict(parameter_bytes=2)], ids=str)
def test_a_form_that_undoes_nothing_is_planned_where_the_trainer_takes_it(changes):
    setting = TrainingSetting(trust="measured", trust_form="lagged", **changes)
    check(large(), setting)
    plain, lagged = (
        Step(large(), dataclasses.replace(setting, trust=trust), 16_384).moments() for trust in ("off", "measured")
    )
    assert not any("weights before" in item for items in lagged.values() for item in items)
    longer = {name for name in plain if sum(lagged[name].values()) > sum(plain[name].values())}
    assert longer == {"rollout", "step"}


def test_no_more_is_probed_than_there_are_questions_or_tokens():
    def probed(**changes):
        return Step(large(), TrainingSetting(trust="measured", max_completion_length=100, **changes), 1).probed

    assert probed(prompts_per_step=8) == 8 and probed(prompts_per_step=8, gpus=4) == 2
    assert probed(prompts_per_step=100, trust_tokens=1_001) == 11


# Peaks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks/plan_accuracy.py"
    spec = importlib.util.spec_from_file_location("plan_accuracy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "changes",
    [
        dict(V=9_000, H=96, I=288, layers=5, heads=6, kv=2, d=16, P=40, L=90, budget=520, group=8, questions=1),
        dict(V=2_000, H=96, I=256, layers=12, heads=4, kv=4, d=24, P=120, L=40, budget=1_280, kind="llama", lora=4,
             dtype="bfloat16", autocast=True, checkpointing=True, group=8),
        dict(V=20_000, H=96, I=128, layers=1, heads=2, kv=2, d=48, P=8, L=40, budget=96, kind="llama", tied=False,
             teacher="live", optimizer="sgd", questions=1),
        dict(V=4_000, H=96, I=256, layers=12, heads=6, kv=2, d=16, P=60, L=12, budget=4_096, group=8, joined=True),
        dict(V=4_000, H=96, I=256, layers=12, heads=6, kv=2, d=16, P=30, L=24, budget=300, group=8, joined=True,
             autocast=True, checkpointing=True),
        dict(V=9_000, H=96, I=288, layers=5, heads=6, kv=2, d=16, P=40, L=90, budget=260, group=2, questions=6,
             checkpointing=True, trust="undo"),
        dict(V=20_000, H=96, I=128, layers=1, heads=2, kv=2, d=48, P=8, L=40, budget=96, kind="llama", tied=False,
             teacher="live", optimizer="sgd", trust="undo"),
        dict(V=20_000, H=96, I=256, layers=4, heads=4, kv=4, d=24, P=20, L=140, budget=330, kind="llama", lora=4,
             dtype="bfloat16", autocast=True, checkpointing=True, questions=4, trust="lagged"),
    ],
    ids=["full, float32", "LoRA, bfloat16, checkpointing", "untied, one chunk of logits", "joined siblings",
         "joined siblings, several micro-batches, bfloat16, checkpointing", "trust", "trust, SGD, live teacher",
         "lagged trust, LoRA, bfloat16"],
)  # fmt: skip
def test_the_peak_of_a_real_step_is_predicted(benchmark, changes):
    case = benchmark.Case("small", **changes)
    plan_, torch_ = benchmark.predicted(case), benchmark.allocated(case)
    for moment in ("peak", "teacher", "loss", "backward"):
        assert plan_[moment] == pytest.approx(torch_[moment], rel=0.12), moment


def test_bytes_per_parameter_that_stay():
    full = TrainingSetting(parameter_bytes=2)
    sizes = {name: size / large().parameters for name, size in parameters.static(large(), full).items()}
    assert sizes == {"parameters": 2, "optimizer": 4, "teacher": 2, "teacher average": 4}
    sizes = parameters.static(large(), dataclasses.replace(full, parameter_bytes=4, gpus=4))
    assert {name: size / large().parameters for name, size in sizes.items()} == {
        "parameters": 4,
        "optimizer": 8,
        "teacher": 4,
        "gradient buckets (DDP)": 4,
    }
    assert "teacher" not in parameters.static(large(), dataclasses.replace(full, teacher="live"))
    assert "teacher average" not in parameters.static(large(), dataclasses.replace(full, teacher="frozen"))
    average = Step(large(), full, 16_384).moments()["step"]["teacher average"]
    assert average == 4 * (large().parameters + large().head)  # and an fp32 copy of the largest bucket
    sharded = parameters.static(large(), dataclasses.replace(full, gpus=8, fsdp=True))  # what trains is fp32 there
    assert {name: size * 8 / large().parameters for name, size in sharded.items()} == {
        "parameters": 4,
        "optimizer": 8,
        "teacher": 2,
        "teacher average": 4,
    }


def test_trust_holds_a_copy_of_what_trains_and_a_few_log_probabilities():
    """Red if the copy is counted twice, always, or not divided by the GPUs that share it."""
    for changes, copied in (({}, large().parameters), (dict(gpus=4, fsdp=True), large().parameters / 4)):
        plain, trusted = (
            Step(large(), TrainingSetting(trust=trust, device="cpu", **changes), 16_384).moments()
            for trust in ("off", "measured")
        )
        more = {name: sum(trusted[name].values()) - sum(plain[name].values()) for name in plain}
        step = trusted["step"]
        assert step["weights before the step (trust)"] == 4 * copied
        kept = step["log-probabilities before (trust)"]
        assert kept == 4096 * 256 * (4 + 8)  # of half a completion, whose tokens are the most that are probed
        assert more.pop("step") == pytest.approx(
            sum(step[item] for item in step.keys() - plain["step"].keys()), rel=0.1
        )
        assert more == {name: kept if name == "rollout" else 0.0 for name in more}  # bf16: the loss shows nothing
        assert 0 < step["probe (trust)"] < 0.1 * sum(step.values())
    fp32 = [
        Step(large(), TrainingSetting(trust=trust, autocast=False), 16_384).moments() for trust in ("off", "measured")
    ]
    for name in ("loss", "backward"):
        assert sum(fp32[1][name].values()) - sum(fp32[0][name].values()) == pytest.approx(1.05 * kept), name
    forms = {
        form: Step(large(), TrainingSetting(trust="measured", trust_form=form), 16_384).moments()["step"]
        for form in ("undo", "lagged")
    }
    assert sum(forms["undo"].values()) - sum(forms["lagged"].values()) == pytest.approx(1.05 * 4 * large().parameters)
    lora = Step(large(), TrainingSetting(trust="measured", lora=8, parameter_bytes=2), 16_384).moments()
    adapters = parameters.adapter_parameters(large(), TrainingSetting(lora=8))
    assert lora["step"]["weights before the step (trust)"] == 4 * adapters


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(objective="grpo"), "has none"),
        (dict(zero=2, gpus=2), "nor under ZeRO"),
        (dict(parameter_bytes=2), "not those of bf16"),
        (dict(trust_form="redo"), "choose one of undo, lagged"),
        (dict(trust_tokens=0), "trust_tokens is 0"),
        (dict(), "choose off or measured"),
    ],
)
def test_trust_that_the_trainer_refuses(changes, says):
    with pytest.raises(UserError, match=says):
        check(large(), TrainingSetting(**dict(trust="measured" if changes else "on") | changes))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("parameter_bytes", [2, 4])  # settle rounds fp32
def test_bytes_per_parameter_that_stay_under_zero(stage, parameter_bytes):
    """tests/distributed measures them."""
    setting = TrainingSetting(gpus=8, zero=stage, parameter_bytes=parameter_bytes)
    bucket = {"reduce bucket (ZeRO)": 8 * 4 * parameters.REDUCE_BUCKET / large().parameters} if stage == 3 else {}
    assert {n: 8 * size / large().parameters for n, size in parameters.static(large(), setting).items()} == {
        "parameters": 16 if stage == 2 else 2,
        "fp32 weights (ZeRO)": 4,
        "optimizer": 8,
        "teacher": 16,
        "teacher average": 32,
        **bucket,
    }
    moments = Step(large(), setting, 16_384).moments(80 * GIB)
    part = 4 * large().parameters / 8
    assert [items.get("gradients", 0) for items in moments.values()][2:4] == [part, part]
    assert moments["rollout"].get("gradients", 0) == (part if stage == 3 else 0)
    assert not any(
        "DDP" in item or "FSDP" in item or "autocast" in item for items in moments.values() for item in items
    )


@pytest.mark.parametrize("more", [dict(zero=2), dict(zero=3), dict(fsdp=True)], ids=str)
def test_sharding_takes_less_than_a_whole_copy_on_each_gpu(more):
    whole = TrainingSetting(gpus=8, vllm_share=0.3)
    before, after = (
        command.peak(Step(large(), s, 16_384), 80 * GIB)[1] for s in (whole, dataclasses.replace(whole, **more))
    )
    assert after < before


def test_what_zero_gathers_and_reduces():
    def row(item: str, **changes) -> list[float]:
        setting = TrainingSetting(**(dict(gpus=8, zero=3, vllm_share=0.3) | changes))
        return [items.get(item, 0) for items in Step(large(), setting, 16_384).moments(80 * GIB).values()]

    whole, live = 2 * large().parameters, 2 * moments.MAX_LIVE
    assert row("gathered (ZeRO)") == [live, 0, live, live, 0]  # the norm takes more than the average's one parameter
    assert row("gathered (ZeRO)", gpus=32)[4] == 2 * large().head  # and less, cut in 32
    assert row("gathered (ZeRO)", vllm_share=None)[0] == whole  # for transformers' generation
    assert row("gathered (ZeRO)", teacher="live") == [live, live, live, live, 0]
    assert row("gathered (ZeRO)", zero=2) == [0] * 5
    bucket, head = parameters.REDUCE_BUCKET, large().head  # the head is larger than a bucket
    assert head > bucket
    assert row("reduce bucket (ZeRO)") == [4 * bucket, 4 * bucket, 4 * bucket, 4 * (bucket + head), 4 * bucket]
    assert row("reduce bucket (ZeRO)", zero=2) == [0, 0, 0, 2 * bucket + 6 * head, 0]
    assert row("reduce bucket (ZeRO)", zero=2, autocast=False)[3] == 4 * bucket + 4 * head
    assert row("norm, flat gradients (ZeRO)", zero=2)[4] == 8 * head
    adapters = dict(zero=2, lora=16)
    assert max(row("teacher", **adapters)) == 2 * parameters.adapter_parameters(large(), TrainingSetting(lora=16))
    assert max(row("teacher average", **adapters)) <= 8 * parameters.adapter_parameters(
        large(), TrainingSetting(lora=16)
    )


def test_prompts_are_shared_where_every_rank_may_run_its_own_forwards():
    for setting, shared in (({"zero": 2}, True), ({"zero": 3}, False), ({"fsdp": True}, False)):
        assert Step(large(), TrainingSetting(gpus=8, **setting), 16_384).shares is shared


def test_an_adapter_has_r_times_in_plus_out_parameters(shapes):
    from peft import LoraConfig, get_peft_model

    for targets in (("q_proj", "v_proj"), MATRICES):
        model = get_peft_model(Qwen3ForCausalLM(config()), LoraConfig(r=3, target_modules=list(targets)))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert parameters.adapter_parameters(shapes["qwen3"], TrainingSetting(lora=3, lora_targets=targets)) == count


LORA = TrainingSetting(lora=16, parameter_bytes=2, vllm_share=0.3)


def test_rows_and_tokens_of_one_gpu():
    setting = dataclasses.replace(LORA, gpus=8, max_completion_length=900, max_prompt_length=100)
    step = Step(large(), setting, 4_500)
    assert (step.rows, step.row, step.fitting, step.positions, step.completions) == (32, 1000, 4, 4_500, 4_050)
    assert step.several and "gradients" in step.loss()
    assert step.held == 32 * 900 and step.blocks == 1  # fewer than 8 budgets
    small = Step(large(), setting, 700)  # a row may exceed the budget, and a group stays together
    assert (small.fitting, small.positions, small.held, small.blocks) == (1, 1000, 8 * 900, 4)
    whole = Step(large(), setting, 32_000)
    assert whole.fitting == 32 and not whole.several and "gradients" not in whole.loss()


@pytest.mark.parametrize(
    "vocabulary, tokens", [(151_936, 1_000), (151_936, 1_500), (151_936, 2_500), (30_000, 4_000), (30_000, 8_000)]
)
@pytest.mark.parametrize("lora", [None, 16])
def test_chunks_of_logits_are_those_of_the_fused_head(vocabulary, tokens, lora):
    setting = TrainingSetting(max_prompt_length=1, max_completion_length=tokens, lora=lora)
    hidden = torch.empty(tokens, 4096, device="meta")
    weight = torch.empty(vocabulary, 4096, device="meta", requires_grad=lora is None)
    chunks = -(-tokens // _head_chunks.default_chunk_size(hidden, weight))
    bytes_per_logit = 6 if chunks == 1 and lora is None else 10  # the teacher's, fp32, make room for the gradient
    logits = Step(dataclasses.replace(large(), vocabulary=vocabulary), setting, 1).loss()["logits"]
    assert logits == -(-tokens // chunks) * vocabulary * bytes_per_logit


@pytest.mark.parametrize("memory", [60, 80, 141])
def test_the_largest_budget_is_the_largest(memory):
    found = command.largest_budget(large(), LORA, memory * GIB)
    assert command.peak(Step(large(), LORA, found), memory * GIB)[1] <= memory * GIB
    assert command.peak(Step(large(), LORA, found + 1), memory * GIB)[1] > memory * GIB
    assert found >= (command.largest_budget(large(), LORA, 0.9 * memory * GIB) or 0)


def test_a_whole_batch_that_fits_needs_no_larger_budget():
    setting = dataclasses.replace(LORA, max_completion_length=64, max_prompt_length=64, teacher_prompt_length=128)
    assert command.largest_budget(large(), setting, 200 * GIB) == 32 * 8 * 128


@pytest.mark.parametrize(
    "change, higher",
    [
        (dict(max_completion_length=16384), True),
        (dict(gradient_checkpointing=False), True),
        (dict(fused_head=False), True),
        (dict(attention="eager"), True),
        (dict(lora=64), True),
        (dict(lora=None), True),
        (dict(parameter_bytes=4), True),
        (dict(vllm_share=None), True),
        (dict(vllm_share=0.2), False),
        (dict(gpus=4, fsdp=True), False),
    ],
    ids=str,
)
def test_every_choice_moves_the_peak_the_way_it_must(change, higher):
    changed = dataclasses.replace(LORA, **change)
    before, after = (command.peak(Step(large(), s, 16384), 80 * GIB)[1] for s in (LORA, changed))
    assert (after > before) if higher else (after < before)


# Command --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    config(max_position_embeddings=40_960).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_table_adds_up_and_the_file_says_the_same(folder, tmp_path, capsys):
    words = ["plan", str(folder), "--memory", "2", "--device", "cpu", "--max_prompt_length", "100"]
    words += ["--max-completion-length=200", "--teacher-prompt-length", "300", "--json", str(tmp_path / "plan.json")]
    assert main(words) == 0
    out = capsys.readouterr().out
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["setting"]["max_prompt_length"] == 100
    assert document["setting"]["max_completion_length"] == 200
    sums = {name: sum(items.values()) for name, items in document["moments"].items()}
    assert document["peak"] == max(sums.values()) == sums[document["peak_moment"]]
    printed = [float(x) for x in re.findall(r"^ *sum +(.*)$", out, re.M)[0].split()]
    assert printed == pytest.approx([v / 2**20 for v in sums.values()], abs=0.01)
    columns = re.findall(r"^ +rollout +teacher +loss +backward +step *$", out, re.M)
    assert len(columns) == 1
    assert "fit, one row at a time" in out and "16384 the peak is " in out and "fits in 2048 MiB" in out


def advised(line: str) -> tuple[list[str], list[str]]:
    """Changes that leave the method as it is, and departures from it."""
    assert "do not fit: it fits with" in line
    same, _, others = line.partition("another setting than the paper's:")
    return tuple(
        [change.rstrip(",. ") for change in re.findall(r"(--.+?)(?=, or with|\.?$)", part)] for part in (same, others)
    )


def told(capsys, words: list[str]) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out.rstrip().splitlines()[-1]


WASTEFUL = ["--no-fused-head", "--no-gradient-checkpointing", "--attention", "eager", "--dtype", "bfloat16"]


@pytest.mark.parametrize(
    ("memory", "gpus", "flags"),
    [*((memory, gpus, []) for memory in (32, 40, 60, 80) for gpus in (1, 8)), (80, 1, WASTEFUL), (60, 8, WASTEFUL)],
    ids=str,
)
def test_it_advises_what_fits_and_what_keeps_the_method_first(memory, gpus, flags, capsys, monkeypatch):
    monkeypatch.setattr(command, "read_model", lambda source: large())
    words = ["8B", "--memory", str(memory), "--gpus", str(gpus), *flags]
    same, others = advised(told(capsys, words))
    assert same or others
    for change in same:
        assert not re.search("--lora|--teacher|--max-completion-length", change)
    for change in others:
        assert re.search("--lora|--teacher|--max-completion-length", change)
    assert not others or not same or all(change.startswith("--gpus") for change in same)
    for change in same + others:
        assert "fit, one row" in told(capsys, [*words, *change.split()]), change


def test_more_gpus_alone_are_enough_where_all_is_sharded(capsys, monkeypatch):
    monkeypatch.setattr(command, "read_model", lambda source: large())
    words = ["8B", "--memory", "80", "--gpus", "2", "--fsdp", "--vllm-share", "0.3"]
    for more in ([], ["--attention", "flash", "--dtype", "bfloat16"]):
        assert advised(told(capsys, [*words, *more]))[0] == ["--gpus 8"]


def test_a_full_model_on_eight_gpus_is_sharded_before_it_becomes_an_adapter(capsys, monkeypatch):
    monkeypatch.setattr(command, "read_model", lambda source: large())
    words = ["8B", "--memory", "80", "--gpus", "8"]
    assert advised(told(capsys, words)) == (["--fsdp"], [])
    assert advised(told(capsys, [*words, "--zero", "3"]))[0] == ["--fsdp instead of --zero 3"]
    small = dataclasses.replace(large(), layers=6, parameters=large().parameters // 4)
    monkeypatch.setattr(command, "read_model", lambda source: small)
    assert "--zero 2" in told(capsys, ["2B", "--memory", "36", "--gpus", "8", "--objective", "grpo"])


def test_nothing_helps_a_model_that_is_too_large(folder, capsys):
    assert main(["plan", str(folder), "--memory", "0.5"]) == 0  # the reserve alone is more
    assert "do not fit: none of the changes tried is enough" in capsys.readouterr().out


def test_teacher_prompts_are_as_long_as_the_trainer_lets_them_be(shapes):
    """max_teacher_prompt_length, or what the positions leave beside a completion; without positions, as asked."""
    model = dataclasses.replace(shapes["qwen3"], positions=1000)
    asked = dataclasses.replace(LORA, max_completion_length=900, max_prompt_length=100, teacher_prompt_length=5000)
    assert fitted(model, asked).teacher_prompt_length == 100
    assert fitted(model, dataclasses.replace(asked, teacher_prompt_length=50)).teacher_prompt_length == 50
    assert fitted(dataclasses.replace(model, positions=None), asked) == asked
    result = command.plan(model, asked, 80 * GIB)
    assert result.setting.teacher_prompt_length == 100
    with pytest.raises(UserError, match="longer than the 1000 positions"):
        command.plan(model, dataclasses.replace(asked, max_prompt_length=101), 80 * GIB)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--memory", "0"], "memory is 0"),
        (["--memory", "nan"], "memory is nan"),
        (["--memory", "80", "--gpus", "0"], "gpus is 0"),
        (["--memory", "80", "--gpus", "-1"], "gpus is -1"),
        (["--memory", "80", "--gpus", "3"], "do not divide evenly by 3 GPUs"),
        (["--memory", "80", "--max-completion-length", "40000"], "longer than the 40960 positions"),
        (["--memory", "80", "--max-completion-length", "0"], "max_completion_length is 0"),
        (["--memory", "80", "--max-tokens-per-microbatch", "0"], "max_tokens_per_microbatch is 0"),
        (["--memory", "80", "--lora", "0"], "the LoRA rank is 0"),
        (["--memory", "80", "--lora-targets", "qkv"], "'qkv' is not a matrix"),
        (["--memory", "80", "--vllm-share", "1.5"], "the vLLM share is 1.5"),
        (["--memory", "80", "--fsdp"], "gpus is 1"),
        (["--memory", "80", "--zero", "2"], "gpus is 1"),
        (["--memory", "80", "--zero", "1"], "invalid choice: 1"),
        (["--memory", "80", "--gpus", "8", "--zero", "2", "--fsdp"], "choose one"),
        (["--memory", "80", "--gpus", "8", "--zero", "3", "--lora", "8"], "choose stage 2 or FSDP"),
        (["--memory", "80", "--teacher", "trust_region"], "invalid choice: 'trust_region'"),
        (["--memory", "80", "--json", "/no/such/plan.json"], "there is no folder /no/such"),
        ([], "--memory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_are_told_in_one_sentence(folder, capsys, words, said):
    assert main(["plan", str(folder), *words]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""


def test_bad_models_are_told_in_one_sentence(tmp_path, capsys):
    def refused(source: object) -> str:
        assert main(["plan", str(source), "--memory", "80"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    (tmp_path / "empty").mkdir()
    assert "there is no model folder" in refused(tmp_path / "nowhere")
    assert "not in the hub's cache" in refused("no-such-model-anywhere")  # the tests are offline
    assert "no config.json" in refused(tmp_path / "empty")
    T5Config().save_pretrained(tmp_path / "t5")
    assert "encoder-decoder" in refused(tmp_path / "t5")
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert "gpt2 model, whose blocks the planner does not know; known: llama" in refused(tmp_path / "gpt2")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    assert "cannot be read" in refused(tmp_path / "broken")
    quantized = config()
    quantized.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantized.save_pretrained(tmp_path / "quantized")
    assert "is quantized" in refused(tmp_path / "quantized")
    AutoConfig.for_model("llama", vocab_size=-1).save_pretrained(tmp_path / "negative")
    assert "no model can be made" in refused(tmp_path / "negative")
