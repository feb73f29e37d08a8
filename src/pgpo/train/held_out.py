"""Held-out evaluation within training: rows -> sampled ids -> what a reward function sees -> records and metrics.

Only the sampling is the evaluation's own (`eval_*`). Prompts, stops, decoding and rewards go through the same code of
TRL as in training (seam/held_out.py), in batches of equal size on every rank.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from pgpo import runlog
from pgpo.errors import UserError
from pgpo.evaluate.avg_at_k import Record, Summary, summarize
from pgpo.evaluate.run import check_ids, graded, with_stem
from pgpo.evaluate.runners import answer_text
from pgpo.settings.field_types import shown
from pgpo.train import profile
from pgpo.train.problems import evaluation_prompts
from pgpo.train.prompts import Prompts
from pgpo.train.seam import SeamTrainer
from pgpo.train.success import weighted_sum
from pgpo.train.user_functions import call_grader

Grader = Callable[[str, Any], Any]
_INTERVAL = ("", runlog.LOW, runlog.HIGH)
_LENGTHS = ("mean_length", "min_length", "max_length", "clipped_ratio")


@dataclass(frozen=True)
class Outcome:
    """What one evaluation found, of all ranks, in the order of the rows.

    records: one per completion. rewards: [N, functions], nan where a function does not apply; None with a grader.
    lengths: [N] tokens. ended: [N] whether a stop ended it. logged: what reward functions gave to `log_metric`.
    """

    records: list[Record]
    rewards: Tensor | None
    lengths: list[int]
    ended: list[bool]
    logged: dict[str, float]


def rows_of(data: Any, prompts: Prompts, what: str = "eval_dataset") -> list[dict[str, Any]]:
    """The rows of a dataset, checked, all with the same columns.

    Args:
        prompts: judges them.

    Raises:
        UserError: no rows, a row without a prompt or with one that cannot be used, ids missing or repeated.
    """
    if isinstance(data, str) or not hasattr(data, "__iter__"):
        raise UserError(f"{what} is {shown(data)}; give a dataset or a list of rows, each with a 'prompt'.")
    rows = list(data)
    if not rows:
        raise UserError(f"{what} is empty; check its filters and its path.")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or "prompt" not in row:
            found = f"the columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else shown(row)
            raise UserError(
                f"row {i} of {what} has no 'prompt' ({found}); {what} needs rows, each with a 'prompt' (chat messages "
                "or text)."
            )
        if (problem := prompts.problem(row["prompt"])) is not None:
            raise UserError(f"row {i} of {what} {problem}")
    given = [row.get("id") for row in rows]
    if any(value is not None for value in given):
        if None in given:
            raise UserError(f"row {given.index(None)} of {what} has no id, but others do; give each its own, or none.")
        try:
            check_ids(list(map(str, given)))
        except UserError as error:
            raise UserError(f"{what}: {error}") from error
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def parts_of(data: Any) -> dict[str, Any]:
    """{prefix of the metrics' names: dataset}: "" for the only one."""
    return {f"{name}_": part for name, part in data.items()} if isinstance(data, Mapping) else {"": data}


class HeldOut:
    """Samples and grades held-out rows with the model in training.

    Args:
        trainer: gives sampling, rewards and ranks; it is complete.
        grade: (text, row) -> Grade, in place of the reward functions.
    """

    def __init__(self, trainer: SeamTrainer, grade: Grader | None) -> None:
        self.trainer = trainer
        self.args = trainer.args
        self.grade = grade

    # Checks ---------------------------------------------------------------------------------------------------------

    def check(self, data: Any) -> None:
        """What can be known before training. A stream is read no further than its first row.

        Raises:
            UserError: rows or prompts that cannot be evaluated.
        """
        if self.args.eval_strategy != "no":
            self._check_kind()
        for prefix, part in parts_of(data).items():
            what = f"eval_dataset[{prefix[:-1]!r}]" if prefix else "eval_dataset"
            if isinstance(part, Iterator):
                raise UserError(f"{what} is {shown(part)}, which can be read only once; give a list or a dataset.")
            rows_of(part.take(1) if isinstance(part, IterableDataset) else part, self._prompts(), what)

    def _check_kind(self) -> None:
        for found, what in (
            (self.trainer.environment_factories is not None, "does not run environments"),
            (self.trainer.is_multimodal, "does not show images to vision-language models"),
        ):
            if found:
                raise UserError(f"held-out evaluation {what}; leave eval_dataset out, with eval_strategy='no'.")

    def _prompts(self) -> Prompts:
        return evaluation_prompts(self.trainer)

    def check_best_metric(self, data: Any) -> None:
        """Raises UserError if `metric_for_best_model` is not among the metrics of an evaluation."""
        wanted = self.args.metric_for_best_model
        if wanted is None or self.args.eval_strategy == "no":
            return
        name = wanted.removeprefix("eval_")
        prefixes = list(parts_of(data))
        known = self._metric_names()
        if any(name.startswith(p) and name[len(p) :] in known for p in prefixes):
            return
        if self.grade is None and any(map(_may_log_metrics, self.trainer.reward_funcs)):
            return  # perhaps one of theirs
        first = f"eval_{prefixes[0]}"
        raise UserError(
            f"metric_for_best_model is {wanted!r}, which no evaluation gives; set it to {first}{runlog.AVG_AT_K}, or "
            f"to one of {', '.join(first + n for n in known if n != runlog.AVG_AT_K)}."
        )

    def _metric_names(self) -> list[str]:
        by_functions = self.grade is None
        names = [runlog.AVG_AT_K + end for end in _INTERVAL]
        if self._right is not None:
            names += [runlog.PASS_AT_K + end for end in _INTERVAL]
        if not by_functions:
            names += [runlog.MAJ_AT_K + end for end in _INTERVAL if self._right is not None]
            names.append(runlog.WELL_FORMED_SHARE)
        names += ["reward", "reward_std", *(f"completions/{name}" for name in _LENGTHS)]
        if by_functions:
            names += [f"rewards/{name}/{what}" for name in self.trainer.reward_func_names for what in ("mean", "std")]
        return names

    @property
    def _right(self) -> float | None:
        """Reward from which a record is right; None if nothing decides."""
        success = self.trainer.success
        return None if self.grade is None and success.decides is None else success.threshold

    # Records --------------------------------------------------------------------------------------------------------

    def run(self, data: Any, seed: int | None = None) -> Outcome:
        """`eval_k` graded completions for every row."""
        with profile.part("evaluation"):
            return self._run(data, seed)

    def _run(self, data: Any, seed: int | None) -> Outcome:
        t, k = self.trainer, self.args.eval_k
        if t.accelerator.is_fsdp2 and not hasattr(t.model, "reshard"):
            raise UserError("FSDP shards the model when training begins, so evaluate after it, or set eval_on_start.")
        self._check_kind()
        rows = rows_of(data, self._prompts())
        rank, ranks = t.accelerator.process_index, t.accelerator.num_processes
        mine = list(range(rank, len(rows), ranks))
        # Every rank takes part in every call: a short one repeats a question and drops it again.
        filled = [*mine, *[0] * (math.ceil(len(rows) / ranks) - len(mine))]
        places = [i for i in filled for _ in range(k)]
        of_all = [i * k + sample for i in filled for sample in range(k)]
        with t.held_out(t.held_out_sampler(k, self.args.seed if seed is None else seed, of_all)):
            prompts = [rows[i]["prompt"] for i in places]
            ids, completions = t.complete(prompts)
            texts = [answer_text(completion) for completion in completions]
            if self.grade is None:
                rewards = self._score([rows[i] for i in places], prompts, completions, ids)
                records = self._records_of_rewards(rows, places, texts, rewards)
                logged = t.logged_by_functions()
            else:
                rewards, logged = None, {}
                told = t.told_of_thinking([rows[i] for i in places], prompts, completions, ids)
                records = self._records_of_grades(told, places, texts)
            t.raise_together()
        found = [
            (i, record, None if rewards is None else rewards[n].tolist(), len(ids[n]), t.ended(ids[n]))
            for n, (i, record) in enumerate(zip(places, records, strict=True))
        ]
        gathered = sorted(
            t.engine.gather_objects(found[: len(mine) * k]), key=lambda item: item[0]
        )  # in the order of the rows
        return Outcome(
            records=[item[1] for item in gathered],
            rewards=None if rewards is None else torch.tensor([item[2] for item in gathered]),
            lengths=[item[3] for item in gathered],
            ended=[item[4] for item in gathered],
            logged=logged,
        )

    def _score(self, rows: list[dict[str, Any]], prompts: list[Any], completions: list[Any], ids: Any) -> Tensor:
        """Rewards, whole questions at a time and at most `eval_batch_size` completions where that is possible."""
        k = self.args.eval_k
        size = max(1, self.args.eval_batch_size // k) * k
        parts = [
            self.trainer.score(rows[i : i + size], prompts[i : i + size], completions[i : i + size], ids[i : i + size])
            for i in range(0, len(rows), size)
        ]
        return torch.cat(parts)

    def _records_of_rewards(
        self, rows: list[dict[str, Any]], places: list[int], texts: list[str], rewards: Tensor
    ) -> list[Record]:
        """A record's reward is the deciding one, or the weighted sum if nothing decides; 0 where there is none."""
        t = self.trainer
        values = t.success.of(rewards, t.reward_weights, t.reward_func_names)
        if values is None:
            values = weighted_sum(rewards, t.reward_weights).tolist()
        elif t.accelerator.is_main_process and self.args.distills:
            t.success.warn_once(values, t.host.say)
        records = []
        for n, (i, text, value) in enumerate(zip(places, texts, values, strict=True)):
            row = identified(rows[i], i)
            record = Record(
                question_id=row["id"],
                domain=row["domain"],
                sample=n % self.args.eval_k,
                reward=0.0 if math.isnan(value) else value,
                answer=None,
                well_formed=None,
                completion=text,
            )
            records.append(with_stem(record, row))
        return records

    def _records_of_grades(self, rows: list[dict[str, Any]], places: list[int], texts: list[str]) -> list[Record]:
        assert self.grade is not None
        records = []
        for n, (i, text) in enumerate(zip(places, texts, strict=True)):
            row = identified(rows[n], i)
            try:
                grade = call_grader(self.grade, text, row, self.args.reward_timeout)
                records.append(graded(row, n % self.args.eval_k, text, grade))
            except UserError as error:
                self.trainer.fail(error)  # all ranks, when they meet
                break
        return records

    # Numbers --------------------------------------------------------------------------------------------------------

    def summarize(self, records: Sequence[Record]) -> Summary:
        """avg@k and, where the grades tell, pass@k, maj@k and the share of well-formed completions."""
        summary = summarize(records, self.args.eval_k, right=self._right)
        silent = all(record["answer"] is None for record in records)
        if silent and any(record["well_formed"] for record in records):  # the grader extracts no answers
            summary = dataclasses.replace(summary, maj_at_k=None)
        return summary

    def metrics(self, outcome: Outcome) -> dict[str, float]:
        """The summary, and mean and spread of the rewards under TRL's names."""
        t = self.trainer
        values = {k: v for k, v in self.summarize(outcome.records).as_dict().items() if isinstance(v, (int, float))}
        if outcome.rewards is None:
            values |= _moments("reward", torch.tensor([record["reward"] for record in outcome.records]), "reward_std")
        else:
            values |= _moments("reward", weighted_sum(outcome.rewards, t.reward_weights), "reward_std")
            for i, name in enumerate(t.reward_func_names):
                values |= _moments(f"rewards/{name}/mean", outcome.rewards[:, i], f"rewards/{name}/std")
        lengths = outcome.lengths
        shape = (sum(lengths) / len(lengths), min(lengths), max(lengths), 1 - sum(outcome.ended) / len(lengths))
        return values | {f"completions/{name}": float(v) for name, v in zip(_LENGTHS, shape)} | outcome.logged


def identified(row: Mapping[str, Any], place: int) -> dict[str, Any]:
    """A row as graders get it: with an id (its place, where it has none) and a domain."""
    own = "" if row.get("id") is None else str(row["id"])
    return {**row, "id": own or str(place), "domain": row.get("domain") or ""}


def _moments(mean: str, values: Tensor, deviation: str) -> dict[str, float]:
    """Mean and standard deviation of the values that are not nan, where these suffice."""
    values = values[~values.isnan()].cpu().double()  # MPS has no fp64
    found = {mean: values.mean().item()} if len(values) else {}
    return found | ({deviation: values.std().item()} if len(values) > 1 else {})


def _may_log_metrics(function: Any) -> bool:
    """Whether a reward function may use `log_metric`, by its name in the signature or in the code."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):
        function = vars(type(function)).get("__call__")
    code = getattr(function, "__code__", None)
    return code is not None and "log_metric" in (*code.co_varnames, *map(str, code.co_consts))
