"""What is installed: imports are declared, the wheel holds what the package reads, the files around it are sound."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from processes import on_cpus, patient

import pgpo

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMES = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}  # module -> distribution, where they differ
# Found where it is installed, and asked for by name: no extra brings it (DISTRIBUTED.md, PERFORMANCE.md).
UNDECLARED = {"deepspeed", "triton"}
WHEEL_BYTES = 3_000_000  # ours: a third of it is the lab's checkpoints


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", text)[0].lower() for text in requirements}


def imported() -> dict[str, bool]:
    """Distribution -> whether it is imported at the top of a file of ours."""
    found: dict[str, bool] = {}
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = set(map(id, tree.body))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"pgpo"}:
                name = NAMES.get(module, module)
                found[name] = found.get(name, False) or id(node) in top
    return found


REQUIRED = names(PROJECT["dependencies"])
EXTRAS = {name: names(needed) for name, needed in PROJECT["optional-dependencies"].items()}
EXTRAS["vllm"] = {"vllm"}  # by TRL's own extra, which knows its range


def test_every_import_is_declared():
    """psutil was imported and not declared: it came with accelerate."""
    optional = set().union(*(EXTRAS[name] for name in ("vllm", "peft", "report", "tasks")))
    assert set(imported()) - UNDECLARED - REQUIRED - optional == set()
    assert REQUIRED - set(imported()) == set()


def test_what_an_extra_brings_is_imported_inside_functions():
    """Else the package would not start without it. Figures are drawn by one module, imported inside a function."""
    optional = set().union(*(EXTRAS[name] for name in ("vllm", "peft", "tasks")))
    assert [name for name, at_top in imported().items() if name in optional and at_top] == []


def test_the_version_is_said_once():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"] == pgpo.__version__
    assert citation["license"] == PROJECT["license"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflows_test_the_pythons_that_are_declared():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    pythons = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert f">={pythons[0]}" == PROJECT["requires-python"]
    said = [line.split()[-1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert said == pythons


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.stem)
def test_a_workflow_or_form_is_yaml_and_runs_what_exists(path):
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)\b", text)) <= set(targets)
    assert [name for name in re.findall(r"\b(?:tests|docs)/[\w/.-]+", text) if not (ROOT / name).exists()] == []


def test_only_the_release_may_publish():
    """Permissions are given per job; no secret is named anywhere."""
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}
        may = {name for name, job in workflow["jobs"].items() if job.get("permissions", {}).get("id-token") == "write"}
        assert may == ({"publish"} if path.stem == "release" else set())
        assert "secrets." not in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_wheel_holds_what_the_package_reads(tmp_path):
    pytest.importorskip("build", reason="needs the dev extra")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, env=on_cpus(), capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size <= WHEEL_BYTES
    packed = set(zipfile.ZipFile(wheel).namelist())
    here = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/pgpo").rglob("*") if p.is_file()}
    assert {name for name in here if "__pycache__" not in name} - packed == set()
    assert "pgpo/py.typed" in packed and not any(name.startswith(("tests", "docs")) for name in packed)
