"""What a user can get wrong in words, recipes, data, models and folders: one sentence, exit status 2, nothing written.

Each case asserts on the whole listing of the working folder (names and contents) before and after. The fuzzers draw
from seeds; the slow suite draws many more cases.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import io
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import trainer_kit
import yaml
from conftest import build_model, build_tokenizer
from fuzz import any_value, fuzzed, spoiled
from test_science_qa import record

from pgpo import PGPOConfig, PGPOTrainer
from pgpo.cli import main
from pgpo.command import directory as run_directory
from pgpo.command import models
from pgpo.errors import UserError
from pgpo.lab.plan import read_study
from pgpo.runlog import RunLog
from pgpo.settings import arguments
from pgpo.settings.arguments import parse

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--test_rows", "2", "--eval_rows", "2", "--eval_k", "2", "--max_steps", "4", "--prompts_per_step", "2"),
    *("--num_generations", "2", "--max_completion_length", "4", "--eval_strategy", "no", "--save_steps", "2"),
]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder with the digest of its content."""
    return {
        str(p.relative_to(folder)): digest(p.read_bytes()) if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(folder, capsys):
    """Run the command line, which must refuse; returns what it says before the last line, and its last sentence."""

    def run(*words: str, says: int = 0) -> tuple[list[str], str]:
        before = listing(folder)
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert status == 2, err
        assert out == ""
        assert "Traceback" not in err and len(err) < 1500, err
        assert err.endswith("\n")
        *said, last = err[:-1].split("\n")
        assert len(said) == says, err
        assert last.startswith("pgpo: ")
        assert listing(folder) == before
        return said, last

    return run


@pytest.fixture
def refused_early(refused, folder, monkeypatch):
    """`refused` before a model is loaded, with no file touched; what gets past arguments and data "reached the model".

    Returns the sentence.
    """

    def stop(*args, **kwargs):
        raise UserError("reached the model.")

    monkeypatch.setattr("pgpo.command.train.load_model", stop)
    load, cached = arguments.load_task, functools.cache(arguments.load_task)  # the lab's takes a while
    monkeypatch.setattr(
        arguments, "load_task", lambda name, **kw: (cached if name == "lab_world" else load)(name, **kw)
    )

    def check(*words: object) -> str:
        before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
        _, sentence = refused(*words)
        assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
        return sentence

    return check


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A loadable model that knows none of the lab's words."""
    return save_model(tmp_path_factory.mktemp("tiny"))


def save_model(folder: Path, tokenizer=None) -> Path:
    model = build_model()
    model.config.max_position_embeddings = 4096  # or the run says what it shortens
    model.save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run of four steps with checkpoints 2 and 4."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", "--model_name_or_path", str(tiny), "--output_dir", str(directory), *SMALL]) == 0
    return directory


# Names and values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        ("--domain astrology", "no domain 'astrology'; choose one of physics, chemistry"),
        ("--task science_qa --domain astrology --data_path .", "Unknown science domain 'astrology'; choose"),
        ("--task science_qa", "needs --domain"),
        ("--task arithmetic", "Unknown task 'arithmetic'; choose one of lab_world, math, reasoning_gym, science_qa"),
        ("--variant baroque", "no variant 'baroque'; choose one of plain, style"),
        ("--objective ppo", "objective is 'ppo'; choose one of pgpo, sdpo, grpo"),
        ("--optim adamgrad", "--optim: invalid choice: 'adamgrad'"),
        ("--optim schedule_free_adamw", "not linear in the learning rate, so rho cannot act; use adamw_torch"),
        ("--alpha -0.5", "alpha is -0.5; it must be a number >= 0"),
        ("--alpha nan", "alpha is nan; it must be a finite number"),
        ("--rho_max 0.9", "rho_max is 0.9; it must be a number >= 1"),
        ("--num_generations 1", "num_generations is 1; .* no sibling can be a demonstration"),
        ("--beta 0.1 --objective sdpo", "beta is 0.1, which self-distillation does not have; leave it at 0.0"),
        (
            "--per_device_train_batch_size 9 --num_generations 4",
            "9 completions per step are not a multiple of num_generations = 4",
        ),
        ("--learning_rat 1", "unrecognized arguments: --learning_rat 1; see `pgpo train --help`"),
        ("physics", "unrecognized arguments: physics; see `pgpo train --help`"),
        ("--alpha much", "--alpha: invalid float value: 'much'"),
        ("--max_steps 2.5", "--max_steps/--max-steps: invalid int value: '2.5'"),
        ("--max_steps", "--max_steps/--max-steps: expected one argument"),
        ("--test_rows 0", "test_rows is 0; it must be at least 1"),
        ("--per_device_train_batch_size 16 --prompts_per_step 8", "prompts_per_step is 8, but .* make 2 questions"),
        ("--loss_type bnpo", "loss_type is 'bnpo', which self-distillation does not have; .*set divergence"),
        ("--model_init_kwargs {}", "--model_init_kwargs does nothing here; use --dtype"),
        ("--resume_from_checkpoint run", "--resume_from_checkpoint does nothing here; use --resume"),
        ("--task", "--task.*: expected one argument; see `pgpo train --help`"),
        ("--prompts_per_step 5000", "4096 training questions, fewer than prompts_per_step = 5000; lower"),
    ],
)
def test_a_wrong_value_is_named_with_what_to_do(refused, words, says):
    _, sentence = refused("train", *words.split())
    assert_matches(sentence, says)


