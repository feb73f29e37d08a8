"""The sampler against its slow twin, transformers' generate: the same tokens for the same random numbers."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from test_runners import WORDS, _tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pgpo.evaluate.runners import TransformersRunner, trimmed
from pgpo.forward import sampling
from pgpo.forward.sampling import Streams, Unsupported, dense, drawn, sample

PAD, EOS = 0, 1
SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
SHAPE |= dict(vocab_size=len(WORDS), initializer_range=0.5, tie_word_embeddings=False)
SHAPE |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation="sdpa")

# Unequal groups and lengths, equal prompts apart from each other, an odd number of rows.
A, B, C, D = [5, 6, 7, 8, 9, 10, 11], [12, 13], [5], [20, 21, 22, 23]
PROMPTS = [A, B, A, C, B, D, A, D, D, B, C, A, A]
STREAMS = Streams(("test", 3), range(len(PROMPTS)))
MOST = 12


def characters() -> PreTrainedTokenizerFast:
    """One character per token, "abcdef" among them: StopStringCriteria asks for text without spaces."""
    backend = Tokenizer(models.BPE({chr(33 + i): i for i in range(len(WORDS))}, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def build(kind: str = "qwen3", **options: Any) -> Any:
    """Random weights, large enough that the next word depends on all before it; in double, against ties."""
    torch.manual_seed(0)
    shape = {**SHAPE, **options}
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8)).double()
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).double()
    if kind == "windows":
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=5)).double()
    assert kind == "experts"
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts))


def config(**options: Any) -> GenerationConfig:
    defaults = dict(do_sample=True, temperature=1.5, top_k=0, max_new_tokens=MOST, pad_token_id=PAD, eos_token_id=EOS)
    return GenerationConfig(**(defaults | options))


def twin(
    model: Any, prompts: list[list[int]], config: GenerationConfig, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> list[list[int]]:
    """generate(), all rows at once, with the sampler's random numbers in place of multinomial's."""
    random, steps = streams.uniform(range(len(prompts)), MOST), iter(range(MOST))

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        summed, step = probabilities.double().cumsum(-1), next(steps)
        rows = [int((row <= u * row[-1]).sum()) for row, u in zip(summed, random[:, step].tolist(), strict=True)]
        return torch.tensor(rows).unsqueeze(1)

    ids, mask = sampling.left_padded(prompts, PAD)
    tokenizer = characters() if config.stop_strings else None
    was, _ = model.training, model.eval()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, tokenizer=tokenizer)
    model.train(was)
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [trimmed(row, stops, config) for row in out[:, ids.shape[1] :].tolist()]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "windows", "experts"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_tokens_are_those_of_generate(kind, attention, do_sample, monkeypatch):
    model = build(kind, attn_implementation=attention)
    if attention == "eager":
        model = model.float()  # transformers' own masks are not for double there
    plain = {} if do_sample else dict(temperature=None, top_k=None)
    settings = config(do_sample=do_sample, eos_token_id=list(range(1, 20)), **plain)
    expected = twin(model, PROMPTS, settings, STREAMS, monkeypatch)
    assert len(set(map(tuple, expected))) > (8 if do_sample else 3)
    found = sample(model, PROMPTS, settings, STREAMS)
    assert found == expected
    if do_sample:
        assert len(set(map(len, found))) > 1  # rows end at different times


PROCESSORS: dict[str, dict[str, Any]] = {
    "temperature": dict(temperature=0.5),
    "top_p": dict(top_p=0.6),
    "top_k": dict(top_k=5),
    "min_p": dict(min_p=0.2),
    "typical": dict(typical_p=0.5),
    "repetition": dict(repetition_penalty=3.0),
    "prompt_repetition": dict(encoder_repetition_penalty=3.0),
    "ngrams": dict(no_repeat_ngram_size=1),
    "bad_words": dict(bad_words_ids=[[i] for i in range(30, 90)] + [[95, 96]]),
    "bias": dict(sequence_bias=[[[40], 9.0]]),
    "suppress": dict(suppress_tokens=list(range(10, 90))),
    "suppress_first": dict(begin_suppress_tokens=list(range(10, 90))),
    "at_least": dict(min_new_tokens=6, eos_token_id=list(range(1, 60))),
    "last": dict(forced_eos_token_id=EOS),
    "decay": dict(exponential_decay_length_penalty=(2, 3.0)),
    "ends": dict(eos_token_id=[EOS, 30, 31, 32, 33, 34]),
    "strings": dict(stop_strings=["A", "BC", "D", "zz", "a", "b", "c"]),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_and_stop_acts_as_in_generate(name, monkeypatch):
    model, settings = build(), config(**PROCESSORS[name])
    expected = twin(model, PROMPTS, settings, STREAMS, monkeypatch)
    assert expected != twin(model, PROMPTS, config(), STREAMS, monkeypatch)  # it does something
    found = sample(model, PROMPTS, settings, STREAMS, tokenizer=characters())
    assert found == expected


def test_gaps_are_filled_by_the_model_as_in_generate(monkeypatch):
    model, settings = build(), config()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.stop_strings = ["A", "B", "f", "g"]
    before = model.generation_config.to_dict()
    settings.stop_strings = ["A", "B", "f", "g"]  # so that the twin gets its tokenizer
    expected = twin(model, PROMPTS, settings, STREAMS, monkeypatch)
    settings.stop_strings = None
    assert sample(model, PROMPTS, settings, STREAMS, tokenizer=characters()) == expected
    assert model.generation_config.to_dict() == before


def test_all_end_at_once_and_none_ends(monkeypatch):
    model = build()
    assert [len(c) for c in sample(model, PROMPTS, config(eos_token_id=list(range(len(WORDS)))), STREAMS)] == [1] * 13
    endless = config(eos_token_id=None)
    found = sample(model, PROMPTS, endless, STREAMS)
    assert [len(c) for c in found] == [MOST] * 13 and found == twin(model, PROMPTS, endless, STREAMS, monkeypatch)


def test_one_prompt_and_one_token(monkeypatch):
    model = build()
    first = Streams(("test", 3), [0])
    assert sample(model, [A], config(), first) == twin(model, [A], config(), first, monkeypatch)
    assert [len(c) for c in sample(model, PROMPTS, config(max_new_tokens=1), STREAMS)] == [1] * 13


@pytest.mark.parametrize(
    ("room", "ended", "limits"),
    [
        (1, 0.0, {}),
        (3, 0.5, dict(most_rows=4)),
        (128, 1.0, dict(most_tokens=50)),
        (2, 0.0, dict(most_tokens=1)),
    ],
)
def test_neither_batches_nor_room_change_a_completion(limits, room, ended, monkeypatch):
    model = build()
    expected = sample(model, PROMPTS, config(), STREAMS)
    monkeypatch.setattr(sampling, "_ROOM", room)
    monkeypatch.setattr(sampling, "_ENDED", ended)
    done: list[tuple[int, int]] = []
    found = sample(model, PROMPTS, config(), STREAMS, progress=lambda *now: done.append(now), **limits)
    assert found == expected
    assert done[-1] == (13, 13) and done == sorted(done)


def test_batches_keep_to_their_limits_and_the_longest_go_first():
    parts = sampling.batches(PROMPTS, MOST, most_tokens=60)
    assert sorted(i for part in parts for i in part) == list(range(13))
    assert all(len(p) == 1 or len(p) * (max(len(PROMPTS[i]) for i in p) + MOST) <= 60 for p in parts)
    lengths = [len(PROMPTS[i]) for part in parts for i in part]
    assert lengths == sorted(lengths, reverse=True)


def test_a_completion_depends_on_its_names_alone():
    """Not on the order, nor on which rank samples it: two ranks find what one finds."""
    model = build()
    whole = sample(model, PROMPTS, config(), STREAMS)
    assert sample(model, PROMPTS[6:], config(), Streams(("test", 3), range(6, 13))) == whole[6:]
    back = list(range(13))[::-1]
    assert sample(model, [PROMPTS[i] for i in back], config(), Streams(("test", 3), back)) == whole[::-1]
    other = sample(model, PROMPTS, config(), Streams(("test", 4), range(13)))
    assert sum(a == b for a, b in zip(other, whole)) <= 2
    firsts = [c for c, p in zip(whole, PROMPTS) if p is A]
    assert len(set(map(tuple, firsts))) == len(firsts)  # siblings differ


def test_a_prompt_is_computed_once_and_ended_rows_leave(monkeypatch):
    model, shapes = build(), []
    model.model.register_forward_pre_hook(
        lambda m, a, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(sampling, "_ENDED", 0.0)
    found = sample(model, PROMPTS, config(eos_token_id=list(range(1, 50))), STREAMS)
    lengths = [len(c) for c in found]
    assert shapes[0] == (4, len(A))  # four different prompts
    assert [rows for rows, _ in shapes[1:]] == [sum(n > step for n in lengths) for step in range(1, max(lengths))]


def test_the_head_never_reads_a_slice():
    """torch copies the head's weight once a row for one: 500 times the time in bf16, and all memory."""
    model, seen = build(), []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].is_contiguous()))
    sample(model, PROMPTS, config(), STREAMS)
    hook.remove()
    assert len(seen) > 1 and all(seen) and not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, monkeypatch):
    """Equal prompts only, for another padding rounds otherwise; greedy, with lengths by a forced mix of stops."""
    model = build().to(dtype)
    settings = config(do_sample=False, temperature=None, top_k=None, eos_token_id=list(range(1, 20)))
    prompts = [A, A, A]
    expected = twin(model, prompts, settings, STREAMS, monkeypatch)
    assert sample(model, prompts, settings, Streams(("x",), range(3))) == expected


