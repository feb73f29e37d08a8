"""`pgpo eval`: avg@k of a model as a student, and of the same model reading a right solution (the self-teacher)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pgpo import runlog
from pgpo.command.directory import last_checkpoint
from pgpo.command.models import check_prompts, load_config, load_model, load_tokenizer, one_thread
from pgpo.command.terminal import Heartbeat, console, quiet, say
from pgpo.errors import UserError
from pgpo.evaluate.avg_at_k import RIGHT, Record, summarize
from pgpo.evaluate.exports import inspect_log, lm_eval_samples, write_inspect_log, write_lm_eval_samples
from pgpo.evaluate.run import Generate, evaluate, write_records
from pgpo.evaluate.runners import TEMPERATURE, TOP_P, TransformersRunner, VLLMRunner, render_prompt
from pgpo.forward.batching import positions
from pgpo.settings.arguments import PRESETS, Parser, TaskArguments, make
from pgpo.tasks import Row
from pgpo.teacher import TeacherContext, build_contexts

_OF_THE_RUN = ("domain", "variant", "data_path", "data_revision", "prompt_style", "data_check", "task_options")


@dataclass
class EvalArguments(TaskArguments):
    """Which questions, and how to sample them."""

    split: str = field(default="test", metadata={"help": "'test', 'validation' or 'train'."})
    k: int = field(default=16, metadata={"help": "Completions per question."})
    temperature: float | None = field(default=None, metadata={"help": "0 is greedy; default 0.6, lab_world 1.0."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus sampling; default 0.95, lab_world 1.0."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Default: 24 for lab_world, else 8192."})
    max_prompt_length: int = field(default=10240, metadata={"help": "Tokens; a longer prompt is an error."})
    batch_size: int = field(default=256, metadata={"help": "Sequences generated at once."})
    rows: int | None = field(default=None, metadata={"help": "Questions; default all."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    hint: bool = field(default=True, metadata={"help": "Also evaluate the hinted self-teacher."})
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM."})
    vllm_options: str | None = field(
        default=None,
        metadata={
            "help": "JSON object of options of vllm.LLM, such as "
            '\'{"tensor_parallel_size": 2, "gpu_memory_utilization": 0.8}\'.'
        },
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Weights in this torch dtype; default float32, with vLLM its own choice."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    records: str | None = field(default=None, metadata={"help": "Write the graded completions to this JSONL file."})
    inspect_log: str | None = field(
        default=None, metadata={"help": "Write the student's as a log of inspect-ai, .json."}
    )
    lm_eval_folder: str | None = field(
        default=None, metadata={"help": "Write the student's as samples of lm-eval here."}
    )

    # Of the run that is evaluated, if it is one: options of generation and of the chat template.
    generation: dict[str, Any] = field(default_factory=dict, init=False)
    template: dict[str, Any] = field(default_factory=dict, init=False)
    # Of the model: how long a hinted prompt may be, as build_contexts takes it.
    fit: dict[str, Any] = field(default_factory=dict, init=False)
    engine: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.engine = _json_object(self.vllm_options) if self.vllm_options is not None else {}
        if self.engine and not self.use_vllm:
            raise UserError("vllm_options are given, but use_vllm is off; add --use_vllm, or leave them out.")
        self.as_many_as_fit = self.max_new_tokens is None
        if self.split not in ("test", "validation", "train"):
            raise UserError(f"split is {self.split!r}; choose test, validation or train.")
        if self.rows is not None and self.rows < 1:
            raise UserError(f"rows is {self.rows}; it must be at least 1, or left out for all questions.")
        if self.k < 1:
            raise UserError(f"k is {self.k}; it must be at least 1 completion per question.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; a seed must be between 0 and 4294967295.")
        for name in ("records", "inspect_log"):
            path = getattr(self, name)
            if path and not Path(path).parent.is_dir():
                raise UserError(f"the folder of {path} does not exist; create it, or choose another --{name}.")
            if path and Path(path).is_dir():
                raise UserError(f"{name} is {path}, which is a folder; name a file in it.")
        if self.lm_eval_folder and Path(self.lm_eval_folder).exists() and not Path(self.lm_eval_folder).is_dir():
            raise UserError(f"lm_eval_folder is {self.lm_eval_folder}, which is a file; name a folder.")
        if self.inspect_log and Path(self.inspect_log).suffix != ".json":
            raise UserError(f"inspect_log is {self.inspect_log}; inspect-ai reads it if it ends in .json.")
        lab = PRESETS["lab_world"] if self.task == "lab_world" else {}  # otherwise the paper's validation settings
        if self.max_new_tokens is None:
            self.max_new_tokens = lab.get("max_completion_length", 8192)
        if self.temperature is None:
            self.temperature = lab.get("eval_temperature", TEMPERATURE)
        if self.top_p is None:
            self.top_p = lab.get("eval_top_p", TOP_P)


def main(argv: Sequence[str]) -> int:
    """Run `pgpo eval MODEL ...`; prints one line per reader of the questions."""
    parser = Parser([EvalArguments], prog="pgpo eval")
    parser.add_argument("model", help="a folder, a hub id, or a run directory (its newest checkpoint)")
    values = vars(parser.parse_args(list(argv)))
    name, stored, generation = values["model"], {}, {}
    if _is_run(name):  # what the run trained on, unless a flag says otherwise
        stored = runlog.read_run(name).config
        parser.set_defaults(task=stored.get("task", TaskArguments.task))
        if vars(parser.parse_args(list(argv)))["task"] == stored.get("task"):
            parser.set_defaults(**{k: stored[k] for k in _OF_THE_RUN if k in stored})
        generation = generation_of(stored, values["use_vllm"])
        limit = generation.get("max_tokens" if values["use_vllm"] else "max_new_tokens")
        parser.set_defaults(max_new_tokens=limit or stored.get("max_completion_length"))
        values = vars(parser.parse_args(list(argv)))
    del values["model"]
    args = make(EvalArguments, values)
    args.generation, args.template = generation, stored.get("chat_template_kwargs") or {}
    quiet()
    if not torch.cuda.is_available():
        one_thread()
    task = args.load()
    rows = getattr(task, args.split)[: args.rows]
    if not rows:
        raise UserError(f"the {args.split} split holds no questions; choose another --split.")
    generate = _generator(model_folder(name), args, rows)
    right = stored.get("success_threshold", RIGHT)

    student = evaluate(rows, generate, task.grade, args.k, args.seed)
    _report("student", student, args.k, right)
    written = [{**r, "reader": "student"} for r in student]
    if args.hint:
        solutions = right_solutions(rows, student, right)
        contexts = {
            row["id"]: hinted_context(row, solutions[row["id"]], **args.fit) for row in rows if row["id"] in solutions
        }
        prompts = {name: context.prompt for name, context in contexts.items()}
        hinted = [row for row in rows if prompts.get(row["id"])]
        if shortened := sum(context.truncated for context in contexts.values()):
            say(f"{shortened} hints are shortened, so that the prompt has at most {args.fit['max_length']} tokens.")
        if hinted:
            # Other random numbers than those that its hints were drawn with.
            other = args.seed + 2**32
            teacher = evaluate(hinted, generate, task.grade, args.k, other, lambda row: prompts[row["id"]])
            _report("hinted", teacher, args.k, right)
            if len(hinted) < len(rows):
                _report("student*", [r for r in student if prompts.get(r["question_id"])], args.k, right)
            written += [{**r, "reader": "hinted"} for r in teacher]
        if len(hinted) < len(rows):
            say(
                f"no right solution is known for {len(rows) - len(hinted)} of {len(rows)} questions: no hint for them"
                + (", and student* is the student on the others." if hinted else ", so no hinted line.")
            )
    if args.records:
        write_records(args.records, written)  # type: ignore[arg-type]
    _export(args, name, rows, student, right)
    return 0


def _export(args: EvalArguments, model: str, rows: Sequence[Row], records: Sequence[Record], right: float) -> None:
    """The student's completions for the tools that were named."""
    task = " ".join(filter(None, (args.task, args.domain, args.split)))
    if args.inspect_log:
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_new_tokens}
        log = inspect_log(records, rows, task=task, model=model, k=args.k, right=right, sampling=sampling)
        write_inspect_log(Path(args.inspect_log), log)
    if args.lm_eval_folder:
        samples = lm_eval_samples(records, rows, k=args.k, right=right)
        say(f"samples: {write_lm_eval_samples(Path(args.lm_eval_folder), samples, task=task, model=model)}")


