"""`--report_to` with the real trackers, offline: names, steps, and one run of the tracker after a resumption."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import patient

from pgpo.runlog import read_run

RECIPE = """
task: lab_world
domain: physics
test_rows: 2
eval_rows: 2
eval_k: 2
max_steps: 2
prompts_per_step: 2
num_generations: 4
eval_steps: 2
save_steps: 2
"""
OURS = {"information", "rho", "student_entropy", "teacher_entropy", "divergence", "effective_lr", "active_share"}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that trains two steps, resumes the run for two more, and returns its directory."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "TRACKIO_DIR": tmp_path / "trackio"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)

    def train(tracker: str) -> Path:
        run = tmp_path / "run"
        first = ["--config", str(recipe), "--output_dir", str(run), "--report_to", tracker]
        for words in (first, ["--resume", str(run), "--max_steps", "4"]):
            done = subprocess.run(  # a process each, as a resumption has
                [sys.executable, "-m", "pgpo", "train", *words],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                timeout=patient(240),
            )
            assert done.returncode == 0, done.stderr[-2000:]
        return run

    return train


def agrees(run: Path, found: dict[int, dict[str, float]]) -> None:
    """Per step: train/NAME is what the run log says, for all of ours; and held-out numbers are eval/NAME."""
    lines = {line["step"]: line for line in read_run(run).metrics}
    assert sorted(lines) == [1, 2, 3, 4]
    for step, line in lines.items():
        assert line.keys() >= OURS
        for name in OURS:
            assert math.isclose(found[step][f"train/{name}"], line[name], rel_tol=1e-5, abs_tol=1e-7), (step, name)
    for step in (2, 4):
        assert 0 <= found[step]["eval/avg_at_k_low"] <= found[step]["eval/avg_at_k"] <= 1
    namespaces = ("train/", "eval/", "profiling/")  # the last is TRL's own, for W&B and trackio
    strange = {name for values in found.values() for name in values if not name.startswith(namespaces)}
    assert strange == set()


def test_tensorboard(trained) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained("tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))  # one folder is one run of TensorBoard
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted(steps)
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    agrees(run, found)
    assert not (run / "checkpoints" / "runs").exists()


def test_trackio(trained) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    run = trained("trackio")
    code = """
import json, trackio
api = trackio.Api()
runs = list(api.runs("huggingface"))
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([[r.name, SQLiteStorage.get_logs("huggingface", r.name)] for r in runs], default=str))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 0, done.stderr[-2000:]
    ((name, logs),) = json.loads(done.stdout.splitlines()[-1])  # one run, not one per process
    assert name.startswith("run-")
    found: dict[int, dict[str, float]] = {}
    for line in logs:
        if "train/global_step" not in line:
            assert all(key.startswith("profiling/") for key in line if "/" in key)  # TRL's own, at no step
            continue
        values = {key: value for key, value in line.items() if "/" in key}
        found.setdefault(int(line["train/global_step"]), {}).update(values)
    agrees(run, found)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: 7 bytes of head, then LevelDB's log format, blocks of 32 KiB (github google/leveldb,
    doc/log_format.md); W&B ships no reader of it in Python."""
    block, place, record = 32768, 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline(trained, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed: pip install wandb")
    from wandb.proto import wandb_internal_pb2

    run = trained("wandb")
    run_id = read_run(run).config["run_id"]
    files = sorted(tmp_path.rglob("run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2  # the id tells the server that it is one run
    found: dict[int, dict[str, float]] = {}
    for file in files:
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                pairs = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                values = {key: json.loads(value) for key, value in pairs.items() if not key.startswith("_")}
                if "train/global_step" in values:
                    found.setdefault(int(values["train/global_step"]), {}).update(values)
                else:
                    assert all(key.startswith("profiling/") for key in values)  # TRL's own, at no step
    agrees(run, found)
