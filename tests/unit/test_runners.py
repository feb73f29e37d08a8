from __future__ import annotations

import sys
import types
from typing import Any, ClassVar

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pgpo.errors import UserError
from pgpo.evaluate import runners
from pgpo.evaluate.runners import TransformersRunner, VLLMRunner

WORDS = ["<pad>", "<eos>", "<user>", "<assistant>", *(f"w{number}" for number in range(100))]
TEMPLATE = (
    "{% if loud %}w19 {% endif %}{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As many tokenizers do, this one adds a special token in front unless it is told not to.
    backend.post_processor = processors.TemplateProcessing(single="<user> $A", special_tokens=[("<user>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer()


@pytest.fixture
def model() -> Qwen3ForCausalLM:
    """Random weights large enough that the next word depends on every word and place before it. In train mode."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        attention_dropout=0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config).double()
    model.lm_head.weight.data[:4] = 0.0  # special words are possible, never the most likely ones
    return model.train()


def _prompt(words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}]


PROMPTS = [_prompt("w1"), _prompt("w1 w2 w3 w4 w5 w6 w7"), _prompt("w9 w3"), _prompt("w1 w2 w3"), _prompt("w8")]


def _ids(words: str) -> list[int]:
    return [WORDS.index(word) for word in f"<user> {words} <assistant>".split()]


def _next_logits(model: Qwen3ForCausalLM, ids: list[int]) -> torch.Tensor:
    """One unpadded forward pass in eval mode, without a cache: the oracle."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    model.train()
    return logits


def _greedy(model: Qwen3ForCausalLM, words: str, length: int) -> str:
    ids = _ids(words)
    for _ in range(length):
        ids.append(int(_next_logits(model, ids).argmax()))
    return " ".join(WORDS[token] for token in ids[-length:])


def _texts(prompt: list[dict[str, str]]) -> str:
    return prompt[0]["content"]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 256])
def test_greedy_text_does_not_depend_on_padding_or_order(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    expected = [_greedy(model, _texts(prompt), 6) for prompt in PROMPTS]
    assert len(set(expected)) == len(expected)  # else a mix-up of prompts would pass
    done: list[tuple[int, int]] = []
    runner = TransformersRunner(
        model,
        tokenizer,
        temperature=0,
        max_new_tokens=6,
        batch_size=batch_size,
        progress=lambda finished, total: done.append((finished, total)),
    )
    assert runner(PROMPTS, 2, 0) == [[text, text] for text in expected]
    assert done[-1] == (10, 10) and len(done) == -(-10 // batch_size)


def test_samples_follow_temperature_and_top_p_also_in_a_padded_row(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.temperature = 0.01
    runner = TransformersRunner(model, tokenizer, temperature=3.0, top_p=0.9, max_new_tokens=1, batch_size=8_000)
    k = 4_000
    samples = runner([_prompt("w1 w2 w3 w4 w5 w6 w7"), _prompt("w1")], k, seed=0)
    for words, drawn in zip(("w1 w2 w3 w4 w5 w6 w7", "w1"), samples, strict=True):
        probability = torch.softmax(_next_logits(model, _ids(words)) / 3.0, -1)
        ranked = probability.sort(descending=True)
        kept = ranked.indices[(ranked.values.cumsum(0) - ranked.values) < 0.9]  # the fewest that reach .9
        expected = torch.zeros_like(probability).index_put((kept,), probability[kept] / probability[kept].sum())
        expected[1], expected[0] = expected[:2].sum(), 0.0  # <pad> and <eos> both leave an empty text
        kept = expected.nonzero().squeeze(1)
        assert 50 < len(kept) < 90  # some words are cut, and more remain than the default top_k of transformers
        texts = [None, "", *WORDS[2:]]
        observed = torch.tensor([sum(text == drawn_text for drawn_text in drawn) for text in texts]).double()
        assert int(observed.sum()) == k
        assert observed[expected == 0].sum() == 0
        chi_square = ((observed - k * expected) ** 2 / (k * expected))[kept].sum()
        # Mean n - 1, sd sqrt(2 (n - 1)): five sd above for the right distribution is out of the question.
        assert chi_square < (len(kept) - 1) + 5 * (2 * (len(kept) - 1)) ** 0.5


def test_the_random_stream_of_training_is_untouched(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    runner = TransformersRunner(model, tokenizer, temperature=1.0, max_new_tokens=5)
    torch.manual_seed(123)
    undisturbed = torch.rand(8)
    torch.manual_seed(123)
    first = runner(PROMPTS, 2, seed=7)
    assert torch.equal(torch.rand(8), undisturbed)
    assert runner(PROMPTS, 2, seed=7) == first  # the seed decides, not where the stream of training stands
    assert runner(PROMPTS, 2, seed=8) != first
    assert all(one != two for one, two in first)  # the k samples differ


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_generation_config_are_given_back(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, fails: bool
) -> None:
    model.model.layers[1].eval()  # a frozen part may be in eval mode while the rest trains
    before = {name: module.training for name, module in model.named_modules()}
    config, state = model.generation_config, torch.get_rng_state()

    def progress(finished: int, total: int) -> None:
        assert not any(module.training for module in model.modules())
        if fails:
            raise KeyboardInterrupt

    runner = TransformersRunner(model, tokenizer, max_new_tokens=2, progress=progress)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            runner(PROMPTS, 1, 0)
    else:
        runner(PROMPTS, 1, 0)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.generation_config is config
    assert torch.equal(torch.get_rng_state(), state)


def test_lora_adapters_take_part_and_the_inner_generation_config_is_given_back(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = TransformersRunner(model, tokenizer, temperature=0, max_new_tokens=6)(PROMPTS, 1, 0)
    config = model.generation_config
    config.repetition_penalty = 9.0
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=True)).double()
    runner = TransformersRunner(adapted, tokenizer, temperature=0, max_new_tokens=6)
    assert runner(PROMPTS, 1, 0) == plain  # a new adapter changes nothing, and the penalty of the model is set aside
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert runner(PROMPTS, 1, 0) != plain
    assert model.generation_config is config and config.repetition_penalty == 9.0


def test_the_cache_is_used_although_training_switched_it_off(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.generation_config.use_cache = False
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    TransformersRunner(model, tokenizer, temperature=0, max_new_tokens=4)([_prompt("w1 w2")], 1, 0)
    assert lengths == [4, 1, 1, 1]  # <user> w1 w2 <assistant>, then one token at a time
    assert model.config.use_cache is False


def test_prompts_hold_the_template_once_and_its_options(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    TransformersRunner(model, tokenizer, max_new_tokens=1)([_prompt("w1")], 1, 0)
    assert seen.pop() == _ids("w1")  # no second <user> from the tokenizer
    TransformersRunner(model, tokenizer, max_new_tokens=1, chat_template_kwargs={"loud": True})([_prompt("w1")], 1, 0)
    assert seen.pop() == [WORDS.index("w19"), *_ids("w1")]


def test_eos_tokens_of_tokenizer_and_model_both_end_a_completion(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = _greedy(model, "w1", 6).split()
    fourth = words[3]
    assert fourth not in words[:3]
    runner = TransformersRunner(model, tokenizer, temperature=0, max_new_tokens=6)
    model.generation_config.eos_token_id = [WORDS.index(fourth), WORDS.index("<user>")]
    assert runner([_prompt("w1")], 1, 0) == [[" ".join(words[:3])]]
    model.generation_config.eos_token_id = WORDS.index("<user>")
    tokenizer.eos_token = fourth
    assert runner([_prompt("w1")], 1, 0) == [[" ".join(words[:3])]]
    # Without a pad token rows that end early are filled with eos; the rows that go on must not be cut.
    tokenizer.pad_token = None
    long = next(prompt for prompt in PROMPTS if fourth not in _greedy(model, _texts(prompt), 6).split())
    assert runner([_prompt("w1"), long], 1, 0) == [[" ".join(words[:3])], [_greedy(model, _texts(long), 6)]]


def test_stops_and_forbidden_words_of_training_hold_and_its_sampling_does_not(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = _greedy(model, "w1", 6).split()
    assert words[3] not in words[:3]
    stop, plain = WORDS.index(words[3]), dict(temperature=0, max_new_tokens=6)
    generation = dict(eos_token_id=stop, repetition_penalty=9.0, num_return_sequences=3, max_new_tokens=1)
    runner = TransformersRunner(model, tokenizer, **plain, generation=generation)
    assert runner([_prompt("w1")], 1, 0) == [[" ".join(words[:3])]]
    assert runner.sample([_ids("w1")], 0) == [[WORDS.index(word) for word in words[:4]]]  # the stop stands in the ids
    model.generation_config.suppress_tokens = [stop]
    (other,) = TransformersRunner(model, tokenizer, **plain)([_prompt("w1")], 1, 0)
    assert other[0].split()[:3] == words[:3] and words[3] not in other[0].split()


def test_plain_text_is_not_put_into_the_template(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    TransformersRunner(model, tokenizer, max_new_tokens=1)(["w1 w2"], 1, 0)
    assert seen == [tokenizer("w1 w2")["input_ids"]]


def test_a_response_template_gives_the_answer_without_the_thinking(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = _greedy(model, "w1", 6).split()
    assert words[2] not in words[:2]
    thinking = {"open": words[0] + " ", "close_pattern": words[2], "content": "text"}
    fields = {"reasoning_content": thinking, "content": {"close_pattern": "<eos>", "content": "text"}}
    defaults = {"role": "assistant"}
    tokenizer.response_template = {"defaults": defaults, "start_anchor": "<assistant>", "fields": fields}
    assert (
        TransformersRunner(model, tokenizer, temperature=0, max_new_tokens=6)([_prompt("w1")], 1, 0)[0][0].split()
        == (words[3:])
    )


def test_what_cannot_be_run_is_refused_at_once(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for options, message in (
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
    ):
        with pytest.raises(UserError, match=message):
            TransformersRunner(model, tokenizer, **({"max_new_tokens": 1} | options))  # type: ignore[arg-type]
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no pad token and no eos token; set tokenizer\.eos_token"):
        TransformersRunner(model, tokenizer, max_new_tokens=1)
    bare = _tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template; set tokenizer\.chat_template"):
        TransformersRunner(model, bare, max_new_tokens=1)


def test_vllm_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'pgpo\[vllm\]'"):
        VLLMRunner("some/model", max_new_tokens=8)


class AskedEngine:
    """vllm.LLM that answers with what it was asked: [w(seed), w(number of the completion), the end]."""

    ends: ClassVar[list[tuple[int, str, Any]]] = [(1, "stop", None)]  # token, finish_reason, stop_reason

    def __init__(self, **options: Any) -> None:
        assert options == {"model": "some/model", "max_model_len": 64}
        self.get_tokenizer = _tokenizer

    def chat(self, messages: Any, parameters: list[Any], **options: Any) -> list[Any]:
        assert options == dict(use_tqdm=False, lora_request=None, chat_template_kwargs={"enable_thinking": False})
        assert {one["temperature"] for one in parameters} == {0.6}
        first = WORDS.index("w0")
        return [
            types.SimpleNamespace(
                prompt_token_ids=[2],
                outputs=[
                    # vLLM gives completion i of a request the seed seed + i.
                    types.SimpleNamespace(
                        token_ids=[first + one["seed"] + i, *([end] if end else [])],
                        text="not as in training",
                        finish_reason=why,
                        stop_reason=what,
                    )
                    for i, (end, why, what) in zip(range(one["n"]), self.ends * one["n"])
                ],
            )
            for one in parameters
        ]


@pytest.fixture
def vllm_runner(monkeypatch: pytest.MonkeyPatch) -> VLLMRunner:
    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = AskedEngine, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    # Seeds that are words; the real ones are in test_eval_targets.py.
    monkeypatch.setattr(runners, "_request_seed", lambda seed, prompt: seed + 2 * prompt)
    return VLLMRunner("some/model", max_new_tokens=8, chat_template_kwargs={"enable_thinking": False}, max_model_len=64)


def test_vllm_is_asked_for_independent_samples(vllm_runner: VLLMRunner) -> None:
    assert vllm_runner([_prompt("w1"), _prompt("w2")], 2, 10) == [["w10", "w11"], ["w12", "w13"]]


def test_vllms_completions_are_decoded_as_in_training(monkeypatch: pytest.MonkeyPatch, vllm_runner: VLLMRunner) -> None:
    """A stop token goes, also one that is no special token; a stop string and a cut completion's last token stay."""
    word = WORDS.index("w7")
    ends = [(word, "stop", word), (word, "stop", "w7"), (word, "length", None), (0, "length", None)]
    monkeypatch.setattr(AskedEngine, "ends", ends)
    assert vllm_runner([_prompt("w1")], 4, 0) == [["w0", "w1 w7", "w2 w7", "w3"]]
