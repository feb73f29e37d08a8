"""Everything that cannot work and can be known before the first step, as a sentence with a remedy.

    check_inputs(...)    the constructor's arguments, before a model is loaded or changed
    check_model(...)     what needs the model, the tokenizer and TRL's part of the trainer
    check_rows(...)      rows of a stream, when they are read

All raise `UserError`, the same one on all ranks, since all check the same data.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn

from pgpo.errors import UserError
from pgpo.forward.batching import positions
from pgpo.forward.open_model import causal_lm
from pgpo.forward.routers import router_problem
from pgpo.settings.config import PGPOConfig
from pgpo.settings.field_types import shown
from pgpo.train import zero
from pgpo.train.adapters import adapter_problem, precision_problem
from pgpo.train.prompts import Prompts
from pgpo.train.seam import Prompt, Rollout, function_name
from pgpo.train.sharding import sharding_problem
from pgpo.train.success import deciding
from pgpo.train.user_functions import CONTEXT_COLUMN, FEEDBACK_ARGUMENTS, REWARD_ARGUMENTS, is_async

_CHUNK = 1000  # ours: rows decoded at a time


# Before the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A dataset as it was given, and what is known without reading it through.

    Attributes:
        name: for sentences.
        columns: of the first row, where there is no schema.
        head: the first rows of a stream; of anything else none.
        late: rows can be judged only when they are read: a stream, or `set_transform`.
    """

    name: str
    dataset: Any
    columns: list[str]
    head: list[Any]
    late: bool

    def may_hold(self, column: str) -> bool:
        return column in self.columns or self.late


def read(name: str, dataset: Any, rows: int = 1) -> Data:
    """rows: so many of a stream are read ahead."""
    head: list[Any] = []
    if isinstance(dataset, IterableDataset):
        head = list(itertools.islice(dataset, rows))
    found = getattr(dataset, "column_names", None)
    if found is None and (head or (isinstance(dataset, Sequence) and not isinstance(dataset, str) and dataset)):
        found = list((head or dataset)[0])
    transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    return Data(name, dataset, list(found or []), head, isinstance(dataset, IterableDataset) or transformed)


def read_all(eval_dataset: Any) -> list[Data]:
    """The evaluation sets, one or several."""
    if isinstance(eval_dataset, dict):
        return [read(f"eval_dataset[{key!r}]", part) for key, part in eval_dataset.items()]
    return [] if eval_dataset is None else [read("eval_dataset", eval_dataset)]


def check_arguments(cls: Any, args: Any) -> None:
    """That the trainer's class, or a subclass of it, gets a configuration that it can use, and overrides what acts."""
    if not isinstance(args, PGPOConfig):
        raise UserError(f"args is a {type(args).__name__}; PGPOTrainer needs a PGPOConfig (same fields and more).")
    if (problem := cls.unused_override(args.distills)) is not None:
        raise UserError(problem)


def check_inputs(
    args: PGPOConfig,
    train_dataset: Any,
    eval_dataset: Any,
    reward_funcs: Any,
    feedback_funcs: Any,
    grade: Any,
    options: Mapping[str, Any],
) -> Data:
    """The training set, for `check_model`.

    Args:
        options: the other keyword arguments of TRL's constructor.
    """
    args.check_again()
    environments = options.get("environment_factory")
    if not reward_funcs and not environments:
        raise UserError("reward_funcs is empty; pass a function that grades completions (1.0 = right).")
    functions = as_list(reward_funcs)
    _check_functions("reward_funcs", functions, "a function, a reward model or its name", (str, nn.Module))
    _check_functions("feedback_funcs", as_list(feedback_funcs), "a function")
    if not environments:  # an environment may bring a reward of its own
        deciding(args.success_reward, [function_name(f) for f in functions], args.distills)
        _check_weights(args, functions)
    _check_evaluation(args, eval_dataset, grade)
    if args.distills:
        for name in ("tools", "environment_factory"):
            if options.get(name):
                raise UserError(f"{name} is not supported with self-distillation; use objective='grpo'.")
    questions = (args.generation_batch_size or 0) // (args.num_generations or 1)
    train, evaluation = read("train_dataset", train_dataset, questions), read_all(eval_dataset)
    _check_training_set(args, train, questions, environments)
    _check_teaching(args, train, feedback_funcs)
    if not environments and not options.get("rollout_func"):  # which bring columns of their own
        judged = [train, *([] if grade is not None else evaluation)]
        _check_columns("reward", functions, REWARD_ARGUMENTS, judged, args)
        _check_columns("feedback", as_list(feedback_funcs), FEEDBACK_ARGUMENTS, [train], args)
    for data in (train, *evaluation):
        _check_column_names(data.name, data.columns, bool(environments))
    return train


