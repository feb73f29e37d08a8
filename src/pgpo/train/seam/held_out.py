"""Held-out rows through the code that makes and rewards completions in training."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from pgpo.evaluate.runners import TransformersRunner, evaluation, shared_options
from pgpo.train.seam.rollouts import STALE, Batch, HeldOutSampler, Ids, Prompt, RolloutSeam, sampling_explained
from pgpo.train.user_functions import (
    is_async,
)


class HeldOutSeam(RolloutSeam):
    """`RolloutSeam` that also samples and scores held-out rows. Subclass it."""

    def held_out_sampler(self, repeats: int, seed: int, places: Sequence[int]) -> HeldOutSampler:
        """The evaluation's own sampling (`eval_*`), with training's stops, lengths and forbidden words.

        places: of this rank's completions among those of all ranks.
        """
        a = self.args

        def by_vllm(prompts: Ids, num_generations: int) -> Ids:
            with self._vllm_sampling(a.eval_temperature, a.eval_top_p) as engine:
                return engine.generate(prompts=prompts, images=None, num_generations=num_generations)[1]

        turns = itertools.count()

        def by_transformers(prompts: Ids, num_generations: int) -> Ids:
            streams = self.streams(evaluation(seed), next(turns), places, len(prompts))
            with self.generation_model() as model, sampling_explained(f"after step {self.state.global_step}"):
                runner = TransformersRunner(
                    model,
                    self.tokenizer,
                    temperature=a.eval_temperature,
                    top_p=a.eval_top_p,
                    max_new_tokens=self.generation_config.max_new_tokens,
                    batch_size=a.eval_batch_size,
                    generation=self.generation_config.to_dict(),
                    rendered=True,
                    sampler="auto" if self.samples_by_loop else "generate",
                    max_tokens=a.max_tokens_per_sampling,
                    say=self.say_once,
                )
                return runner.sample(prompts, seed, streams)

        return HeldOutSampler(by_vllm if self.use_vllm else by_transformers, repeats)

    @contextlib.contextmanager
    def held_out(self, sampler: HeldOutSampler) -> Iterator[None]:
        """Inside, `complete` and `score` work on held-out rows; afterwards training is as it was before.

        TRL renews vLLM's copy of the weights once per step, but they also change between steps: a checkpoint is loaded,
        the guard rolls back, a callback swaps in an average. So the copy is renewed here, and before what comes after.
        """
        if self.use_vllm:
            self.vllm_generation.sync_weights()
        modes = [(module, module.training) for module in self.model.modules()]
        before = {name: getattr(self, name) for name in ("rollout_func", "num_generations_eval")}
        self.rollout_func: Any = None  # it has its own sampling
        self.num_generations_eval = sampler.repeats
        self._held_out = sampler
        self.model.eval()  # TRL files what it records under train or eval by the model's mode
        try:
            yield
        finally:
            self._last_loaded_step: int = STALE
            self._held_out = None
            self.rollout_func, self.num_generations_eval = before.values()
            for module, training in modes:
                module.training = training
            self._metrics["eval"].clear()
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()

    def complete(self, prompts: list[Prompt]) -> tuple[Ids, list[Any]]:
        """Sampled token ids and what reward functions see of them, by the code that makes both in training.

        Every rank must call it, with equally many prompts.
        """
        if self.tools:
            tools = {t.__name__: t for t in self._standalone_tools}
            asynchronous = {name: t for name, t in tools.items() if is_async(t)}
            self._async_tool_dicts: Any = [asynchronous] * len(prompts)
            self._sync_tool_dicts: Any = [{n: t for n, t in tools.items() if n not in asynchronous}] * len(prompts)
        _, ids, _, completions, *_ = self._generate(prompts)
        return ids, completions

    def score(self, rows: list[Batch], prompts: list[Prompt], completions: list[Any], ids: Ids) -> Tensor:
        """Rewards of held-out completions: [this rank's, functions], nan where a function does not apply.

        Every rank must call it, with equally many completions.
        """
        self._problem = None
        rows = self.told_of_thinking(rows, prompts, completions, ids)
        per_function = super()._calculate_rewards(rows, prompts, completions, ids)  # all ranks
        self.raise_together()
        if self._problem is not None:
            self.host.say(f"{self._problem} It counts as None.")
            self._problem = None
        start = self.accelerator.process_index * len(prompts)
        return per_function[start : start + len(prompts)].cpu()

    def logged_by_functions(self) -> dict[str, float]:
        """Means over all ranks of what reward functions gave to `log_metric` on held-out completions."""
        found: dict[str, list[float]] = {}
        for logged in self.engine.gather_objects(
            [{name: list(values) for name, values in self._pending_metrics.items()}]
        ):
            for name, values in logged.items():
                found.setdefault(name, []).extend(values)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def ended(self, ids: list[int]) -> bool:
        """Whether a completion ends by a stop token, not at the length limit; as TRL judges."""
        return ids[-1] in (*self._stops, self.tokenizer.pad_token_id)

    @contextlib.contextmanager
    def _vllm_sampling(self, temperature: float, top_p: float) -> Iterator[Any]:
        """TRL's vLLM engine with other sampling parameters."""
        engine = self.vllm_generation
        other: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            **{"top_k": 0, "min_p": None, "repetition_penalty": 1.0},  # off
            "generation_kwargs": shared_options(self.args.generation_kwargs or {}),
        }
        before = {name: getattr(engine, name, None) for name in other}
        try:
            for name, value in other.items():
                setattr(engine, name, value)
            yield engine
        finally:
            for name, value in before.items():
                setattr(engine, name, value)
