"""`pgpo train` in which one rank ends at step 3. usage: rank_death.py RANK HOW WHERE TIME_FILE pgpo-arguments..."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from pgpo.cli import main
from pgpo.train.trainer import PGPOTrainer


def end(how: str, file: Path) -> None:
    file.write_text(f"{time.time()} {os.getpid()}")
    if how in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, how))
    elif how == "exit":
        os._exit(7)
    else:
        raise MemoryError("no room for 3 more tensors")


if __name__ == "__main__":
    rank, how, where, file = sys.argv[1:5]
    if os.environ["RANK"] == rank:
        plain = getattr(PGPOTrainer, where)

        def patched(self, *args, **kwargs):
            if self.state.global_step >= 3 or where == "held_out_records":
                end(how, Path(file))
            return plain(self, *args, **kwargs)

        setattr(PGPOTrainer, where, patched)
    sys.exit(main(["train", *sys.argv[5:]]))