def as_list(functions: Any) -> list[Any]:
    """One function or several, of None none."""
    if isinstance(functions, (list, tuple)):
        return list(functions)
    return [] if functions is None else [functions]


def _check_functions(name: str, functions: Sequence[Any], what: str, others: tuple[type, ...] = ()) -> None:
    for function in functions:
        if not callable(function) and not isinstance(function, others):
            raise UserError(f"{name} holds {shown(function)}; pass {what}, or a list of them.")


def _check_weights(args: PGPOConfig, functions: Sequence[Any]) -> None:
    weights = args.reward_weights
    if weights is not None and len(weights) != len(functions):
        names = ", ".join(map(function_name, functions))
        raise UserError(
            f"reward_weights has {len(weights)} numbers for {len(functions)} reward functions ({names}); give one for "
            "each."
        )


def _check_columns(
    kind: str, functions: Sequence[Any], given: Sequence[str], sets: Sequence[Data], args: PGPOConfig
) -> None:
    """That a function's arguments are those that it is called with: `given`, and the columns of the dataset."""
    for function in functions:
        if isinstance(function, (str, nn.Module)):
            continue
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # a built-in that does not tell
            continue
        what = f"{kind} function {function_name(function)!r}"
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters) and (left := [n for n in given if n not in named]):
            raise UserError(
                f"{what} takes no {left[0]!r}, which every {kind} function is given; add **kwargs to its arguments."
            )
        for data in sets:
            columns = _columns_for_functions(data, args)
            needed = [name for name, p in named.items() if p.default is p.empty and name not in (*given, *columns)]
            if needed and not data.late:
                dropped = needed[0] in data.columns and needed[0] not in ("prompt", "completion")
                raise UserError(
                    f"{what} needs {needed[0]!r}, which it does not get from {data.name} (it gets {', '.join(given)} "
                    f"and the columns: {', '.join(columns) or 'none'}); "
                    f"{'leave remove_unused_columns False' if dropped else 'add the column, or a default'}."
                )


def _columns_for_functions(data: Data, args: PGPOConfig) -> list[str]:
    """Columns that TRL hands on: of training, remove_unused_columns leaves those with images."""
    dropped = args.remove_unused_columns and data.name == "train_dataset"
    kept = ("image", "images") if dropped else data.columns
    return [name for name in data.columns if name in kept and name not in ("prompt", "completion")]


def _check_training_set(args: PGPOConfig, data: Data, questions: int, environments: Any) -> None:
    """questions: rows that the first completions are sampled for."""
    dataset = data.dataset
    if dataset is None and environments:
        return  # TRL makes rows for them
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise UserError(
            f"train_dataset is {'missing' if dataset is None else f'a {type(dataset).__name__}'}; give a Dataset or "
            "IterableDataset of the datasets library (Dataset.from_list(rows) makes one)."
        )
    if isinstance(dataset, IterableDataset) and args.max_steps <= 0:
        raise UserError("train_dataset is a stream, whose length is not known; set max_steps.")
    rows = len(dataset) if isinstance(dataset, Dataset) else len(data.head)
    if rows == 0:
        raise UserError("train_dataset is empty; check its filters and its path.")
    known = not data.late or bool(data.head)
    if known and "prompt" not in data.columns and not environments:
        raise UserError(_no_prompt(data.name, data.columns))
    if known and isinstance(environments, Mapping) and "environment" not in data.columns:
        raise UserError(
            f"environment_factory is a dict, but train_dataset has no column 'environment' (its columns: "
            f"{', '.join(data.columns)}); name each row's environment there: {', '.join(map(str, environments))}."
        )
    if rows < questions:
        count = "prompts_per_step"
        if (steps := args.steps_per_generation or 1) > 1:
            count = f"prompts_per_step * steps_per_generation = {args.prompts_per_step} * {steps}"
        raise UserError(f"train_dataset has {rows} rows, fewer than {count} = {questions}; lower prompts_per_step.")


