"""One round of `pgpo probe`: the student's completions, the self-teacher's under each kind of hint, and I_k and D."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pgpo.evaluate.probe import Group, Hinted, Line, Signal
from pgpo.evaluate.runners import TransformersRunner
from pgpo.tasks import Grade, Row, Task
from pgpo.teacher.contexts import TeacherContext
from pgpo.train.prompts import Rendered
from pgpo.train.rows import Sample
from pgpo.train.seam import Rollout
from pgpo.train.trainer import PGPOTrainer


@dataclass(frozen=True)
class Answer:
    """A completion: its prompt and its tokens, the text, whether it was cut at the length limit, and its grade."""

    prompt: list[int]
    ids: list[int]
    text: str
    clipped: bool
    grade: Grade


class Sampler:
    """Samples the student and the self-teacher, and measures the student's completions under each kind of hint.

    Args:
        trainer: of the run; its weights are not changed.
        hinted_samples: completions per question and kind of hint.
    """

    def __init__(self, trainer: PGPOTrainer, task: Task, hinted_samples: int) -> None:
        self.trainer, self.task, self.hinted_samples = trainer, task, hinted_samples
        self.model: Any = trainer.model
        self.model.eval()
        self.rendered = Rendered(trainer.render)

    @torch.no_grad()
    def round(self, rows: Sequence[Row], temperature: float, number: int) -> list[Line]:
        """One line per question."""
        trainer, group = self.trainer, self.trainer.num_generations
        args = trainer.args
        args.temperature = temperature
        runner = TransformersRunner(
            self.model,
            trainer.tokenizer,
            temperature=temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_completion_length or 1,
            batch_size=args.eval_batch_size,
            chat_template_kwargs=trainer.chat_template_kwargs,
            generation=args.generation_kwargs,
        )
        prompts = [row["prompt"] for row in rows]
        self._check_head(prompts[0])
        write = partial(self._write, runner, rows, f"{args.seed} {number}")
        students = write("student", [self.rendered(prompt) for prompt in prompts], prompts, group)
        texts = [answer.text for answers in students for answer in answers]
        rewards = self._rewards(rows, students, number)
        votes = [answer.grade.answer for answers in students for answer in answers]
        remarks = [self._remark(row, answer) for row, answers in zip(rows, students, strict=True) for answer in answers]
        opened = [bool(runner.opens_thinking(prompt)) for prompt in prompts for _ in range(group)]
        rollout = Rollout(
            prompts=[prompt for prompt in prompts for _ in range(group)],
            completions=texts,
            rewards=rewards,
            feedback=None,
            local=slice(0, len(texts)),
            opened=opened if any(opened) else None,
        )
        own = "first" if args.demonstration == "placebo" else args.demonstration
        contexts = partial(trainer.contexts, rollout, rendered=self.rendered, step=number)
        right = [trainer.success.right(reward) for reward in rewards]
        wrong = [float(not r and vote is not None) for r, vote in zip(right, votes, strict=True)]
        kinds: dict[str, list[TeacherContext]] = {
            "right": contexts(rewards, choice=own, use_successes=True),
            "wrong": contexts(wrong, choice="first", use_successes=True, success_threshold=1.0),
            "placebo": contexts(rewards, choice="placebo", use_successes=True),
        }
        if any(remarks):
            kinds["feedback"] = contexts(rewards, feedback=remarks, feedback_mode="always", use_successes=False)

        lines = [
            Line(
                temperature=temperature,
                question_id=row["id"],
                domain=row["domain"],
                student=self._group(answers),
                hinted={},
                signals={},
            )
            for row, answers in zip(rows, students, strict=True)
        ]
        for kind, found in kinds.items():
            groups = [found[i * group : (i + 1) * group] for i in range(len(rows))]
            shown = {i: c for i, g in enumerate(groups) if (c := next((c for c in g if c.prompt), None)) is not None}
            asked = [context.prompt for context in shown.values()]
            hinted = write(kind, [self.rendered(p) for p in asked], asked, self.hinted_samples, list(shown))
            for (i, context), answers in zip(shown.items(), hinted, strict=True):
                vote = None if context.demonstration is None else votes[context.demonstration]
                lines[i]["hinted"][kind] = Hinted(shown=vote, completions=self._group(answers))
            for line, answers, context_of in zip(lines, students, groups, strict=True):
                line["signals"][kind] = self._signal(answers, context_of)
        return lines

    def _rewards(self, rows: Sequence[Row], students: Sequence[Sequence[Answer]], number: int) -> list[float]:
        """As training sees them, at a step of this number."""
        if self.task.rewards is None:
            return [answer.grade.reward for answers in students for answer in answers]
        texts = [answer.text for answers in students for answer in answers]
        asked = [row for row, answers in zip(rows, students, strict=True) for _ in answers]
        return self.task.rewards(texts, asked, self.trainer.args.seed, number)[0]

    def _remark(self, row: Row, answer: Answer) -> str | None:
        """On a failed attempt: the task's, else the grader's."""
        if self.trainer.success.right(answer.grade.reward):
            return None
        return answer.grade.feedback if self.task.feedback is None else self.task.feedback(answer.text, row)

    def _write(
        self,
        runner: TransformersRunner,
        rows: Sequence[Row],
        seed: str,
        reader: str,
        encoded: list[list[int]],
        prompts: list[Any],
        count: int,
        places: Sequence[int] | None = None,
    ) -> list[list[Answer]]:
        """`count` graded completions per prompt; `places` of their questions in `rows`."""
        numbers = random.Random(f"{seed} {reader} {runner.temperature}").getrandbits(31)
        with self.trainer.engine.autocast():
            sampled = runner.sample([ids for ids in encoded for _ in range(count)], numbers) if encoded else []
        found: list[list[Answer]] = [[] for _ in prompts]
        for n, ids in enumerate(sampled):
            i = n // count
            row = rows[i if places is None else places[i]]
            if runner.opens_thinking(prompts[i]):
                row = {"thinking_opened": True, **row}
            text = runner.text(prompts[i], encoded[i], ids)
            clipped = not runner.stopped(ids) and len(ids) >= runner.max_new_tokens
            found[i].append(Answer(encoded[i], ids, text, clipped, self.task.grade(text, row)))
        return found

    def _group(self, answers: Sequence[Answer]) -> Group:
        return Group(
            right=[self.trainer.success.right(a.grade.reward) for a in answers],
            answer=[a.grade.answer for a in answers],
            well_formed=[a.grade.well_formed for a in answers],
            tokens=[len(a.ids) for a in answers],
            clipped=[a.clipped for a in answers],
            completion=[a.text for a in answers],
        )

    def _signal(self, answers: Sequence[Answer], contexts: Sequence[TeacherContext]) -> Signal:
        """Entropies and divergence of a question's completions, as a step measures them."""
        masked = self.trainer.args.mask_truncated_completions
        samples = [
            Sample(answer.prompt, self.rendered(context.prompt), answer.ids)
            for answer, context in zip(answers, contexts, strict=True)
            if context.prompt is not None and answer.ids and not (masked and answer.clipped)
        ]
        information, sums, tokens = self.trainer.distillation.measure(self.model, samples, len(answers) - len(samples))
        return Signal(
            samples=information.samples,
            hinted=information.hinted_samples,
            student_entropy=information.student_entropy * information.hinted_samples,
            teacher_entropy=information.teacher_entropy * information.hinted_samples,
            divergence=sums.divergence,
            tokens=tokens,
        )

    def _check_head(self, prompt: Any) -> None:
        ids = torch.tensor([self.rendered(prompt)], device=self.trainer.engine.device)
        self.trainer.distillation.forwards.check(self.model, {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids)})
