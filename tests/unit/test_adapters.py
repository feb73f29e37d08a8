"""Every kind of adapter: the teacher starts as the student, averages as PEFT alone would give, resumes and merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit
from conftest import build_model
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM, TrainerCallback

from pgpo.errors import UserError

IDS = torch.arange(40).reshape(2, 20) % 36
RATE = 0.25


def lora(**options: Any) -> LoraConfig:
    """Not zero at its start (init_lora_weights=False), so that a teacher without it would be seen."""
    defaults = dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return LoraConfig(**(defaults | options), task_type="CAUSAL_LM")


def untied() -> Any:
    config = build_model().config
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


def with_biases() -> Any:
    config = LlamaConfig(**(build_model(kind="llama").config.to_dict() | {"attention_bias": True}))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


class Quantized(nn.Linear):
    """Stands in for a quantized layer: codes of a byte each, scales per row, no floating-point weight that trains."""

    @classmethod
    def of(cls, plain: nn.Linear) -> Quantized:
        layer = cls(plain.in_features, plain.out_features, bias=False)
        scale = plain.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        codes = (plain.weight.detach() / scale).round().add(8).to(torch.uint8)
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.register_buffer("scale", scale)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight.float() - 8) * self.scale
        return nn.functional.linear(x.float(), weight).to(x.dtype)


def quantized() -> Any:
    """As `load_in_8bit` leaves a model, by what TRL and PEFT look at; TRL then trains the adapter in bf16."""
    model = build_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Quantized.of(layer.self_attn.q_proj)
        layer.mlp.down_proj = Quantized.of(layer.mlp.down_proj)
    model.requires_grad_(False)
    model.is_loaded_in_8bit = True
    return model


KINDS: dict[str, tuple[Callable[[], LoraConfig], Callable[[], Any]]] = {
    "LoRA": (lora, build_model),
    "rsLoRA": (lambda: lora(use_rslora=True), build_model),
    "DoRA": (lambda: lora(use_dora=True), build_model),
    "rank and alpha patterns": (
        lambda: lora(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3}, use_rslora=True),
        build_model,
    ),
    "bias of the adapter": (lambda: lora(target_modules=["q_proj"], lora_bias=True), with_biases),
    "modules_to_save: norm": (lambda: lora(modules_to_save=["norm"]), build_model),
    "modules_to_save: tied head": (lambda: lora(modules_to_save=["lm_head"]), build_model),
    "modules_to_save: tied embedding": (lambda: lora(modules_to_save=["embed_tokens"]), build_model),
    "modules_to_save: both, tied": (
        lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        build_model,
    ),
    "tokens": (lambda: lora(trainable_token_indices=[1, 5]), build_model),
    "embedding": (lambda: lora(target_modules=["embed_tokens", "q_proj"]), untied),
    "all linear": (lambda: lora(target_modules="all-linear"), build_model),
    "some layers": (lambda: lora(layers_to_transform=[1]), build_model),
    "start: default": (lambda: lora(init_lora_weights=True), build_model),
    "start: orthogonal": (lambda: lora(init_lora_weights="orthogonal"), build_model),
    "start: PiSSA": (lambda: lora(init_lora_weights="pissa"), build_model),
    "start: OLoRA": (lambda: lora(init_lora_weights="olora"), build_model),
}


def train(path: Path, config: Any, model: Any, resume: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0 if resume is None else 1)  # a process that resumes has other random numbers
    defaults = dict(max_steps=4, save_strategy="steps", save_steps=2)
    defaults |= {} if options.get("teacher") == "live" else {"teacher_rate": RATE}
    t = trainer_kit.trainer(path, model=model, peft_config=config, **(defaults | options))
    seen = t.seen = [trained(t.model)]
    t.first = logits(t.model), teacher_logits(t)

    class Watch(TrainerCallback):
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append(trained(t.model))

    t.add_callback(Watch())
    trainer_kit.train(t, resume_from_checkpoint=None if resume is None else str(resume))
    return t


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    training = model.training
    found = model.eval()(input_ids=IDS).logits
    model.train(training)
    return found


def teacher_logits(t: Any) -> torch.Tensor:
    return t.teacher.logits(lambda module: module(input_ids=IDS).logits)


def assert_average(t: Any, config: Any, model: Any, tolerance: float) -> None:
    """Teacher = average of the trained parameters in fp64, run by PEFT alone."""
    first, *steps = t.seen
    average = {n: p.double() for n, p in first.items()}
    for step in steps:
        for n in average:
            average[n] += RATE * (step[n].double() - average[n])
    saved = t.teacher.state_dict()["parameters"]
    assert saved.keys() == average.keys()
    for n in average:
        assert saved[n].dtype == torch.float32
        torch.testing.assert_close(saved[n].double(), average[n], rtol=1e-6, atol=1e-6)
    oracle = get_peft_model(model, config)
    with torch.no_grad():
        for n, p in oracle.named_parameters():
            if p.requires_grad:
                p.copy_(average[n])
    torch.testing.assert_close(teacher_logits(t), logits(oracle), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_life_of_an_adapter(tmp_path, kind):
    config, model = KINDS[kind]
    t = train(tmp_path / "a", config(), model())
    student, teacher = t.first
    assert torch.equal(student, teacher)
    end = logits(t.model)
    assert len(t.seen) == 5 and (end - student).abs().max() > 0.1
    assert (end - teacher_logits(t)).abs().max() > 0.01
    assert_average(t, config(), model(), 1e-4)  # of logits up to 30, through fp32 weights that are off by 1e-7

    again = train(tmp_path / "b", config(), model(), tmp_path / "a/checkpoint-2")
    assert trainer_kit.differences(t, again) == []

    torch.manual_seed(2)
    loaded = PeftModel.from_pretrained(model(), tmp_path / "a/checkpoint-4")
    assert torch.equal(logits(loaded), end)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), end, rtol=0, atol=1e-4)  # W + B A in another order
    merged.save_pretrained(tmp_path / "merged")  # a file has no shared memory: what was tied must still be right
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(reloaded), end, rtol=0, atol=1e-4)


def test_bias_without_a_bias_to_merge_into_trains_and_loads_and_peft_says_that_it_cannot_merge(tmp_path):
    t = train(tmp_path, lora(lora_bias=True), build_model(), max_steps=2)
    loaded = PeftModel.from_pretrained(build_model(), tmp_path / "checkpoint-2")
    assert torch.equal(logits(loaded), logits(t.model))
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        loaded.merge_and_unload()


# Quantized base -------------------------------------------------------------------------------------------------------


def test_a_quantized_base_stays_and_its_bf16_adapter_resumes_exactly(tmp_path):
    base = trainer_kit.weights(quantized())
    t = train(tmp_path / "a", lora(), quantized())
    student, teacher = t.first
    assert torch.equal(student, teacher)
    assert (logits(t.model) - student).abs().max() > 0.1
    assert {p.dtype for p in trained(t.model).values()} == {torch.bfloat16}  # as TRL makes them
    again = train(tmp_path / "b", lora(), quantized(), tmp_path / "a/checkpoint-2")
    assert trainer_kit.differences(t, again) == []
    for name, value in base.items():  # the teacher's adapter has no base of its own
        inside = [p for n, p in t.model.named_parameters() if n.replace(".base_layer", "").endswith(name)]
        assert len(inside) == 1 and torch.equal(inside[0], value), name
    assert_bf16_average(t)


def assert_bf16_average(t: Any) -> None:
    """The average is kept in fp32, though the teacher that runs is rounded."""
    average = {n: p.double() for n, p in t.seen[0].items()}
    for step in t.seen[1:]:
        for n in average:
            average[n] += RATE * (step[n].double() - average[n])
    for n, p in t.teacher.state_dict()["parameters"].items():
        torch.testing.assert_close(p.double(), average[n], rtol=1e-6, atol=1e-6)
        twin = t.model.get_parameter(n.replace(".default.", ".teacher."))
        assert torch.equal(twin, p.to(torch.bfloat16))


@pytest.mark.parametrize(
    "options",
    [
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        dict(load_in_8bit=True),
    ],
)
def test_bitsandbytes(tmp_path, monkeypatch, options):
    """Real QLoRA, where bitsandbytes is installed. On a CPU with AVX512 it packs 4-bit weights anew in the first
    forward without gradient and computes otherwise from then on, which no checkpoint could hold: switched off here."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    shape = build_model().config
    shape.hidden_size = shape.intermediate_size = 64  # blocks of 64 weights
    torch.manual_seed(0)
    Qwen3ForCausalLM(shape).save_pretrained(tmp_path / "base")

    def base() -> Any:
        quantization = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, dtype=torch.float32
        )

    t = train(tmp_path / "a", lora(), base())
    assert torch.equal(*t.first)
    assert (logits(t.model) - t.first[0]).abs().max() > 0.1
    assert_bf16_average(t)
    again = train(tmp_path / "b", lora(), base(), tmp_path / "a/checkpoint-2")
    assert trainer_kit.differences(t, again) == []