def _no_prompt(name: str, found: Sequence[str]) -> str:
    remedy = "rename the one that holds the chat messages or the text"
    if "conversations" in found:
        remedy = "make it of conversations (ShareGPT's), with the keys role and content, without the answer"
    elif "messages" in found:
        remedy = "make it of messages, without the answer"
    return f"{name} has the columns {', '.join(found)} but no 'prompt'; {remedy}."


def _check_evaluation(args: PGPOConfig, eval_dataset: Any, grade: Any) -> None:
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    for asked, given, remedy in (
        (strategy != "no", f"eval_strategy is {strategy!r}", "set eval_strategy='no'"),
        (args.eval_on_start, "eval_on_start is True", "leave it False"),
    ):
        if asked and eval_dataset is None:
            raise UserError(f"{given}, but there is no eval_dataset; pass one, or {remedy}.")
    if grade is not None and (not callable(grade) or is_async(grade)):
        raise UserError(
            f"grade is {'an async function' if callable(grade) else shown(grade)}; pass a plain function (completion "
            "text, dataset row) -> pgpo.tasks.graders.Grade."
        )


def _check_teaching(args: PGPOConfig, data: Data, feedback_funcs: Any) -> None:
    """That the teacher can have anything to show."""
    told = args.feedback_mode != "never" and (bool(feedback_funcs) or CONTEXT_COLUMN in data.columns)
    siblings = args.use_successful_as_teacher and (args.num_generations != 1 or args.allow_own_success)
    if not args.distills or told or siblings or (data.late and not data.head):
        return
    source = f"give feedback_funcs or a column {CONTEXT_COLUMN!r}"
    if args.feedback_mode == "never":
        source = f"{source}, and leave feedback_mode='never' out"
    if not args.use_successful_as_teacher:
        raise UserError(
            f"use_successful_as_teacher is False and there is no feedback, so that no sample has a teacher; {source}."
        )
    raise UserError(
        "num_generations is 1; with fewer than 2 completions per question no sibling can be a demonstration, and there "
        f"is no feedback; use 2 or more (the paper takes 8), or {source}."
    )


def _check_column_names(name: str, found: Sequence[str], environments: bool) -> None:
    for column in (*REWARD_ARGUMENTS, *(["environments"] if environments else [])):
        if column in found:
            raise UserError(
                f"{name} has a column {column!r}, a name that already means something to reward functions; rename it, "
                f"e.g. {name}.rename_column({column!r}, 'my_{column}')."
            )


# With the model -------------------------------------------------------------------------------------------------------


def check_model(trainer: Any, train: Data) -> tuple[Prompts, int | None]:
    """The checks of prompts, and the limit of a teacher prompt in tokens (None = no limit).

    Args:
        trainer: a PGPOTrainer whose TRL part is complete.
    """
    model, tokenizer = trainer.model, trainer.tokenizer
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no pad token and no eos token; set tokenizer.pad_token.")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, by which a completion ends; set tokenizer.eos_token.")
    if trainer.args.precision_note is not None and trainer.accelerator.is_main_process:
        trainer.host.say(trainer.args.precision_note)
    if (tags := trainer.unseen_thinking_tags) and trainer.accelerator.is_main_process:
        trainer.host.say(
            f"the tokenizer has {' and '.join(tags)} as special tokens, which decoded completions do not show: "
            "reward functions and demonstrations cannot tell thinking from answer. Switch thinking off in "
            "chat_template_kwargs, or set tokenizer.response_template, by which TRL separates the two."
        )
    if (problem := precision_problem(model)) is not None:
        raise UserError(problem)
    _check_sharding(trainer)
    if (problem := adapter_problem(model, trainer.distills)) is not None:
        raise UserError(problem)
    if trainer.args.trust != "off" and trainer.args.trust_form == "undo":
        _check_undo(trainer)
    if trainer.aux_loss_enabled and (problem := router_problem(causal_lm(model))) is not None:
        raise UserError(problem)
    if trainer.distills and trainer.is_multimodal:
        raise UserError("self-distillation of vision-language models is not supported; use objective='grpo'.")
    teacher_prompt_limit = _teacher_prompt_limit(trainer)
    prompts = _prompts(trainer, trainer.distills, trainer.args.max_prompt_length)
    check_rows(prompts, train.head, 0, bool(trainer.environment_factories))
    if not train.late:
        _check_dataset(train, prompts)
    if prompts.prefilled and trainer.accelerator.is_main_process:
        trainer.host.say(
            "a prompt ends in an assistant's message: as in TRL, the chat template closes it, and the completion is a "
            "turn of its own."
        )
    return prompts, teacher_prompt_limit


