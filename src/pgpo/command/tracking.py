"""What `report_to` sends goes to one run of the tracker, however often the run is resumed.

Each tracker gets what transformers' callbacks send it: our metrics beside TRL's as train/NAME, held-out ones as
eval/NAME. By itself a resumed run would begin a new one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback

from pgpo.runlog import TENSORBOARD_FOLDER


@contextmanager
def one_run(trainer: Any, directory: Path, run_id: str | None) -> Iterator[None]:
    """TensorBoard writes to directory/tensorboard; trackio and W&B know the run by a name and an id that stay.

    What the user set (run_name, TENSORBOARD_LOGGING_DIR, WANDB_RUN_ID, WANDB_RESUME) is left as it is.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(directory / TENSORBOARD_FOLDER)
    if trainer.args.run_name is None and run_id is not None:
        trainer.args.run_name = f"{directory.resolve().name}-{run_id[:8]}"
    added = {}
    if "wandb" in trainer.args.report_to and run_id is not None and "WANDB_RUN_ID" not in os.environ:
        added = {"WANDB_RUN_ID": run_id} | ({} if "WANDB_RESUME" in os.environ else {"WANDB_RESUME": "allow"})
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
