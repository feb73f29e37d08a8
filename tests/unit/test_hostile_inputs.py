"""Values, functions, files and templates that mean harm or nonsense: one sentence, exit status 2, nothing written.

The fuzzers draw from seeds; the slow suite draws many more cases.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import json
import math
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import trainer_kit
import yaml
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer
from processes import patient

from pgpo import PGPOConfig
from pgpo.cli import main
from pgpo.command import directory as run_directory
from pgpo.command import models
from pgpo.errors import UserError
from pgpo.lab.plan import read_study
from pgpo.runlog import RunLog
from pgpo.teacher import ContextTemplates, build_contexts
from pgpo.train import arguments
from pgpo.train.arguments import parse
from pgpo.train.prompts import Prompts
from pgpo.train.user_functions import call, check_rewards, time_limit

ROWS = 16  # 4 prompts x 4 completions
ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(folder, capsys, monkeypatch):
    """Run the command line, which must refuse in one sentence and leave the folder as it is; the sentence.

    Whatever gets past arguments and data is refused as well: "reached the model".
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
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert status == 2 and out == "", (status, out, err)
        assert err.startswith("pgpo: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "Traceback" not in err and len(err) < 1500, err
        assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
        return err

    return check


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
def test_a_value_out_of_range_is_named_on_the_command_line(refused, name, value, says):
    text = str(float(value)) if name == "top_p" else str(value)  # argparse makes it a float
    sentence = refused("train", f"--{name}={text}")
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
def test_numbers_of_the_other_commands(refused, folder, words, says):
    assert says in refused(*words.split())


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
def test_recipes(refused, folder, content, says):
    (folder / "r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refused("train", "--config", "r.yaml", "--use_cpu")
    assert re.search(says, sentence), sentence


# They set up the process, not the run: another test would feel it.
PROCESS = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "local_rank", "ddp_backend")
PROCESS += ("full_determinism", "torch_compile", "torch_compile_backend", "torch_compile_mode", "tf32", "use_cpu")
FIELDS = sorted({*PGPOConfig.__dataclass_fields__, *arguments.RunArguments.__dataclass_fields__} - {*PROCESS, "_n_gpu"})


def any_value(rng: random.Random, depth: int = 0) -> object:
    """A value of some type that YAML has."""
    kinds: list[Callable[[], object]] = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice([0, 1, -1, 2, 7, 2**31, 2**63, -(2**70), 10**300]),
        lambda: rng.choice([0.0, -0.5, 1.5, 1e-300, 1e300, math.nan, math.inf, -math.inf]),
        lambda: rng.choice(
            ["", " ", "no", "{prompt}", "{}", "{{x}}", "%s", "\0", "\n", "é\u2028", "1e5", "~/x", "../x", "a" * 3000]
        ),
        lambda: datetime.date(2020, 1, rng.randint(1, 28)),
        lambda: b"\xff\x00",
        lambda: "".join(
            chr(rng.choice([rng.randint(32, 126), rng.randint(160, 0xD7FF)])) for _ in range(rng.randint(1, 20))
        ),
    ]
    if depth < 3:
        kinds.append(lambda: [any_value(rng, depth + 1) for _ in range(rng.randint(0, 3))])
        kinds.append(
            lambda: {rng.choice(["a", "b", 1, None]): any_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
        )
    return rng.choice(kinds)()


def spoiled(rng: random.Random, good: bytes) -> bytes:
    """A few bytes changed, put in, or taken out; or nothing but noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randint(0, 300))
    data = bytearray(good)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data) + 1)
        piece = rng.choice(
            [
                rng.randbytes(1),
                rng.choice(
                    [
                        b"\n",
                        b":",
                        b": ",
                        b"\t",
                        b"{",
                        b"}",
                        b"[",
                        b"'",
                        b'"',
                        b"&a ",
                        b"*a",
                        b"!!",
                        b"\0",
                        b"-",
                        b"#",
                        b"\r",
                        b"9",
                    ]
                ),
            ]
        )
        match rng.randrange(3):
            case 0:
                data[place:place] = piece
            case 1:
                del data[place : place + rng.randint(1, 8)]
            case _:
                data[place : place + 1] = piece
    return bytes(data)


def fuzzed(default: int):
    """Seeds of the fuzzers: a few by default, ten times as many in the slow suite."""
    return pytest.mark.parametrize(
        "seeds", [range(default), pytest.param(range(default, 11 * default), marks=pytest.mark.slow)], ids=str
    )


@fuzzed(100)
def test_fuzzed_recipes(refused, folder, seeds):
    ends = set()
    for seed in seeds:
        (folder / "r.yaml").write_bytes(spoiled(random.Random(seed), RECIPE.encode()))
        ends.add(refused("train", "--config", "r.yaml", "--use_cpu").split("line")[0])
    assert "pgpo: reached the model.\n" in ends and len(ends) > 5  # some are in order, the others wrong in many ways


@fuzzed(100)
def test_recipes_with_any_value_for_any_name(refused, folder, seeds):
    ends = set()
    for seed in seeds:
        rng = random.Random(seed)
        document = {rng.choice(FIELDS): any_value(rng) for _ in range(rng.randint(1, 2))}
        (folder / "r.yaml").write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
        ends.add(refused("train", "--config", "r.yaml", "--use_cpu").split(" is ")[0])
    assert len(ends) > len(seeds) / 4


@fuzzed(20)
def test_fuzzed_studies(refused, folder, seeds):
    text = (ROOT / "recipes/lab-study.yaml").read_bytes()
    for seed in seeds:
        (folder / "s.yaml").write_bytes(spoiled(random.Random(seed), text) + b"\nname: ../../x\n")  # never in order
        refused("study", "s.yaml", "--list")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", "the study s.yaml is not valid YAML: 'name' stands twice"),
        (BOMB, "the alias .a is not supported"),
        ("name: ../../x\n", "name is '../../x'; give one of letters, digits"),
        ("name: ok\nseeds: [1]\nsettings: {..: {}}\nmethods: {a: {}}\n", "settings has the name '..'; use letters"),
        ("name: ok\nseeds: [1]\nsettings: {a/b: {}}\nmethods: {a: {}}\n", "settings has the name 'a/b'"),
    ],
)
def test_studies(folder, text, says):
    (folder / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_study(Path("s.yaml"))


# Templates ------------------------------------------------------------------------------------------------------------


@fuzzed(150)
def test_fuzzed_templates_are_taken_whole_or_refused(tmp_path, seeds):
    """Braces that are no placeholder are text; a value that looks like one stays as it is."""
    pieces = [
        "{",
        "}",
        "{{",
        "}}",
        "{prompt}",
        "{solution}",
        "{feedback}",
        "{demonstration}",
        "{0}",
        "{prompt!r}",
        "{ x }",
    ]
    pieces += ["%s", "$x", "\\", "{prompt.__class__}", "é", "\n", "text"]
    taken = 0
    for seed in seeds:
        rng = random.Random(seed)
        chosen = [rng.choice(pieces) for _ in range(rng.randint(0, 6))]
        if rng.random() < 0.5:
            chosen += ["{prompt}", "{solution}", "{feedback}"]
            rng.shuffle(chosen)
        text = "".join(chosen)
        names = sorted(re.findall(r"\{([A-Za-z_]\w*)\}", text))
        try:
            templates = ContextTemplates(reprompt=text)
        except ValueError:
            assert names != ["feedback", "prompt", "solution"], text
            continue
        assert names == ["feedback", "prompt", "solution"], text
        before, after = templates.around("{feedback} {0}", "{prompt}")
        expected = text.replace("{solution}", "\1").replace("{feedback}", "\2").replace("{prompt}", "\3")
        expected = expected.replace("\1", "\nCorrect solution:\n\n{feedback} {0}\n\n")
        said = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{prompt}\n\n"
        assert f"{before}\3{after}" == expected.replace("\2", said), text
        taken += 1
    assert taken > len(seeds) / 10


@pytest.mark.parametrize("name", ["reprompt_template", "solution_template", "feedback_template"])
def test_a_template_without_its_placeholder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"The {name.split('_')[0]} template holds no placeholder; it must hold"):
        trainer_kit.trainer(tmp_path, **{name: "{} {0} {{ x }}"})


# Data -----------------------------------------------------------------------------------------------------------------


def record(number: int, **changes) -> dict:
    """A question in the columns of SciKnowEval."""
    columns = {
        "question": f"How far is {number}?",
        "choices": {"label": ["A", "B", "C", "D"], "text": [f"{number}.{i} m" for i in range(4)]},
        "answerKey": "ABCD"[number % 4],
        "domain": "Physics",
        "type": "mcq-4-choices",
        "details": {"level": "L3"},
    }
    return columns | changes


def lines(*extra: str | bytes, count: int = 30) -> bytes:
    good = [json.dumps(record(i)).encode() for i in range(count)]
    return b"\n".join([*good, *(e if isinstance(e, bytes) else e.encode() for e in extra)]) + b"\n"


GOOD = json.dumps(record(99))
DATA: list[tuple[bytes, str]] = [
    (lines(), "reached the model"),
    (lines().replace(b"\n", b"\r\n"), "reached the model"),
    (b"\xef\xbb\xbf" + lines(), "reached the model"),
    (b"\n\n  \n" + lines().replace(b"\n", b"\n\n"), "reached the model"),
    (b"\n \n\r\n", "q.jsonl is empty; restore it"),
    (lines(b'{"question": "\xff"}'), "q.jsonl, line 31: not UTF-8 at byte 14"),
    (lines().decode().encode("utf-16"), "q.jsonl, line 1: not UTF-8"),
    (lines(GOOD.replace("{", '{"answerKey": "A", ', 1)), "q.jsonl, line 31: not JSON .'answerKey' stands twice"),
    (lines(GOOD.replace('"label"', '"label": [], "label"')), "line 31: not JSON .'label' stands twice"),
    (lines(GOOD.replace("{", '{"idx": NaN, ', 1)), "line 31: not JSON .NaN is no JSON"),
    (lines(GOOD.replace("{", '{"idx": -Infinity, ', 1)), "line 31: not JSON .-Infinity is no JSON"),
    (lines(GOOD.replace("{", f'{{"idx": {"9" * 5000}, ', 1)), "line 31: not JSON"),
    (lines(GOOD.replace("How far", "\\ud800")), "line 31: not JSON .*surrogates not allowed"),
    (lines(GOOD.replace("99.0 m", "\\uD83D")), "line 31: not JSON .*surrogates not allowed"),
    (lines(GOOD.replace("How far", "\\ud83d\\ude00")), "reached the model"),
    (lines("[" * 100_000), "line 31: not JSON"),
    (lines("[1, 2]"), "line 31: a JSON list instead of an object"),
    (lines("null"), "line 31: a JSON NoneType instead of an object"),
    (lines(GOOD[:-1]), "line 31: not JSON"),
    (lines(GOOD + GOOD), "line 31: not JSON .Extra data"),
    (lines(json.dumps(record(99, question="x" * 50_000_000))), "line 31: 50000[0-9]+ bytes, more than the 1048576 of"),
    (lines("x" * 50_000_000), "line 31: 50000000 bytes, more than"),
    (lines(json.dumps(record(99, choices=None))), 'line 31: column "choices" is None; make it an object'),
    (lines(json.dumps(record(99, choices={"label": "AB", "text": ["a", "b"]}))), 'line 31: column "choices" must have'),
    (lines(json.dumps(record(99, choices={"label": [["A"], "B"], "text": ["a", "b"]}))), 'column "choices" must have'),
    (lines(json.dumps(record(99, details=[]))), 'line 31: column "details" is'),
    (lines(json.dumps(record(99, question="  "))), 'line 31: column "question" is blank'),
    (lines(json.dumps(record(99, answerKey=1))), 'line 31: column "answerKey" is 1; make it a text'),
]


@pytest.mark.parametrize(("content", "says"), DATA, ids=range(len(DATA)))
def test_data(refused, folder, content, says):
    (folder / "q.jsonl").write_bytes(content)
    sentence = refused(*SCIENCE)
    assert re.search(says, sentence), sentence


SCIENCE = ["train", "--task", "science_qa", "--domain", "physics", "--data_path", "q.jsonl", "--no_data_check"]
SCIENCE += ["--use_cpu", "--prompts_per_step", "4", "--model_name_or_path", "m"]


@fuzzed(100)
def test_fuzzed_data(refused, folder, seeds):
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
        ends.add(re.sub("[0-9]+", "", refused(*SCIENCE))[:60])
    assert len(ends) > 8


def test_a_folder_or_a_file_that_cannot_be_opened(refused, folder):
    (folder / "q.jsonl").mkdir()
    assert "holds no .jsonl file" in refused(*SCIENCE)
    (folder / "q.jsonl/x.jsonl").mkdir()
    assert "x.jsonl cannot be read (Is a directory)" in refused(*SCIENCE)


# Reward and feedback functions ----------------------------------------------------------------------------------------


class Evil:
    """Raises whatever is asked of it."""

    def __float__(self):
        raise KeyError("no number")

    def __repr__(self):
        raise RuntimeError("no name")

    __abs__ = __float__


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def failing_generator():
    yield 1.0
    raise LookupError("half-way")


def endless_generator():
    while True:
        yield 1.0


def assert_training_refuses(t, says: str) -> str:
    """UserError of one line, and no update happened."""
    start, teacher = trainer_kit.weights(t.model), trainer_kit.weights(t.teacher.module)
    with pytest.raises(UserError, match=says) as caught:
        trainer_kit.train(t)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert t.state.global_step == 0
    assert trainer_kit.bitwise_equal(start, trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(teacher, trainer_kit.weights(t.teacher.module))
    return str(caught.value)


RETURNED: list[tuple[Callable[[], object], str]] = [
    (lambda: "1" * ROWS, "returned '1+' at step 1; return a list with one reward per completion"),
    (lambda: b"1" * ROWS, "returned b'1+' at step 1; return a list"),
    (lambda: {float(i): 1 for i in range(ROWS)}, "returned {0.0: 1, .* at step 1; return a list"),
    (lambda: set(map(float, range(ROWS))), "returned {0.0, .* at step 1; return a list"),
    (lambda: torch.tensor(1.0), r"returned tensor\(1.\) at step 1; return a list"),
    (lambda: torch.ones(ROWS, 2), "returned tensor.* for sample 0 at step 1; a reward must be a finite number"),
    (lambda: [[1.0]] * ROWS, r"returned \[1.0\] for sample 0 at step 1"),
    (lambda: [1.0] * 15 + [1j], "returned 1j for sample 15 at step 1"),
    (lambda: [1.0] * 15 + [10**400], "returned .* for sample 15 at step 1; a reward must be a finite number"),
    (lambda: [1.0, Evil(), *[1.0] * 14], "returned <Evil instance at .*> for sample 1 at step 1"),
    (lambda: Evil(), "returned <Evil instance at .*> at step 1; return a list"),
    (lambda: [object()] * ROWS, "returned <object object at .*> for sample 0"),
    (lambda: [["x" * 10**6] * 10**4] * ROWS, r"returned \['xx.* for sample 0"),
    (lambda: [1.0] * 10**6, "returned 1000000 rewards for 16 completions"),
    (endless_generator, "returned more rewards for 16 completions"),
    (failing_generator, "raised LookupError at step 1 on the batch of 16 samples: half-way"),
    (lambda: (_ for _ in ()), "returned 0 rewards for 16 completions"),
    (lambda: sys.exit(0), "raised SystemExit at step 1 on the batch of 16 samples: 0"),
    (lambda: {}["a\nb"], r"raised KeyError at step 1 on the batch of 16 samples: 'a\\nb'"),
    (lambda: (_ for _ in ()).throw(Unspeakable), "raised Unspeakable at step 1 .*: no reason given"),
    (lambda: (_ for _ in ()).throw(ValueError("a\n b" * 400)), "raised ValueError at step 1 .*: a ba b"),
]


@pytest.mark.parametrize(("returned", "says"), RETURNED, ids=range(len(RETURNED)))
def test_whatever_a_reward_function_returns(returned, says):
    calls = []

    def verdict(prompts):
        calls.append(len(prompts))
        return returned()

    what, place = "reward function 'verdict'", "at step 1"
    with pytest.raises(UserError, match=f"^{what} {says}") as caught:
        rewards, problem = check_rewards(
            call(verdict, what, place, "reward", None, {"prompts": ROWS * ["w1"]}), what, place
        )
        raise UserError(problem or f"no problem with {rewards}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert calls == [ROWS]  # not called again to find the sample: it may send mail, or count


@pytest.mark.parametrize("number", [0, 6, 7, 15, 17])
def test_what_a_reward_function_returns_reaches_no_update(tmp_path, number):
    returned, says = RETURNED[number]

    def verdict(prompts, completions, **kwargs):
        return returned()

    assert_training_refuses(trainer_kit.trainer(tmp_path, reward=verdict), f"^reward function 'verdict' {says}")


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("x" * ROWS, "returned 'x+' at step 1; return a list with one text per completion"),
        ([b"no"] * ROWS, "returned b'no' for sample 0 at step 1; return a text or None"),
        ({str(i): "no" for i in range(ROWS)}, "returned {.* at step 1; return a list with one text"),
        ([["no"]] * ROWS, r"returned \['no'\] for sample 0"),
        (endless_generator(), "returned more texts for 16 completions"),
    ],
)
def test_whatever_a_feedback_function_returns(tmp_path, returned, says):
    def remark(prompts, completions, **kwargs):
        return returned

    assert_training_refuses(trainer_kit.trainer(tmp_path, feedback_funcs=remark), f"^feedback function 'remark' {says}")


def test_numbers_of_numpy_and_torch_are_rewards(tmp_path):
    ends = []
    for convert in (
        list,
        np.array,
        torch.tensor,
        lambda r: [torch.tensor(x) for x in r],
        lambda r: [bool(x) for x in r],
    ):
        t = trainer_kit.trainer(
            tmp_path,
            reward=lambda prompts, completions, c=convert, **k: c(trainer_kit.parity_reward(prompts, completions)),
        )
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert all(trainer_kit.bitwise_equal(ends[0], end) for end in ends[1:])


def test_an_object_with_an_async_call_is_a_reward_function(tmp_path):
    class Judge:
        async def __call__(self, prompts, completions, **kwargs):
            await asyncio.sleep(0)
            return trainer_kit.parity_reward(prompts, completions)

    ends = []
    for reward in (trainer_kit.parity_reward, Judge(), functools.partial(Judge())):
        t = trainer_kit.trainer(tmp_path, reward=reward)
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(ends[0], ends[1]) and trainer_kit.bitwise_equal(ends[0], ends[2])


# Functions that hang --------------------------------------------------------------------------------------------------


def sleeping():
    time.sleep(60)


def waiting():
    threading.Event().wait()


def computing():
    while True:
        pass


def catching():
    """Catches every Exception, as code around a flaky service does."""
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def catching_all():
    """Catches the first interruption altogether."""
    for _ in range(2):
        with contextlib.suppress(BaseException):
            time.sleep(60)
    time.sleep(60)


@pytest.mark.parametrize("hang", [sleeping, waiting, computing, catching, catching_all], ids=lambda f: f.__name__)
def test_a_reward_function_that_hangs_is_ended(tmp_path, hang):
    def verdict(prompts, completions, **kwargs):
        hang()
        return [1.0] * len(prompts)

    start = time.monotonic()
    t = trainer_kit.trainer(tmp_path, reward=verdict, reward_timeout=0.2)
    says = "^reward function 'verdict' did not return within reward_timeout = 0.2 seconds at step 1; make it faster"
    assert_training_refuses(t, says)
    assert time.monotonic() - start < patient(3)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("kind", ["async", "feedback", "endless"])
def test_other_functions_that_hang_are_ended(tmp_path, kind):
    async def verdict(prompts, completions, **kwargs):
        await asyncio.sleep(60)

    def remark(prompts, completions, **kwargs):
        time.sleep(60)

    def endless(prompts, completions, **kwargs):
        def items():
            time.sleep(60)
            yield 1.0

        return items()

    options = {"async": {"reward": verdict}, "feedback": {"feedback_funcs": remark}, "endless": {"reward": endless}}[
        kind
    ]
    name = {
        "async": "reward function 'verdict'",
        "feedback": "feedback function 'remark'",
        "endless": "reward .*'endless'",
    }
    t = trainer_kit.trainer(tmp_path, reward_timeout=0.2, **options)
    assert_training_refuses(t, f"^{name[kind]} did not return within reward_timeout = 0.2 seconds at step 1")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_functions_own_timeout_is_its_own(tmp_path, is_async):
    def verdict(prompts, completions, **kwargs):
        raise TimeoutError("the judge is away")

    async def verdict_async(prompts, completions, **kwargs):
        raise asyncio.TimeoutError("the judge is away")

    t = trainer_kit.trainer(tmp_path, reward=verdict_async if is_async else verdict, reward_timeout=60.0)
    assert_training_refuses(t, "raised TimeoutError at step 1 on the batch of 16 samples: the judge is away")


def test_a_function_in_time_is_left_alone(tmp_path):
    ends = []
    for timeout in (None, 60.0):
        t = trainer_kit.trainer(tmp_path, reward_timeout=timeout)
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(*ends)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_limit_gives_back_another_ones_alarm():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        with time_limit(50):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 50
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        signal.raise_signal(signal.SIGALRM)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_the_limit_needs_the_main_thread():
    said = []

    def work():
        try:
            with time_limit(5):
                pass
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [
        "reward_timeout is 5, which needs Linux or macOS and training in the main thread; leave it at None."
    ]


# Chat templates -------------------------------------------------------------------------------------------------------

THINKS_WHEN_LONG = CHAT_TEMPLATE.replace(
    "<assistant>{% endif %}", "<assistant>{% if messages[-1]['content'] | length > 60 %} w9{% endif %}{% endif %}"
)
THINKS_ALWAYS = CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant> w9{% endif %}")
# Not only behind the messages: what the template opens changes what stands before, too.
THINKS_AND_SAYS_SO = "w3 " + THINKS_ALWAYS + "{% if not add_generation_prompt %} end.{% endif %}"


def templated(tmp_path, template: str, **options):
    t = trainer_kit.trainer(tmp_path, **options)
    t.tokenizer.chat_template = template
    return t


def test_a_template_that_opens_thinking_for_long_prompts_alone_is_refused(tmp_path):
    says = (
        "at step 1: the chat template opens the student's answer with '<assistant>' and the teacher's with "
        "'<assistant> w9', so that they would judge different texts; set a template"
    )
    assert_training_refuses(templated(tmp_path, THINKS_WHEN_LONG), re.escape(says))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKS_ALWAYS, THINKS_AND_SAYS_SO])
def test_a_template_that_opens_every_answer_alike_is_taken(tmp_path, template):
    t = templated(tmp_path, template)
    spy = trainer_kit.Spy(t)
    (log,) = trainer_kit.train(t)
    assert log["active_share"] > 0
    student = [
        ids[mask.bool()].tolist() for ids, mask in zip(spy.batches[0]["prompt_ids"], spy.batches[0]["prompt_mask"])
    ]
    opening = t.tokenizer(t.answer_prefix([{"role": "user", "content": "w1"}]))["input_ids"]
    assert len(opening) == (1 if template == CHAT_TEMPLATE else 2)
    for own, teachers in zip(student, spy.batches[0]["teacher_prompt_ids"], strict=True):
        assert own[-len(opening) :] == opening and (teachers is None or teachers[-len(opening) :] == opening)


def test_plain_text_has_no_opening(tmp_path):
    assert trainer_kit.trainer(tmp_path).answer_prefix("w1 w2") == ""


def any_prompt(rng: random.Random) -> object:
    """Chat messages in good order, or in which something is not."""
    messages: list[object] = [
        {"role": rng.choice(["user", "assistant", "system", "tool", "human"]), "content": f"w{rng.randint(0, 35)}"}
        for _ in range(rng.randint(0, 4))
    ]
    if rng.random() < 0.3:
        messages.append(any_value(rng))
    for message in messages:
        if isinstance(message, dict) and rng.random() < 0.3:
            message[rng.choice(["role", "content", "value", "from", "tool_calls"])] = any_value(rng)
    return rng.choice([messages, messages, messages, any_value(rng), f"w1 {any_value(rng)}"])


@fuzzed(400)
@pytest.mark.parametrize("hinted", [True, False])
def test_fuzzed_prompts_are_taken_or_refused_in_a_sentence(seeds, hinted):
    """And what is taken can be rendered, and hinted at."""
    tokenizer = build_tokenizer()
    ends: dict[bool, int] = {True: 0, False: 0}
    for seed in seeds:
        prompt = any_prompt(random.Random(seed))
        problem = Prompts(tokenizer, {}, hinted, limit=50, limit_name="max_prompt_length").problem(prompt)
        ends[problem is None] += 1
        if problem is not None:
            assert problem.endswith(".") and "\n" not in problem and len(problem) < 700, problem
            continue
        if not isinstance(prompt, str):
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        if hinted:
            assert build_contexts([prompt] * 2, ["w1", "w2"], [1.0, 0.0], 2)[1].prompt is not None
    assert min(ends.values()) > len(seeds) / 20, ends


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
    from pgpo.train.field_types import file_name

    made = Path(f"{file_name(name.split('/')[-1])}-PGPO")
    assert made.resolve().parent == folder.resolve() and not made.name.startswith(".")
