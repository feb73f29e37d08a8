"""The command line itself: help without torch, exit statuses, and `pgpo eval` from flags to printed numbers."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import build_model, build_tokenizer
from safetensors.torch import load_file, save_file

import pgpo
from pgpo import cli
from pgpo.cli import main
from pgpo.command import eval as evaluation
from pgpo.command import train as train_run
from pgpo.errors import UserError
from pgpo.runlog import RunLog
from pgpo.settings import field_types
from pgpo.settings.arguments import parse
from pgpo.tasks import lab_world
from pgpo.train import checkpoint

COMMANDS = ("demo", "train", "probe", "eval", "sde", "lab-base")


# Help, version, exit statuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(capsys, words):
    assert main(words) == 0
    out, err = capsys.readouterr()
    listed = re.findall(r"^  ([a-z-]+)  ", out, flags=re.MULTILINE)
    assert set(COMMANDS) <= set(listed)
    assert set(listed) == set(cli.COMMANDS)
    assert err == ""


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{pgpo.__version__}\n"


def test_python_m_pgpo_help_imports_nothing_heavy_and_is_fast():
    code = (
        "import runpy, sys; sys.argv = ['pgpo', '--help']\n"
        "try: runpy.run_module('pgpo', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print('heavy:', sorted({'torch', 'transformers', 'trl', 'numpy', 'datasets', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: pgpo COMMAND" in done.stdout
    assert done.stdout.endswith("heavy: []\n")
    # CPU time, not wall time, and the best of three: other processes on the machine are none of its business.
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "pgpo", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5


def test_python_m_pgpo_exits_with_mains_status():
    done = subprocess.run([sys.executable, "-m", "pgpo", "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"pgpo: there is no command 'trian'; choose one of .*\.\n", done.stderr)


@pytest.mark.parametrize(
    "command, names",
    [
        (
            "train",
            "objective alpha rho_max rho_min divergence divergence_beta teacher teacher_rate prompts_per_step "
            "num_generations success_threshold feedback_mode max_tokens_per_microbatch eval_k task domain "
            "model_name_or_path output_dir overwrite use_peft learning_rate config",
        ),
        (
            "probe",
            "task domain variant data_path prompt_style questions hinted_samples temperatures temperature "
            "max_completion_length num_generations divergence model_name_or_path output_dir config",
        ),
        ("eval", "task domain split k temperature top_p max_new_tokens rows seed hint no_hint use_vllm records"),
        ("sde", "json figure law quick"),
        ("lab-base", "seed variant out overwrite"),
    ],
)
def test_help_of_a_command_lists_its_arguments(capsys, command, names):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert out.startswith(f"usage: pgpo {command} ")
    missing = [name for name in names.split() if not re.search(rf"--{name}\b", out)]
    assert not missing


def test_what_a_command_raises_becomes_one_line_and_a_status(monkeypatch, capsys):
    def end_with(error):
        def command(words):
            raise error

        monkeypatch.setitem(cli.COMMANDS, "train", command)
        status = main(["train"])
        return status, capsys.readouterr().err

    assert end_with(UserError("a text\n  over lines")) == (2, "pgpo: a text over lines\n")
    assert end_with(KeyboardInterrupt()) == (130, "pgpo: stopped.\n")
    with pytest.raises(RuntimeError):  # not the user's mistake: the traceback stays
        end_with(RuntimeError("a bug"))


# From flags to the configuration --------------------------------------------------------------------------------------


SCIENCE = "--task science_qa --domain physics --use_cpu"


@pytest.mark.parametrize(
    ("words", "questions", "tokens"),
    [
        ("--use_cpu", 8, 24),
        ("--use_cpu --max-completion-length 12", 8, 12),
        (SCIENCE, 8, 64),
        (f"{SCIENCE} --model_name_or_path Qwen/Qwen3-8B", 32, 8192),
        (f"{SCIENCE} --model-name-or-path=Qwen/Qwen3-8B", 32, 8192),
        (f"{SCIENCE} --model_name_or_path Qwen/Qwen3-8B --prompts_per_step 4", 4, 8192),
        (f"{SCIENCE} --model_name_or_path Qwen/Qwen3-8B --per_device_train_batch_size 16", 2, 8192),
        ("--use_cpu --per-device-train-batch-size 16", 2, 24),
        ("--use_cpu --per_device_train_batch_size 8 --gradient_accumulation_steps 3", 3, 24),
        ("--config r.yaml --use_cpu", 2, 8192),
        ("--config=r.yaml --use_cpu --task lab_world", 2, 24),
        ("--use_cpu --prompts_per_step 4 --config r.yaml --per_device_train_batch_size 32", 4, 8192),
    ],
)
def test_the_flags_that_choose_the_defaults_of_others(folder, words, questions, tokens):
    """task, model and TRL's batch, in both spellings, on the command line or in a recipe."""
    lines = "task: science_qa\ndomain: physics\nmodel_name_or_path: m\nper_device_train_batch_size: 16\n"
    (folder / "r.yaml").write_text(lines)
    parsed = parse(words.split())
    assert (parsed.config.prompts_per_step, parsed.config.max_completion_length) == (questions, tokens)
    assert "config" not in parsed.given