def _check_sharding(trainer: Any) -> None:
    if (
        trainer.is_deepspeed_enabled
        and (problem := zero.zero_problem(trainer.model, trainer.accelerator, trainer.args)) is not None
    ):
        raise UserError(problem)
    if trainer.args.guard == "rollback" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise UserError(
            "guard='rollback' keeps a copy of weights and optimizer, which is not sharded under FSDP or DeepSpeed; "
            "use 'rollback_teacher', 'halve_step' or 'warn'."
        )
    if trainer.distills and trainer.is_fsdp_enabled and (problem := sharding_problem(trainer.accelerator)) is not None:
        raise UserError(problem)


def _check_undo(trainer: Any) -> None:
    """That trust can move the weights back after a step."""
    undo, instead = "trust='measured' with trust_form='undo'", "or use trust_form='lagged'"
    if trainer.is_deepspeed_enabled:
        raise UserError(
            f"{undo} moves weights after the step, of which DeepSpeed keeps a copy of its own; use DDP or FSDP2, "
            f"{instead}."
        )
    if trainer.is_fsdp_enabled and trainer.args.bf16:
        return  # accelerate keeps the shards in fp32
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            raise UserError(
                f"{undo} keeps a part of each step, which bf16 rounds away, and the weight {name} is bf16; load the "
                f"model with dtype='float32' (bf16=True then halves the matmuls), {instead}."
            )


# Positions ------------------------------------------------------------------------------------------------------------


def _room(trainer: Any) -> int | None:
    """Tokens that the model's positions leave to a prompt beside a completion of full length; None = no limit."""
    most, completion = positions(trainer.model.config), trainer.args.max_completion_length or 1
    if most is None:
        return None
    if completion >= most:
        raise UserError(
            f"max_completion_length is {completion}, which leaves no room for a prompt in the model's {most} "
            "positions; lower it, or take a model with more."
        )
    return most - completion


def _teacher_prompt_limit(trainer: Any) -> int | None:
    """max_teacher_prompt_length, or less where the model has fewer positions; says so."""
    room, limit = _room(trainer), trainer.args.max_teacher_prompt_length
    if not trainer.distills or room is None or (limit is not None and limit <= room):
        return limit
    if trainer.accelerator.is_main_process:
        trainer.host.say(
            f"teacher prompts are shortened to {room} tokens, not max_teacher_prompt_length = {limit}: the model has "
            f"{positions(trainer.model.config)} positions, of which a completion may take "
            f"{trainer.args.max_completion_length}."
        )
    return room


# Rows -----------------------------------------------------------------------------------------------------------------


def _prompts(trainer: Any, hinted: bool, longest: int | None) -> Prompts:
    limits = {"max_prompt_length": longest}
    limits["the model's positions less max_completion_length"] = _room(trainer)
    limit, name = min(((value, name) for name, value in limits.items() if value is not None), default=(None, ""))
    rendering = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
    if trainer.tools:
        rendering["tools"] = trainer.tools
    render = not trainer.is_multimodal and not trainer.environment_factories  # images and tools come in later
    return Prompts(trainer.processing_class, rendering, hinted, render, limit, name)


