"""Checkpoints: whole or not there, verified, exact to continue, without pickled code, and never the end of a run."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pickle
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import trainer_kit
from conftest import build_model
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from pgpo.errors import UserError
from pgpo.train import checkpoint
from pgpo.train import state as train_state

CONTENT = {"model.safetensors": b"weights", "optimizer.pt": b"o" * 5000, "deep/er/part.bin": b"", "state.json": b"{}"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """No waiting for the disk, some milliseconds per file."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write(folder: Path, step: int, content: dict[str, bytes] = CONTENT, run: str | None = "r1") -> Path:
    place = checkpoint.begin(folder) / f"checkpoint-{step}"
    for name, data in content.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return checkpoint.commit(folder, step, run)


# Sealing and verifying ------------------------------------------------------------------------------------------------


def test_the_manifest_lists_every_file_with_size_and_sha256(tmp_path):
    path = write(tmp_path / "c", 4)
    assert path == tmp_path / "c/checkpoint-4"
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"checkpoint-4"}
    assert json.loads((path / "manifest.json").read_text()) == {
        "schema": 1,
        "step": 4,
        "run": "r1",
        "files": {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in CONTENT.items()},
    }
    assert checkpoint.problem(path) is None
    assert checkpoint.problem(path, "r1") is None


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def change_manifest(path: Path, **values) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE = {
    "a bit flips": (lambda p: flip(p / "optimizer.pt"), "optimizer.pt: its content changed (SHA-256)"),
    "it is cut": (lambda p: os.truncate(p / "optimizer.pt", 4999), "optimizer.pt: 4999 of 5000 bytes"),
    "it grows": (lambda p: (p / "deep/er/part.bin").write_bytes(b"x"), "deep/er/part.bin: 1 of 0 bytes"),
    "a file is lost": (lambda p: (p / "state.json").unlink(), "state.json: missing"),
    "a file is added": (
        lambda p: (p / "deep/adapter_model.bin").write_bytes(b"x"),
        "deep/adapter_model.bin: not among the files that were written",
    ),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: missing, so it is incomplete or not"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 40), "manifest.json: JSONDecodeError"),
    "another JSON": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json: TypeError"),
    "no files listed": (lambda p: change_manifest(p, files=None), "manifest.json: "),
    "another version": (lambda p: change_manifest(p, schema=2), "manifest.json: version 2, this pgpo reads 1"),
    "another step": (lambda p: change_manifest(p, step=6), "manifest.json: it is the checkpoint of step 6"),
    "another run": (lambda p: change_manifest(p, run="r2"), "manifest.json: another run wrote it"),
    "no run": (lambda p: change_manifest(p, run=None), "manifest.json: another run wrote it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    path = write(tmp_path, 4)
    hurt, says = DAMAGE[damage]
    hurt(path)
    assert checkpoint.problem(path, "r1").startswith(says)


def test_what_a_file_manager_hides_there_does_no_harm(tmp_path):
    path = write(tmp_path, 4, CONTENT | {".metadata": b"listed"})
    (path / ".DS_Store").write_bytes(b"x")
    (path / ".ipynb_checkpoints").mkdir()
    (path / ".ipynb_checkpoints/state.json").write_bytes(b"x")
    assert checkpoint.problem(path) is None
    (path / ".metadata").write_bytes(b"Listed")
    assert checkpoint.problem(path).startswith(".metadata: its content")


class Crash(BaseException):
    """The process dies here."""


class Clock:
    """Dies before the n-th change of the file system, whichever it is."""

    def __init__(self, monkeypatch) -> None:
        self.left = -1
        for owner, name in (
            *((os, n) for n in ("fsync", "mkdir", "rename", "rmdir", "unlink", "open")),
            *((Path, n) for n in ("mkdir", "rename", "write_text", "write_bytes")),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self.counted(name, getattr(owner, name)))

    def counted(self, name, plain):
        def call(*args, **kwargs):
            if self.left == 0:
                raise Crash
            self.left -= 1
            return plain(*args, **kwargs)

        return call


@pytest.mark.parametrize("older", [[2], []])
def test_a_crash_at_any_moment_leaves_whole_checkpoints(tmp_path, monkeypatch, older):
    """While 4 is written anew and the older ones are rotated away; enumerates every moment."""
    new = CONTENT | {"state.json": b'{"new": 1}'}
    origin = tmp_path / "origin"
    for step in (*older, 4):
        write(origin, step)
    clock = Clock(monkeypatch)
    seen_old = seen_new = 0
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        clock.left = -1
        shutil.copytree(origin, folder)
        clock.left = moment
        with contextlib.suppress(Crash):
            write(folder, 4, new)
            checkpoint.rotate(folder, 4, 1)
            break
        clock.left = -1
        if older:
            assert checkpoint.steps(folder), moment  # 2 goes only when 4 is there
        checkpoint.remove_leftovers(folder)
        found = checkpoint.steps(folder)
        assert found, moment  # nothing is lost
        for step in found:
            assert checkpoint.problem(folder / f"checkpoint-{step}", "r1") is None, (moment, step)
        if 4 in found:
            state = (folder / "checkpoint-4/state.json").read_bytes()
            assert state in (b"{}", b'{"new": 1}')
            seen_old, seen_new = seen_old + (state == b"{}"), seen_new + (state != b"{}")
        assert {p.name for p in folder.iterdir()} == {f"checkpoint-{s}" for s in found}
    assert checkpoint.steps(folder) == [4]
    assert moment > 20 and seen_old > 5 and seen_new > 2


def test_everything_is_on_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    order: list[tuple[str, str]] = []
    plain_rename, plain_fsync = Path.rename, checkpoint._fsync
    monkeypatch.setattr(checkpoint, "_fsync", lambda p: (order.append(("fsync", p.name)), plain_fsync(p)))
    monkeypatch.setattr(Path, "rename", lambda p, t: (order.append(("rename", t.name)), plain_rename(p, t))[1])
    write(tmp_path / "c", 4)
    at = order.index(("rename", "checkpoint-4"))
    expected = {Path(n).name for n in CONTENT} | {"manifest.json", "checkpoint-4", "deep", "er"}
    assert {name for _, name in order[:at]} == expected
    assert order[at + 1 :] == [("fsync", "c")]


@pytest.mark.parametrize(
    "found, step, limit, best, left",
    [
        ([2, 4, 6], 6, 2, None, [4, 6]),
        ([2, 4, 6], 6, None, None, [2, 4, 6]),
        ([2, 4, 6], 6, 0, None, [2, 4, 6]),
        ([2, 4, 6], 6, 3, None, [2, 4, 6]),
        ([2, 4, 6], 6, 1, None, [6]),
        ([2, 4, 6], 6, 2, 2, [2, 6]),
        ([2, 4, 6], 6, 1, 4, [4, 6]),
        ([8, 10, 100], 100, 2, None, [10, 100]),  # by number, not by name
        ([2, 4, 6, 8], 4, 2, None, [2, 4]),  # 6 and 8 could not be read, and the run goes on from 2
        ([2, 4, 6, 8], 4, 3, None, [2, 4, 8]),
    ],
)
def test_rotation(tmp_path, found, step, limit, best, left):
    for s in found:
        (tmp_path / f"checkpoint-{s}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()  # not one of ours
    checkpoint.rotate(tmp_path, step, limit, None if best is None else tmp_path / f"checkpoint-{best}")
    assert checkpoint.steps(tmp_path) == left
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-best", *(f"checkpoint-{s}" for s in left)}


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to let any file grow beyond `size` bytes (EFBIG): a full disk without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_recognized_whoever_writes(tmp_path, tokenizer):
    big = {"a": torch.zeros(9000)}
    words = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    words.add_tokens([f"token{i}" for i in range(2000)])
    for action in (
        lambda: (tmp_path / "text").write_text("x" * 9000),
        lambda: torch.save(big, tmp_path / "t.pt"),
        lambda: save_file(big, tmp_path / "t.safetensors"),
        lambda: words.backend_tokenizer.save(str(tmp_path / "t.json")),
    ):
        with files_of_at_most(5000), pytest.raises(Exception) as caught:
            action()
        assert checkpoint.write_failure(caught.value) in (os.strerror(errno.EFBIG), "the disk took no more data")
    for error in (TypeError("not JSON"), RuntimeError("CUDA error"), ValueError("os error"), UserError("no")):
        assert checkpoint.write_failure(error) is None
        error.__context__ = FileNotFoundError(errno.ENOENT, "tried another name")
        assert checkpoint.write_failure(error) is None
        error.__context__ = OSError(errno.ENOSPC, "full")
        assert checkpoint.write_failure(error) == os.strerror(errno.ENOSPC)


def test_batches_come_back_as_they_were(tmp_path):
    base = torch.arange(12.0).reshape(4, 3)
    batches = [
        {"ids": base[:2], "ratio": base[:2, :1], "none": None, "prompts": [[1, 2], None], "count": torch.tensor(7)},
        {"ids": base[2:], "mask": base[2:] > 7, "rows": torch.arange(2), "half": torch.full([3], 0.1).bfloat16()},
    ]
    tensors, plain = checkpoint.pack(batches)
    save_file(tensors, tmp_path / "t.safetensors")
    again = checkpoint.unpack(load_file(tmp_path / "t.safetensors"), json.loads(json.dumps(plain)), "cpu")
    for batch, other in zip(batches, again, strict=True):
        assert list(batch) == list(other)
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                assert other[name].dtype == value.dtype and torch.equal(other[name], value)
            else:
                assert other[name] == value


# A trainer that goes on from a checkpoint is the one that never stopped -----------------------------------------------


def seal_again(path: Path) -> None:
    """Let the manifest fit what the checkpoint now holds."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json")
    listed = {
        p.relative_to(path).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in files
    }
    change_manifest(path, files=listed)


TIMES = ("step_time", "generation_seconds", "update_seconds")
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def trainer(path: Path, **options):
    """Saves every step, samples for real, and shuffles."""
    defaults = dict(max_steps=4, save_strategy="steps", save_steps=1, shuffle_dataset=True, rollout=None)
    return trainer_kit.trainer(path, **(defaults | options))


def trained(path: Path, resume: Path | None = None, **options):
    t = trainer(path, **options)
    trainer_kit.train(t, resume_from_checkpoint=None if resume is None else str(resume))
    return t


def course(t) -> list[dict]:
    """Every logged scalar but the times, as text (nan equals nan)."""
    lines = [r for r in t.state.log_history if "grad_norm" in r]
    return [{k: repr(v) for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same(t, other) -> None:
    assert course(t) == course(other)
    assert train_state.collected(t) == train_state.collected(other)
    for name in ("entropy_coef", "_last_world_entropy"):  # TRL's controller
        assert getattr(t, name) == getattr(other, name), name
    assert trainer_kit.differences(t, other) == []


CASES: dict[str, tuple[dict, list[int]]] = {
    "several steps of one generation": (dict(steps_per_generation=3), [2, 3]),
    "several passes over it": (dict(num_iterations=2), [1, 2]),
    "both, between two logs": (dict(steps_per_generation=2, num_iterations=2, logging_steps=3, max_steps=6), [4, 5]),
    "in the second and third pass over the data": (dict(rows=8, max_steps=6), [2, 5]),
    "there, within a generation": (dict(rows=8, num_iterations=3, max_steps=8), [7]),
    "GRPO, clipped against the rollout": (dict(objective="grpo", num_iterations=2), [3]),
    "GRPO with TRL's entropy controller": (
        dict(objective="grpo", micro_batch_size=4, use_adaptive_entropy=True, entropy_coef=0.3, entropy_target=9.0),
        [2],
    ),
    "SDPO, one generation per step": (dict(objective="sdpo"), [2]),
    "cross-fitted": (dict(information_source="cross_fit", steps_per_generation=2), [3]),
    "lagged": (dict(information_source="lagged", information_weight=0.5, num_iterations=2), [3]),
    "frozen teacher": (dict(teacher="frozen", num_iterations=2), [1]),
    "guarded": (dict(guard="halve_step", guard_warmup=0, guard_patience=1, num_iterations=2), [3]),
    "LoRA with dropout": (dict(peft_config=LORA, num_iterations=2), [3]),
}


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_as_if_it_had_never_stopped(tmp_path, case):
    options, steps = CASES[case]
    whole = trained(tmp_path / "whole", **options)
    assert any(float(line["grad_norm"]) > 0 for line in course(whole))
    if options.get("objective", "pgpo") == "pgpo":
        own = train_state.collected(whole)
        assert own["signal_steps"] == own["modulation"]["steps"] == whole.state.global_step
    for step in steps:
        again = trained(tmp_path / "again", tmp_path / f"whole/checkpoint-{step}", save_strategy="no", **options)
        assert_same(again, whole)


def test_only_a_reused_generation_is_saved(tmp_path):
    trained(tmp_path, steps_per_generation=2, max_steps=2)
    assert (tmp_path / "checkpoint-1/pgpo_rollout-0.safetensors").exists()
    assert not (tmp_path / "checkpoint-2/pgpo_rollout-0.safetensors").exists()


def test_the_last_rollout_comes_back_with_its_batches(tmp_path):
    whole = trained(tmp_path / "a", num_iterations=2, max_steps=2)
    again = trained(tmp_path / "b", tmp_path / "a/checkpoint-1", num_iterations=2, max_steps=2)
    assert again.last_rollout == whole.last_rollout is not None


def test_another_steps_per_generation_within_a_generation_is_refused(tmp_path):
    trained(tmp_path / "a", steps_per_generation=2, max_steps=1)
    with pytest.raises(
        UserError, match=r"checkpoint-1 cannot .* its steps_per_generation is 2, this run's 3\); remove"
    ):
        trained(tmp_path / "b", tmp_path / "a/checkpoint-1", steps_per_generation=3)


def test_another_number_of_processes_goes_on_and_is_told(tmp_path):
    trained(tmp_path / "a", num_iterations=2, max_steps=1)
    file = tmp_path / "a/checkpoint-1/pgpo_progress-0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ranks": 2}))
    seal_again(file.parent)
    with pytest.warns(UserWarning, match="written by another number of processes: the run continues, but not bit for"):
        again = trained(tmp_path / "b", tmp_path / "a/checkpoint-1", num_iterations=2, max_steps=2)
    assert again.state.global_step == 2


def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path):
    trained(tmp_path / "a", max_steps=1, save_only_model=True)
    with pytest.raises(UserError, match=r"checkpoint-1 cannot be continued \(.*no optimizer.pt, as with save_only"):
        trained(tmp_path / "b", tmp_path / "a/checkpoint-1")


def test_a_changed_save_steps_acts(tmp_path):
    trained(tmp_path / "a", max_steps=2, save_steps=2)
    trained(tmp_path / "b", tmp_path / "a/checkpoint-2", max_steps=5, save_steps=1)
    assert checkpoint.steps(tmp_path / "b") == [3, 4, 5]


# A trainer that is given a checkpoint verifies it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    trained(folder, max_steps=3)
    return folder


@pytest.fixture
def copy_of(three, tmp_path) -> Path:
    shutil.copytree(three, tmp_path / "a")
    return tmp_path / "a"


def refusal(t, resume: object) -> str:
    """What the trainer says instead of training; nothing was loaded."""
    before = trainer_kit.weights(t.model)
    t.training_step = None
    with pytest.raises(UserError) as caught:
        trainer_kit.train(t, resume_from_checkpoint=resume)
    assert trainer_kit.bitwise_equal(trainer_kit.weights(t.model), before)
    return str(caught.value)


def test_a_damaged_checkpoint_is_refused_with_the_file_and_an_older_whole_one(copy_of, three):
    flip(copy_of / "checkpoint-3/optimizer.pt")
    flip(copy_of / "checkpoint-2/scheduler.pt")
    t = trainer(copy_of / "b")
    assert refusal(t, str(copy_of / "checkpoint-3")) == (
        f"the checkpoint {copy_of}/checkpoint-3 is not as it was written (optimizer.pt: its content changed "
        f"(SHA-256)); continue from {copy_of}/checkpoint-1."
    )
    (copy_of / "checkpoint-1/model.safetensors").unlink()
    assert refusal(t, copy_of / "checkpoint-2") == (
        f"the checkpoint {copy_of}/checkpoint-2 is not as it was written (scheduler.pt: its content changed "
        "(SHA-256)); no older one is whole, so restore it from a copy."
    )
    shutil.copy(three / "checkpoint-3/optimizer.pt", copy_of / "checkpoint-3")
    (copy_of / "checkpoint-2/scheduler.pt").unlink()
    assert "(scheduler.pt: missing); no older one" in refusal(t, copy_of / "checkpoint-2")  # 3 is whole, but newer


def test_true_is_the_newest_whole_one_and_what_is_skipped_is_said(copy_of, three, tmp_path):
    whole = trained(tmp_path / "whole", three / "checkpoint-2", save_strategy="no")
    os.truncate(copy_of / "checkpoint-3/model.safetensors", 100)
    (copy_of / "runs").mkdir()
    t = trainer(copy_of, save_strategy="no")
    said: list[str] = []
    t.host.say = said.append
    trainer_kit.train(t, resume_from_checkpoint=True)
    assert_same(t, whole)
    (sentence,) = said
    assert sentence.startswith("checkpoint checkpoint-3 cannot be read (model.safetensors: 100 of ")


def test_true_without_a_whole_one(copy_of, tmp_path):
    assert refusal(trainer(tmp_path / "empty"), True) == (
        f"{tmp_path / 'empty'} has no whole checkpoint; give the path of one, or start from the beginning."
    )
    for path in copy_of.glob("checkpoint-*"):
        flip(path / "model.safetensors")
    t = trainer(copy_of)
    said: list[str] = []
    t.host.say = said.append
    assert "has no whole checkpoint" in refusal(t, True)
    assert [s.split()[1] for s in said] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]


def test_a_path_that_is_not_there_and_a_checkpoint_of_plain_trl_are_refused(copy_of):
    t = trainer(copy_of / "b")
    missing = copy_of / "checkpoint-9"
    assert refusal(t, str(missing)) == f"there is no checkpoint {missing}; give its folder, or True for the newest one."
    for file in [copy_of / "checkpoint-3/manifest.json", *(copy_of / "checkpoint-3").glob("pgpo_*")]:
        file.unlink()
    assert refusal(t, str(copy_of / "checkpoint-3")) == (
        f"{copy_of}/checkpoint-3 is no checkpoint of pgpo (it has no manifest.json), so teacher and schedule cannot be "
        "continued; give it to the trainer as the model, to train on from its weights."
    )


def test_without_a_manifest_it_goes_on_and_says_that_it_cannot_verify(copy_of, three, tmp_path):
    whole = trained(tmp_path / "whole", three / "checkpoint-2", save_strategy="no")
    (copy_of / "checkpoint-2/manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no manifest.json: whether it is whole cannot be verified"):
        again = trained(tmp_path / "again", copy_of / "checkpoint-2", save_strategy="no")
    assert_same(again, whole)


def test_a_checkpoint_may_be_copied_to_another_name_but_not_to_that_of_another_step(copy_of, three, tmp_path):
    whole = trained(tmp_path / "whole", three / "checkpoint-2", save_strategy="no")
    (copy_of / "checkpoint-2").rename(copy_of / "best")
    again = trained(tmp_path / "again", copy_of / "best", save_strategy="no")
    assert_same(again, whole)
    (copy_of / "best").rename(copy_of / "checkpoint-2000")
    assert "it is the checkpoint of step 2); continue from" in refusal(again, copy_of / "checkpoint-2000")


def test_false_and_none_start_from_the_beginning(copy_of):
    for resume in (False, None):
        t = trainer(copy_of, max_steps=1, save_strategy="no")
        trainer_kit.train(t, resume_from_checkpoint=resume)
        assert t.state.global_step == 1


# What a checkpoint holds ----------------------------------------------------------------------------------------------


def test_the_teachers_adapter_is_saved_once_and_the_students_alone_is_the_model(tmp_path):
    t = trained(tmp_path, peft_config=LORA, max_steps=2)
    path = tmp_path / "checkpoint-2"
    assert [p.name for p in path.iterdir() if p.is_dir()] == []  # PEFT would put a second adapter into a folder
    assert not any("teacher" in name for name in load_file(path / "adapter_model.safetensors"))
    student = {n: p for n, p in t.model.named_parameters() if ".default." in n}
    teacher = {n.split("/", 1)[1]: p for n, p in load_file(path / "pgpo_teacher.safetensors").items()}
    assert student.keys() == teacher.keys()
    assert any(not torch.equal(student[n], teacher[n]) for n in student)
    assert set(t.model.peft_config) == {"default", "teacher"}  # as before
    assert "save_pretrained" not in vars(t.model)

    merged = PeftModel.from_pretrained(build_model(), path).merge_and_unload().eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = t.model.eval()(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
        assert not torch.allclose(build_model().eval()(ids).logits, expected, atol=1e-2)


def test_no_pickle_of_the_arguments(tmp_path):
    t = trained(tmp_path, max_steps=1)
    assert not (tmp_path / "checkpoint-1/training_args.bin").exists()
    t.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model/model.safetensors").exists()
    assert not (tmp_path / "model/training_args.bin").exists()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def name_as_pickle(module: str, name: str) -> bytes:
    """What pickle writes for a function or class of this name, protocol 4."""
    strings = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name))  # SHORT_BINUNICODE
    return b"\x80\x04" + strings + b"\x93."  # PROTO 4, STACK_GLOBAL, STOP


class ReadAll(Exception):
    """The checkpoint was read to its end."""


def read_all(*_):
    raise ReadAll


TARGETS = [
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin", "adapter_model.bin"),
    *("optimizer.bin", "scaler.pt", "model.safetensors", "adapter_model.safetensors", "pgpo_teacher.safetensors"),
    *("pgpo_state.json", "trainer_state.json", "pgpo_progress-0.json", "pgpo_rollout-0.safetensors"),
]


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("peft", [False, True])
def test_no_pickled_code_runs(tmp_path, form, peft):
    """In whatever file it hides, in the formats of pickle and of torch.save, beside the real weights or instead."""
    options = dict(num_iterations=2, peft_config=LORA if peft else None)
    trained(tmp_path / "a", max_steps=1, **options)
    t = trainer(tmp_path / "b", **options)
    t.training_step = read_all
    marker = tmp_path / "executed"
    bomb = tmp_path / "bomb"
    if form == "torch":
        torch.save({"a": Bomb(marker)}, bomb)
    else:
        bomb.write_bytes(pickle.dumps(Bomb(marker)))
    read = refused = 0
    for number, name in enumerate(TARGETS):
        path = tmp_path / f"{number}" / "checkpoint-1"
        shutil.copytree(tmp_path / "a/checkpoint-1", path)
        shutil.copy(bomb, path / name)
        if name.endswith("_model.bin"):  # transformers falls back to it
            (path / "model.safetensors").unlink(missing_ok=True)
            (path / "adapter_model.safetensors").unlink(missing_ok=True)
        seal_again(path)  # whoever can write the folder can write a manifest
        try:
            trainer_kit.train(t, resume_from_checkpoint=str(path))
        except ReadAll:
            read += 1
        except Exception as error:
            refused += 1
            assert isinstance(error, UserError) or name == "trainer_state.json", (name, error)
    assert not marker.exists()
    assert read + refused == len(TARGETS) and read >= 2 and refused >= 8
    with pytest.raises(Exception):  # the bomb is live  # noqa: B017
        pickle.loads(bomb.read_bytes()) if form == "pickle" else torch.load(bomb, weights_only=False)
        assert not marker.exists()


def test_metadata_of_a_sharded_checkpoint_names_nothing_but_torchs_own(tmp_path):
    """torch.distributed.checkpoint (FSDP) reads it with plain pickle."""
    model = torch.nn.Linear(3, 4).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3).bfloat16()).sum().backward()
    optimizer.step()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "n": torch.zeros(3, dtype=torch.int64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(states, checkpoint_id=tmp_path / "a")
    checkpoint.require_inert(tmp_path / "a/.metadata")

    trained(tmp_path / "b", max_steps=1)
    place = tmp_path / "b/checkpoint-1/pytorch_model_fsdp_0"
    place.mkdir()
    metadata = "torch.distributed.checkpoint.metadata"
    assert pickle.loads(name_as_pickle(metadata, "os.path.join")) is os.path.join  # pickle follows dots
    for content in (
        pickle.dumps(Bomb(tmp_path / "executed")),
        name_as_pickle(metadata, "os.system"),
        name_as_pickle("torch", "hub.load"),
        name_as_pickle("builtins", "eval"),
    ):
        (place / ".metadata").write_bytes(content)
        seal_again(place.parent)
        with pytest.raises(
            UserError, match=r"checkpoint-1 cannot be continued \(UnpicklingError: it names .*\); remove"
        ):
            trained(tmp_path / "c", tmp_path / "b/checkpoint-1")
    assert not (tmp_path / "executed").exists()


# A disk that takes no more --------------------------------------------------------------------------------------------


def full_at(t, steps: set[int], size: int) -> None:
    """The disk takes no file beyond `size` bytes while the checkpoints of these steps are written."""
    plain = t._save_checkpoint

    def save(model, trial):
        with files_of_at_most(size) if t.state.global_step in steps else contextlib.nullcontext():
            plain(model, trial)

    t._save_checkpoint = save


@pytest.mark.parametrize(("size", "first"), [(2000, "model.safetensors"), (100_000, "optimizer.pt")])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path, size, first):
    whole = trained(tmp_path / "whole", max_steps=3)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "whole/checkpoint-2").iterdir()}
    assert sizes[first] > size  # the first file that does not fit
    said: list[str] = []
    t = trainer(tmp_path / "full", max_steps=3)
    full_at(t, {2}, size)
    t.host.say = said.append
    trainer_kit.train(t)
    assert_same(t, whole)
    (sentence,) = said
    assert sentence.startswith(f"checkpoint-2 could not be written in {tmp_path / 'full'} (")
    assert "training continues and the next save tries again: free some space there." in sentence
    assert checkpoint.steps(tmp_path / "full") == [1, 3]
    assert not (tmp_path / "full/.writing").exists()
    assert checkpoint.problem(tmp_path / "full/checkpoint-3") is None
    assert t.failed_save is None


def test_a_last_save_that_fails_is_remembered(tmp_path):
    t = trainer(tmp_path, max_steps=2)
    full_at(t, {2}, 2000)
    with pytest.warns(UserWarning, match=r"checkpoint-2 could not be written"):  # without a run log to tell it
        trainer_kit.train(t)
    assert t.failed_save is not None
    assert not (tmp_path / ".writing").exists()
    assert checkpoint.steps(tmp_path) == [1]


def test_any_other_error_while_saving_is_raised(tmp_path):
    t = trainer(tmp_path, max_steps=1)
    t.save_extra = lambda _: {}["state"]
    with pytest.raises(KeyError, match="state"):
        trainer_kit.train(t)
    assert checkpoint.steps(tmp_path) == []
    assert t._get_output_dir(None) == str(tmp_path)  # not the place aside
    trained(tmp_path, max_steps=1)  # which the next save clears
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "checkpoint-1"}


# What transformers does with a checkpoint of its own ------------------------------------------------------------------


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    """Step 1 is the best; its path is the final one, also in the state that step 3 saves."""
    values = iter([0.9, 0.1, 0.2])
    options = dict(eval_strategy="steps", eval_steps=1, save_total_limit=2, max_steps=3)
    t = trainer(tmp_path, eval_dataset=[{"prompt": "w1"}], metric_for_best_model="avg", **options)
    t.args.load_best_model_at_end = t.args.greater_is_better = True

    def evaluate(**_):
        metrics = {"eval_avg": next(values)}
        t.control = t.callback_handler.on_evaluate(t.args, t.state, t.control, metrics)
        return metrics

    t.evaluate = evaluate
    trainer_kit.train(t)
    assert checkpoint.steps(tmp_path) == [1, 3]
    best = str(tmp_path / "checkpoint-1")
    for step in (1, 3):
        saved = json.loads((tmp_path / f"checkpoint-{step}/trainer_state.json").read_text())
        assert saved["best_model_checkpoint"] == best
        assert checkpoint.problem(tmp_path / f"checkpoint-{step}") is None
    first = load_file(tmp_path / "checkpoint-1/model.safetensors")
    assert all(torch.equal(p, first[n]) for n, p in t.model.named_parameters())


def test_a_checkpoint_is_pushed_when_it_has_its_name(tmp_path):
    t = trainer(tmp_path, max_steps=1)
    t.args.push_to_hub = True
    pushed = []
    t._push_from_checkpoint = lambda folder: pushed.append((folder, checkpoint.problem(Path(folder))))
    t._save_checkpoint, save = (lambda *_: None), t._save_checkpoint
    t.push_to_hub = lambda *_, **__: None
    trainer_kit.train(t)
    save(t.model, None)
    assert pushed == [(str(tmp_path / "checkpoint-1"), None)]
    assert t.args.push_to_hub is True