def assert_matches(sentence: str, pattern: str) -> None:
    assert re.search(pattern, sentence), sentence


@pytest.mark.parametrize(
    "words",
    [
        *("lab-base --seed x", "lab-base --flag", "lab-base --variant baroque"),
        *("sde --flag", "sde --law nowhere:law", "sde --json nowhere/x.json", "demo --flag"),
    ],
)
def test_flags_of_the_other_commands(refused, words):
    _, sentence = refused(*words.split())
    assert_matches(sentence, words.split()[-1].split(":")[0])


def test_lab_base_refuses_a_folder_that_holds_something(refused, folder):
    (folder / "thesis").mkdir()
    (folder / "thesis/chapter.txt").write_text("three years of work")
    _, sentence = refused("lab-base", "--out", "thesis")
    assert_matches(sentence, "thesis is not empty; .*--overwrite")


# Values of the configuration ------------------------------------------------------------------------------------------

NUMBERS = ["learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps"]
NUMBERS += ["temperature", "top_p", "repetition_penalty", "alpha", "rho_max", "teacher_rate", "reward_timeout", "beta"]
BAD_VALUES: list[tuple[str, object, str]] = [
    *(
        (name, value, f"{name} is {value}; it must be a finite number")
        for name in NUMBERS
        for value in (math.nan, math.inf)
    ),
    *(
        (name, -0.5, f"{name} is -0.5; it must")
        for name in NUMBERS
        if name not in ("temperature", "top_p", "teacher_rate")
    ),
    ("teacher_rate", 1.5, "teacher_rate is 1.5; a share of the student must lie in"),
    ("top_p", 0, "top_p is 0; nucleus sampling needs a share in"),
    ("top_p", 2, "top_p is 2; nucleus sampling needs a share in"),
    ("temperature", 0, "temperature is 0; student and teacher logits are divided by it"),
    ("temperature", -1.0, "temperature is -1.0; student and teacher logits are divided by it"),
    ("adam_beta1", 1.0, r"adam_beta1 is 1.0; it must lie in \[0, 1\)"),
    ("seed", -1, "seed is -1; a seed must be between 0 and 4294967295"),
    ("seed", 2**32, "seed is 4294967296; a seed must be between"),
    ("data_seed", -3, "data_seed is -3; a seed must be between"),
    ("max_steps", 0, "max_steps is 0; it must be at least 1, or -1"),
    ("num_train_epochs", 0, "num_train_epochs is 0; it must be above 0"),
    ("gradient_accumulation_steps", 0, "gradient_accumulation_steps is 0; it must be at least 1"),
    ("steps_per_generation", 0, "steps_per_generation is 0; it must be at least 1"),
    ("save_steps", 0, "save_steps is 0; it must be above 0"),
    ("top_k", -2, r"top_k is -2; it must be 0 \(all tokens\) or more"),
    ("min_p", 1.5, r"min_p is 1.5; it must lie in \[0, 1\]"),
    ("prompts_per_step", 0, "prompts_per_step is 0; it must be at least 1"),
    ("on_nonfinite", "ignore", "on_nonfinite is 'ignore'; choose one of stop, skip"),
]