def evaluation_prompts(trainer: Any) -> Prompts:
    """What prompts of held-out rows are judged by, from the first one on."""
    return _prompts(trainer, hinted=False, longest=trainer.args.max_prompt_length)


def _check_dataset(data: Data, prompts: Prompts) -> None:
    for i, prompt in enumerate(_column(data, "prompt")):
        if (problem := prompts.problem(prompt)) is not None:
            raise UserError(f"row {i} of {data.name} {problem}")
    if prompts.hinted:
        for i, text in enumerate(_column(data, CONTEXT_COLUMN)):
            _check_context(f"row {i} of {data.name}", text)


def check_rows(prompts: Prompts, rows: Sequence[Mapping[str, Any]], first: int, environments: bool) -> None:
    """Rows that are judged as they are read; `first` is the place of the first one."""
    for i, row in enumerate(rows, first):
        place = f"row {i} of train_dataset, counted from 0 as they are read,"
        _check_column_names(place, list(row), environments)
        if "prompt" in row:
            if (problem := prompts.problem(row["prompt"])) is not None:
                raise UserError(f"{place} {problem}")
        elif not environments:
            raise UserError(_no_prompt(place, list(row)))
        if prompts.hinted:
            _check_context(place, row.get(CONTEXT_COLUMN))


def _check_context(place: str, text: Any) -> None:
    if text is not None and not isinstance(text, str):
        raise UserError(f"{place} has {shown(text)} in {CONTEXT_COLUMN}; give a text or None.")


def _column(data: Data, name: str) -> Iterator[Any]:
    if name not in data.columns:
        return
    if isinstance(data.dataset, Dataset):
        for part in data.dataset.select_columns([name]).iter(_CHUNK):
            yield from part[name]
    else:
        yield from (row.get(name) for row in data.dataset)


# Evaluation -----------------------------------------------------------------------------------------------------------


def check_evaluation(trainer: Any) -> None:
    """That the held-out rows can be evaluated, and that an evaluation gives what the best checkpoint is chosen by."""
    if trainer.eval_dataset is not None:
        trainer.held_out_evaluation.check(trainer.eval_dataset)
    if trainer.args.load_best_model_at_end or trainer.args.save_strategy == "best":
        check_best_metric(trainer)


def check_best_metric(trainer: Any) -> None:
    """Where evaluation is PGPOTrainer's own."""
    own = "evaluate" not in vars(trainer) and type(trainer).evaluate.__module__ == "pgpo.train.trainer"
    if own and trainer.eval_dataset is not None:
        trainer.held_out_evaluation.check_best_metric(trainer.eval_dataset)


# In a step ------------------------------------------------------------------------------------------------------------


def check_spread(trainer: Any, rollout: Rollout) -> None:
    """That the rewards have a variance in single precision, which TRL's advantages are divided by."""
    if math.isinf(trainer.recorded("reward_std") or 0.0):
        largest = max(map(abs, rollout.rewards))
        raise UserError(
            f"at step {trainer.state.global_step + 1}: the rewards, up to {largest:.3g}, have a variance beyond single "
            "precision, so that every advantage would be 0; divide them."
        )


def check_answer_prefixes(trainer: Any, prompts: Sequence[Prompt], teacher_prompts: Sequence[Prompt | None]) -> None:
    """Student and teacher must judge a completion behind the same opening; a template may add <think> to one only."""
    seen: dict[str, str] = {}  # siblings share prompts

    def prefix(prompt: Prompt) -> str:
        key = repr(prompt)
        if key not in seen:
            seen[key] = trainer.answer_prefix(prompt)
        return seen[key]

    for prompt, teacher_prompt in zip(prompts, teacher_prompts, strict=True):
        if teacher_prompt is not None and prefix(prompt) != prefix(teacher_prompt):
            raise UserError(
                f"at step {trainer.state.global_step + 1}: the chat template opens the student's answer with "
                f"{prefix(prompt)!r} and the teacher's with {prefix(teacher_prompt)!r}, so that they would judge "
                "different texts; set a template (or chat_template_kwargs) whose opening does not depend on the "
                f"messages, which begin with {str(prompt)[:60]!r}."
            )
