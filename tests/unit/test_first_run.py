"""What a user of a model of their own meets first: devices, waiting times, wording, `--help`, the hub, `pgpo env`."""

from __future__ import annotations

import re
import subprocess
import sys
import types

import pytest
import torch
import trainer_kit
from conftest import build_model, build_tokenizer
from huggingface_hub import constants, errors
from test_cli import A, B, evaluate_with, science  # noqa: F401 (a fixture)
from test_memory import config as planned_config
from test_train_run import TINY, pgpo
from transformers import utils

from pgpo import PGPOConfig, UserError, cli, hub
from pgpo.cli import main
from pgpo.command import eval as evaluation
from pgpo.command import hours, session, terminal
from pgpo.errors import reason
from pgpo.settings import config as settings
from pgpo.train.diagnostics import Diagnostics


@pytest.fixture
def own_model(tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Devices --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_bf16(monkeypatch):
    monkeypatch.setattr(settings.training_args, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr(settings, "is_torch_xla_available", lambda: False)
    monkeypatch.setattr(utils, "is_torch_bf16_gpu_available", lambda: False)


def test_without_bf16_training_is_in_fp32_and_says_so(no_bf16, tmp_path):
    said = []
    host = types.SimpleNamespace(say=said.append, watched=set(), run_id=None, trusted=None, before_seal=lambda: None)
    t = trainer_kit.trainer(tmp_path, host=host, bf16=None, use_cpu=False)
    assert t.args.bf16 is False and "no device here computes in bf16, so the matmuls are in fp32." in said


def test_bf16_is_as_asked_where_it_can_be(no_bf16, monkeypatch, tmp_path):
    path = str(tmp_path)
    assert PGPOConfig(path, use_cpu=True).bf16 is True  # TRL's default, of a CPU that is asked for
    assert PGPOConfig(path, bf16=False).precision_note is None
    with pytest.raises(UserError, match=r"bf16 is True, but no device .* leave it out for fp32, or set use_cpu"):
        PGPOConfig(path, bf16=True)


def test_train_and_eval_compute_with_as_many_threads(own_model, monkeypatch, tmp_path):
    """One on a CPU, unless OMP_NUM_THREADS says otherwise."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    train = ("train", "--model_name_or_path", own_model, "--max_steps", "1", "--eval_strategy", "no", *TINY)
    evaluate = ("eval", own_model, "--rows", "1", "--k", "1", "--max_new_tokens", "2", "--no_hint")
    for words in (train, ("--output_dir", tmp_path / "run")), (evaluate, ()):
        status, err = pgpo(*words[0], *words[1])
        assert status == 0, err
    assert asked == [1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert pgpo(*evaluate)[0] == 0 and asked == [1, 1]


# Waiting --------------------------------------------------------------------------------------------------------------


def test_off_a_terminal_steps_and_evaluations_are_told(own_model, monkeypatch, tmp_path):
    monkeypatch.setattr(session, "Heartbeat", lambda: terminal.Heartbeat(0.0))
    words = ("train", "--model_name_or_path", own_model, "--max_steps", "2", "--eval_steps", "2", *TINY)
    status, err = pgpo(*words, "--output_dir", tmp_path / "run")
    assert status == 0, err
    steps = re.findall(r"^step    (\d) of 2  acc [\d.]+  reward [\d.]+  .*rho [\d.]+ \([\d.]+ min\)$", err, re.M)
    assert steps == ["1", "2"]
    doing = re.findall(r"^(.*): (\d+) forwards so far \([\d.]+ min\)$", err, re.M)
    stages = list(dict.fromkeys(what for what, _ in doing))
    questions = "evaluating 2 {} questions".format
    assert (
        stages
        == [
            *(
                questions("test"),
                questions("validation"),
                "step 1 of 2",
                "step 2 of 2",
                "after step 2",
                questions("test"),
            ),
        ][: len(stages)]
    )
    assert all(next(n for what, n in doing if what == stage) == "1" for stage in stages)  # each counts anew


def test_a_line_every_half_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    beat = terminal.Heartbeat()
    for clock[0] in range(0, 100, 7):
        beat(lambda: f"at {clock[0]}")
    assert capsys.readouterr().err == "at 35 (0.6 min)\nat 70 (1.2 min)\n"  # 65 = 35 + 30 is not asked at


def test_eval_tells_how_far_it_is(own_model, monkeypatch):
    monkeypatch.setattr(evaluation, "Heartbeat", lambda: terminal.Heartbeat(0.0))
    status, err = pgpo("eval", own_model, "--rows", "3", "--k", "2", "--max_new_tokens", "3", "--batch_size", "4")
    assert status == 0
    lines = [re.sub(r" \([\d.]+ min\)", "", line) for line in err.splitlines()]
    assert lines[0] == "0 completions are done, the next ones are at token 1 of at most 3"
    assert "4 of 6 completions are done" in lines
    assert "4 completions are done, the next ones are at token 1 of at most 3" in lines


def test_hours_are_told_before_they_are_spent(monkeypatch, tmp_path):
    """Sampling, forward, backward and teacher: 2 + 2 + 4 + 2 FLOPs per parameter and token."""
    monkeypatch.setattr(hours, "flops_per_second", lambda: 1e9)
    model = types.SimpleNamespace(num_parameters=lambda: 3_600_000)
    args = trainer_kit.config(tmp_path, prompts_per_step=10, num_generations=10, max_completion_length=1000)
    text = hours.warning(model, args, adapts=False, evaluated=50)
    assert "about 1.0 h per step of 10 x 10, and 0.4 h in the first evaluation of 50 questions x 4" in text
    assert "1 GFLOP/s on 1 thread(s), measured" in text and "--max_completion_length" in text
    assert "about 0.8 h per step" in hours.warning(model, args, adapts=True, evaluated=50)
    grpo = trainer_kit.config(tmp_path, objective="grpo", num_generations=10, max_completion_length=500)
    assert hours.warning(model, grpo, adapts=False, evaluated=0) is None  # 10 x 4 x 500 x 8: 0.16 h


def test_a_cpus_speed_is_measured():
    assert 1e8 < hours.flops_per_second() < 1e14


def test_paper_sized_defaults_on_a_cpu_do_not_pass_without_a_word(own_model, science, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(hours, "flops_per_second", lambda: 1e6)

    def stop(*_):
        raise UserError("enough.")

    monkeypatch.setattr("pgpo.command.train._trainer", stop)
    words = ("train", *science, "--model_name_or_path", own_model, "--prompts_per_step", "2", "--use_cpu")
    status, err = pgpo(*words, "--output_dir", tmp_path / "run")
    assert status == 2 and "completions of 8192 tokens take this CPU about" in err
    assert "per step of 2 x 8, and" in err and "first evaluation of 6 questions x 16" in err  # test and validation


# Wording --------------------------------------------------------------------------------------------------------------


def test_the_student_with_an_asterisk_is_explained_where_it_stands(monkeypatch, capsys, science):  # noqa: F811
    evaluate_with(monkeypatch, [[B], [B], [B]], hinted=A)
    assert main(["eval", "model", *science, "--prompt_style", "boxed", "--k", "1"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "student*" not in err
    assert "known for 3 of 3 questions: no hint for them, so no hinted line." in err


def test_three_steps_without_a_teacher_name_what_to_change(tmp_path):
    said = []
    diagnostics = Diagnostics(trainer_kit.config(tmp_path), said.append)
    for step in (1, 2, 3, 4):
        diagnostics.inactive(step, [0.0, 0.0], 0)
    (text,) = said
    assert text.startswith("at step 3, for 3 steps in a row: no completion had a teacher")
    assert all(word in text for word in ("lower temperature", "easier questions", "objective='grpo'"))


@pytest.mark.parametrize(
    ("memory", "budget", "said"),
    [
        ("2", "16384", r"fits in 2048 MiB\n.* fit, one row at a time; so do all rows of a step together, (\d+) tokens"),
        (
            "0.55",
            "60000",
            r"does not fit in .*\n.* fit, one row at a time; the largest .* that fits is (\d+), so lower",
        ),
    ],
)
def test_plan_tells_the_budget_apart_from_a_row(memory, budget, said, tmp_path, capsys):
    planned_config().save_pretrained(tmp_path)
    words = ["--memory", memory, "--max-tokens-per-microbatch", budget, "--max-completion-length", "64"]
    words += ["--max-prompt-length", "64", "--device", "cpu", "--prompts-per-step", "64"]
    assert main(["plan", str(tmp_path), *words]) == 0
    out = capsys.readouterr().out
    assert re.search(said, out), out


# Positions ------------------------------------------------------------------------------------------------------------


def eval_lines(capsys, folder, *words):
    assert main(["eval", str(folder), "--rows", "2", "--k", "1", *words]) == 0
    return capsys.readouterr()


def test_completions_and_hints_fit_the_positions(own_model, monkeypatch, capsys):
    """128 positions. Red if a completion or a hint runs over them, as RoPE lets it in silence."""
    seen = []
    plain = type(build_model()).forward

    def forward(self, *args, position_ids=None, **kwargs):
        seen.append(int(position_ids.max()))
        return plain(self, *args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(type(build_model()), "forward", forward)
    monkeypatch.setattr(evaluation, "PRESETS", {"lab_world": {"max_completion_length": 500}})
    err = eval_lines(capsys, own_model).err
    length = int(re.search(r"completions end after (\d+) tokens, not 500: the model has 128 positions", err)[1])
    assert 20 < length < 64 and max(seen) < 128
    assert pgpo("eval", own_model, "--rows", "2", "--max_new_tokens", "127")[0] == 2


def test_a_hint_that_is_too_long_is_shortened_and_counted(own_model, capsys):
    words = ("--max_new_tokens", "4", "--max_prompt_length")
    whole = eval_lines(capsys, own_model, *words, "120")
    assert "shortened" not in whole.err and len(whole.out.splitlines()) == 2
    longest = int(re.search(r"has (\d+) prompt tokens", pgpo("eval", own_model, *words, "2")[1])[1])
    short = eval_lines(capsys, own_model, *words, str(longest + 20))
    assert f"so that the prompt has at most {longest + 20} tokens" in short.err


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_answers_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code and capsys.readouterr().out.startswith(f"usage: pgpo {command}")


def test_demo_takes_no_arguments(capsys):
    assert main(["demo", "--fast"]) == 2
    assert capsys.readouterr().err == "pgpo: unrecognized arguments: --fast; see `pgpo demo --help`.\n"


def test_libraries_do_not_speak_of_their_future_between_the_steps():
    code = "import warnings\nfrom pgpo.command.terminal import quiet\nquiet()\nwarnings.warn('later', FutureWarning)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "later" not in done.stderr


def test_env_is_one_paste_without_secrets_and_home(monkeypatch, capsys, tmp_path):
    home = tmp_path / "home/somebody"
    (home / "cache/accelerate").mkdir(parents=True)
    (home / "cache/accelerate/default_config.yaml").touch()
    monkeypatch.chdir(home)
    for name, value in {
        "HOME": str(home),
        "HF_HOME": str(home / "cache"),
        "HF_TOKEN": "hf_SECRET",
        "WANDB_API_KEY": "SECRET",
        "HF_ENDPOINT": "https://me:SECRET@mirror",
        "OMP_NUM_THREADS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "SECRET" not in out and str(home) not in out
    assert f"torch {torch.__version__}" in out and re.search(r"^cpu: .* cores, .* GiB of memory$", out, re.M)
    assert "OMP_NUM_THREADS=3" in out and "accelerate:      ~/cache/accelerate/default_config.yaml" in out
    assert re.search(r"^runs: +~/runs \(does not exist\)$", out, re.M)


# The hub --------------------------------------------------------------------------------------------------------------


def answer(error_type):
    """An answer of the hub's, as its client raises it."""
    response = types.SimpleNamespace(headers={}, status_code=404, request=None)
    return error_type("no", response=response)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (errors.RepositoryNotFoundError, "the hub has no model 'some/model', or it is private; check the name"),
        (errors.GatedRepoError, "'some/model' is gated: ask for access"),
        (errors.RevisionNotFoundError, "has no revision 'main'"),
        (None, r"cannot be asked for the model 'some/model' (OSError: no network); give a folder"),
    ],
)
def test_an_unknown_model_is_asked_for_once(found, said, monkeypatch, capsys):
    """And the commands that load one say it in one sentence."""
    calls = []

    def ask(url, **options):
        calls.append((url, options))
        raise OSError("no network") if found is None else answer(found)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    for words in (["plan", "some/model", "--memory", "8"], ["eval", "some/model", "--rows", "1"]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert (err.count("\n") == 1 and said.replace("'main'", "None") in err) or said in err
    assert len(calls) == 2 and all("some/model" in url and options["timeout"] <= 10 for url, options in calls)


def test_adapters_and_what_is_in_the_cache_pass(monkeypatch, tmp_path):
    def missing(url, **options):
        raise errors.EntryNotFoundError("no config.json")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", missing)
    hub.require_model("some/adapters")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", None)
    hub.require_model("some/model")


def test_what_a_library_says_is_cut_between_sentences():
    long = RuntimeError("One thing.  Another " + "thing " * 100)
    assert reason(long) == "One thing"
    assert reason(RuntimeError("word " * 100)).endswith("word …")
    assert reason(RuntimeError("short.")) == "short"