# Refused --------------------------------------------------------------------------------------------------------------


def in_4_bits() -> Any:
    model = build_model()
    model.is_loaded_in_4bit = True
    return model


NO_BASE = "changes the base model in a way that no checkpoint holds"
NOT_DISTILLED = "is not supported with self-distillation"
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "random start": (lambda: lora(init_lora_weights="pissa_niter_2"), {}, NO_BASE),
    "random start, GRPO": (lambda: lora(init_lora_weights="pissa_niter_2"), {"objective": "grpo"}, NO_BASE),
    "prepared start": (lambda: lora(init_lora_weights="lora_ga"), {}, NO_BASE),
    "tied embedding": (lambda: lora(target_modules=["embed_tokens"]), {}, "weight is also the head's, cannot be"),
    "tied embedding, GRPO": (
        lambda: lora(target_modules=["embed_tokens"]),
        {"objective": "grpo"},
        "weight is also the head's, cannot be",
    ),
    "DoRA in 4 bits": (lambda: lora(use_dora=True), {"model": in_4_bits}, "use_dora on a 4-bit model needs a GPU"),
    "prompt tuning": (lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), {}, NOT_DISTILLED),
    "prompt tuning, live": (
        lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        {"teacher": "live"},
        "the adapter type PROMPT_TUNING is not supported with self-distillation; use LoRA, or objective='grpo'.",
    ),
    "prefix tuning, live": (
        lambda: PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        {"teacher": "live"},
        NOT_DISTILLED,
    ),
    "AdaLoRA, live": (
        lambda: AdaLoraConfig(total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        {"teacher": "live"},
        NOT_DISTILLED,
    ),
    "aLoRA, live": (lambda: lora(alora_invocation_tokens=[3]), {"teacher": "live"}, "option alora_invocation_tokens"),
    "IA3": (lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[]), {}, "is of type IA3; a teacher"),
    "bias: lora_only": (lambda: lora(bias="lora_only"), {}, "bias='lora_only' has no exact twin"),
    "bias: all": (lambda: lora(bias="all"), {}, "bias='all' has no exact twin"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused_in_a_sentence(tmp_path, kind):
    config, options, says = REFUSED[kind]
    options = dict(options)
    model = options.pop("model", build_model)()
    with pytest.raises(UserError) as caught:
        trainer_kit.trainer(tmp_path, model=model, peft_config=config(), **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_with_lora_is_refused_by_trl(tmp_path):
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer_kit.trainer(tmp_path, peft_config=lora(target_modules=["lm_head"]))


@pytest.mark.parametrize(
    "config",
    [
        lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        lambda: VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        lambda: lora(bias="lora_only"),
    ],
)
def test_the_live_teacher_takes_other_adapters(tmp_path, config):
    t = train(tmp_path / "a", config(), with_biases(), teacher="live")
    assert torch.equal(*t.first)
    assert torch.equal(logits(t.model), teacher_logits(t))
    assert not torch.equal(logits(t.model), t.first[0])
    again = train(tmp_path / "b", config(), with_biases(), tmp_path / "a/checkpoint-2", teacher="live")
    assert trainer_kit.differences(t, again) == []
    merged = PeftModel.from_pretrained(with_biases(), tmp_path / "a/checkpoint-4").merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(t.model), rtol=0, atol=1e-4)


def test_grpo_takes_prompt_tuning(tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = trainer_kit.trainer(tmp_path, peft_config=config, objective="grpo")
        assert len(trainer_kit.train(t)) == 1
