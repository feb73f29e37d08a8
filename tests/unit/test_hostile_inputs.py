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
import os
import random
import re
import shutil
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

from pgpo import PGPOConfig
from pgpo.cli import main
from pgpo.errors import UserError
from pgpo.lab.plan import read_study
from pgpo.runlog import RunLog
from pgpo.teacher import ContextTemplates
from pgpo.train import arguments, run
from pgpo.train.arguments import parse
from pgpo.train.user_functions import time_limit

ROWS = 16  # 4 prompts x 4 completions
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("PGPO_SCIENCE_DATA", raising=False)
    return work


@pytest.fixture
def refused(folder, capsys, monkeypatch):
    """Run the command line, which must refuse in one sentence and leave the folder as it is; the sentence.

    Whatever gets past arguments and data is refused as well: "reached the model".
    """

    def stop(*args, **kwargs):
        raise UserError("reached the model.")

    monkeypatch.setattr(run, "load_model", stop)
    monkeypatch.setattr(arguments, "load_task", functools.cache(arguments.load_task))  # the lab's takes a while

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
    ("top_k", -1, r"top_k is -1; it must be 0 \(all tokens\) or more"),
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
    number = "float" if isinstance(value, float) else "whole"
    text = f"{float(value)}" if name == "top_p" else str(value)
    assert re.search(
        says.replace("top_p is 0;", "top_p is 0.0;").replace("top_p is 2;", "top_p is 2.0;"),
        refused("train", f"--{name}={text}"),
    ), number


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
        ("eval . --seed -1", "seed"),
        ("eval . --temperature nan", "temperature"),
        ("eval . --top_p 2", "top_p"),
        ("eval . --max_new_tokens 0", "max_new_tokens"),
        ("eval . --batch_size 0", "batch_size"),
        ("lab-base --seed -1 --out b", "seed"),
        ("plan . --memory nan", "memory"),
        ("plan . --memory -1", "memory"),
        ("train --eval_rows -1", "eval_rows is -1"),
        ("train --samples_per_step -1", "samples_per_step is -1"),
        ("train --task science_qa --domain physics --data_path . --validation_fraction nan", "validation_fraction"),
    ],
)
def test_numbers_of_the_other_commands(refused, folder, words, says):
    assert says in refused(*words.split())
