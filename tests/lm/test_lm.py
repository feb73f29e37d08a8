"""The package on a real pretrained chat model, SmolLM2-135M-Instruct: 30 layers, 9 query heads on 3, 49,152 tokens.

`make test-lm` builds it (recipes/lm/from_gguf.py). Memory 4 GB, one CPU core a few minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import on_cpus
from safetensors.torch import load_file
from trainer_kit import train as train_quietly
from trainer_kit import trainer, trl_trainer, weights

from pgpo import runlog
from pgpo.cli import main
from pgpo.core import dense_distillation_head, fused_distillation_head
from pgpo.forward.batching import Limits
from pgpo.forward.open_model import head_error, joins, open_forward
from pgpo.forward.passes import Passes, States
from pgpo.teacher import Teacher, build_contexts

FOLDER = Path(os.environ.get("PGPO_SMOLLM2", Path(sys.prefix, "smollm2")))  # `make test-lm` puts it there
pytestmark = [
    pytest.mark.lm,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no SmolLM2 in {FOLDER}: its wheel could not be had"),
]
TASK = [
    *("--task", "reasoning_gym:basic_arithmetic", "--prompt_style", "plain", "--task_options"),
    '{"min_terms": 2, "max_terms": 2, "max_digits": 1, "allow_parentheses": false, "allow_negation": false}',
]
RUN = [
    *("train", "--model_name_or_path", str(FOLDER), *TASK, "--objective", "pgpo", "--prompts_per_step", "4"),
    *("--num_generations", "8", "--max_completion_length", "12", "--max_prompt_length", "128", "--temperature", "0.5"),
    *("--max_teacher_prompt_length", "256", "--learning_rate", "3e-5", "--warmup_steps", "0", "--use_cpu"),
    *("--eval_k", "1", "--test_rows", "4", "--save_strategy", "steps", "--report_to", "none"),
]
FULL = ["--bf16", "false", "--gradient_checkpointing", "false"]
GIB = 2**30
QUESTIONS = ["What is 3 + 4?", "Name the capital of France.", "Which is larger, 2 or 5?"]


@pytest.fixture(scope="module")
def gym() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed: pip install 'pgpo[tasks]'")


def load(dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype)


@pytest.fixture(scope="module")
def model():
    """For tests that train nothing."""
    found = load().eval()
    open_forward(found)
    return found


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER, padding_side="left")


@pytest.fixture(scope="module")
def rows(tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of hinted prompts and of their completions, four, one and three of unequal length."""
    texts = [["The answer is 7.", "3 + 4 = 7", "8", "The sum of 3 and 4 is 7."], ["Paris"], ["5", "It is 5.", "2"]]
    prompts, completions = [], []
    for question, answers in zip(QUESTIONS, texts, strict=True):
        chat = [{"role": "user", "content": question}]
        hinted = build_contexts([chat] * 2, [answers[0], ""], [1.0, 0.0], 2)[1].prompt
        ids = tokenizer.apply_chat_template(hinted, add_generation_prompt=True, return_dict=True)["input_ids"]
        for answer in answers:
            prompts.append(ids)
            completions.append([*tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
    return prompts, completions


def alone(model, prompts, completions) -> torch.Tensor:
    """[N, V]: transformers' own logits, row by row."""
    parts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
        parts.append(logits[0, len(prompt) - 1 : -1])
    return torch.cat(parts)


# The model ------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_a_chat_model(model, tokenizer) -> None:
    """A slip in the conversion (heads permuted, another template, digits split otherwise) leaves no such answer."""
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.config.tie_word_embeddings and model.num_parameters() == 134_515_008
    chat = [{"role": "user", "content": QUESTIONS[1]}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\n")
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids) and ids[-1] == tokenizer.eos_token_id


# Forwards -------------------------------------------------------------------------------------------------------------


def test_joined_siblings_have_the_states_of_rows_alone(model, rows, tokenizer) -> None:
    prompts, completions = rows
    passes = Passes(model, tokenizer.pad_token_id, model.device)
    assert joins(model) and passes.join_error(model, model.config.vocab_size) < 1e-4
    with torch.no_grad():
        got = passes.forward(model, prompts, completions, lambda hidden, head: head.logits(hidden), [4, 1, 3])
        apart = passes.forward(model, prompts, completions, lambda hidden, head: head.logits(hidden))
    expected = alone(model, prompts, completions)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)  # logits of up to 30
    torch.testing.assert_close(apart, expected, atol=2e-3, rtol=0)


def test_shared_prefixes_give_the_states_of_padded_rows_and_the_teacher_is_the_student(model, rows, tokenizer) -> None:
    prompts, completions = rows
    passes = Passes(model, tokenizer.pad_token_id, model.device)
    teacher = Teacher(model, "ema", 0.05)
    open_forward(teacher.module)
    tokens: list[int] = []
    hook = teacher.module.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared = passes.teacher(teacher, prompts, completions, Limits())
    cost, tokens[:] = sum(tokens), []
    padded = passes.teacher(teacher, prompts, completions)
    hook.remove()
    assert cost < 0.7 * sum(tokens)  # of eight prompts three are read
    torch.testing.assert_close(shared.hidden, padded.hidden, atol=1e-3, rtol=0)
    with torch.no_grad():  # before any update, teacher and student are one: no divergence between them
        student = passes.forward(model, prompts, completions, States)
    assert torch.equal(student.hidden, padded.hidden) and torch.equal(student.head.weight, padded.head.weight)


def test_the_fused_head_is_the_dense_one(model, rows, tokenizer) -> None:
    """Divergence, entropies and gradients with 49,152 tokens; the teacher read a hint, the student did not."""
    prompts, completions = rows
    passes = Passes(model, tokenizer.pad_token_id, model.device)
    chats = [[{"role": "user", "content": QUESTIONS[i]}] for i in (0, 0, 0, 0, 1, 2, 2, 2)]
    plain = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]
    with torch.no_grad():
        taught = passes.forward(model, prompts, completions, States)
        own = passes.forward(model, plain, completions, States)
    labels = torch.tensor([token for completion in completions for token in completion])
    weight = own.head.weight.detach()
    results = []
    for head in (fused_distillation_head, dense_distillation_head):
        hidden, matrix = own.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        share = torch.full((len(labels),), 1 / len(labels))
        out = head(hidden, matrix, taught.hidden, weight, labels, share, kind="jsd", beta=0.5, top_k=100)
        out.loss.backward()
        results.append((out.divergence, out.student_entropy, out.teacher_entropy, hidden.grad, matrix.grad))
    for fused, dense in zip(*results, strict=True):
        torch.testing.assert_close(fused, dense, atol=2e-5 * float(dense.abs().max()) + 1e-6, rtol=1e-3)
    assert results[0][0].max() > 0.01  # the hint says something


