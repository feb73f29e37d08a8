"""vLLM's copy of the weights is that of the model in training whenever it samples; what it samples with; its options.

The engine is a stub that TRL's own code fills and asks (tests/vllm_stub.py); tests/engine/ has the real one.
"""

from __future__ import annotations

import json

import pytest
import torch
import trainer_kit
import vllm_stub
from conftest import build_model, build_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_train_run import pgpo
from transformers import TrainerCallback

from pgpo.command import eval as evaluation
from pgpo.command import session
from pgpo.runlog import RunLog, read_run

SAME = 1e-5  # nats: LoRA is merged for the engine, which rounds
QUICK = dict(use_vllm=True, eval_k=1, max_steps=2, learning_rate=3e-2, rollout=None, bf16=False)


@pytest.fixture
def log(monkeypatch):
    return vllm_stub.install(monkeypatch)


def make(path, model=None, **options):
    """A trainer whose completions the engine samples, and four held-out rows."""
    folder = path / "model"
    model = model or build_model()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    model.name_or_path = str(folder)
    return trainer_kit.trainer(path, model, eval_dataset=trainer_kit.dataset(4), **(QUICK | options))


def move(model, by=0.05):
    """What a callback, or a user, may do to the weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


# The weights that it samples from -------------------------------------------------------------------------------------


def test_the_weights_are_renewed_once_per_step_and_per_evaluation(log, tmp_path):
    """Not per prompt, batch or row."""
    t = make(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=2, eval_k=2)
    trainer_kit.train(t)
    assert log.engine.syncs == len(log.distances) == 5  # steps 1, 2, evaluation, step 3, evaluation
    t.evaluate()
    assert log.engine.syncs == 6 and max(log.distances) < SAME


def before_training(t, path):
    t.evaluate()
    trainer_kit.train(t)


def trained_twice(t, path):
    """The second run counts its steps anew, from where the engine's copy was made."""
    t.args.max_steps = 1
    trainer_kit.train(t)
    trainer_kit.train(t)


def loaded_weights(t, path):
    """As the step that validation selects is."""
    t.args.save_strategy, t.args.save_steps = "steps", 1
    trainer_kit.train(t)
    t.evaluate()
    t.load_weights(path / "checkpoint-1")
    t.evaluate()


def best_model(t, path):
    t.args.eval_strategy = t.args.save_strategy = "steps"
    t.args.eval_steps = t.args.save_steps = 1
    t.args.load_best_model_at_end, t.args.metric_for_best_model = True, "eval_completions/mean_length"
    t.args.greater_is_better = False
    trainer_kit.train(t)
    t.evaluate()


def resumed(t, path):
    """The checkpoint is of the step at which the engine's copy was made."""
    t.args.save_strategy, t.args.save_steps, t.args.max_steps = "steps", 1, 1
    trainer_kit.train(t)
    move(t.model)
    t.evaluate()
    t.args.max_steps = 2
    trainer_kit.train(t, resume_from_checkpoint=str(path / "checkpoint-1"))


def rolled_back(t, path):
    trainer_kit.train(t)
    assert t.guard.snapshot is not None
    t.evaluate()
    t.guard._restore(t.guard.snapshot)
    t.evaluate()


class Swap(TrainerCallback):
    """Evaluates other weights than those that train, as averages of them are evaluated."""

    def __init__(self, t):
        self.t = t

    def on_step_end(self, args, state, control, **kwargs):
        move(self.t.model)

    def on_evaluate(self, args, state, control, **kwargs):
        move(self.t.model, -0.05)


def swapped(t, path):
    t.args.eval_strategy, t.args.eval_steps = "steps", 1
    t.add_callback(Swap(t))
    trainer_kit.train(t)


LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
CASES = [
    *((story, {}) for story in (before_training, trained_twice, loaded_weights, best_model, resumed, swapped)),
    (rolled_back, dict(guard="rollback", guard_warmup=0, guard_signals="sampled_kl")),
    (before_training, dict(trust="measured", objective="sdpo", eval_strategy="steps", eval_steps=1)),
    (before_training, dict(peft_config=LORA)),
    (loaded_weights, dict(peft_config=LORA)),
    (before_training, dict(objective="grpo", steps_per_generation=2)),
]


@pytest.mark.parametrize(
    ("story", "options"), CASES, ids=lambda value: getattr(value, "__name__", None) or str([*value])
)
def test_it_samples_from_the_weights_as_they_are(story, options, log, tmp_path):
    t = make(tmp_path, **options)
    story(t, tmp_path)
    assert len(log.distances) >= 2 and max(log.distances) < SAME, log.distances


LAB = """
task: lab_world
domain: physics
objective: grpo
weight_decay: 0.5
test_rows: 2
eval_rows: 2
eval_k: 1
max_steps: 4
prompts_per_step: 2
num_generations: 2
max_completion_length: 4
learning_rate: 3e-2
eval_steps: 2
samples_per_step: 0
use_vllm: true
"""