def model_folder(name: str) -> str:
    """The newest checkpoint of a run directory; any other name unchanged."""
    if _is_run(name):
        return str(last_checkpoint(Path(name))[1])
    return name


def _is_run(name: str) -> bool:
    return (Path(name) / runlog.CONFIG_FILE).exists() and (Path(name) / runlog.CHECKPOINTS_FOLDER).is_dir()


def right_solutions(rows: Sequence[Row], records: Sequence[Record], right: float = RIGHT) -> dict[str, str]:
    """Question id -> the solution in the task, else the first right completion of the model (as in training)."""
    found: dict[str, str] = {}
    for record in records:
        if record["reward"] >= right:
            found.setdefault(record["question_id"], record["completion"])
    return found | {row["id"]: row["solution"] for row in rows if row.get("solution")}


def hinted_context(row: Row, solution: str, **limit: Any) -> TeacherContext:
    """What the self-teacher reads: the question with a right solution. limit: max_length and length, for its prompt."""
    return build_contexts([row["prompt"]] * 2, [solution, ""], [1.0, 0.0], 2, **limit)[1]


def hinted_prompt(row: Row, solution: str) -> Any:
    """The self-teacher's prompt; None if the solution is nothing but thinking."""
    return hinted_context(row, solution).prompt


def generation_of(stored: Mapping[str, Any], use_vllm: bool) -> dict[str, Any]:
    """A run's `generation_kwargs`; none for an evaluation with the other engine, which has other names for them."""
    options = dict(stored.get("generation_kwargs") or {})
    if stored.get("use_vllm") and (regex := stored.get("vllm_structured_outputs_regex")) is not None:
        options["structured_outputs"] = {"regex": regex}
    if options and use_vllm != bool(stored.get("use_vllm")):
        say(
            f"the run's generation_kwargs ({', '.join(options)}) are of another engine and are ignored; see --use_vllm."
        )
        return {}
    return options


