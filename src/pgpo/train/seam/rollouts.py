"""TRL's members that make completions and rewards: prompts -> completions -> rewards, as public hooks."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_callable_name, get_config_model_id

from pgpo.core import AdaptiveClip
from pgpo.errors import UserError
from pgpo.evaluate.runners import answer_text, render_prompt, trimmed
from pgpo.forward import sampling
from pgpo.forward.batching import positions
from pgpo.train import profile
from pgpo.train.engine import Engine
from pgpo.train.gate import StepGate
from pgpo.train.host import Host
from pgpo.train.success import Success, deciding, weighted_sum
from pgpo.train.user_functions import (
    CONTEXT_COLUMN,
    REWARD_ARGUMENTS,
    call,
    call_async,
    check_rewards,
    check_texts,
    is_async,
)
from pgpo.visible import is_thinking_tag, opens_thinking

Batch = dict[str, Any]
Prompt = Any  # a list of chat messages, or a plain string
Ids = list[list[int]]  # one list of tokens per completion or prompt
STALE = -1  # as TRL's `_last_loaded_step`: vLLM's copy of the weights is renewed before anything is sampled
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class HeldOutSampler:
    """What samples in place of training's sampler: (token ids of prompts, completions per prompt) -> token ids.

    Each prompt stands `repeats` times in a row.
    """

    sample: Callable[[Ids, int], Ids]
    repeats: int


@dataclass(frozen=True)
class Rollout:
    """What the ranks generated together, in rank order; rows of one question are consecutive.

    Attributes:
        prompts: N prompts as given in the dataset.
        completions: N texts.
        rewards: [N] weighted sum over the reward functions.
        success: [N] rewards that tell right solutions (success.py), nan where there is none; None if nothing tells.
        feedback: N texts or None, or None if there are neither feedback functions nor a column of contexts.
        local: this rank's rows.
        problem: what is not finite in the rewards, with on_nonfinite="skip".
        opened: N flags, whether a completion begins inside a thinking block that its prompt opened; None = nowhere.
    """

    prompts: list[Prompt]
    completions: list[str]
    rewards: list[float]
    feedback: list[str | None] | None
    local: slice
    problem: str | None = None
    opened: list[bool] | None = None
    success: list[float] | None = None


class RolloutSeam(GRPOTrainer):
    """GRPOTrainer whose rollouts, rewards and user functions are checked and captured. Subclass it."""

    _tag_names: ClassVar = ["trl", "pgpo"]
    _name = "PGPO"
    _paper: ClassVar = {"title": "Physics-Guided Policy Optimization with Self-Distillation", "id": "2606.03620"}

    def __init__(
        self,
        *args: Any,
        feedback_funcs: list[Callable[..., Any]],
        reads_contexts: bool = False,
        judges_late: bool = False,
        host: Host,
        **kwargs: Any,
    ) -> None:
        """reads_contexts: rows may hold a context for the teacher. judges_late: `judge` sees rows as they are read."""
        self.feedback_funcs, self.reads_contexts, self.judges_late = feedback_funcs, reads_contexts, judges_late
        self.host = host
        reward_funcs = kwargs.get("reward_funcs") or []
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        kwargs["reward_funcs"] = [self._guarded(f) for f in reward_funcs]
        if kwargs.get("rollout_func") is not None:
            kwargs["rollout_func"] = self._checked(kwargs["rollout_func"])
        self._forwarded: tuple[Tensor, Tensor, Tensor | None] | None = None  # what TRL's loss is to take for a forward
        self._captured: tuple[list[Prompt], list[str], list[bool], Tensor, list[str | None] | None] | None = None
        self.prompt_limit: tuple[int | None, str] = None, ""  # tokens, and where the limit comes from
        self._held_out: HeldOutSampler | None = None  # while held-out rows are sampled and graded
        self.turn = -1, 0  # step, and how often completions were sampled in it before
        self.said: set[str] = set()
        self._recorded_before: dict[str, int] = {}  # scalars per name when this training step began
        self._grad_norm: float | None = None
        self._failure: UserError | None = None  # of a user's function on this rank, until all ranks know of it
        self._problem: str | None = None  # what is not finite in the rewards of this rank
        self._distrusted: str | None = None  # what is not finite in the step at work
        self.finite_here = True  # whether what this rank put into the step is finite
        self.skips_in_a_row = 0
        self.last_rollout: Rollout | None = None
        self.gate = StepGate(kwargs["args"].modulated_weight_decay)
        clip = kwargs["args"].adaptive_clip
        self.clip = None if clip is None else AdaptiveClip(clip)
        self.completion_lengths: list[int] = []  # of the latest rollout on this rank: tokens that the model wrote
        self._watching = False
        super().__init__(*args, **kwargs)
        functions: list[Any] = self.reward_funcs  # type: ignore[has-type]
        own = functions[len(reward_funcs) :]  # get_reward of environments, which TRL appends
        self.reward_funcs = functions[: len(reward_funcs)] + [self._guarded(f) for f in own]
        decides = deciding(self.args.success_reward, self.reward_func_names, self.args.distills)
        self.success = Success(decides, self.args.success_threshold)
        if self.args.distills:
            # TRL cuts a completion only behind these; padding behind a stop of the user's would be trained on.
            self.eos_token_ids = list(dict.fromkeys(self._stops))

    # Hooks ----------------------------------------------------------------------------------------------------

    def annotate(self, batch: Batch, rollout: Rollout) -> Batch:
        """Add what the loss needs to this rank's batch; lists and tensors must have one entry per row."""
        raise NotImplementedError

    def judge(self, rows: list[dict[str, Any]], first: int) -> None:
        """Raise UserError for a row that cannot be used; `first` is the place of the first one in the stream."""

    # Services for the subclass ----------------------------------------------------------------------------------

    @functools.cached_property
    def engine(self) -> Engine:
        """The processes of this run."""
        return Engine(self.accelerator, bool(self.is_fsdp_enabled), bool(self.is_deepspeed_enabled))

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def is_multimodal(self) -> bool:
        return bool(self._is_vlm)

    def record(self, name: str, value: float) -> None:
        """Add a scalar to the log of this training step; call it on every rank with the same value."""
        self._metrics["train"][name].append(value)

    def rescale_recorded(self, name: str, factor: float) -> None:
        """Multiply the latest scalar of this training step, as `record` took it."""
        self._metrics["train"][name][-1] *= factor

    def recorded(self, name: str) -> float | None:
        """The latest scalar TRL recorded in this step, e.g. 'completions/mean_length'."""
        values = self._metrics["train"].get(name)
        return values[-1] if values else None

    def raise_together(self) -> None:
        """End all ranks with the sentence of a user's function that failed on one. Every rank must call it."""
        failure, self._failure = self._failure, None
        for text in self.engine.gather_objects([None if failure is None else str(failure)]):
            if text is not None:
                raise UserError(text) from failure

    def fail(self, error: UserError, count: int = 0) -> list[float | None]:
        """End the run. Where other ranks wait, not before they know: with rewards of no meaning until then."""
        if self.accelerator.num_processes == 1:
            raise error
        self._failure = self._failure or error
        return [0.0] * count

    def say_once(self, text: str) -> None:
        """From the main process."""
        if self.accelerator.is_main_process and text not in self.said:
            self.host.say(text)
        self.said.add(text)

    def render(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, ready for generation, by the same template as the student's prompts."""
        return render_prompt(
            self.processing_class, prompt, chat_template=self.chat_template, **self.chat_template_kwargs
        )

    def answer_prefix(self, prompt: Prompt) -> str:
        """Text that the chat template puts behind the last message to open the answer; none for plain text."""
        if isinstance(prompt, str):
            return ""
        opened, plain = (
            self.processing_class.apply_chat_template(
                conversation=prompt,
                chat_template=self.chat_template,
                add_generation_prompt=opening,
                tokenize=False,
                **self.chat_template_kwargs,
            )
            for opening in (True, False)
        )
        shared = (i for i, (a, b) in enumerate(zip(opened, plain)) if a != b)
        return str(opened[next(shared, min(len(opened), len(plain))) :])

    @property
    def unseen_thinking_tags(self) -> list[str]:
        """Thinking tags that decoding drops as special tokens, where TRL does not parse the completion either."""
        if any(getattr(self.tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
            return []
        return sorted(
            {
                t.content
                for t in self.tokenizer.added_tokens_decoder.values()
                if t.special and is_thinking_tag(t.content)
            }
        )

    def opens_thinking(self, prompt: Prompt) -> bool:
        """Whether a prompt, rendered for generation, ends inside a thinking block, as behind a template's `<think>`."""
        if isinstance(prompt, str):
            return opens_thinking(prompt)
        text = self.processing_class.apply_chat_template(
            conversation=prompt,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **self.chat_template_kwargs,
        )
        return opens_thinking(str(text))

    def told_of_thinking(
        self, rows: list[Batch], prompts: list[Prompt], completions: list[Any], ids: Ids
    ) -> list[Batch]:
        """The rows of completions, with a column "thinking_opened" if any of them begins inside a thinking block that
        its prompt opened and still holds it: where the tokenizer has a response template and the block is closed, TRL
        has cut it off."""
        opens = {repr(prompt): self.opens_thinking(prompt) for prompt in {repr(p): p for p in prompts}.values()}
        if not any(opens.values()):
            return rows
        flags = [
            opens[repr(prompt)]
            and self.tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer_text(completion).strip()
            for prompt, completion, tokens in zip(prompts, completions, ids, strict=True)
        ]
        return [{"thinking_opened": flag, **row} for flag, row in zip(flags, rows, strict=True)]

    # TRL's members ----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        self._check_weights()
        self._judge(inputs)
        with sampling_explained(f"at step {self.state.global_step + 1}"):
            batch = super()._generate_and_score_completions(inputs)
        assert self._captured is not None
        prompts, completions, opened, per_function, feedback = self._captured
        self._captured = None
        rows = len(prompts)
        gathered_prompts, gathered_texts = self.engine.gather_objects(prompts), self.engine.gather_objects(completions)
        start = self.accelerator.process_index * rows
        rollout = Rollout(
            prompts=gathered_prompts,
            completions=gathered_texts,
            rewards=weighted_sum(per_function, self.reward_weights).tolist(),
            success=self.success.of(per_function, self.reward_weights, self.reward_func_names),
            feedback=None if feedback is None else self.engine.gather_objects(feedback),
            local=slice(start, start + rows),
            problem=next((p for p in self.engine.gather_objects([self._problem]) if p is not None), None),
            opened=flags if any(flags := self.engine.gather_objects(opened)) else None,
        )
        return self.annotate(batch, rollout)

    def _generate(self, prompts: list[Prompt]) -> Any:
        generated = super()._generate(prompts)
        _, completions, masks = generated[:3]
        counted = completions if masks is None else masks
        self.completion_lengths = [len(ids) if masks is None else int(sum(ids)) for ids in counted]
        return generated

    def _calculate_rewards(
        self, inputs: list[Batch], prompts: list[Prompt], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        self._problem = None
        with profile.part("grading"):
            inputs = self.told_of_thinking(inputs, prompts, completions, completion_ids_list)
            per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # all ranks
        if weighted_sum(per_function, self.reward_weights).isinf().any():
            self._problem = self._problem or f"the weighted sum of the rewards is inf {self._place}"
            if self.args.on_nonfinite == "stop":
                self.fail(UserError(f"{self._problem}; lower reward_weights, or the rewards."))
        columns = {k: [row[k] for row in inputs] for k in inputs[0] if k not in ("prompt", "completion")}
        with profile.part("grading"):
            feedback = self._feedback(
                prompts=prompts, completions=completions, completion_ids=completion_ids_list, **columns
            )
        if self.reads_contexts:
            given = [row.get(CONTEXT_COLUMN) for row in inputs]
            feedback = [a or b for a, b in zip(feedback or given, given, strict=True)]
        self.raise_together()
        opened = [bool(row.get("thinking_opened", False)) for row in inputs]
        self._captured = (prompts, [answer_text(c) for c in completions], opened, per_function, feedback)
        return per_function

    def _judge(self, rows: list[Batch]) -> None:
        """Rows that nothing has looked at before. What one rank finds, all say."""
        if not self.judges_late:
            return
        copies = self.num_generations
        questions = len(rows) * self.accelerator.num_processes // copies  # of one round of completions
        before = self._step // self._generate_every * questions
        mine = self.accelerator.process_index * len(rows)
        found: UserError | None = None
        # A group may have begun on the rank before.
        places = range(-mine % copies, len(rows), copies)
        try:
            self.judge([rows[i] for i in places], before + -(-mine // copies))
        except UserError as error:
            found = error
        for text in self.engine.gather_objects([None if found is None else str(found)]):
            if text is not None:
                raise UserError(text) from found

    def _feedback(self, **kwargs: Any) -> list[str | None] | None:
        """First text that a feedback function gives for each completion of this rank."""
        if not self.feedback_funcs:
            return None
        found: list[str | None] = [None] * len(kwargs["prompts"])
        for function in self.feedback_funcs:
            what, timeout = f"feedback function {function_name(function)!r}", self.args.reward_timeout
            try:
                texts = call(function, what, self._place, "text", timeout, {"trainer_state": self.state, **kwargs})
                found = [a or b for a, b in zip(found, check_texts(texts, what, self._place), strict=True)]
            except UserError as error:
                self.fail(error)
        return found

    def _guarded(self, function: Any) -> Any:
        """A reward function that TRL can take: floats or None, whatever the user's does."""
        if isinstance(function, (str, nn.Module)):
            return function
        what = f"reward function {function_name(function)!r}"

        def check(rewards: list[Any]) -> list[float | None]:
            checked, problem = check_rewards(rewards, what, self._place)
            if problem is not None and self.args.on_nonfinite == "stop":
                raise UserError(problem)
            self._problem = self._problem or problem
            return checked

        if is_async(function):

            @functools.wraps(function, assigned=("__doc__",), updated=())
            async def guarded_async(**kwargs: Any) -> list[float | None]:
                try:
                    limit = self.args.reward_timeout
                    return check(await call_async(function, what, self._place, "reward", limit, kwargs))
                except UserError as error:
                    return self.fail(error, len(kwargs["prompts"]))

            guarded_async.__name__ = function_name(function)
            return guarded_async

        @functools.wraps(function, assigned=("__doc__",), updated=())
        def guarded(**kwargs: Any) -> list[float | None]:
            try:
                return check(call(function, what, self._place, "reward", self.args.reward_timeout, kwargs))
            except UserError as error:
                return self.fail(error, len(kwargs["prompts"]))

        guarded.__name__ = function_name(function)  # TRL names the metric after it
        return guarded

    def _checked(self, rollout: Callable[..., Any]) -> Callable[..., Any]:
        """A rollout function whose completions all have a token, and masks one value for each, as TRL takes for
        granted."""

        @functools.wraps(rollout)
        def checked(prompts: list[Prompt], trainer: Any) -> dict[str, Any]:
            output: dict[str, Any] = rollout(prompts, trainer)
            _check_env_mask(output, self._place)
            for name in REWARD_ARGUMENTS:
                if name != "completion_ids" and name in output:
                    raise UserError(
                        f"rollout_func returned a field {name!r}, a name under which reward functions get something "
                        "else; rename it."
                    )
            for i, ids in enumerate(output.get("completion_ids", [])):
                if len(ids) == 0:
                    raise UserError(
                        f"rollout_func returned no token for sample {i} {self._place}; return at least the end-of-text "
                        "token."
                    )
            most = positions(self.model.config)
            for i, (prompt, ids) in enumerate(zip(output.get("prompt_ids", []), output.get("completion_ids", []))):
                if most is not None and len(prompt) + len(ids) > most:
                    raise UserError(
                        f"rollout_func returned {len(prompt)} prompt and {len(ids)} completion tokens for sample {i} "
                        f"{self._place}, more than the model's {most} positions; let it return fewer."
                    )
            return output

        return checked

    @property
    def _place(self) -> str:
        """Where a user's function is called, for a sentence."""
        step = f"at step {self.state.global_step + 1}"
        if self._held_out is not None:
            step = f"in the evaluation after step {self.state.global_step}"
        return step if self.accelerator.num_processes == 1 else f"{step} on rank {self.accelerator.process_index}"

    def _check_weights(self) -> None:
        """Weights with nan or inf never mend, and on a GPU sampling from them ends the process."""
        for rank, name in enumerate(self.engine.gather_objects([nonfinite_parameter(self.model)])):
            if name is not None:
                raise UserError(
                    f"at step {self.state.global_step + 1}: the weight {name} holds nan or inf (rank {rank}), so "
                    "nothing can be sampled and nothing was updated; continue from an earlier checkpoint with a lower "
                    "learning rate."
                )

    def _generate_single_turn(
        self, prompt_ids: Ids, images: Any, multimodal_fields: Any, num_generations: int, **kwargs: Any
    ) -> Any:
        with profile.part("sampling"):
            return self._sampled(prompt_ids, images, multimodal_fields, num_generations, **kwargs)

    def _sampled(
        self, prompt_ids: Ids, images: Any, multimodal_fields: Any, num_generations: int, **kwargs: Any
    ) -> Any:
        if self._held_out is not None:
            return self._held_out.sample(prompt_ids, num_generations), None
        if (found := self._by_loop(prompt_ids, multimodal_fields)) is not None:
            return found, None
        with self._stop_strings_known() as by_string:
            ids, logprobs = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, **kwargs
            )
        return [trimmed(row, self._stops, self.generation_config) for row in ids] if by_string else ids, logprobs

    @contextlib.contextmanager
    def generation_model(self) -> Iterator[nn.Module]:
        """The student, gathered and unwrapped for `generate`."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model

    @property
    def samples_by_loop(self) -> bool:
        """Whether pgpo.forward.sampling may take the place of `generate`."""
        if self.engine.gathers_layers and self.args.sampler != "generate":
            problem = "ranks gather the model's layers in each forward, and must run equally many"
            self.say_once(str(sampling.Unsupported(problem)))
        return self.args.sampler != "generate" and not self.engine.gathers_layers

    def streams(self, call: tuple[int | str, ...], turn: int, places: Sequence[int], rows: int) -> sampling.Streams:
        """Random numbers of completions by their places among those of all ranks. After the first turn, with tools,
        those that go on have other places on every rank: by rank and row."""
        if turn:
            return sampling.Streams((*call, turn, self.accelerator.process_index), range(rows))
        return sampling.Streams(call, places)

    def _by_loop(self, prompts: Ids, fields: Any) -> Ids | None:
        """Completions of pgpo.forward.sampling; None where TRL's own path must sample them."""
        step, turn = self.turn
        self.turn = step, turn = self.state.global_step, turn + 1 if step == self.state.global_step else 0
        if self.use_vllm or self.use_transformers_continuous_batching or fields or not self.samples_by_loop:
            return None
        first = self.accelerator.process_index * len(prompts)
        places = range(first, first + len(prompts))
        streams = self.streams(("training", self.args.seed, step), turn, places, len(prompts))
        with self.generation_model() as model:
            try:
                found = sampling.sample(
                    model,
                    prompts,
                    self.generation_config,
                    streams,
                    tokenizer=self.tokenizer,
                    most_tokens=self.args.max_tokens_per_sampling,
                )
            except sampling.Unsupported as problem:
                self.say_once(str(problem))
                return None
        stops = set(self.eos_token_ids)  # TRL cuts behind these
        return [next((ids[: i + 1] for i, token in enumerate(ids) if token in stops), ids) for ids in found]

    @contextlib.contextmanager
    def _stop_strings_known(self) -> Iterator[bool]:
        """transformers needs the tokenizer for `stop_strings`, which TRL does not hand over. Whether there are any."""
        if self.use_vllm or not self.generation_config.stop_strings:
            yield False
            return
        model = self.accelerator.unwrap_model(self.model_wrapped)
        model.generate = functools.partial(model.generate, tokenizer=self.tokenizer)
        try:
            yield True
        finally:
            del model.generate

    @property
    def _stops(self) -> list[int]:
        """Every token that ends a completion."""
        if self.use_vllm:
            own = (self.args.generation_kwargs or {}).get("stop_token_ids")
        else:
            own = self.generation_config.eos_token_id
        return [*self.eos_token_ids, *([] if own is None else [own] if isinstance(own, int) else own)]

    def _tokenize_prompts(self, prompts: list[Prompt]) -> Any:
        repeats = 1 if self._held_out is None else self._held_out.repeats
        prompt_ids, images, fields = super()._tokenize_prompts(prompts[::repeats])
        prompt_ids = [ids for ids in prompt_ids for _ in range(repeats)]
        limit, name = self.prompt_limit
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            if limit is not None and len(ids) > limit:
                raise UserError(
                    f"a prompt has {len(ids)} tokens, more than {name} = {limit}: {_start(prompt)!r}; raise the limit "
                    "or drop the row."
                )
        return prompt_ids, images, fields


def _check_env_mask(output: dict[str, Any], place: str) -> None:
    """Raises UserError if a rollout function's env_mask does not say of every token whose it is."""
    if (masks := output.get("env_mask")) is None:
        return
    completions = output.get("completion_ids", [])
    if len(masks) != len(completions):
        raise UserError(
            f"rollout_func returned {len(masks)} rows of env_mask for {len(completions)} completions {place}; return "
            "one per completion."
        )
    for i, (mask, ids) in enumerate(zip(masks, completions)):
        if len(mask) != len(ids):
            raise UserError(
                f"rollout_func returned an env_mask of {len(mask)} values for the {len(ids)} tokens of sample {i} "
                f"{place}; return one per token: 1 for the model's, 0 for the environment's."
            )
        if (value := next((v for v in mask if v not in (0, 1)), None)) is not None:
            raise UserError(
                f"rollout_func returned the value {value!r} in the env_mask of sample {i} {place}; return 1 for a "
                "token of the model, 0 for one of the environment."
            )


def function_name(function: Any) -> str:
    """What TRL calls a function or a reward model, in metrics too."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if isinstance(function, nn.Module):
        return str(get_config_model_id(function.config)).split("/")[-1]
    return str(get_callable_name(function))


def _start(prompt: Prompt, characters: int = 60) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return text if len(text) <= characters else text[:characters] + "…"


def nonfinite_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter, in the part that this rank holds, with nan or inf. A sum tells, without a copy."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
        if local.dtype in _FLOATS and not local.is_meta:
            wide = torch.float64 if local.dtype == torch.float64 else torch.float32
            if not math.isfinite(local.detach().sum(dtype=wide).item()):
                return name
    return None


@contextlib.contextmanager
def sampling_explained(place: str) -> Iterator[None]:
    """torch's error where logits are not finite, as one sentence. (On a GPU it is an assertion that cannot be told.)"""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError(
            f"{place}: the model's logits hold nan or inf, so nothing can be sampled; look for an overflow in half "
            "precision, or a temperature close to 0."
        ) from error
