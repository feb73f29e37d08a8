"""Who may import whom. Every file is parsed, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest
from processes import patient

SOURCE = Path(__file__).parents[2] / "src"
PACKAGE = SOURCE / "pgpo"

EVERYTHING = frozenset({"*"})
RECORDS = frozenset({"runlog", "study_files", "files", "provenance"})  # what runs and studies leave on the disk
# Module or package -> top-level parts of ours that it may import; itself always, `errors` too unless it is a LEAF.
ALLOWED: dict[str, frozenset[str]] = {
    "pgpo": EVERYTHING,  # lazily: the public names
    "pgpo.__main__": EVERYTHING,
    "pgpo.cli": EVERYTHING,
    "pgpo.lab": frozenset({"command", "train", "settings", "alarms", "evaluate", "tasks", *RECORDS}),
    "pgpo.command": frozenset({"train", "settings", "forward", "teacher", "tasks", "evaluate", "hub", *RECORDS}),
    "pgpo.train": frozenset(
        {"settings", "alarms", "core", "teacher", "forward", "tasks", "evaluate", "runlog", "files", "visible"}
    ),
    "pgpo.settings": frozenset({"alarms", "core", "teacher", "tasks"}),
    "pgpo.alarms": frozenset(),
    "pgpo.forward": frozenset({"core", "teacher"}),
    "pgpo.memory": frozenset({"forward", "runlog", "files", "hub"}),
    "pgpo.minimal": frozenset({"core", "teacher", "tasks"}),
    "pgpo.sde": frozenset({"core", "intervals"}),
    "pgpo.evaluate": frozenset({"forward", "intervals", "tasks", "runlog", "files", "visible"}),
    "pgpo.report": frozenset({"intervals", *RECORDS}),
    "pgpo.tasks": frozenset(),
    "pgpo.tasks.graders": frozenset({"visible"}),
    "pgpo.tasks.open_answers": frozenset({"tasks", "visible"}),
    "pgpo.teacher": frozenset(),
    "pgpo.teacher.contexts": frozenset({"visible"}),
    "pgpo.visible": frozenset(),
    "pgpo.core": frozenset(),
    "pgpo.study_files": frozenset({"runlog"}),
    "pgpo.runlog": frozenset({"files", "provenance"}),
    "pgpo.files": frozenset(),
    "pgpo.hub": frozenset(),
    "pgpo.provenance": frozenset(),
    "pgpo.intervals": frozenset(),
    "pgpo.errors": frozenset(),
}
# Usable outside this project as a single file (contexts and graders: with visible.py): not even the error class.
LEAVES = {"pgpo.core", "pgpo.teacher.contexts", "pgpo.tasks.graders", "pgpo.errors", "pgpo.visible"}

HEAVY = {"transformers", "trl", "accelerate", "peft", "datasets"}
HEAVY_ANYWHERE = ("command/", "settings/", "train/", "forward/", "lab/", "evaluate/runners.py")
HEAVY_INSIDE_FUNCTIONS = {
    "tasks/boxed_math.py": {"trl"},
    "tasks/science_qa.py": {"datasets"},
    "teacher/weights.py": {"peft"},
    "memory/shapes.py": {"transformers"},
}
# The one file that needs Triton; whoever imports it does so inside a function.
TRITON = "core/triton_kernels.py"


def module_name(path: PurePosixPath) -> str:
    parts = ["pgpo", *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(PurePosixPath(p.relative_to(PACKAGE).as_posix())) for p in PACKAGE.rglob("*.py")}


def imports(path: PurePosixPath, tree: ast.AST, in_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(absolute dotted name, line, inside a function?) of every import, `import_module("...")` included.

    `from a.b import c` is a.b.c, whether c is a module or a name.
    """
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, in_function
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno, in_function
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno, in_function
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(path, node, inside)


def rule(module: str) -> str | None:
    """The most special entry of ALLOWED that covers a module; "pgpo" covers itself alone."""
    covering = [key for key in ALLOWED if module == key or (key != "pgpo" and module.startswith(key + "."))]
    return max(covering, key=len, default=None)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """{module: modules of ours that it imports} of {file: source}."""
    modules = {module_name(PurePosixPath(file)) for file in sources}
    graph: dict[str, set[str]] = {}
    for file, source in sources.items():
        path = PurePosixPath(file)
        found = graph.setdefault(module_name(path), set())
        for name, _, _ in imports(path, ast.parse(source)):
            while name and name not in modules:  # from a.b import a name of a.b
                name = name.rpartition(".")[0]
            found |= {name} - {"", module_name(path)}
    return graph


