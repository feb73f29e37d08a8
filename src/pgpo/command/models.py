"""The model and the tokenizer of a command: found, loaded, and checked against the questions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pgpo.command.terminal import progress, say
from pgpo.errors import UserError, reason
from pgpo.hub import is_hub_id, require_model
from pgpo.runlog import BASE_FOLDER
from pgpo.settings.arguments import Parsed
from pgpo.tasks import Row, Task, lab_world
from pgpo.train.seam import nonfinite_parameter


def model_source(parsed: Parsed, task: Task, scratch: Path, resumed: Path | None) -> Path | str:
    """Folder or hub id of the model: the one named, the lab's base model, or a small one that is trained here first.

    `resumed`: the run directory of a run that continues, which has that small model already.
    """
    if parsed.model.model_name_or_path:
        return parsed.model.model_name_or_path
    if parsed.run.task == "lab_world":
        return lab_world.checkpoint_path(parsed.run.variant)
    if resumed is not None:
        return resumed / BASE_FOLDER
    from pgpo.command.warm_start import warm_start

    say("no model given: a small one is made now and taught the answer format (one to three minutes).")
    with progress("warm start") as (bar, line):
        return warm_start(
            task.train,
            parsed.run.prompt_style,
            scratch / BASE_FOLDER,
            seed=parsed.config.seed,
            progress=lambda step, steps, loss: bar.update(
                line, total=steps, completed=step, shown=f"loss {loss:.2f} nats per token"
            ),
        )


def load_model(source: Path | str, dtype: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Model (float32 by default) and tokenizer. Raises UserError with the reason if they cannot be loaded."""
    tokenizer = load_tokenizer(source, **{k: options[k] for k in ("revision", "trust_remote_code") if k in options})
    with _explained(source):
        precision = "auto" if dtype == "auto" else getattr(torch, dtype or "float32")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=precision, **options)
    if (weight := nonfinite_parameter(model)) is not None:
        raise UserError(f"the weight {weight} of the model {str(source)!r} holds nan or inf; give an intact copy.")
    return model, tokenizer


def require_source(source: Path | str, revision: str | None = None) -> None:
    """Raises UserError if there is neither such a folder nor such a model on the hub."""
    if Path(source).exists():
        return
    if not is_hub_id(str(source)):
        raise UserError(f"there is no model folder {source}; give one with config, weights and tokenizer, or a hub id.")
    require_model(str(source), revision)


def load_tokenizer(source: Path | str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer, padding on the left. Raises UserError if there is no such model, or it cannot be loaded."""
    require_source(source, revision)
    with _explained(source):
        return AutoTokenizer.from_pretrained(
            source, padding_side="left", revision=revision or "main", trust_remote_code=trust_remote_code
        )


def load_config(source: Path | str, trust_remote_code: bool = False) -> Any:
    """The config of a model, or of the model that adapters belong to. Raises UserError if it cannot be loaded."""
    with _explained(source):
        return AutoConfig.from_pretrained(base_of(source), trust_remote_code=trust_remote_code)


def base_of(source: Path | str) -> str:
    """The model of a folder of adapters; any other name unchanged."""
    file = Path(source) / "adapter_config.json"
    if not file.is_file() or (Path(source) / "config.json").exists():
        return str(source)
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])


@contextmanager
def _explained(source: Path | str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the model {str(source)!r} cannot be loaded ({type(error).__name__}: {reason(error)}); give a folder or "
            "hub id with config, weights and tokenizer."
        ) from error


def check_prompts(tokenizer: Any, rows: Sequence[Row], limit: int | None, template: dict[str, Any]) -> int:
    """Tokens of the longest prompt.

    Raises UserError without a chat template or a pad token, or if a prompt has more than `limit` tokens.
    """
    if not tokenizer.chat_template:
        raise UserError("the model's tokenizer has no chat template; use an instruction-tuned model or set one.")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no pad token and no eos token; set tokenizer.pad_token.")
    prompts = [row["prompt"] for row in rows]
    encoded = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True, **template)[
        "input_ids"
    ]
    for row, ids in zip(rows, encoded, strict=True):
        if limit is not None and len(ids) > limit:
            raise UserError(
                f"question {row['id']} has {len(ids)} prompt tokens, more than max_prompt_length = {limit}; raise it."
            )
    return max(map(len, encoded))


def one_thread() -> None:
    """On a CPU, unless OMP_NUM_THREADS says how many: small models gain nothing from more, and threads that wait for
    each other lose a lot where others compute, too."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
