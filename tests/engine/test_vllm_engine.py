"""A real vLLM, on the CPU: `make test-vllm`. Skipped where vLLM is not installed.

vLLM's CPU build packs the weights of its linear layers when it has loaded them, and drops the plain ones, so that no
later load finds them (plain GRPOTrainer fails there too). `engine` therefore lets the layers compute with F.linear.
"""

from __future__ import annotations

import json

import pytest
import torch
import trainer_kit
import yaml
from conftest import SHAPE, build_tokenizer
from peft import LoraConfig
from test_train_run import pgpo
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from pgpo.command import session
from pgpo.evaluate.runners import TransformersRunner
from pgpo.runlog import read_run
from pgpo.tasks import lab_world

pytestmark = pytest.mark.vllm

CLOSE = 1e-4  # nats: two implementations of one model in fp32; measured 2e-6
ENGINE = dict(enforce_eager=True, enable_chunked_prefill=False, dtype="float32")


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """Options of every engine that TRL or pgpo makes; its weights can be loaded again."""
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm installs its CPU build")
    from trl.generation import vllm_generation
    from vllm.model_executor.layers import utils

    def plain_linear(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    plain, options = vllm.LLM, dict(ENGINE)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", plain_linear)
    for module in (vllm, vllm_generation):
        monkeypatch.setattr(module, "LLM", lambda **given: plain(**(given | options)))
    return options


@pytest.fixture
def calls(monkeypatch):
    """Of each call of TRL's `generate`: log-probabilities of the sampled tokens by the model as it is then, and by the
    engine."""
    found, plain = [], VLLMGeneration.generate

    def generate(self, prompts, images, num_generations, profiler=None):
        output = plain(self, prompts=prompts, images=images, num_generations=num_generations)
        assert self.top_p == 1.0  # so that the engine's are those of the whole vocabulary
        ours = [logprobs_of(self.model, p, c, self.temperature) for p, c in zip(prompts, output[1], strict=True)]
        found.append((torch.cat(ours), torch.cat([torch.tensor(lp)[:, 0] for lp in output[2]])))
        return output

    monkeypatch.setattr(VLLMGeneration, "generate", generate)
    return found


def distances(calls):
    return [(ours - theirs).abs().max().item() for ours, theirs in calls]


def logprobs_of(model, prompt, completion, temperature):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].float()
    for module, mode in modes:
        module.training = mode
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def write_model(folder):
    """A model whose heads vLLM's CPU attention takes."""
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**(SHAPE | {"head_dim": 32}), tie_word_embeddings=True)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def write_lab_model(folder):
    """As large as the lab's, with heads that vLLM's CPU attention takes; untrained."""
    config = AutoConfig.from_pretrained(lab_world.checkpoint_path("plain"))
    config.head_dim, config.initializer_range = 32, 0.3
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(lab_world.checkpoint_path("plain")).save_pretrained(folder)
    return folder


def make(path, **options):
    model = Qwen3ForCausalLM.from_pretrained(write_model(path / "model"), dtype=torch.float32)
    quick = dict(use_vllm=True, eval_k=2, eval_top_p=1.0, max_steps=3, learning_rate=1e-2, rollout=None)
    return trainer_kit.trainer(path, model, eval_dataset=trainer_kit.dataset(4), **(quick | options))


LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize("options", [{}, dict(peft_config=LORA)], ids=["full", "lora"])
def test_steps_and_evaluations_sample_from_the_weights_as_they_are(options, calls, tmp_path):
    t = make(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=1, **options)
    trainer_kit.train(t)
    t.load_weights(tmp_path / "checkpoint-1")
    t.evaluate()
    found = distances(calls)
    assert len(found) == 6 and max(found) < CLOSE, found