def test_a_run_that_stored_no_default_of_its_time_goes_on_as_it_was(folder):
    """The paper's batch and lengths were defaults of the configuration, and a run stores what differs from defaults."""
    stored = {"task": "science_qa", "domain": "physics", "model_name_or_path": "m", "use_cpu": True, "alpha": 0.5}
    again = parse(["--max_steps", "9"], stored=stored)
    assert (again.config.prompts_per_step, again.config.max_completion_length, again.config.alpha) == (32, 8192, 0.5)
    assert again.given.items() >= (stored | {"max_steps": 9}).items()
    assert not {"prompts_per_step", "max_completion_length"} & again.given.keys()  # `--resume` changes nothing


@pytest.mark.parametrize("name", ["alpha", "learning_rate", "task"])
def test_a_value_is_looked_at_once(monkeypatch, name):
    """argparse makes it what its field is; the dataclass that it ends in checks it; nothing else does."""
    seen = []
    plain = field_types._check_value

    def look(field: str, value: object) -> None:
        seen.extend([value] if field == name else [])
        plain(field, value)

    monkeypatch.setattr(field_types, "_check_value", look)
    parse(["--use_cpu", *({"task": ["--task", "lab_world"]}.get(name) or [f"--{name}", "0.5"])])
    assert len(seen) == 1


# Demo -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 130])
def test_demo_runs_three_methods_side_by_side(tmp_path, monkeypatch, capsys, status):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo-1").mkdir(parents=True)
    calls = []

    def train(words):
        calls.append(words)
        directory = Path(words[words.index("--output_dir") + 1])
        log = RunLog.create(directory, {"objective": words[words.index("--objective") + 1], "alpha": 1.0})
        with log:
            log.metrics(1, {"information": 0.1, "rho": 1.1, "grad_norm": 0.5})
        return status, directory

    monkeypatch.setattr(train_run, "main", train)
    assert main(["demo"]) == status
    methods = {"sdpo": ["sdpo"], "pgpo": ["pgpo"], "measured-trust": ["sdpo", "--trust", "measured"]}
    wanted = [
        ["--objective", *flags, *cli.DEMO_FLAGS, "--output_dir", f"runs/demo-2/{name}"]
        for name, flags in methods.items()
    ]
    assert calls == (wanted if status == 0 else wanted[:1])
    assert all(parse(words).config.learning_rate == 2e-3 for words in wanted)
    assert (tmp_path / "runs/demo-2/figure.png").exists() == (status == 0)
    assert any((tmp_path / "runs/demo-1").iterdir()) is False


def test_one_process_of_several_draws(tmp_path, monkeypatch, capsys):
    for rank, said in (("1", ""), ("0", "no figure: There is no run directory")):
        monkeypatch.setenv("RANK", rank)
        cli._draw([tmp_path / "run"], tmp_path)
        assert capsys.readouterr().err[: len(said) or None] == said


# Eval: exact numbers with completions of our choice -------------------------------------------------------------------


def record(number: int) -> dict:
    """A science question whose right option is A."""
    return {
        "question": f"How far is {number}?",
        "choices": {"label": ["A", "B"], "text": [f"{number} m", f"{number + 100} m"]},
        "answerKey": "A",
        "domain": "Physics",
        "type": "mcq-2-choices",
        "details": {"level": "L3"},
    }


@pytest.fixture
def science(tmp_path) -> list[str]:
    """30 questions, of which 3 are test questions."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record(n)) + "\n" for n in range(30)))
    return ["--task", "science_qa", "--domain", "physics", "--data_path", str(file), "--no_data_check"]


def evaluate_with(monkeypatch, student: list[list[str]], hinted: str) -> list[list]:
    """Let `pgpo eval` read these completions in place of a model's; returns the prompts it asks for."""
    asked: list[list] = []

    def generate(prompts, k, seed):
        asked.append(prompts)
        return student if len(asked) == 1 else [[hinted] * k for _ in prompts]

    monkeypatch.setattr(evaluation, "_generator", lambda model, args, rows: generate)
    return asked


A, B, NOTHING = (r"I see. \boxed{A}", r"I see. \boxed{B}", "I do not know.")