def test_the_model_ends_in_a_plain_head(model, rows) -> None:
    assert head_error(model, torch.tensor([rows[0][0]])) < 1e-5


# Evaluation and training ----------------------------------------------------------------------------------------------


def test_the_student_and_the_reader_of_a_right_sibling_are_evaluated(gym, tmp_path, capsys) -> None:
    """A hint that does not arrive, or a format that nobody keeps, leaves nothing right."""
    file = tmp_path / "records.jsonl"
    words = ["--k", "4", "--rows", "8", "--temperature", "0.5", "--top_p", "1", "--max_new_tokens", "12"]
    assert main(["eval", str(FOLDER), *TASK, *words, "--records", str(file)]) == 0
    assert re.search(r"^hinted +avg@4 ", capsys.readouterr().out, re.MULTILINE)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    hinted = {r["question_id"] for r in found if r["reader"] == "hinted"}
    for reader in ("student", "hinted"):
        right = [r["reward"] >= 1 for r in found if r["reader"] == reader and r["question_id"] in hinted]
        assert len(right) == 4 * len(hinted) > 0
        assert sum(right) / len(right) > 0.2, reader  # measured on 16 questions: .53 and .52


# Of its own memory alone: what getrusage and wait4 tell of a child starts at its parent's peak.
PEAK = """
import sys
from pathlib import Path
from pgpo.cli import main
code = main(sys.argv[1:])
print(Path("/proc/self/status").read_text())
sys.exit(code)
"""


