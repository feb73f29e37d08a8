"""README, the pages behind it, CHANGELOG and DISTRIBUTED.md in step with the code: refused is what they call refused.

The documents are read: every sentence "... are refused", and every bullet of a list of refusals, needs a row in
REFUSED, whose calls must end in its words; every row needs its sentence. What they call supported, by name, must be
taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from pgpo import PGPOConfig, PGPOTrainer, UserError
from pgpo.core import modulate
from pgpo.settings import rules
from pgpo.train import problems
from pgpo.train.adapters import adapter_problem, precision_problem
from pgpo.train.held_out import HeldOut
from pgpo.train.prompts import Prompts
from pgpo.train.seam import SeamTrainer
from pgpo.train.sharding import sharding_problem
from pgpo.train.success import deciding
from pgpo.train.zero import zero_problem

ROOT = Path(__file__).parents[2]
FIRST_PAGES = ["README.md", *sorted(f"docs/{p.parent.name}/{p.name}" for p in ROOT.glob("docs/[st]*/*.md"))]
README, CHANGELOG, DISTRIBUTED = (
    "\n".join(re.sub(r"\n +", " ", (ROOT / name).read_text(encoding="utf-8")) for name in names)  # bullets of one line
    for names in (FIRST_PAGES, ["CHANGELOG.md"], ["docs/DISTRIBUTED.md"])
)
USER = {"role": "user", "content": "w1 w2"}


def parity(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def config(**fields: Any) -> PGPOConfig:
    """bf16 would need a GPU or a new CPU."""
    return PGPOConfig(bf16=False, **fields)


def fsdp(version: int = 2, offload: Any = None) -> str | None:
    plugin = SimpleNamespace(fsdp_version=version, cpu_offload=offload or OffloadPolicy())
    return sharding_problem(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))


def zero(stage: int, offload: bool = False, model: Any = None, settings: Any = None, **args: Any) -> str | None:
    found = SimpleNamespace(config=settings or {}, is_offload=lambda: offload)
    plugin = SimpleNamespace(zero_stage=stage, hf_ds_config=found)
    plain = dict(fp16=False, distills=True, teacher="ema", load_best_model_at_end=False, adaptive_clip=None)
    given = SimpleNamespace(**plain | {"information_source": "same_batch"} | args)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    return zero_problem(model or nn.Linear(1, 1), accelerator, given)


def cut_up() -> nn.Module:
    model = nn.Linear(1, 1)
    model.weight.ds_tensor = torch.zeros(1)  # as DeepSpeed leaves a parameter
    return model


def adapted() -> nn.Module:
    model = nn.Linear(1, 1)
    model.peft_config = {}
    return model


def sharded(**args: Any) -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(**args), is_fsdp_enabled=True, is_deepspeed_enabled=False)
    problems._check_sharding(trainer)


def inputs(row: dict[str, Any] | None = None, **options: Any) -> Any:
    rows = Dataset.from_list([row or {"prompt": [USER]}] * 8)
    given = {"eval_dataset": None, "reward_funcs": parity, "grade": None, "options": {}, **options}
    fields = {name: given.pop(name) for name in list(given) if name in PGPOConfig.__dataclass_fields__}
    return problems.check_inputs(config(**fields), rows, feedback_funcs=[], **given)


def prompt_problem(prompt: Any) -> str | None:
    return Prompts(build_tokenizer(), {}, hinted=True).problem(prompt)


def rendered() -> str:
    return build_tokenizer().apply_chat_template([USER], add_generation_prompt=True, tokenize=False)


def best_metric() -> Any:
    args = SimpleNamespace(metric_for_best_model="eval_accuracy", eval_strategy="steps")
    success = SimpleNamespace(decides=None, threshold=1.0)
    trainer = SimpleNamespace(args=args, reward_funcs=[parity], reward_func_names=["parity"], success=success)
    return HeldOut(trainer, None).check_best_metric([{}])


def prefix_tuned() -> nn.Module:
    model = build_model()
    model.peft_config = {"default": SimpleNamespace(peft_type="PREFIX_TUNING", is_prompt_learning=True)}
    return model


def room() -> Any:
    args = SimpleNamespace(max_completion_length=4096)
    return problems._room(SimpleNamespace(model=build_model(), args=args))


class OwnLoss(PGPOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return None


def train_after(engine: bool) -> Any:
    return SeamTrainer.train(SimpleNamespace(is_deepspeed_enabled=engine, model=1, model_wrapped=2))


# What a document calls refused -> words of the sentence, and calls that must end in it: returned, or as an error.
REFUSED: dict[str, tuple[str, list[Callable[[], Any]]]] = {
    # Several processes
    "FSDP1": ("fsdp_version: 2", [lambda: fsdp(version=1)]),
    "FSDP2 with CPU offload": ("fsdp_offload_params", [lambda: fsdp(offload=CPUOffloadPolicy(pin_memory=False))]),
    '`guard="rollback"`': ("guard='rollback'", [lambda: sharded(guard="rollback")]),
    "ZeRO-1": ("ZeRO stage [01]", [lambda: zero(1), lambda: zero(0)]),
    "DeepSpeed's offloading": ("offload_optimizer_device", [lambda: zero(2, offload=True)]),
    "`zero3_init_flag`": ("zero3_init_flag", [lambda: zero(3, model=cut_up())]),
    "fp16, with DeepSpeed's own loss scaling": ("set fp16: false", [lambda: zero(2, fp16=True)]),
    "an optimizer or scheduler of DeepSpeed's own": (
        "its own (optimizer|scheduler)",
        [
            lambda: zero(2, settings={"optimizer": {}}),
            lambda: zero(2, settings={"scheduler": {}}),
        ],
    ),
    '`information_source="cross_fit"`': ("'cross_fit'", [lambda: zero(2, information_source="cross_fit")]),
    "`adaptive_clip`": ("adaptive_clip is set", [lambda: zero(2, adaptive_clip=2.0)]),
    "`load_best_model_at_end`": ("load_best_model_at_end", [lambda: zero(2, load_best_model_at_end=True)]),
    "under ZeRO-3, LoRA with a teacher of its own": ("teacher's adapter", [lambda: zero(3, model=adapted())]),
    'under ZeRO-3, `teacher="trust_region"`': ("'trust_region'", [lambda: zero(3, teacher="trust_region")]),
    "a second `train()` of one trainer": ("trains once", [lambda: train_after(engine=True)]),
    # One process
    "A field of TRL's that would do nothing here": (
        "epsilon is|beta is|data_seed is",
        [
            lambda: config(epsilon=0.3),
            lambda: config(beta=0.1, objective="sdpo"),
            lambda: config(data_seed=3, objective="grpo"),
        ],
    ),
    "a field of TRL or transformers that would do nothing, when it is set": (
        "label_smoothing_factor",
        [lambda: config(label_smoothing_factor=0.1)],
    ),
    "an override that is never called": ("overrides compute_loss", [lambda: OwnLoss.unused_override(distills=True)]),
    "trained weights in fp16": ("is fp16", [lambda: precision_problem(nn.Linear(1, 1).half())]),
    "`torch_dtype` in `model_init_kwargs`": (
        "name it dtype",
        [lambda: config(model_init_kwargs={"torch_dtype": "bfloat16"})],
    ),
    "several reward functions without `success_reward`": (
        "set success_reward",
        [lambda: deciding(None, ["right", "format"], needed=True)],
    ),
    "prompts that the chat template has rendered already": ("rendered already", [lambda: prompt_problem(rendered())]),
    "prompts that end in an assistant's message": (
        "ends in an assistant's message",
        [lambda: prompt_problem([USER, {"role": "assistant", "content": "w3"}])],
    ),
    "columns named like an argument of reward functions": (
        "column 'completion_ids'",
        [
            lambda: inputs({"prompt": [USER], "completion_ids": [1]}),
        ],
    ),
    "prompts that leave no room for a completion in the model's positions": ("128 positions", [room]),
    "rows that cannot be used": (
        "empty prompt|empty list|single dict",
        [lambda: prompt_problem(""), lambda: prompt_problem([]), lambda: prompt_problem({})],
    ),
    "evaluations that cannot work": ("no eval_dataset", [lambda: inputs(eval_strategy="steps", eval_steps=1)]),
    "a `metric_for_best_model` that no evaluation gives": ("no evaluation gives", [best_metric]),
    "adapters that cannot be right": ("PREFIX_TUNING", [lambda: adapter_problem(prefix_tuned(), distills=True)]),
    "tools and environments with self-distillation": (
        "(tools|environment_factory) is not supported",
        [
            lambda: inputs(options={"tools": [parity]}),
            lambda: inputs(options={"environment_factory": parity}),
        ],
    ),
}


def sentence(call: Callable[[], Any]) -> str | None:
    try:
        found = call()
    except (UserError, ValueError) as error:
        return str(error)
    return found if isinstance(found, str) else None


def told(text: str) -> set[str]:
    """The subjects of "..., ... and ... are refused", and the first words of bullets in a list of refusals."""
    found: set[str] = set()
    for subjects in re.findall(
        r"(?:^|[.;:] )(?:- )?([^.;:\n]+?) (?:is|are) refused", text.replace(" \n", " "), re.MULTILINE
    ):
        found |= set(re.split(r", | and (?=\w+'s )", subjects))
    for block in re.findall(r"^(?:Refused|### Refused)[^\n]*\n\n((?:[*-] [^\n]*\n)+)", text, re.MULTILINE):
        found |= {re.split(r": `", line[2:])[0] for line in block.splitlines()}
    return found


@pytest.mark.parametrize("text", [README, CHANGELOG, DISTRIBUTED], ids=["README", "CHANGELOG", "DISTRIBUTED"])
def test_every_refusal_that_a_document_tells_has_its_call(text):
    assert told(text) and told(text) - REFUSED.keys() == set()


def test_every_call_has_its_refusal_in_a_document():
    assert REFUSED.keys() - told(README) - told(CHANGELOG) - told(DISTRIBUTED) == set()


@pytest.mark.parametrize("subject", REFUSED)
def test_what_a_document_calls_refused_is_refused(subject):
    words, calls = REFUSED[subject]
    for call in calls:
        text = sentence(call)
        assert text is not None and text.endswith(".") and re.search(words, text)


def test_a_refusal_of_what_works_would_be_found():
    """As the CHANGELOG once said of DeepSpeed."""
    assert told("- FSDP1, FSDP2 with CPU offload and DeepSpeed's ZeRO are refused.") - REFUSED.keys() == {
        "DeepSpeed's ZeRO"
    }
    assert told("Refused:\n\n* FSDP2: `a.py:b`\n* ZeRO-2\n") == {"FSDP2", "ZeRO-2"}


def test_the_kinds_of_several_processes_are_taken():
    for kind in ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"):
        assert kind in README and kind in CHANGELOG and kind in DISTRIBUTED
    assert (fsdp(), zero(2), zero(3), zero(3, model=adapted(), teacher="live")) == (None, None, None, None)


def test_the_optimizers_that_the_readme_names_are_taken_and_no_others():
    named = re.search(r"It works for (.*?), is\s+bit-identical", README, re.DOTALL)[1]
    words = set(re.findall(r"\b[A-Z]\w+", named))
    assert {"SGD", "AdamW", "Muon"} <= words
    weights = [nn.Parameter(torch.zeros(2, 2))]
    for name in words:
        modulate(getattr(torch.optim, name)(weights, lr=0.1)).remove()
    for name in ("Rprop", "ASGD", "LBFGS"):
        assert sentence(lambda name=name: modulate(getattr(torch.optim, name)(weights, lr=0.1))) is not None


def values_in(text: str) -> set[tuple[str, str]]:
    """`field="value"`, also `"value"` in a list behind it, of PGPOConfig's fields with choices."""
    found = set()
    for field, choices in rules.CHOICES.items():
        for values in re.findall(rf'{field}=("\w+"(?:`? or `?"\w+")*)', text):
            found |= {(field, value) for value in re.findall(r'"(\w+)"', values)}
        assert all(value in choices for name, value in found if name == field)
    return found


def test_the_values_that_the_readme_names_are_taken():
    found = values_in(README)
    assert {("objective", "grpo"), ("information_source", "cross_fit")} <= found
    for field, value in found:
        PGPOConfig.paper(bf16=False, **{field: value})  # two halves need two questions


def test_the_guards_that_the_readme_names_are_those_of_the_code():
    named = re.search(r"`--guard (\w+)` \(or (.*?)\)", README, re.DOTALL)
    assert {"off", named[1], *re.findall(r"`(\w+)`", named[2])} == set(rules.CHOICES["guard"])