def test_eval_prints_what_the_completions_say(monkeypatch, capsys, science, tmp_path):
    # Rewards 3/4, 1/4 and 0/4; majorities A, B and none; well-formed 4 + 4 + 2 of 12.
    asked = evaluate_with(monkeypatch, [[A, A, B, A], [B, A, B, B], [B, NOTHING, NOTHING, B]], hinted=A)
    words = ["eval", "model", *science, "--prompt_style", "boxed", "--k", "4", "--records", str(tmp_path / "r.jsonl")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    student, hinted, compared = out.splitlines()
    assert re.fullmatch(
        r"student  avg@4 0\.333 \[0\.024, 0\.910\]  pass@4 0\.667 \[0\.044, 0\.989\]  maj@4 0\.333 "
        r"\[0\.011, 0\.956\]  well-formed 0\.833  3 questions \(95 % intervals clustered by question\)",
        student,
    )
    assert hinted.startswith("hinted   avg@4 1.000 [0.012, 1.000]  pass@4 1.000")  # 2 / (2 + t^2), t = 12.706
    assert "2 questions" in hinted
    assert compared.startswith("student* avg@4 0.500") and "2 questions" in compared  # (3/4 + 1/4) / 2, same questions
    assert "known for 1 of 3 questions" in err and err.count("\n") == 1
    # The hinted prompt is the question's own, with the model's first right completion.
    assert [p[0]["content"].count(A) for p in asked[1]] == [1, 1]
    assert all(h[0]["content"].startswith(s[0]["content"]) for s, h in zip(asked[0][:2], asked[1], strict=True))

    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [r["reader"] for r in records] == ["student"] * 12 + ["hinted"] * 8
    keys = {"question_id", "domain", "sample", "reward", "answer", "well_formed", "completion", "reader", "stem"}
    assert all(r.keys() == keys for r in records)
    assert [r["completion"] for r in records[:4]] == [A, A, B, A]


def test_eval_writes_what_other_tools_read(monkeypatch, capsys, science, tmp_path):
    evaluate_with(monkeypatch, [[A, A], [B, A], [B, NOTHING]], hinted=A)
    words = ["eval", "a/model", *science, "--prompt_style", "boxed", "--k", "2", "--no-hint"]
    log, samples = tmp_path / "log.json", tmp_path / "samples"
    assert main([*words, "--inspect_log", str(log), "--lm_eval_folder", str(samples)]) == 0
    found = json.loads(log.read_text())
    assert (found["eval"]["model"], len(found["samples"])) == ("a/model", 6)
    assert found["eval"]["model_generate_config"] == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 8192}
    (path,) = samples.glob("a__model/samples_science-qa-physics-test_*.jsonl")
    assert len(path.read_text().splitlines()) == 3 and str(path) in capsys.readouterr().err
    assert main([*words, "--inspect_log", str(tmp_path / "log.txt")]) == 2
    assert "inspect-ai reads it if it ends in .json" in capsys.readouterr().err


def test_eval_of_a_run_asks_as_the_run_did(monkeypatch, tmp_path):
    """Task, prompt style and length limit come from the run's config.json; a flag still wins."""
    run = tmp_path / "run"
    stored = {"task": "lab_world", "variant": "style", "max_completion_length": 31}
    RunLog.create(run, stored).close()
    (run / "checkpoints").mkdir()
    seen = []

    def stop(model, args, rows):
        seen.append(args)
        raise UserError("enough.")

    monkeypatch.setattr(evaluation, "_generator", stop)
    monkeypatch.setattr(evaluation, "model_folder", lambda name: name)
    assert main(["eval", str(run)]) == main(["eval", str(run), "--max_new_tokens", "7", "--variant", "plain"]) == 2
    assert [(a.variant, a.max_new_tokens) for a in seen] == [("style", 31), ("plain", 7)]