@pytest.mark.parametrize(("name", "value", "says"), BAD_VALUES, ids=lambda v: str(v)[:24])
def test_a_value_out_of_range_is_named_in_python(tmp_path, name, value, says):
    with pytest.raises(UserError, match=says):
        trainer_kit.config(tmp_path / "run", **{name: value})
    assert list(tmp_path.iterdir()) == []


# One of each rule: the command line goes through the same configuration.
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        row
        for row in BAD_VALUES
        if row[0] in ("learning_rate", "adam_beta1", "seed", "max_steps", "top_p", "on_nonfinite")
    ],
    ids=lambda v: str(v)[:24],
)
def test_a_value_out_of_range_is_named_on_the_command_line(refused_early, name, value, says):
    text = str(float(value)) if name == "top_p" else str(value)  # argparse makes it a float
    sentence = refused_early("train", f"--{name}={text}")
    assert re.search(says.replace(f"top_p is {value};", f"top_p is {text};"), sentence), sentence


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("alpha", "1", "alpha is '1'; it must be a number"),
        ("alpha", True, "alpha is True; it must be a number"),
        ("alpha", [1.0], r"alpha is \[1.0\]; it must be a number"),
        ("learning_rate", None, "learning_rate is None; it must be a number"),
        ("learning_rate", 10**400, "learning_rate is .*, which takes more than 64 bits"),
        ("num_generations", 2.0, "num_generations is 2.0; it must be a whole number or None"),
        ("num_generations", "8", "num_generations is '8'; it must be a whole number or None"),
        ("seed", 1.0, "seed is 1.0; it must be a whole number"),
        ("seed", False, "seed is False; it must be a whole number"),
        ("seed", datetime.date(2020, 1, 1), "seed is datetime.date.*; it must be a whole number"),
        ("eval_k", 10**5000, "eval_k is .*huge number.*64 bits"),
        ("fused_head", "no", "fused_head is 'no'; it must be true or false"),
        ("fused_head", 1, "fused_head is 1; it must be true or false"),
        ("teacher", 3, "teacher is 3; it must be a text"),
        ("reprompt_template", {"prompt": None}, "reprompt_template is {'prompt': None}; it must be a text or None"),
        ("rho_file", "a\0b", "rho_file is .*, which holds a NUL character"),
        ("guard_signals", {1: [2] * 10**6}, "guard_signals is .*; it must be a text or None"),
    ],
    ids=lambda v: str(v)[:24] if not isinstance(v, int) else "number",
)
def test_a_value_of_another_type_is_named(tmp_path, name, value, says):
    with pytest.raises(UserError, match=says) as caught:
        trainer_kit.config(tmp_path, **{name: value})
    assert len(str(caught.value)) < 300


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = trainer_kit.config(
        tmp_path, alpha=np.float32(0.5), num_generations=np.int64(4), learning_rate=1, importance_clip=math.inf
    )
    assert (config.alpha, config.num_generations, config.importance_clip) == (0.5, 4, math.inf)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("eval . --k nan", "--k: invalid int value: 'nan'"),
        ("eval . --seed -1", "seed is -1; a seed must be between"),
        ("eval . --temperature nan", "temperature is nan; it must be a finite number"),
        ("train --eval_rows -1", "eval_rows is -1"),
        ("train --samples_per_step -1", "samples_per_step is -1"),
        ("train --task science_qa --domain physics --data_path . --validation_fraction nan", "validation_fraction"),
    ],
)
def test_numbers_of_the_other_commands(refused_early, folder, words, says):
    assert says in refused_early(*words.split())


# Recipes --------------------------------------------------------------------------------------------------------------