def _generator(model: str, args: EvalArguments, rows: Sequence[Row]) -> Generate:
    template = args.template or {"enable_thinking": False}  # paper: thinking off; other templates ignore it
    loaded: Any = None
    if args.use_vllm:
        tokenizer = load_tokenizer(model, trust_remote_code=args.trust_remote_code)
        config = load_config(model, args.trust_remote_code)
    else:
        loaded, tokenizer = load_model(model, args.dtype, trust_remote_code=args.trust_remote_code)
        config = loaded.config
    longest, most = check_prompts(tokenizer, rows, args.max_prompt_length, template), positions(config)
    tokens = args.max_new_tokens = _fitting_tokens(args, longest, most)
    limit = args.max_prompt_length if most is None else min(args.max_prompt_length, most - tokens)
    args.fit = {"max_length": limit, "length": lambda prompt: len(render_prompt(tokenizer, prompt, **template))}
    sampling: dict[str, Any] = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": tokens,
        "chat_template_kwargs": template,
        "generation": args.generation,
    }
    if args.use_vllm:
        options: dict[str, Any] = {"dtype": args.dtype or "auto", "trust_remote_code": args.trust_remote_code}
        options |= {"max_model_len": limit + tokens, **args.engine}
        return VLLMRunner(model, progress=console.is_terminal, **sampling, **options)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    return TransformersRunner(
        loaded, tokenizer, batch_size=args.batch_size, progress=_progress(loaded, tokens), **sampling
    )


def _fitting_tokens(args: EvalArguments, longest: int, most: int | None) -> int:
    """max_new_tokens, or fewer where it was not given and the model has not the positions for it; says so.

    longest: tokens of the longest prompt. most: the model's positions, None where nothing limits them.
    """
    tokens = args.max_new_tokens or 1
    if most is None or longest + tokens <= most:
        return tokens
    room = most - longest
    if room < 1:
        raise UserError(
            f"the longest question has {longest} prompt tokens, which leave no place for an answer in the model's "
            f"{most} positions; take a model with more, or --rows before it."
        )
    if not args.as_many_as_fit:
        raise UserError(
            f"max_new_tokens is {tokens}, which with the longest prompt of {longest} tokens is more than "
            f"the model's {most} positions; set --max_new_tokens to at most {room}."
        )
    shorter = max(1, room // 2) if args.hint else room  # a hint is as long as an answer
    say(
        f"completions end after {shorter} tokens, not {tokens}: the model has {most} positions, of which "
        f"a prompt takes up to {longest}{' and a hint as many as the answer' if args.hint else ''}."
    )
    return shorter


def _progress(model: Any, tokens: int) -> Callable[[int, int], None]:
    """Says every half minute how many completions are done, and how far those at work are: a forward is a token."""
    beat = Heartbeat()
    state = {"done": 0, "forwards": 0}

    def forward(*_: Any) -> None:
        state["forwards"] += 1
        of = f" of at most {tokens}" if state["forwards"] <= tokens else ""
        beat(lambda: f"{state['done']} completions are done, the next ones are at token {state['forwards']}{of}")

    def batch(done: int, total: int) -> None:
        state.update(done=done % total, forwards=0)
        beat(lambda: f"{done} of {total} completions are done")

    model.register_forward_hook(forward)
    return batch


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"vllm_options is no JSON ({error}); give an object: '{{\"enforce_eager\": true}}'.") from error
    if not isinstance(value, dict):
        raise UserError(f"vllm_options is {text}; give a JSON object: '{{\"enforce_eager\": true}}'.")
    return value


def _report(reader: str, records: Sequence[Record], k: int, right: float) -> None:
    s = summarize(records, k, right=right)
    cells = [
        f"{name}@{k} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"
        for name, e in (("avg", s.avg_at_k), ("pass", s.pass_at_k), ("maj", s.maj_at_k))
        if e is not None
    ]
    if s.well_formed_share is not None:
        cells.append(f"well-formed {s.well_formed_share:.3f}")
    units = "stem" if s.stems < s.questions else "question"
    count = f"{s.questions} questions" + (f" with {s.stems} stems" if s.stems < s.questions else "")
    print(f"{reader:8s} {'  '.join(cells)}  {count} (95 % intervals clustered by {units})")