def violations(file: str, source: str) -> list[str]:
    """What `source` may not import if it is src/pgpo/`file`; one sentence each."""
    path = PurePosixPath(file)
    module = module_name(path)
    layer = rule(module)
    if layer is None:
        return [f"{file}: no entry of ALLOWED covers {module}"]
    tree = ast.parse(source)
    found = []
    for name, line, in_function in imports(path, tree):
        top = name.split(".")[0]
        reason = None
        if top == "pgpo":
            reason = _ours(layer, name)
        elif top in HEAVY and not file.startswith(HEAVY_ANYWHERE):
            if top not in HEAVY_INSIDE_FUNCTIONS.get(file, ()):
                reason = f"{top} belongs to command/, settings/, train/, forward/, lab/ and evaluate/runners.py"
            elif not in_function:
                reason = f"{top} only inside a function here"
        known = {"pgpo", "torch", "triton"} if file == TRITON else {"pgpo", "torch"}
        if layer == "pgpo.core" and top not in known and top not in sys.stdlib_module_names:
            reason = "core knows torch and the standard library only"
        if name.startswith(module_name(PurePosixPath(TRITON))) and not in_function:
            reason = "Triton is not everywhere: only inside a function"
        if layer == "pgpo.core" and name.startswith("torch.distributed"):
            reason = "core takes a reduce callable, never torch.distributed"
        if reason is not None:
            found.append(f"{file}:{line}: {name}: {reason}")
    if layer == "pgpo.core":
        found += [
            f"{file}:{node.lineno}: .distributed: core takes a reduce callable, never torch.distributed"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr == "distributed"
        ]
    return found


def _ours(layer: str, name: str) -> str | None:
    """Why a module under `layer` may not import `name` of ours; None if it may."""
    parts = name.split(".")
    within_package = layer not in ("pgpo.teacher.contexts", "pgpo.tasks.graders") and (
        name == layer or name.startswith(layer + ".")
    )
    if "*" in ALLOWED[layer] or within_package:
        return None
    if layer not in LEAVES and (parts[1:2] == ["errors"] or name == "pgpo.__version__"):
        return None
    if len(parts) == 1 or f"pgpo.{parts[1]}" not in MODULES:
        return "the root module leads to every layer"
    return None if parts[1] in ALLOWED[layer] else f"{layer} may not import {parts[1]}"


