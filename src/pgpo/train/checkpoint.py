"""Atomic checkpoints: written aside, sealed with a manifest, renamed; verified before a run continues from one.

    checkpoints/.writing/checkpoint-4/    while it is written
    checkpoints/checkpoint-4/             sealed: manifest.json holds size and SHA-256 of every other file
    checkpoints/.removing/checkpoint-2/   while it is removed

    manifest.json    {"schema": 1, "step": 4, "run": id or null, "files": {name: {"bytes": 9, "sha256": "..."}, ...}}

A rename within a folder is atomic, so a process that dies at any moment leaves every `checkpoint-*` as it was or whole.
Files and folders are flushed to the disk (fsync) before the rename, and the folder after it. What a dead process
leaves behind is under the two dotted names; `begin` and `remove_leftovers` remove it. The hashes detect accidental
changes (truncation, bad copies, flipped bits). They are no signature, so pickled code in a checkpoint is never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMA = 1
MANIFEST_FILE = "manifest.json"
WRITING = ".writing"
REMOVING = ".removing"
_CHUNK = 2**20  # bytes hashed at once
_DCP = "torch.distributed.checkpoint"
_INERT = {  # module -> data classes without code, as torch 2.13 writes them
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
}


# Writing --------------------------------------------------------------------------------------------------------------


def begin(folder: Path) -> Path:
    """An empty place beside the checkpoints, in which `checkpoint-<step>` is to be written. Raises OSError."""
    remove_leftovers(folder)
    place = folder / WRITING
    place.mkdir(parents=True)
    return place


def commit(folder: Path, step: int, run: str | None = None) -> Path:
    """Seal `.writing/checkpoint-<step>` and give it its name; one that has the name already is replaced.

    Raises OSError; the checkpoints are then as before.
    """
    written, final = folder / WRITING / _name(step), folder / _name(step)
    files = {
        name: {"bytes": (written / name).stat().st_size, "sha256": sha256(written / name)}
        for name in sorted(_files(written))
    }
    manifest = {"schema": SCHEMA, "step": step, "run": run, "files": files}
    (written / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*written.rglob("*"), written):
        _fsync(path)
    if final.exists():
        _move_out(final)
    written.rename(final)
    _fsync(folder)
    remove_leftovers(folder)
    return final


def rotate(folder: Path, step: int, limit: int | None, best: Path | None = None) -> None:
    """Remove checkpoints until `limit` are left (None or 0: no limit), the oldest first.

    The one of `step`, just written, and `best` stay. Later ones go first: they could not be read when the run was
    resumed from an earlier one, so they belong to an abandoned course.
    """
    found = sorted(steps(folder), key=lambda s: (s <= step, s))
    surplus = len(found) - limit if limit and limit > 0 else 0
    free = [s for s in found if s != step and (best is None or best.name != _name(s))]
    for old in free[: max(0, surplus)]:
        _move_out(folder / _name(old))
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that died was writing or removing. One that was sealed, and whose predecessor of the same
    name was out of the way already, gets its name first.
    """
    for written in (folder / WRITING).glob("checkpoint-*"):
        if (folder / REMOVING / written.name).exists() and not (folder / written.name).exists():
            with contextlib.suppress(OSError):
                written.rename(folder / written.name)
    for name in (WRITING, REMOVING):
        shutil.rmtree(folder / name, ignore_errors=True)


def write_failure(error: BaseException) -> str | None:
    """The disk's reason, if a failed write caused the error; None for any other error.

    Python raises OSError; Rust (safetensors, tokenizers) an error of its own with the number in its text; torch.save a
    RuntimeError without it.
    """
    seen: BaseException | None = error
    while seen is not None:
        # A missing file that the code went on without is not the cause.
        if isinstance(seen, OSError) and seen.errno and (seen is error or not isinstance(seen, FileNotFoundError)):
            return os.strerror(seen.errno)
        if number := re.search(r"\(os error (\d+)\)", str(seen)):
            return os.strerror(int(number[1]))
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, RuntimeError) and re.search(r"inline_container|PytorchStreamWriter", str(error)):
        return "the disk took no more data"
    return None


