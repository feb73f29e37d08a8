"""Every command of README, Start and Tutorials is one that the package takes, and runs; every script of them, too."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, PAGES, ROOT, Block, blocks, commands
from processes import on_cpus, patient

from pgpo import PGPOConfig, PGPOTrainer, cli
from pgpo.command import eval as eval_command
from pgpo.command.train import RESUMABLE
from pgpo.errors import UserError
from pgpo.settings.arguments import TaskArguments
from pgpo.tasks import lab_world

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.is_shell]
PYTHON = [block for block in BLOCKS if block.language == "python"]
QUICK = [block for block in BLOCKS if block.file and block.page.name == "three-lines.md"]

# Words of a command that no test runs -> why. What it says is checked all the same.
NOT_RUN = {
    "pip install": "it would change the environment of the tests",
    "jupyter": "the notebook has a test of its own, below",
    "accelerate launch": "it needs GPUs",
    "Qwen/Qwen3-8B": "its config comes from the hub",
}
# What a page's variables are here: a model that needs no network, and questions that it can answer.
HERE = {"TASK": "--task lab_world"}


def line_of(block: Block, command: str) -> str:
    return f"{block}: {command}"


LINES = []
for page in PAGES:
    names: dict[str, str] = {}
    LINES += [(block, command) for block in SHELL if block.page == page for command in commands(block.text, names)]


class Taken(Exception):
    """The arguments were taken; nothing is run."""


@pytest.fixture
def no_work(monkeypatch):
    """Commands that check their arguments and do nothing."""

    def taken(*args, **kwargs):
        raise Taken

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(TaskArguments, "load", taken)
    monkeypatch.setattr(cli, "_demo", taken)
    monkeypatch.setattr(eval_command, "_is_run", lambda name: False)
    monkeypatch.setitem(cli.COMMANDS, "demo", taken)
    for name in ("lab.study", "memory.command", "report.page", "sde.verify", "lab.base_model"):
        monkeypatch.setattr(importlib.import_module(f"pgpo.{name}"), "main", taken)


def words_of_pgpo(command: str) -> list[str] | None:
    """The arguments of `pgpo`, behind a launcher or not; None for another program."""
    found = re.match(r"(?:\S*/)?pgpo\b(.*)|(?:\S*/)?(?:python|accelerate|torchrun)\b.* -m pgpo\b(?!\.)(.*)", command)
    return None if found is None else shlex.split(found[1] or found[2] or "")


def take(words: list[str]) -> None:
    """Let the command line judge the arguments."""
    if "--resume" in words:  # the run is not there: what may change is
        at = words.index("--resume")
        changed = {word[2:] for word in words[at + 2 :] if word.startswith("--")}
        assert changed <= RESUMABLE
        words = words[:at] + words[at + 2 :]
    if words[0] == "train":
        words = [*words, "--use_cpu"]  # else bf16 is checked against the hardware of the moment
    with pytest.raises(Taken):
        cli.COMMANDS[words[0]](words[1:])


@pytest.mark.parametrize(("block", "command"), LINES, ids=[line_of(*line) for line in LINES])
def test_a_command_is_taken(block, command, no_work):
    """A flag that was renamed, a file that was moved, a command that is gone."""
    for path in re.findall(r"\b(?:recipes|results|docs|src)/[\w./-]+", command):
        assert (ROOT / path).exists()
    if target := re.match(r"make (\S+)", command):
        assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if module := re.search(r"-m (pgpo\.\w+)", command):
        importlib.import_module(module[1])
    if (words := words_of_pgpo(command)) is None:
        return
    name, *_ = words
    if "[" in command:  # the list of commands says so what may be left out
        assert name in cli.COMMANDS
        return
    take(words)


def test_a_command_that_is_not_taken_is_found(no_work):
    for words in (["train", "--alfa", "1"], ["eval", "model", "--kk", "3"], ["train", "--guard", "sleep"]):
        with pytest.raises(UserError):
            take(words)
    with pytest.raises(KeyError):
        take(["trane"])


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_script_names_what_exists(block):
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(
                hasattr(module, a.name) or importlib.import_module(f"{node.module}.{a.name}") for a in node.names
            )
        if isinstance(node, ast.Call):
            given = {k.arg for k in node.keywords} - {None}
            called = getattr(node.func, "id", "")
            if called == "PGPOConfig":
                assert given <= {f.name for f in dataclasses.fields(PGPOConfig)}
            if called == "PGPOTrainer":
                assert given <= set(inspect.signature(PGPOTrainer).parameters)


def test_every_exception_has_its_command():
    text = "\n".join(block.text for block in SHELL)
    assert [words for words in NOT_RUN if words not in re.sub(r"\s*\\\n\s*", " ", text)] == []


def test_the_pages_have_commands():
    assert len(LINES) > 20 and len(PYTHON) > 5 and QUICK


# ------------------------------------------------------------------------------------------------------- they run


def workplace(folder: Path) -> Path:
    """A copy of what a checkout has beside src/, where `pgpo`, `make` and the rest are those of this environment."""
    for name in ("recipes", "results", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "Makefile", folder)
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    for name, words in {
        "python": "",
        "pgpo": "-m pgpo",
        "torchrun": "-m torch.distributed.run",
    }.items():
        script(programs / name, f'exec {shlex.quote(sys.executable)} {words} "$@"')
    make = shutil.which("make")
    (folder / ".venv/.installed").touch()
    script(programs / "make", f'exec {make} -o .venv/.installed "$@"')  # nothing is installed
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def local_model(folder: Path) -> Path:
    """The lab's model with room for long prompts."""
    shutil.copytree(lab_world.checkpoint_path("plain"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


def run(text: str, folder: Path, quiet: float, **more: str) -> str:
    """What a shell script prints; its first command that fails ends the test."""
    source = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = on_cpus(PATH=f"{folder / '.venv/bin'}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=source, **more)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patient(quiet),
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def shell(page: Path, here: dict[str, str]) -> str:
    """The commands of a page in order, but for those that no test runs."""
    lines, names = [], {}
    for block in [b for b in SHELL if b.page == page and not b.is_listing]:
        for command in commands(block.text, names):
            names |= {name: value for name, value in here.items() if name in names}
            if not any(part in command for part in NOT_RUN):
                lines.append(command)
    return "\n".join(lines)


def write_scripts(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)


@pytest.mark.parametrize("block", QUICK, ids=str)
def test_a_quick_script_runs(block, tmp_path):
    (tmp_path / block.file).write_text(block.text)
    printed = run(f"{sys.executable} {block.file}", tmp_path, quiet=20)
    steps = re.findall(r"rho (\d\.\d+)", printed)
    assert len(steps) == 5 and all(1 < float(rho) <= 2 for rho in steps)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "index.md" or "start" in str(p)], ids=lambda p: p.stem)
def test_the_commands_of_a_page_run(page, tmp_path):
    folder = workplace(tmp_path)
    write_scripts(page, folder)
    text = shell(page, {"MODEL": str(local_model(tmp_path / "model")), **HERE})
    if not text:
        pytest.skip("no command of this page is run")
    run(text, folder, quiet=240)


# ------------------------------------------------------------------------------------------- the site, the notebook


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(source), str(out)]
    return subprocess.run(words, env=on_cpus(), capture_output=True, text=True, timeout=patient(120))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("furo", reason="needs the docs extra")
    done = build(DOCS, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / "reference/configuration.html").read_text()
    assert all(f"{field.name} =" in page for field in dataclasses.fields(PGPOConfig) if field.name in vars(PGPOConfig))
    pages = [p.read_text() for p in tmp_path.rglob("*.html") if "_modules" not in p.parts]
    fetched = [
        url for text in pages for url in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', text)
    ]
    assert fetched == []  # it can be read without network


@pytest.mark.slow
def test_a_dead_link_stops_the_site(tmp_path):
    pytest.importorskip("furo", reason="needs the docs extra")
    source = tmp_path / "docs"
    source.mkdir()
    for name in ("conf.py", "reference_tables.py"):
        shutil.copy(DOCS / name, source)
    (source / "index.md").write_text("# A page\n\n[gone](gone.md)\n")
    done = build(source, tmp_path / "out")
    assert done.returncode != 0 and "gone.md" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((DOCS / "tutorials").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    """With nbmake, in a folder of its own, without network."""
    pytest.importorskip("nbmake", reason="needs the dev extra")
    shutil.copy(notebook, tmp_path)
    words = (
        f"{sys.executable} -m pytest -p no:cacheprovider --nbmake --nbmake-timeout={patient(120):.0f} {notebook.name}"
    )
    run(words, tmp_path, quiet=200, HF_HUB_OFFLINE="1")