RECIPE = """\
# A recipe that is in order.
objective: pgpo
alpha: 1.0
learning_rate: 1e-3
num_generations: 4
prompts_per_step: 4
report_to: none
remove_thinking: true
solution_template: "Right: {demonstration}"
chat_template_kwargs: {enable_thinking: false}
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
SNIPPETS: list[tuple[str | bytes, str]] = [
    ("alpha: 1.0\nlearning_rat: 1\n", "the recipe has unknown names: learning_rat; see `pgpo train --help`"),
    ("alpha: [1.0\n", "recipe r.yaml is not valid YAML: .*line 2"),
    ("- alpha\n- 1.0\n", "recipe r.yaml holds no `name: value` lines"),
    ("", "recipe r.yaml holds no `name: value` lines"),
    ("alpha: much\n", "--alpha: invalid float value: 'much'"),
    ("alpha: .nan\n", "alpha is nan"),
    ("max_steps: 2.5\n", "--max_steps/--max-steps: invalid int value: '2.5'"),
    (BOMB, "recipe r.yaml is not valid YAML: the alias .a is not supported, write the value out .*line 2"),
    ("x: &x 1\nalpha: *x\n", "the alias .x is not supported"),
    ("a: &a [*a]\n", "the alias .a is not supported"),
    ("<<: *b\nalpha: 1\n", "the alias .b is not supported"),
    ("alpha: 1.0\nseed: 3\nalpha: 2.0\n", "not valid YAML: 'alpha' stands twice .*line 3"),
    ("alpha: 1.0\n'alpha': 1.0\n", "'alpha' stands twice"),
    ("chat_template_kwargs: {a: 1, a: 2}\n", "'a' stands twice"),
    ("1: x\n1.0: y\n", "1.0 stands twice"),
    ("alpha: 1.0\n\tseed: 3\n", "not valid YAML: .*line 2"),
    ("alpha:\t1.0\n", "not valid YAML: .*line 1"),
    (b"\xef\xbb\xbfalpha: 1.0\n", "reached the model"),  # a byte order mark
    ("alpha: 1.0\r\nseed: 3\r\n", "reached the model"),
    ("alpha: 1.0\n".encode("utf-16"), "recipe r.yaml is not UTF-8 at byte 0; save it as UTF-8"),
    (b"alpha: 1.0 # \xff\n", "not UTF-8 at byte 13"),
    (b"alpha: 1.0\x00\n", "not valid YAML: .*special characters"),
    ("[" * 5000, "not valid YAML: it is nested too deeply"),
    ("{" * 5000, "not valid YAML"),
    ("a: " * 500, "not valid YAML"),
    ("!!python/object/apply:os.system ['touch pwned']\n", "not valid YAML: could not determine a constructor"),
    ("alpha: !!float much\n", "not valid YAML: ValueError"),
    ("alpha: !!bool much\n", "not valid YAML: KeyError"),
    ("alpha: !!timestamp much\n", "not valid YAML: AttributeError"),
    ("alpha: 2020-99-99\n", "not valid YAML: ValueError"),
    (f"seed: {'9' * 5000}\n", "not valid YAML: ValueError"),
    (f"seed: {'9' * 50}\n", "seed is 9+.*64 bits"),
    ("alpha: 1\n---\nalpha: 2\n", "not valid YAML: expected a single document"),
    ("alpha: {prompt}\n", "alpha is {'prompt': None}; it must be a number"),
    ("reprompt_template: {prompt}\n", "reprompt_template is {'prompt': None}; it must be a text or None"),
    ("task: [lab_world]\n", r"task is \['lab_world'\]; it must be a text"),
    ("task: 2020-01-01\n", "task is datetime.date"),
    ("task: ~\n", "task is None; it must be a text"),
    ("alpha: ~\n", "alpha is None; it must be a number"),
    ("alpha: yes\n", "alpha is True; it must be a number"),
    ("alpha: .inf\n", "alpha is inf; it must be a finite number"),
    ("num_generations: 2.0\n", "--num_generations/--num-generations: invalid int value: '2.0'"),
    ("overwrite: 3\n", "--overwrite: Truthy value expected: got 3"),
    ("eval_rows: {}\n", "eval_rows is {}; it must be a whole number or None"),
    ('data_path: "a\\0b"\n', "data_path is .*, which holds a NUL character; remove it"),
    ("help: 1\n", "the recipe has unknown names: help"),
    ("~: 1\n", "the recipe has unknown names: None"),
    ("1: 1\nx: 1\n2020-01-01: 1\n", "the recipe has unknown names: .*1, .*x"),
    ("? [1, 2]\n: 1\n", "not valid YAML: .*unhashable key"),
    ("output_dir: " + "x" * 5000 + "\n", "File name too long"),
    ("task: science_qa\ndomain: physics\ndata_path: " + "x" * 5000 + "\n", "File name too long"),
    ("rho_file: " + "x" * 5000 + "\n", "reached the model|File name too long"),
]


@pytest.mark.parametrize(("content", "says"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_recipes(refused_early, folder, content, says):
    (folder / "r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refused_early("train", "--config", "r.yaml", "--use_cpu")
    assert re.search(says, sentence), sentence


# They set up the process, not the run: another test would feel it.
PROCESS = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "local_rank", "ddp_backend")
PROCESS += ("full_determinism", "torch_compile", "torch_compile_backend", "torch_compile_mode", "tf32", "use_cpu")
FIELDS = sorted({*PGPOConfig.__dataclass_fields__, *arguments.RunArguments.__dataclass_fields__} - {*PROCESS, "_n_gpu"})


@fuzzed(100)
def test_fuzzed_recipes(refused_early, folder, seeds):
    ends = set()
    for seed in seeds:
        (folder / "r.yaml").write_bytes(spoiled(random.Random(seed), RECIPE.encode()))
        ends.add(refused_early("train", "--config", "r.yaml", "--use_cpu").split("line")[0])
    assert "pgpo: reached the model." in ends and len(ends) > 5  # some are in order, the others wrong in many ways


@fuzzed(100)
def test_recipes_with_any_value_for_any_name(refused_early, folder, seeds):
    ends = set()
    for seed in seeds:
        rng = random.Random(seed)
        document = {rng.choice(FIELDS): any_value(rng) for _ in range(rng.randint(1, 2))}
        (folder / "r.yaml").write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
        ends.add(refused_early("train", "--config", "r.yaml", "--use_cpu").split(" is ")[0])
    assert len(ends) > len(seeds) / 4


@fuzzed(20)
def test_fuzzed_studies(refused_early, folder, seeds):
    text = (ROOT / "recipes/lab-study.yaml").read_bytes()
    for seed in seeds:
        (folder / "s.yaml").write_bytes(spoiled(random.Random(seed), text) + b"\nname: ../../x\n")  # never in order
        refused_early("study", "s.yaml", "--list")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: ../../x\n", "name is '../../x'; give one of letters, digits"),
        ("name: ok\nseeds: [1]\nsettings: {..: {}}\nmethods: {a: {}}\n", "settings has the name '..'; use letters"),
        ("name: ok\nseeds: [1]\nsettings: {a/b: {}}\nmethods: {a: {}}\n", "settings has the name 'a/b'"),
    ],
)
def test_studies(folder, text, says):
    (folder / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_study(Path("s.yaml"))


def test_missing_recipe(refused):
    assert_matches(refused("train", "--config", "r.yaml")[1], "recipe r.yaml cannot be read .No such file")
    assert_matches(refused("train", "--config")[1], "--config needs the path of a YAML recipe")
    assert_matches(refused("train", "--config", ".")[1], "recipe . cannot be read .Is a directory")


def test_flags_win_over_the_recipe_and_are_checked_last(refused, folder):
    (folder / "r.yaml").write_text("alpha: 2.0\nobjective: ppo\n")
    _, sentence = refused("train", "--config=r.yaml", "--objective", "dpo")
    assert_matches(sentence, "objective is 'dpo'")


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "records, says",
    [
        (None, "There is no file or folder q.jsonl"),
        ([record(0), record(1, answerKey="E")], "q.jsonl, line 2: answerKey 'E' is not among the option labels"),
        ([record(0), record(1)], "the task has 0 training questions, fewer than prompts_per_step = 8"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_data_files(refused, folder, tiny, command, records, says):
    if records is not None:
        (folder / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    words = ["--task", "science_qa", "--domain", "physics", "--data_path", "q.jsonl", "--no_data_check"]
    if command == "eval":  # two questions make a test set of 1 and a validation set of 1: none is left to train on
        words = [str(tiny), *words, "--split", "train"]
        says = says if "training" not in says else "the train split holds no questions; choose another --split"
    _, sentence = refused(command, *words)
    assert_matches(sentence, says)


def lines(*extra: str | bytes, count: int = 30) -> bytes:
    good = [json.dumps(record(i)).encode() for i in range(count)]
    return b"\n".join([*good, *(e if isinstance(e, bytes) else e.encode() for e in extra)]) + b"\n"


GOOD = json.dumps(record(99))
DATA: list[tuple[bytes, str]] = [
    (lines(), "reached the model"),
    (lines().replace(b"\n", b"\r\n"), "reached the model"),
    (b"\xef\xbb\xbf" + lines(), "reached the model"),
    (b"\n\n  \n" + lines().replace(b"\n", b"\n\n"), "reached the model"),
    (lines().decode().encode("utf-16"), "q.jsonl, line 1: not UTF-8"),
    (lines(GOOD.replace("{", '{"answerKey": "A", ', 1)), "q.jsonl, line 31: not JSON .'answerKey' stands twice"),
    (lines(GOOD.replace('"label"', '"label": [], "label"')), "line 31: not JSON .'label' stands twice"),
    (lines(GOOD.replace("{", '{"idx": NaN, ', 1)), "line 31: not JSON .NaN is no JSON"),
    (lines(GOOD.replace("{", '{"idx": -Infinity, ', 1)), "line 31: not JSON .-Infinity is no JSON"),
    (lines(GOOD.replace("How far", "\\ud800")), "line 31: not JSON .*surrogates not allowed"),
    (lines(GOOD.replace("99.0 m", "\\uD83D")), "line 31: not JSON .*surrogates not allowed"),
    (lines(GOOD.replace("How far", "\\ud83d\\ude00")), "reached the model"),
    (lines("[" * 100_000), "line 31: not JSON"),
    (lines(GOOD + GOOD), "line 31: not JSON .Extra data"),
    (lines(json.dumps(record(99, question="x" * 50_000_000))), "line 31: 50000[0-9]+ bytes, more than the 1048576 of"),
    (lines("x" * 50_000_000), "line 31: 50000000 bytes, more than"),
    (lines(json.dumps(record(99, choices={"label": [["A"], "B"], "text": ["a", "b"]}))), 'column "choices" must have'),
]


@pytest.mark.parametrize(("content", "says"), DATA, ids=range(len(DATA)))
def test_data(refused_early, folder, content, says):
    (folder / "q.jsonl").write_bytes(content)
    sentence = refused_early(*SCIENCE)
    assert re.search(says, sentence), sentence


SCIENCE = ["train", "--task", "science_qa", "--domain", "physics", "--data_path", "q.jsonl", "--no_data_check"]
SCIENCE += ["--use_cpu", "--prompts_per_step", "4", "--model_name_or_path", "m"]


@fuzzed(100)
def test_fuzzed_data(refused_early, folder, seeds):
    ends = set()
    for seed in seeds:
        rng = random.Random(seed)
        bad = record(99)
        if rng.random() < 0.5:
            bad = record(99) | {rng.choice([*bad, "idx"]): any_value(rng)}
            line = json.dumps(bad, default=str).encode()
        else:
            line = spoiled(rng, GOOD.encode())
        (folder / "q.jsonl").write_bytes(lines(line))
        ends.add(re.sub("[0-9]+", "", refused_early(*SCIENCE))[:60])
    assert len(ends) > 8


def test_a_folder_or_a_file_that_cannot_be_opened(refused_early, folder):
    (folder / "q.jsonl").mkdir()
    assert "holds no .jsonl file" in refused_early(*SCIENCE)
    (folder / "q.jsonl/x.jsonl").mkdir()
    assert "x.jsonl cannot be read (Is a directory)" in refused_early(*SCIENCE)


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "eval"])
def test_prompts_longer_than_the_limit(refused, tiny, command):
    model = ("--model_name_or_path", tiny) if command == "train" else (tiny,)
    _, sentence = refused(command, *model, "--max_prompt_length", "5")
    assert_matches(sentence, r"question \S+ has \d+ prompt tokens, more than max_prompt_length = 5; raise")


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("kind", ["missing", "not a model", "truncated", "no pad and no eos", "no chat template"])
def test_unusable_models(refused, folder, tiny, command, kind):
    path = folder / "model"
    if kind == "not a model":
        path.mkdir()
        (path / "notes.txt").write_text("no model here")
    elif kind == "truncated":
        shutil.copytree(tiny, path)
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind != "missing":
        tokenizer = build_tokenizer()
        if kind == "no pad and no eos":
            tokenizer.pad_token = tokenizer.eos_token = None
        else:
            tokenizer.chat_template = None
        save_model(path, tokenizer)
    said = {
        "missing": f"there is no model folder {path}",
        "not a model": f"the model '{path}' cannot be loaded",
        "truncated": f"the model '{path}' cannot be loaded .SafetensorError",
        "no pad and no eos": "no pad token and no eos token; set",
        "no chat template": "no chat template; use an instruction-tuned model or set one",
    }
    model = ("--model_name_or_path", path) if command == "train" else (path,)
    _, sentence = refused(command, *model)
    assert_matches(sentence, said[kind])


@pytest.mark.parametrize(
    "words, says",
    [
        ("--k 0", "k is 0; it must be at least 1"),
        ("--rows 0", "rows is 0; it must be at least 1"),
        ("--split dev", "split is 'dev'; choose test, validation or train"),
        ("--k many", "--k: invalid int value: 'many'; see `pgpo eval --help`"),
        ("--records nowhere/r.jsonl", "the folder of nowhere/r.jsonl does not exist"),
        ("--temperature -1", "temperature = -1.0 cannot be sampled at"),
        ("--use_vllm", "vLLM, which is not installed"),
    ],
)
def test_eval_arguments(refused, tiny, monkeypatch, words, says):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    assert_matches(refused("eval", tiny, *words.split())[1], says)


def test_eval_needs_a_model(refused):
    assert_matches(refused("eval")[1], "required: model; see `pgpo eval --help`")


@pytest.mark.parametrize(
    "words, says", [("--use_peft --lora_r 0", "`r` should be a positive"), ("--seed -1", "[Ss]eed must be between")]
)
def test_what_only_the_libraries_below_can_judge(refused, tiny, words, says):
    assert_matches(refused("train", "--model_name_or_path", tiny, *words.split())[1], says)


# Run directories ------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_refused_and_untouched(refused, folder, finished):
    shutil.copytree(finished, folder / "run")
    _, sentence = refused("train", "--output_dir", "run")
    assert_matches(sentence, "run already exists; continue it with `pgpo train --resume run`, .* --overwrite")


@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b/run"])
def test_a_run_directory_that_cannot_be_made(refused, folder, name):
    (folder / "file").write_text("a regular file")
    _, sentence = refused("train", "--output_dir", name)
    assert_matches(sentence, f"run directory {name} cannot be created: file is a file; choose another --output_dir")


@pytest.mark.parametrize("place", ["new", "empty", "replaced"])
def test_a_run_that_fails_in_its_first_step_leaves_no_trace(folder, tiny, finished, monkeypatch, capsys, place):
    def fail(self, model, batch):
        raise UserError("the first step failed.")

    monkeypatch.setattr(PGPOTrainer, "optimize", fail)
    if place != "new":
        (folder / "a/b").mkdir(parents=True)
    before = listing(folder)
    if place == "replaced":
        shutil.copytree(finished, folder / "a/b/run")
        (folder / "a/b/run/notes.txt").write_text("the user's own")
        before |= {"a/b/run": "folder", "a/b/run/notes.txt": digest(b"the user's own")}
    words = ["train", "--model_name_or_path", str(tiny), "--output_dir", "a/b/run", *SMALL]
    assert main([*words, "--overwrite"] if place == "replaced" else words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "pgpo: the first step failed."
    assert listing(folder) == before


# Resuming -------------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 2])


def break_json(file: Path) -> None:
    file.write_text('{"global_step": ')


def test_resume_with_a_recipe(refused, folder, finished):
    shutil.copytree(finished, folder / "run")
    (folder / "r.yaml").write_text("alpha: 2.0\n")
    _, sentence = refused("train", "--resume", "run", "--config", "r.yaml")
    assert_matches(sentence, "--resume continues the run with its own arguments; leave --config out")
    assert_matches(refused("train", "--resume")[1], "--resume needs the run directory")
    assert_matches(refused("train", "--resume", "nowhere")[1], "There is no run directory nowhere")


def test_resume_of_a_run_whose_every_checkpoint_is_broken(refused, folder, finished):
    shutil.copytree(finished, folder / "run")
    truncate(folder / "run/checkpoints/checkpoint-4/model.safetensors")
    break_json(folder / "run/checkpoints/checkpoint-2/trainer_state.json")
    said, sentence = refused("train", "--resume", "run", says=2)
    assert "checkpoint-4" in said[0] and "model.safetensors" in said[0]
    assert "checkpoint-2" in said[1] and "trainer_state.json" in said[1]
    assert_matches(sentence, "run has no readable checkpoint in checkpoints/; start a new run")


# Secrets, code and names ----------------------------------------------------------------------------------------------


def test_code_that_comes_with_a_model_runs_when_asked_alone(tmp_path, monkeypatch):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    place, marker = tmp_path / "model", tmp_path / "it ran"
    build_model().save_pretrained(place)
    build_tokenizer().save_pretrained(place)
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (place / "config.json").write_text(json.dumps(config))
    (place / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert PGPOConfig(str(tmp_path), use_cpu=True).trust_remote_code is False
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(UserError, match=r"cannot be loaded .*contains custom code"):
            models.load_model(place, **options)
    for words in (
        ["eval", str(place)],
        ["plan", str(place), "--memory", "80"],
        ["train", "--model_name_or_path", str(place)],
    ):
        assert main(words) == 2
    assert not marker.exists()
    models.load_model(place, trust_remote_code=True)  # the test can tell
    assert marker.exists()


SECRETS = {
    "--hub_token": "hf_SECRETone",
    "--model_init_kwargs": '{"token": "hf_SECRETtwo", "nested": {"api_key": "SECRETthree"}}',
    "--vllm_server_base_url": "http://user:SECRETfour@judge:8000",
}


def test_no_secret_is_written(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"SECRET-{name}")
    words = [word for pair in SECRETS.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["pgpo", "train", *words])
    parsed = parse([*words, "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path / "run")])
    assert parsed.config.hub_token == "hf_SECRETone"  # it is used
    log = RunLog.create(tmp_path / "run", run_directory.resolved_config(parsed, "id"), {"device": "cpu"})
    log.__exit__(None, None, None)
    written = {p.name: p.read_text() for p in (tmp_path / "run").iterdir()}
    assert written.keys() >= {"config.json", "environment.json"}
    for name, text in written.items():
        assert "SECRET" not in text, (name, re.findall(r".*SECRET.*", text))
    config = json.loads(written["config.json"])
    assert config["config"]["vllm_server_base_url"] == "http://***@judge:8000"
    assert "hub_token" not in config["config"]["arguments"]


@pytest.mark.parametrize("domain", ["../../thesis", "/etc/passwd", "..", ".", "a\nb", "ü/é", "x" * 50, "C:\\x"])
def test_a_name_made_from_words_stays_within_its_folder(folder, domain):
    parsed = parse(["--use_cpu", "--bf16", "false"])
    parsed.run.domain = domain
    name = run_directory.new_name(parsed)
    assert name.parent == Path("runs") and name.resolve().parent == (folder / "runs").resolve()
    assert re.fullmatch(r"lab_world-[\w.-]+-pgpo-1", name.name)


@pytest.mark.parametrize("name", ["..", "../..", "org/..", "org/.hidden", "a/b c"])
def test_a_trainer_without_arguments_writes_beside_itself(folder, name):
    from pgpo.settings.field_types import file_name

    made = Path(f"{file_name(name.split('/')[-1])}-PGPO")
    assert made.resolve().parent == folder.resolve() and not made.name.startswith(".")