# Reading --------------------------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, readable or not, the oldest first."""
    names = [p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def named_step(path: Path) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return None if found is None else int(found[1])


def problem(path: Path, run: str | None = None) -> str | None:
    """Why a checkpoint is not what was written under its name (by the run of this id, if given), or None."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        schema, step, writer, listed = (manifest[key] for key in ("schema", "step", "run", "files"))
        if schema != SCHEMA:
            return f"{MANIFEST_FILE}: version {schema}, this pgpo reads {SCHEMA}"
        if named_step(path) not in (None, step):  # a copy may have any other name
            return f"{MANIFEST_FILE}: it is the checkpoint of step {step}"
        if run is not None and writer != run:
            return f"{MANIFEST_FILE}: another run wrote it"
        found = {n for n in _files(path) if n in listed or not any(part.startswith(".") for part in Path(n).parts)}
        if odd := sorted(found ^ listed.keys()):
            return f"{odd[0]}: {'missing' if odd[0] in listed else 'not among the files that were written'}"
        for name in sorted(listed, key=lambda n: listed[n]["bytes"]):
            size = (path / name).stat().st_size
            if size != listed[name]["bytes"]:
                return f"{name}: {size} of {listed[name]['bytes']} bytes"
        for name in listed:
            if sha256(path / name) != listed[name]["sha256"]:
                return f"{name}: its content changed (SHA-256)"
    except FileNotFoundError:
        return f"{MANIFEST_FILE}: missing, so it is incomplete or not from pgpo"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE}: {type(error).__name__}"
    return None


def newest_whole(
    folder: Path, run: str | None = None, before: int | None = None, say: Callable[[str], Any] | None = None
) -> Path | None:
    """The newest checkpoint in a folder that verifies (`problem` is None); `say` gets a sentence for each one skipped.

    before: a step; only older checkpoints are looked at.
    """
    for step in reversed([s for s in steps(folder) if before is None or s < before]):
        path = folder / _name(step)
        if (found := problem(path, run)) is None:
            return path
        if say is not None:
            say(f"checkpoint {path.name} cannot be read ({found}); trying the one before.")
    return None


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_inert(file: Path) -> None:
    """Refuse a `.metadata` file of torch.distributed.checkpoint (FSDP), which torch unpickles, unless it names nothing
    but what torch puts there. Raises pickle.UnpicklingError with the first other name.
    """
    with file.open("rb") as opened:
        _InertUnpickler(opened).load()


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _INERT.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


# Batches of tensors and plain values ----------------------------------------------------------------------------------


def pack(batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split batches into CPU tensors {"<batch>/<name>": tensor} and what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    plain: list[dict[str, Any]] = []
    for i, batch in enumerate(batches):
        plain.append({})
        for name, value in batch.items():
            if isinstance(value, Tensor):
                tensors[f"{i}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
                plain[i][name] = {"tensor": "cpu" if value.device.type == "cpu" else "device"}
            else:
                plain[i][name] = {"value": value}
    return tensors, plain


def unpack(tensors: Mapping[str, Tensor], plain: Sequence[Mapping[str, Any]], device: Any) -> list[dict[str, Any]]:
    """What `pack` took apart; tensors that were not on the CPU go to `device`. Raises KeyError if one is missing."""

    def restore(key: str, entry: Mapping[str, Any]) -> Any:
        if "tensor" not in entry:
            return entry["value"]
        return tensors[key] if entry["tensor"] == "cpu" else tensors[key].to(device)

    return [{name: restore(f"{i}/{name}", entry) for name, entry in batch.items()} for i, batch in enumerate(plain)]


def _name(step: int) -> str:
    return f"checkpoint-{step}"


def _files(path: Path) -> set[str]:
    """Relative names of all files but the manifest."""

    def walk(folder: Path) -> Iterator[Path]:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                yield from walk(entry)
            else:
                yield entry

    return {file.relative_to(path).as_posix() for file in walk(path)} - {MANIFEST_FILE}


def _move_out(path: Path) -> None:
    """Rename a checkpoint out of the way first, so that no `checkpoint-*` is ever half removed."""
    target = path.parent / REMOVING / path.name
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