def test_eval_without_hints(monkeypatch, capsys, science):
    asked = evaluate_with(monkeypatch, [[A], [A], [B]], hinted=A)
    assert main(["eval", "model", *science, "--prompt_style", "boxed", "--k", "1", "--no_hint"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(asked) == 1


@pytest.mark.parametrize("trained_with_vllm", [False, True])
def test_eval_of_a_run_samples_with_its_stops(monkeypatch, capsys, science, tmp_path, trained_with_vllm):
    """Red if a run's stops, length or template options hold in training alone."""
    stored = dict(
        generation_kwargs=dict(stop_strings=["!"], max_new_tokens=5),
        chat_template_kwargs=dict(loud=True),
        max_completion_length=9,
        use_vllm=trained_with_vllm,
    )
    RunLog.create(tmp_path / "run", stored)
    (tmp_path / "run" / "checkpoints").mkdir()
    given = {}

    def runner(model, tokenizer, **options):
        given.update(options)
        return lambda prompts, k, seed: [[A] * k for _ in prompts]

    monkeypatch.setattr(evaluation, "model_folder", lambda name: name)
    monkeypatch.setattr(
        evaluation, "load_model", lambda *_, **__: (types.SimpleNamespace(to=lambda device: None, config=None), None)
    )
    monkeypatch.setattr(evaluation, "check_prompts", lambda *_: 1)
    monkeypatch.setattr(evaluation, "positions", lambda config: None)
    monkeypatch.setattr(evaluation, "_progress", lambda *_: None)
    monkeypatch.setattr(evaluation, "TransformersRunner", runner)
    assert main(["eval", str(tmp_path / "run"), *science, "--prompt_style", "boxed", "--k", "1", "--no_hint"]) == 0
    assert given["chat_template_kwargs"] == dict(loud=True)
    said = capsys.readouterr().err
    if trained_with_vllm:  # its options have other names
        assert given["generation"] == {} and given["max_new_tokens"] == 9
        assert "generation_kwargs (stop_strings, max_new_tokens) are of another engine" in said
    else:
        assert given["generation"] == stored["generation_kwargs"] and given["max_new_tokens"] == 5


def test_a_solution_that_is_nothing_but_thinking_is_no_hint(monkeypatch, capsys, science):
    evaluate_with(monkeypatch, [[f"<think>{A}</think>"], [A], [B]], hinted=A)
    assert main(["eval", "model", *science, "--prompt_style", "boxed", "--k", "1"]) == 0
    out, err = capsys.readouterr()
    assert "  1 questions" in out.splitlines()[1]
    assert "known for 2 of 3 questions" in err


def test_the_tasks_own_solution_is_preferred():
    rows = [{"id": "a", "solution": "theirs"}, {"id": "b"}, {"id": "c", "solution": ""}, {"id": "d"}]
    answers = [("a", 1.0, "x"), ("b", 0.0, "wrong"), ("b", 1.0, "y"), ("b", 1.0, "late"), ("c", 1.0, "z")]
    records = [{"question_id": i, "reward": r, "completion": c} for i, r, c in answers]
    assert evaluation.right_solutions(rows, records) == {"a": "theirs", "b": "y", "c": "z"}


# Eval: the lab's checkpoint -------------------------------------------------------------------------------------------

LAB = ["--rows", "24", "--k", "2"]


def lab_eval(tmp_path, *words: str) -> list[dict]:
    records = tmp_path / "records.jsonl"
    assert main(["eval", *words, *LAB, "--records", str(records)]) == 0
    return [json.loads(line) for line in records.read_text().splitlines()]


def test_eval_of_the_lab_checkpoint(tmp_path, capsys):
    checkpoint = str(lab_world.checkpoint_path("plain"))
    records = lab_eval(tmp_path, checkpoint)
    lines = capsys.readouterr().out.splitlines()
    assert len(records) == 2 * 24 * 2
    means = {}
    for line, reader in zip(lines, ("student", "hinted"), strict=True):
        assert line.startswith(f"{reader:8s} avg@2 ") and "24 questions" in line
        means[reader] = sum(r["reward"] for r in records if r["reader"] == reader) / 48
        assert f"avg@2 {means[reader]:.3f} [" in line
    assert means["student"] + 0.1 < means["hinted"]  # what self-distillation lives on
    assert lab_eval(tmp_path, checkpoint) == records
    assert lab_eval(tmp_path, checkpoint, "--seed", "1") != records


def test_a_run_directory_stands_for_its_newest_readable_checkpoint(tmp_path, capsys):
    """Newest by number: 10 comes after 9."""
    plain = lab_world.checkpoint_path("plain")
    run = tmp_path / "run"
    RunLog.create(run, {"objective": "pgpo"}).close()
    for step in (9, 10, 11):
        written = checkpoint.begin(run / "checkpoints") / f"checkpoint-{step}"
        shutil.copytree(plain, written)
        if step == 10:
            weights = load_file(written / "model.safetensors")
            weights["model.norm.weight"] *= 0.3
            save_file(weights, written / "model.safetensors", metadata={"format": "pt"})
        checkpoint.commit(run / "checkpoints", step)
    (run / "checkpoints/checkpoint-11/config.json").write_text("{")

    found = lab_eval(tmp_path, str(run), "--no_hint")
    assert "checkpoint-11 cannot be read" in capsys.readouterr().err
    assert found == lab_eval(tmp_path, str(run / "checkpoints/checkpoint-10"), "--no_hint")
    assert found != lab_eval(tmp_path, str(plain), "--no_hint")


def test_eval_prints_only_its_lines(tmp_path, capfd):
    """No loading bars and no warnings of the libraries below, on either stream."""
    build_model().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    assert main(["eval", str(tmp_path), "--rows", "2", "--k", "1", "--no_hint", "--max_new_tokens", "2"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("student  avg@1 0.000") and out.count("\n") == 1
    assert err == ""