def trained(directory: Path, *words: str) -> float:
    """`pgpo train` in a process of its own; its largest resident memory in bytes."""
    command = [sys.executable, "-c", PEAK, *RUN, *words, "--output_dir", str(directory)]
    done = subprocess.run(command, env=on_cpus(HF_HUB_OFFLINE="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return float(re.search(r"^VmHWM:\s+(\d+) kB$", done.stdout, re.MULTILINE)[1]) * 1024


@pytest.fixture(scope="module")
def full(gym, tmp_path_factory) -> tuple[Path, float]:
    """Two steps of all parameters in fp32: 4 questions x 8 completions of at most 12 tokens."""
    directory = tmp_path_factory.mktemp("full") / "run"
    return directory, trained(directory, *FULL, "--max_steps", "2", "--save_steps", "1", "--save_total_limit", "2")


def test_all_parameters_train_in_four_gigabytes(full) -> None:
    directory, peak = full
    assert peak < 4 * GIB  # 3.4 to 3.8 measured
    steps = runlog.read_run(directory).metrics
    assert [line[runlog.STEP] for line in steps] == [1, 2]
    for line in steps:
        assert line[runlog.ACTIVE_SHARE] > 0 and 0 < line[runlog.GRAD_NORM] < 1e3
        assert line[runlog.RHO] == pytest.approx(min(2.0, math.exp(line[runlog.INFORMATION])), rel=1e-4)
    before, after = load_file(FOLDER / "model.safetensors"), load_file(last(directory, 2) / "model.safetensors")
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
    assert all(0 < distance < 1e-3 for distance in moved.values())  # two steps of AdamW at 3e-5


def test_the_plan_is_within_fifteen_percent_of_the_measured_peak(full, tmp_path, capsys) -> None:
    """With prompts as long as this task's, 60 tokens and 100 with a hint."""
    file = tmp_path / "plan.json"
    words = ["--memory", "8", "--device", "cpu", "--no-autocast", "--no-gradient-checkpointing", "--json", str(file)]
    words += ["--prompts-per-step", "4", "--max-completion-length", "12", "--max-prompt-length", "60"]
    assert main(["plan", str(FOLDER), *words, "--teacher-prompt-length", "100"]) == 0
    assert json.loads(file.read_text())["peak"] == pytest.approx(full[1], rel=0.15)


def last(directory: Path, step: int) -> Path:
    return directory / runlog.CHECKPOINTS_FOLDER / f"checkpoint-{step}"


def test_a_resumed_run_is_the_run_that_was_not_stopped(full, tmp_path, capfd) -> None:
    directory = tmp_path / "stopped"
    trained(directory, *FULL, "--max_steps", "1", "--save_steps", "1", "--save_total_limit", "1")
    assert main(["train", "--resume", str(directory), "--max_steps", "2"]) == 0
    whole, resumed = (last(d, 2) for d in (full[0], directory))
    manifests = [json.loads((d / "manifest.json").read_text())["files"] for d in (whole, resumed)]
    tensors = {name for name in manifests[0] if name.endswith((".safetensors", ".pt"))} - {"scheduler.pt"}
    assert {"model.safetensors", "optimizer.pt"} <= tensors
    differing = [name for name in sorted(tensors) if manifests[0][name] != manifests[1][name]]
    assert differing == []


def test_adapters_in_bf16_with_checkpointing_take_one_and_a_half_gigabytes(gym, tmp_path) -> None:
    directory = tmp_path / "lora"
    adapters = ["--use_peft", "--lora_r", "8", "--lora_target_modules", "q_proj", "v_proj", "--dtype", "bfloat16"]
    words = ["--bf16", "true", "--gradient_checkpointing", "true", "--max_steps", "2", "--save_steps", "2"]
    assert trained(directory, *adapters, *words) < 1.5 * GIB
    run = runlog.read_run(directory)
    assert all(line[runlog.GRAD_NORM] > 0 for line in run.metrics)
    saved = load_file(last(directory, 2) / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)  # zero before training


def test_grpo_takes_the_step_of_trl(tmp_path, tokenizer) -> None:
    """SGD, so that a step is the gradient; one batch of 2 questions x 4 completions that are given."""
    options = dict(objective="grpo", prompts_per_step=2, optim="sgd", learning_rate=1e-3, max_steps=1)
    with contextlib.redirect_stdout(io.StringIO()):
        ours = trainer(tmp_path / "a", load(), tokenizer=tokenizer, **options)
        train_quietly(ours)
    start, mine = weights(load()), weights(ours.model)
    del ours
    theirs = weights(trl_trainer(tmp_path / "b", load(), tokenizer=tokenizer, **options).model)
    steps = {name: float((theirs[name] - start[name]).abs().max()) for name in start}
    assert min(steps.values()) > 0
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=1e-3 * steps[name] + 1e-8, rtol=0)