@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_the_selected_model_is_the_one_that_is_tested(protocol, log, monkeypatch, tmp_path):
    """Red if the engine answers from the last step's weights."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(LAB)
    monkeypatch.setattr(session, "selected_step", lambda *_: 2)  # chance, with so few questions
    status, err = pgpo("train", "--config", recipe, "--output_dir", run, "--protocol", protocol)
    assert status == 0, err
    assert json.loads((run / "result.json").read_text())["selected"]["step"] == 2
    assert max(log.distances) < SAME
    if protocol == "strict":  # else the curve has tested it already
        tested = load_file(run / "checkpoints/checkpoint-2/model.safetensors")
        last = load_file(run / "checkpoints/checkpoint-4/model.safetensors")
        held = dict(log.engine.model.named_parameters())
        assert all(torch.equal(held[name], tested[name]) for name in held)
        assert not all(torch.equal(held[name], last[name]) for name in held)
        lines = read_run(run).evaluations
        assert [line["step"] for line in lines if line["split"] == "test_selected"] == [2]


def test_a_run_goes_on_with_the_engine_of_its_checkpoint(log, tmp_path):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(LAB)
    assert pgpo("train", "--config", recipe, "--output_dir", run, "--eval_strategy", "no", "--save_steps", "4")[0] == 0
    assert pgpo("train", "--resume", run, "--max_steps", "5")[0] == 0
    assert len(log.engines) == 2 and max(log.distances) < SAME


# What it samples with -------------------------------------------------------------------------------------------------

OF_TRAINING = dict(top_k=7, min_p=0.1, repetition_penalty=1.3, top_p=0.8, temperature=1.7)


def test_the_sampling_of_training_is_not_that_of_evaluation(log, tmp_path):
    """And training goes on with its own."""
    extra = dict(seed=3, stop_token_ids=[9], bad_words=["w6"], n=1)
    options = dict(generation_kwargs=extra, eval_strategy="steps", eval_steps=1, importance_clip=None)
    t = make(tmp_path, **OF_TRAINING, **options, max_completion_length=3)
    trainer_kit.train(t)
    asked = log.engine.asked
    kinds = [p["seed"] == 3 for p in asked]
    assert kinds == [*[True] * 16, *[False] * 4] * 2
    for p, training in zip(asked, kinds, strict=True):
        assert {name: p[name] for name in OF_TRAINING} == (
            OF_TRAINING if training else dict(top_k=0, min_p=0.0, repetition_penalty=1.0, top_p=0.95, temperature=0.6)
        )
        assert (p["stop_token_ids"], p["bad_words"], p["max_tokens"]) == ([9], ["w6"], 3)  # hold in both


# pgpo eval --use_vllm -------------------------------------------------------------------------------------------------


def model_folder(tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def evaluate(folder, *words):
    return pgpo("eval", folder, "--use_vllm", "--rows", "1", "--k", "2", "--no_hint", *words)


def test_the_engine_of_eval_gets_what_the_flags_say(log, tmp_path):
    words = ("--dtype", "bfloat16", "--trust_remote_code", "--max_prompt_length", "30", "--max_new_tokens", "4")
    options = {"enforce_eager": True, "gpu_memory_utilization": 0.5}
    status, err = evaluate(model_folder(tmp_path), *words, "--vllm_options", json.dumps(options))
    assert status == 0, err
    expected = dict(dtype="bfloat16", trust_remote_code=True, max_model_len=34, **options)
    assert log.engine.options == {"model": str(tmp_path / "model"), **expected}
    assert log.engine.model.dtype == torch.bfloat16
    assert [(p["n"], p["max_tokens"], p["temperature"]) for p in log.engine.asked] == [(2, 4, 1.0)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max_prompt_length", "2"), "prompt tokens, more than max_prompt_length = 2"),
        (("--vllm_options", "{"), "vllm_options is no JSON"),
        (("--vllm_options", "[1]"), "give a JSON object"),
        (("--vllm_options", '{"no_such_option": 1}'), "unexpected keyword argument 'no_such_option'"),
        (("--vllm_options", '{"seed": 1}', "--use_vllm", "false"), "add --use_vllm"),
        (("--max_new_tokens", "128"), "more than the model's 128 positions; set --max_new_tokens to at most"),
    ],
)
def test_what_the_engine_of_eval_cannot_do_is_told_in_one_sentence(words, said, log, tmp_path):
    status, err = evaluate(model_folder(tmp_path), *words)
    assert (status, err.count("\n")) == (2, 1) and said in err


def test_the_form_of_a_runs_answers_holds_in_eval(log, monkeypatch, tmp_path):
    """TRL takes it as a field, and as a mapping in generation_kwargs."""
    for n, stored in enumerate(
        (
            dict(vllm_structured_outputs_regex="a+"),
            dict(generation_kwargs=dict(structured_outputs=dict(regex="a+"), top_k=3)),
        )
    ):
        run = tmp_path / str(n)
        RunLog.create(run, dict(use_vllm=True, task="lab_world", max_completion_length=3, **stored)).close()
        (run / "checkpoints").mkdir()
        monkeypatch.setattr(evaluation, "model_folder", lambda name: str(model_folder(tmp_path)))
        status, err = evaluate(run)
        assert status == 0, err
        (asked,) = log.engine.asked
        assert asked["structured_outputs"] == vllm_stub.StructuredOutputsParams(regex="a+") and asked["top_k"] == 0


def test_adapters_are_served_over_their_base(log, tmp_path):
    folder = model_folder(tmp_path)
    config = LoraConfig(r=16, target_modules=["q_proj"], base_model_name_or_path=str(folder), task_type="CAUSAL_LM")
    get_peft_model(build_model(), config).save_pretrained(tmp_path / "adapters")
    file = tmp_path / "adapters/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(folder)}))
    build_tokenizer().save_pretrained(tmp_path / "adapters")
    status, err = evaluate(tmp_path / "adapters", "--max_new_tokens", "2")
    assert status == 0, err
    options = log.engine.options
    assert (options["model"], options["enable_lora"], options["max_lora_rank"]) == (str(folder), True, 16)
    assert log.engine.adapters == {str(tmp_path / "adapters")}