def test_lora_checkpointing_and_training_mode(monkeypatch):
    """As in training: adapters act, dropout does not, checkpointing does not drop the KV cache; all is given back."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    base = build(attention_dropout=0.5)
    plain = sample(base, PROMPTS, config(), STREAMS)
    model = peft.get_peft_model(base, lora).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.gradient_checkpointing_enable()
    model.train()
    model.base_model.model.model.layers[0].eval()  # a mixture of modes
    modes = [m.training for m in model.modules()]
    base.config.use_cache = base.generation_config.use_cache = False
    expected_config = base.generation_config
    found = sample(model, PROMPTS, config(), STREAMS)
    assert [m.training for m in model.modules()] == modes and base.generation_config is expected_config
    model.gradient_checkpointing_disable()
    base.config.use_cache = base.generation_config.use_cache = True
    assert found == twin(model, PROMPTS, config(), STREAMS, monkeypatch) != plain
    assert not any(p.grad is not None for p in model.parameters())


def test_the_random_streams_of_torch_are_untouched():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sample(build_once := build(), PROMPTS, config(), STREAMS)
    torch.manual_seed(1)
    sample(build_once, PROMPTS, config(), STREAMS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("build_model", "options", "text"),
    [
        (build, dict(num_beams=2), "beam"),
        (build, dict(guidance_scale=2.0), "UnbatchedClassifierFreeGuidance"),
        (build, dict(encoder_no_repeat_ngram_size=2), "EncoderNoRepeatNGram"),
        (build, dict(cache_implementation="static"), "KV cache"),
        (lambda: Phi3ForCausalLM(Phi3Config(**SHAPE)), {}, "prepares its inputs"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=len(WORDS), hidden_size=8, state_size=4)), {}, "its inputs"),
    ],
)
def test_what_it_cannot_serve_it_says_before_anything_is_computed(build_model, options, text):
    model = build_model()
    model.register_forward_pre_hook(lambda *a: pytest.fail("a forward"))
    with pytest.raises(Unsupported, match=text):
        sample(model, PROMPTS, config(**options), STREAMS)


def test_evaluation_then_goes_on_with_generate_and_says_so_once():
    said: list[str] = []
    model, tokenizer = build(), _tokenizer()
    options = dict(temperature=1.0, max_new_tokens=4, generation={"encoder_no_repeat_ngram_size": 2})
    runner = TransformersRunner(model, tokenizer, **options, say=said.append)
    slow = TransformersRunner(model, tokenizer, **options, sampler="generate", say=said.append)
    prompts = [[{"role": "user", "content": "w1 w2"}]]
    assert runner(prompts, 3, 0) == slow(prompts, 3, 0)
    assert len(said) == 1 and "EncoderNoRepeatNGram" in said[0] and "generate()" in said[0]


def test_logits_that_are_not_finite_raise_what_torch_raises():
    model = build()
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        sample(model, PROMPTS, config(), STREAMS)


def test_drawn_tokens_have_a_probability():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(5, -1)
    random = torch.tensor([0.0, 0.25, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, broken = drawn(scores, random)
    assert tokens.tolist() == [1, 1, 1, 3, 3] and not broken
    assert drawn(torch.full((1, 3), -torch.inf), random[:1])[1]
    # A total that is not 1 for rounding: the last token still has the share that it should have.
    torch.manual_seed(0)
    wide = torch.randn(50, 30_000)
    assert drawn(wide, torch.full((50,), 1 - 2**-53, dtype=torch.float64))[0].max() < 30_000


def test_a_draw_stays_in_the_vocabulary_where_there_is_no_fp64(monkeypatch):
    """MPS: just below 1 is 1 in fp32, and the token behind the last one would be drawn."""
    monkeypatch.setattr(sampling, "sum_dtype", lambda device: torch.float32)
    for scores in (torch.zeros(1, 8), torch.randn(1, 50_000), torch.tensor([[0.0, 1.0, -torch.inf]])):
        for below in (1e-9, 2**-26, 2**-24, 0.5):
            random = torch.tensor([1 - below], dtype=torch.float64)
            tokens, broken = sampling.drawn(scores, random.to(sampling.sum_dtype(scores.device)))
            assert not broken and tokens.item() < scores.shape[1] and scores[0, tokens.item()] > -torch.inf


def test_streams_are_uniform_and_independent():
    names = Streams(("run", 5), range(400))
    random = names.uniform(range(400), 50)
    assert random.min() >= 0 and random.max() < 1
    n = random.numel()
    assert abs(random.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    neighbours = ((random[1:] - 0.5) * (random[:-1] - 0.5)).mean() * 12
    assert abs(neighbours) < 5 / n**0.5
    assert torch.equal(names.uniform([7], 20)[0], random[7, :20])  # a longer stream begins alike
    assert not torch.equal(Streams(("run", 6), range(400)).uniform([7], 50), random[7:8])


def test_rows_that_stay_are_dense():
    assert dense([0, 1, 4, 6]) == [0, 1, 6, 4] or dense([0, 1, 4, 6]) == [0, 1, 4, 6]
    for live in ([3], [0, 2, 5], [1, 2, 3], [0, 1, 2], [4, 5, 6]):
        kept = dense(live)
        assert sorted(kept) == live
        assert all(row == place or row >= len(live) for place, row in enumerate(kept))
