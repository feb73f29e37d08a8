"""The run directory of `pgpo train`: its name, its lock, how it is created, resumed and removed again."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pgpo import runlog
from pgpo.command.terminal import say
from pgpo.errors import UserError
from pgpo.provenance import SECRET_SUFFIXES
from pgpo.runlog import BASE_FOLDER, RUN_ID, RunLog
from pgpo.settings.arguments import Parsed
from pgpo.settings.field_types import file_name
from pgpo.train import checkpoint as checkpoints


def new_name(parsed: Parsed) -> Path:
    """runs/<task>-<domain>-<objective>-<n>, the first n that is free."""
    parts = [parsed.run.task, parsed.run.domain, parsed.config.objective]
    stem = "-".join(file_name(p) for p in parts if p)
    number = 1
    while (Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return Path("runs") / f"{stem}-{number}"


def nearest_existing(directory: Path) -> Path:
    """The directory, or the nearest of its parents that exists."""
    try:
        return next(p for p in (directory, *directory.parents) if p.exists())
    except OSError as error:  # such as a name that is too long
        raise UserError(
            f"the run directory {str(directory)[:60]!r} cannot be created ({error.strerror}); choose another "
            "--output_dir."
        ) from error


def require_free(directory: Path, existing: Path, overwrite: bool) -> None:
    """Raise UserError if the directory holds a run, or cannot be created, before the model is loaded."""
    if not existing.is_dir():
        raise UserError(
            f"the run directory {directory} cannot be created: {existing} is a file; choose another --output_dir."
        )
    if runlog.occupied(directory) and not overwrite:
        raise UserError(
            f"the run directory {directory} already exists; continue it with `pgpo train --resume {directory}`, or "
            "choose another --output_dir, or replace it with --overwrite."
        )


@contextmanager
def locked(directory: Path, existing: Path) -> Iterator[None]:
    """Keep other processes from training in this directory; folders created for it are removed if they stay empty.

    `existing`: its nearest existing parent before.
    """
    try:
        with runlog.lock(
            directory, f"another process is training in {directory}; wait until it ends, or stop it first."
        ):
            yield
    finally:
        for folder in (directory, *directory.parents):
            if folder == existing or not folder.is_dir() or any(folder.iterdir()):
                break
            with suppress(OSError):  # somebody has just put something there
                folder.rmdir()


def open_log(parsed: Parsed, directory: Path, base: Path, run_id: str, resumed: int | None) -> RunLog:
    """The log of a run that continues after step `resumed`, or of a new one (None).

    A new one gets a copy of `base`, the initial model, where `pgpo train` made it.
    """
    config = resolved_config(parsed, run_id)
    if resumed is not None:
        log = RunLog.resume(directory, resumed)
        runlog.update_config(directory, config)  # a later --resume must know what this one changed
        return log
    device = {"device": _device(parsed.config)}
    log = RunLog.create(directory, config, device, overwrite=parsed.run.overwrite)
    _remove_parts(directory, (BASE_FOLDER, runlog.TEST_RECORDS_FILE, runlog.RESULT_FILE))  # of a run that is replaced
    if base.exists():
        shutil.copytree(base, directory / BASE_FOLDER)
    return log


def resolved_config(parsed: Parsed, run_id: str) -> dict[str, Any]:
    """The configuration for config.json; `arguments` alone is enough to repeat the run."""
    resolved = {k: v for k, v in parsed.config.to_dict().items() if not k.startswith("_")}
    return {
        **resolved,
        **vars(parsed.run),
        "model_name_or_path": parsed.model.model_name_or_path,
        RUN_ID: run_id,
        "arguments": {
            k: v
            for k, v in parsed.given.items()
            if k not in ("output_dir", "overwrite") and not k.endswith(SECRET_SUFFIXES)
        },
    }


def _device(args: Any) -> str:
    return torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device.type)


def discard(directory: Path) -> None:
    """Remove the files of a run that has finished no step, and no others."""
    files = (runlog.CONFIG_FILE, runlog.ENVIRONMENT_FILE, runlog.EVALUATIONS_FILE, runlog.SAMPLES_FILE)
    _remove_parts(directory, (*files, runlog.CHECKPOINTS_FOLDER, BASE_FOLDER))


def _remove_parts(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        else:
            (directory / name).unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files and folders of a process that died."""
    checkpoints.remove_leftovers(directory / runlog.CHECKPOINTS_FOLDER)
    for file in directory.glob("*.tmp"):
        if re.fullmatch(r"[\w.]+\.(json|jsonl)\.\d+\.tmp", file.name):  # as files.write_atomically names them
            file.unlink(missing_ok=True)


def last_checkpoint(directory: Path) -> tuple[int, Path]:
    """Step and path of the newest checkpoint that is complete and belongs to this run; says which ones it skips.

    Raises UserError if there is none.
    """
    folder = directory / runlog.CHECKPOINTS_FOLDER
    run_id = runlog.read_run(directory).config.get(RUN_ID)
    path = checkpoints.newest_whole(folder, run_id, say=say)
    if path is not None:
        return int(path.name.removeprefix("checkpoint-")), path
    if not checkpoints.steps(folder):
        raise UserError(
            f"{directory} was stopped before its first checkpoint was written, so there is nothing "
            'to continue; start it again with the "command" in its config.json, --overwrite and a smaller '
            "--save_steps."
        )
    raise UserError(f"{directory} has no readable checkpoint in {runlog.CHECKPOINTS_FOLDER}/; start a new run.")


def after_a_lost_rank(directory: Path, step: int, main: bool) -> str:
    """What to do after a rank was lost. `main`: this process writes the checkpoints, hence sees them all."""
    saved = checkpoints.steps(directory / runlog.CHECKPOINTS_FOLDER)
    if saved:
        go_on = f"continue from step {saved[-1]}, with the same launcher, by: pgpo train --resume {directory}"
    elif main:
        go_on = "nothing is saved yet."
    else:
        go_on = f"the checkpoints are in {directory} on rank 0's machine."
    return f"after step {step}; {go_on}"


@contextmanager
def full_disk_explained(directory: Path) -> Iterator[None]:
    """Turn an OSError of the log into a UserError; after a resume from the last checkpoint no line is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise UserError(
            f"the log in {directory} could not be written ({error.strerror}); free some space, then continue with "
            f"`pgpo train --resume {directory}`."
        ) from error