@pytest.mark.parametrize("file", sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")))
def test_every_file_keeps_to_its_imports(file: str) -> None:
    assert violations(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Inside functions and for types alone neither: what two modules share belongs in a third."""
    files = {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")}
    TopologicalSorter(import_graph(files)).prepare()
    circle = {"sde/verify.py": "def f():\n    from .figure import draw", "sde/figure.py": "from .verify import Outcome"}
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(circle)).prepare()


def test_the_rules_are_about_files_that_exist() -> None:
    """A renamed folder would leave its rule, and the exemptions, without effect."""
    assert ALLOWED.keys() - MODULES == set()
    assert all((PACKAGE / file).exists() for file in [*HEAVY_ANYWHERE, *HEAVY_INSIDE_FUNCTIONS, TRITON])


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/x.py", "import numpy"),
        ("core/x.py", "import triton"),
        ("core/x.py", "def f():\n    import triton.language"),
        ("core/triton_kernels.py", "import numpy"),
        ("core/x.py", "from . import triton_kernels"),
        ("core/__init__.py", "from .triton_kernels import statistics"),
        ("core/x.py", "import torch.distributed"),
        ("core/x.py", "import torch.distributed.nn as n"),
        ("core/x.py", "from torch import distributed as d"),
        ("core/x.py", "from torch.distributed import all_reduce"),
        ("core/x.py", "import torch\n\ndef f(t):\n    torch.distributed.all_reduce(t)"),
        ("core/x.py", "from pgpo.errors import UserError"),
        ("core/x.py", "from ..errors import UserError"),
        ("core/x.py", "from .. import minimal"),
        ("core/x.py", "from pgpo import __version__"),
        ("core/__init__.py", "from .x import a\nfrom ..runlog import b"),
        ("core/x.py", "class A:\n    def f(self):\n        if self:\n            from pgpo.tasks import b"),
        ("teacher/contexts.py", "from pgpo.teacher.weights import Teacher"),
        ("teacher/contexts.py", "from . import weights"),
        ("teacher/contexts.py", "from pgpo.errors import UserError"),
        ("teacher/weights.py", "from pgpo.core import token_entropy"),
        ("teacher/weights.py", "import peft"),
        ("teacher/weights.py", "def f():\n    import transformers"),
        ("tasks/graders.py", "from . import Row"),
        ("tasks/graders.py", "from pgpo.errors import UserError"),
        ("tasks/science_qa.py", "import datasets"),
        ("tasks/science_qa.py", "class A:\n    from datasets import Dataset"),
        ("tasks/science_qa.py", "def f():\n    from transformers import AutoTokenizer"),
        ("tasks/lab_world.py", "def f():\n    import datasets"),
        ("tasks/lab_world.py", "from pgpo.core import divergence"),
        ("tasks/__init__.py", "import importlib\nimportlib.import_module('pgpo.train.trainer')"),
        ("tasks/__init__.py", "from importlib import import_module\nimport_module('pgpo.core')"),
        ("runlog.py", "from pgpo.core import Information"),
        ("runlog.py", "from pgpo import study_files"),
        ("files.py", "from pgpo.runlog import SCHEMA"),
        ("study_files.py", "from pgpo.lab.plan import Study"),
        ("command/train.py", "from pgpo.lab.study import main"),
        ("command/train.py", "def f():\n    from pgpo.report.page import main"),
        ("alarms.py", "from pgpo.train.guard import GUARDS"),
        ("train/trainer.py", "from pgpo.command.models import load_model"),
        ("lab/study.py", "from pgpo.report.methods import MethodResult"),
        ("runlog.py", "__import__('pgpo.report')"),
        ("errors.py", "from pgpo import runlog"),
        ("visible.py", "from pgpo.errors import UserError"),
        ("tasks/science_qa.py", "from pgpo.visible import visible_text"),
        ("evaluate/run.py", "from pgpo.train.trainer import PGPOTrainer"),
        ("evaluate/run.py", "import transformers"),
        ("evaluate/run.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trl import GRPOConfig"),
        ("evaluate/run.py", "from ..core import divergence"),
        ("report/figures.py", "from pgpo.evaluate import summarize"),
        ("report/figures.py", "import pgpo"),
        ("report/figures.py", "from pgpo import PGPOTrainer"),
        ("forward/passes.py", "from pgpo.settings.config import PGPOConfig"),
        ("forward/batching.py", "from ..runlog import lock"),
        ("memory/shapes.py", "from transformers import AutoConfig"),
        ("memory/moments.py", "from pgpo.train.trainer import _HELD"),
        ("memory/command.py", "from pgpo.core.head import fused_distillation_head"),
        ("sde/verify.py", "from pgpo.teacher import Teacher"),
        ("sde/verify.py", "from pgpo.errors import UserError\nimport pgpo.evaluate.run"),
        ("minimal.py", "from pgpo.evaluate.run import evaluate"),
        ("minimal.py", "from transformers import AutoModel"),
        ("train/trainer.py", "from pgpo.lab import base_model"),
        ("train/trainer.py", "def f():\n    from pgpo.cli import main"),
        ("train/trainer.py", "from pgpo import minimal"),
        ("lab/study.py", "from pgpo.core import ExponentialLaw"),
        ("cli.py", "def f():\n    from trl import TrlParser"),
        ("brand_new.py", "import math"),
    ],
)
def test_a_planted_bad_import_is_found(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "core/x.py",
            "import math\nfrom collections.abc import Callable\nimport torch\nfrom torch.optim import Optimizer",
        ),
        (
            "core/x.py",
            "from .information import token_entropy\nfrom pgpo.core import viscosity\nfrom . import stepping",
        ),
        ("core/__init__.py", "from .information import token_entropy"),
        ("core/triton_kernels.py", "import triton\nfrom . import _head_formulas"),
        ("core/x.py", "def f():\n    from . import triton_kernels"),
        ("teacher/contexts.py", "import re\nfrom pgpo.visible import visible_text"),
        ("teacher/weights.py", "def f():\n    from peft import LoraConfig"),
        ("teacher/__init__.py", "from .contexts import build_contexts\nfrom .weights import Teacher"),
        ("tasks/science_qa.py", "def f():\n    import datasets\nfrom pgpo.errors import UserError"),
        ("tasks/lab_world.py", "from pgpo.tasks.graders import Grade\nfrom . import Row"),
        ("evaluate/runners.py", "import transformers\nfrom .run import evaluate"),
        ("report/figures.py", "from pgpo import __version__, runlog\nfrom ..runlog import read_run"),
        ("forward/passes.py", "from transformers.cache_utils import DynamicCache\nfrom pgpo.teacher import Teacher"),
        ("memory/shapes.py", "def f():\n    from transformers import AutoConfig"),
        ("train/trainer.py", "from trl import GRPOTrainer\nfrom pgpo import core\nimport pgpo.runlog as r"),
        ("lab/study.py", "import transformers\nfrom pgpo.train.trainer import PGPOTrainer"),
        ("cli.py", "def f():\n    from pgpo.lab.study import study\n    import pgpo.sde"),
        ("__init__.py", "def f():\n    from pgpo.train.trainer import PGPOTrainer"),
    ],
)
def test_a_good_import_is_not_mistaken_for_a_bad_one(file: str, source: str) -> None:
    assert violations(file, source) == []


@pytest.mark.parametrize(
    "arguments", [["-m", "pgpo", "--help"], ["-c", "import pgpo.cli"], ["-c", "import pgpo"]], ids=" ".join
)
def test_help_is_fast_because_nothing_heavy_is_imported(arguments: list[str]) -> None:
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=patient(20),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pgpo" in imported
    assert {name for name in imported if name.split(".")[0] in {"torch", *HEAVY}} == set()
    if "--help" in arguments:
        assert all(command in done.stdout for command in ("train", "eval", "sde"))