def test_the_importance_correction_is_the_ratio_of_the_two_policies(engine, calls, tmp_path):
    """The engine in bf16, training in fp32: min(exp(ours - theirs), 2) for each token."""
    engine["dtype"] = "bfloat16"
    t = make(tmp_path, temperature=0.7, importance_clip=None)
    ratios, plain = [], t.annotate

    def annotate(batch, rollout):
        ratios.append(batch["importance_sampling_ratio"][batch["completion_mask"].bool()])
        return plain(batch, rollout)

    t.annotate = annotate
    trainer_kit.train(t)
    assert len(ratios) == len(calls) == 3
    for ratio, (ours, theirs) in zip(ratios, calls, strict=True):
        torch.testing.assert_close(ratio, (ours - theirs).exp().clamp(max=2.0), atol=1e-5, rtol=1e-5)
        assert (ratio - 1).abs().max() > 1e-3  # the two do differ


def test_evaluation_has_its_own_sampling_and_training_keeps_its_own(tmp_path):
    """Greedy completions are those of transformers, whatever training samples with."""
    training = dict(top_k=3, min_p=0.2, repetition_penalty=1.5, generation_kwargs=dict(seed=3, frequency_penalty=1.0))
    t = make(tmp_path, **training, temperature=1.5, eval_temperature=0.0, eval_k=1, importance_clip=None)
    trainer_kit.train(t)
    records = t.held_out_records(list(t.eval_dataset))
    runner = TransformersRunner(t.model, t.tokenizer, temperature=0, max_new_tokens=8)
    expected = runner([row["prompt"] for row in t.eval_dataset], 1, 0)
    assert [[record["completion"]] for record in records] == expected


RECIPE = """
task: lab_world
domain: physics
objective: grpo
weight_decay: 0.5
learning_rate: 3e-2
test_rows: 4
eval_rows: 2
eval_k: 2
max_steps: 4
prompts_per_step: 2
num_generations: 2
eval_steps: 2
samples_per_step: 0
use_vllm: true
"""


@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_the_selected_model_is_tested_and_the_run_continues(protocol, calls, monkeypatch, tmp_path):
    recipe, run = write_recipe(tmp_path)
    monkeypatch.setattr(session, "selected_step", lambda *_: 2)
    status, err = pgpo("train", "--config", recipe, "--output_dir", run, "--protocol", protocol)
    assert status == 0, err
    assert json.loads((run / "result.json").read_text())["selected"]["step"] == 2
    selected = [line["step"] for line in read_run(run).evaluations if line["split"] == "test_selected"]
    assert selected == ([2] if protocol == "strict" else [])
    assert pgpo("train", "--resume", run, "--max_steps", "5")[0] == 0
    assert max(distances(calls)) < CLOSE, distances(calls)


def write_recipe(tmp_path, **changes):
    recipe = yaml.safe_load(RECIPE) | {"model_name_or_path": str(write_lab_model(tmp_path / "model"))} | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml", tmp_path / "run"


def records(tmp_path, *words):
    file = tmp_path / "records.jsonl"
    rows = ("--rows", "6", "--k", "1", "--temperature", "0", "--records", file)
    status, err = pgpo("eval", *words, *rows)
    assert status == 0, err
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_eval_gives_what_it_gives_without_vllm(adapters, engine, tmp_path):
    """Student and self-teacher, greedily, in the dtype that is asked for."""
    del engine["dtype"]
    recipe, run = write_recipe(tmp_path, use_vllm=False)
    lora = ("--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj") if adapters else ()
    status, err = pgpo("train", "--config", recipe, "--output_dir", run, "--eval_strategy", "no", *lora)
    assert status == 0, err
    ours, theirs = records(tmp_path, run), records(tmp_path, run, "--use_vllm", "--dtype", "float32")
    assert len(ours) == len(theirs) > 6  # of both readers
    assert ours == theirs


def test_options_that_vllm_refuses_are_told_in_one_sentence(tmp_path):
    words = ("eval", write_model(tmp_path / "model"), "--use_vllm", "--rows", "1", "--k", "1", "--max_new_tokens", "4")
    status, err = pgpo(*words, "--vllm_options", '{"no_such_option": 1}')
    assert status == 2 and "no_such_option" in err.splitlines()[-1]
