"""Prompts, columns and models that cannot be used are named before the first step; what TRL takes, trains."""

from __future__ import annotations

import decimal
import fractions
import math
import os
import warnings

import numpy as np
import pytest
import torch
import trainer_kit
import trl
from conftest import CHAT_TEMPLATE, WORDS, build_model, build_tokenizer
from datasets import Dataset, IterableDataset
from trainer_kit import GROUP, bitwise_equal, parity_reward, train, weights

from pgpo import PGPOTrainer, UserError
from pgpo.train.prompts import Prompts, rendered_mark, template_marks
from pgpo.train.user_functions import check_rewards

TEMPLATES = os.path.join(os.path.dirname(trl.__file__), "chat_templates")
USER = [{"role": "user", "content": "w1 w2"}]
OBJECTIVES = ["pgpo", "sdpo", "grpo"]


def templated(text: str):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def template(name: str):
    """A tokenizer with a chat template that TRL ships."""
    with open(os.path.join(TEMPLATES, f"{name}.jinja")) as file:
        return templated(file.read())


def make(path, data, reward=parity_reward, tokenizer=None, model=None, quiet=True, **options):
    """A trainer on these rows (a list, or a dataset)."""
    trainer_options = ("feedback_funcs", "eval_dataset", "environment_factory", "peft_config", "optimizers")
    extra = {name: options.pop(name) for name in trainer_options if name in options}
    extra.setdefault("rollout_func", options.pop("rollout_func", trainer_kit.fake_rollout))
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        return PGPOTrainer(
            build_model() if model is None else model,
            reward,
            trainer_kit.config(path, **options),
            Dataset.from_list(data) if isinstance(data, list) else data,
            processing_class=tokenizer or build_tokenizer(),
            **extra,
        )


def rows(*special, count=6) -> list[dict]:
    """Rows in order, then the special prompts."""
    return [*({"prompt": USER} for _ in range(count)), *({"prompt": prompt} for prompt in special)]


def stream(data: list[dict]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(data))


def trained(t) -> dict[str, torch.Tensor]:
    """Weights after training."""
    train(t)
    return weights(t.model)


def refuses(path, says: str, data, *, late: bool = False, **options) -> str:
    """UserError when the trainer is made; or, of a stream, when the row is read, before any update."""
    with pytest.raises(UserError, match=says) as caught:
        t = make(path, data, **options)
        assert late, "the trainer was made"
        train(t)
    if late:
        assert t.state.global_step == 1  # the row belongs to the second step
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# Prompts that were rendered beforehand --------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "Hi there"}]
CHATS = [
    TURNS,
    [{"role": "system", "content": "Be kind"}, *TURNS],
    [*TURNS, {"role": "assistant", "content": "Yo"}, *TURNS],
]
ORDINARY = [
    "What is 2 + 2?",
    "Question: x\nAnswer:",
    "User: hi\nAssistant:",
    "### Instruction:\nDo it.\n\n### Response:\n",
    "What does <|im_start|> mean?",
    "<b>bold</b> words",
    "[INST] is a token of which model?",
    "You are a helpful assistant. Solve: 1 + 1",
    "system",
    "assistant",
    "<think>",
    " Hello\n",
]
CHATML = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "lfm2", "nemotron_3_nano"]


@pytest.mark.parametrize("name", [*CHATML, "gemma", "gemma3", "phi3", "cohere2", "gptoss", "llama3_1", "deepseekv3"])
def test_a_rendered_text_is_told_from_an_ordinary_one(name):
    tokenizer = template(name)
    marks = template_marks(tokenizer, {"enable_thinking": False})
    assert [text for text in ORDINARY if rendered_mark(text, marks, tokenizer)] == []
    told = 0
    for messages in CHATS:
        for arguments in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            try:
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
            except Exception:  # no system role
                continue
            for variant in (text, text.strip(), f"\n{text}"):
                assert rendered_mark(variant, marks, tokenizer), variant
            told += 1
    assert told >= 6


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("{% for m in messages %}{{ m.role | upper }}: {{ m.content }} {% endfor %}ASSISTANT:", "USER: hi ASSISTANT:"),
        ("{{ bos_token }}[INST] {{ messages[-1].content }} [/INST]", "[INST] hi [/INST]"),
        ("### Human: {{ messages[-1].content }}\n### Assistant:\n", "### Human: hi\n### Assistant:"),
    ],
)
def test_marks_of_templates_without_special_tokens(text, rendered):
    tokenizer = templated(text)
    marks = template_marks(tokenizer, {})
    assert rendered_mark(rendered, marks, tokenizer)
    assert not rendered_mark("hi", marks, tokenizer) and not rendered_mark("Who is the ASSISTANT?", marks, tokenizer)


@pytest.mark.parametrize("text", ["{{ messages[-1].content }}", "{{ messages[-1].content }}\n", "Q: {{ 1 }}"])
def test_a_template_without_marks_finds_none(text):
    tokenizer = templated(text)
    marks = template_marks(tokenizer, {})
    assert [t for t in ORDINARY if rendered_mark(t, marks, tokenizer)] == []


@pytest.mark.parametrize("objective", ["pgpo", "sdpo"])
@pytest.mark.parametrize(
    "text", ["<user> w1 w2 <assistant>", "<user> w1", "w1 <assistant>", " <user> w1 <assistant> w3"]
)
def test_a_rendered_prompt_is_refused_where_a_hint_is_written_into_it(tmp_path, text, objective):
    says = r"^row 5 of train_dataset has a prompt that the chat template has rendered already .*give the messages"
    data = [{"prompt": "w1 w2"} for _ in range(5)] + [{"prompt": text}]
    refuses(tmp_path, says, data, objective=objective)


def test_grpo_takes_rendered_prompts_as_trl_does(tmp_path):
    make(tmp_path, [{"prompt": "<user> w1 <assistant>"}] * 4, objective="grpo")


def test_text_prompts_beside_a_chat_template_are_taken(tmp_path):
    make(tmp_path, [{"prompt": f"w1 w{i} user assistant"} for i in range(6)])


# What a prompt must be ------------------------------------------------------------------------------------------------

SHAREGPT = [{"from": "human", "value": "w1"}]
BAD_PROMPTS = [
    (None, "has the prompt None; give chat messages or a text"),
    ([], "has an empty list as its prompt; give at least one message, or drop the row"),
    ([{"role": "user"}], r"has a message without content \(its keys: role\); give every message"),
    ([{"role": "user", "content": None}], "has a message without content"),
    ([{"content": "w1"}], "has a message without role"),
    (SHAREGPT, "has messages with ShareGPT's keys, from and value; name them role and content"),
]
BAD_TEXTS = [("", "has an empty prompt, ''; drop the row"), (" \n", "has an empty prompt")]
STREAMED = [
    (7, "has the prompt 7; give chat messages or a text"),
    ({"role": "user", "content": "w1"}, "has a single dict as its prompt; make it a list of messages"),
    (["w1", "w2"], "has 'w1' in its prompt where a message belongs"),
    ("w1", "mixes text and chat messages with the rows before it"),
]


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
@pytest.mark.parametrize(("prompt", "says"), BAD_PROMPTS, ids=lambda v: str(v)[:20])
def test_a_bad_prompt_is_named_with_its_row(tmp_path, prompt, says, objective):
    refuses(tmp_path, f"^row 6 of train_dataset {says}", rows(prompt), objective=objective)


@pytest.mark.parametrize(("prompt", "says"), BAD_TEXTS)
def test_an_empty_text_is_named_with_its_row(tmp_path, prompt, says):
    refuses(tmp_path, f"^row 4 of train_dataset {says}", [{"prompt": p} for p in ["w1"] * 4 + [prompt]])


@pytest.mark.parametrize("prompt", [{"role": "user", "content": "w1"}, ["w1", "w2"], 3, [1, 2]], ids=str)
def test_a_column_of_another_type_is_named(tmp_path, prompt):
    refuses(tmp_path, "^row 0 of train_dataset has ", [{"prompt": prompt}] * 4)


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
@pytest.mark.parametrize(("prompt", "says"), [*BAD_PROMPTS, *BAD_TEXTS, *STREAMED], ids=lambda v: str(v)[:20])
def test_a_bad_row_of_a_stream_is_named_when_it_is_read(tmp_path, prompt, says, objective):
    says = rf"^row 6 of train_dataset, counted from 0 as they are read, {says}"
    data = stream(rows(prompt, USER, USER, count=6))
    refuses(tmp_path, says, data, late=True, objective=objective, max_steps=2)


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
def test_what_the_first_step_of_a_stream_needs_is_read_ahead(tmp_path, objective):
    refuses(tmp_path, "^row 2 of train_dataset", stream(rows(None, count=2) + rows(count=6)), objective=objective)
    refuses(tmp_path, "has 3 rows, fewer than prompts_per_step = 4", stream(rows(count=3)), objective=objective)
    refuses(tmp_path, "train_dataset is empty", stream([]), objective=objective)
    says = "has the columns question but no 'prompt'; rename"
    refuses(tmp_path, says, stream([{"question": "w1"}] * 6), objective=objective)
    refuses(tmp_path, "is a stream, whose length is not known; set max_steps", stream(rows()), max_steps=-1)


def test_a_stream_trains_as_the_same_rows_do(tmp_path):
    data = list(trainer_kit.dataset())
    assert bitwise_equal(*(trained(make(tmp_path, kind, max_steps=2)) for kind in (data, stream(data))))


def test_a_later_row_without_a_prompt_is_named(tmp_path):
    data = stream([*rows(), {"question": "w1"}, *rows()])
    refuses(
        tmp_path,
        "row 6 of train_dataset, .* has the columns .* but no 'prompt'|row 6 .* the prompt None",
        data,
        late=True,
        max_steps=2,
    )


def test_fewer_rows_than_a_generation_of_several_steps_needs(tmp_path):
    says = r"has 6 rows, fewer than prompts_per_step \* steps_per_generation = 4 \* 2 = 8; lower"
    refuses(tmp_path, says, rows(), steps_per_generation=2)


def test_rows_that_are_made_when_they_are_read_are_judged_then(tmp_path):
    data = Dataset.from_list([{"number": i} for i in range(8)])
    data.set_transform(lambda batch: {"prompt": [USER if n < 6 else None for n in batch["number"]]})
    refuses(tmp_path, "^row 6 of train_dataset, .* has the prompt None", data, late=True, max_steps=2)


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_other_names_of_the_prompt_are_known(tmp_path, column):
    refuses(tmp_path, f"but no 'prompt'; make it of {column}", [{column: SHAREGPT}] * 4)


def test_a_dataset_that_is_none(tmp_path):
    with pytest.raises(UserError, match="train_dataset is missing; give a Dataset"):
        make(tmp_path, None)
    with pytest.raises(UserError, match="train_dataset is a dict; give a Dataset"):
        make(tmp_path, {"prompt": ["w1"]})


# What the chat template refuses ---------------------------------------------------------------------------------------

SYSTEM = [{"role": "system", "content": "w3"}, *USER]
TWICE = [*USER, *USER]
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
@pytest.mark.parametrize(
    ("refusal", "prompt", "says"),
    [
        (NO_SYSTEM, SYSTEM, r"roles: system, user; it says: System role not supported\); write the system's text"),
        (ALTERNATES, TWICE, r"roles: user, user; it says: roles must alternate\); join neighbouring messages"),
    ],
)
def test_roles_that_the_template_refuses(tmp_path, refusal, prompt, says, objective):
    says = f"^row 6 of train_dataset has a prompt that the chat template refuses .{says}"
    refuses(tmp_path, says, rows(prompt), tokenizer=templated(refusal + CHAT_TEMPLATE), objective=objective)


def test_the_real_gemma_and_mistral_like_templates(tmp_path):
    gemma = template("gemma")
    refuses(tmp_path, "row 6 .*refuses .*system", rows(SYSTEM), tokenizer=gemma)
    refuses(tmp_path, "row 6 .*refuses .*user, user", rows(TWICE), tokenizer=gemma)


def test_each_shape_of_roles_is_rendered_once():
    tokenizer = build_tokenizer()
    rendered = []
    plain = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *a, **k: rendered.append(1) or plain(*a, **k)
    prompts = Prompts(tokenizer, {}, hinted=False, limit=1000)
    for i in range(50):
        assert prompts.problem([{"role": "user", "content": f"w{i}"}]) is None
        assert prompts.problem([{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]) is None
    assert len(rendered) == 2


def test_a_list_of_parts_that_the_template_writes_as_python(tmp_path):
    prompt = [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]
    refuses(
        tmp_path, "row 0 .* list of parts, which the chat template writes as Python's text", [{"prompt": prompt}] * 4
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_prompt_that_ends_in_an_assistants_message(tmp_path, objective):
    prompt = [*USER, {"role": "assistant", "content": "w5"}]
    if objective != "grpo":
        refuses(
            tmp_path, "row 6 .* ends in an assistant's message, which TRL closes", rows(prompt), objective=objective
        )
        return
    with pytest.warns(UserWarning, match="ends in an assistant's message: as in TRL, the chat template closes it"):
        make(tmp_path, rows(prompt), objective=objective, quiet=False)


def test_a_prompt_without_a_user(tmp_path):
    refuses(tmp_path, r"row 6 .* without a user's message \(roles: human\)", rows([{"role": "human", "content": "w1"}]))


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
def test_a_tokenizer_without_an_end(tmp_path, objective):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    refuses(
        tmp_path,
        r"no eos token, by which a completion ends; set tokenizer\.eos_token",
        rows(),
        tokenizer=tokenizer,
        objective=objective,
    )


def test_evaluation_rows_are_looked_at_too(tmp_path):
    bad = Dataset.from_list(rows(None, count=2))
    refuses(tmp_path, "^row 2 of eval_dataset has the prompt None", rows(), eval_dataset=bad)
    refuses(tmp_path, r"^row 2 of eval_dataset\['hard'\] has the prompt None", rows(), eval_dataset={"hard": bad})
    make(tmp_path, rows(), eval_dataset=Dataset.from_list(rows(SYSTEM)))


# Columns and rewards --------------------------------------------------------------------------------------------------

ARGUMENTS = ["completion_ids", "completions", "prompts", "trainer_state", "log_extra", "log_metric"]


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
@pytest.mark.parametrize("column", ARGUMENTS)
def test_a_column_named_like_an_argument_of_reward_functions(tmp_path, column, objective):
    data = [row | {column: "x"} for row in rows()]
    says = f"has a column '{column}', .* rename it, e.g. .*rename_column.'{column}', 'my_{column}'"
    refuses(tmp_path, f"^train_dataset {says}", data, objective=objective)
    refuses(tmp_path, f"^train_dataset {says}", stream(data), objective=objective)
    refuses(tmp_path, f"^eval_dataset {says}", rows(), eval_dataset=Dataset.from_list(data), objective=objective)


def test_a_field_of_a_rollout_named_like_an_argument(tmp_path):
    def rollout(prompts, trainer):
        return trainer_kit.fake_rollout(prompts, trainer) | {"completions": ["x"] * len(prompts)}

    t = make(tmp_path, rows(), rollout_func=rollout)
    with pytest.raises(UserError, match=r"rollout_func returned a field 'completions'.* rename it"):
        train(t)


@pytest.mark.parametrize("column", ["completion", "answer", "environments", "id"])
def test_other_columns_are_taken(tmp_path, column):
    train(make(tmp_path, [row | {column: "x"} for row in rows()]))


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.bool_(True),
        torch.tensor(True),
        torch.tensor(1),
        torch.tensor([1.0]),
        torch.tensor(1.0, dtype=torch.bfloat16),
        torch.tensor(1.0, requires_grad=True),
        np.float16(1),
        np.array(1.0),
        decimal.Decimal(1),
        fractions.Fraction(1),
    ],
    ids=repr,
)
def test_every_number_is_a_reward(value):
    assert check_rewards([value, None], "f", "here") == ([1.0, None], None)


@pytest.mark.parametrize(
    "value", ["1.0", b"1", [1.0], torch.ones(2), np.ones(2), 1j, decimal.Decimal("sNaN")], ids=repr
)
def test_what_is_no_number_is_no_reward(value):
    with pytest.raises(UserError, match="for sample 0 here; a reward must be a finite number"):
        check_rewards([value], "f", "here")


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, 1e39, 10**400, torch.tensor(math.nan), np.float64("-inf"), decimal.Decimal("NaN")],
    ids=str,
)
def test_what_is_not_finite_is_said(value):
    rewards, problem = check_rewards([value], "f", "here")
    assert rewards == [None] and "a reward must be a finite number" in problem


@pytest.mark.parametrize(
    "convert", [lambda r: torch.tensor(r) > 0.5, lambda r: np.array(r) > 0.5, lambda r: [x > 0.5 for x in r]]
)
def test_verdicts_train_as_numbers_do(tmp_path, convert):
    rewards = (parity_reward, lambda prompts, completions, **k: convert(parity_reward(prompts, completions)))
    assert bitwise_equal(*(trained(make(tmp_path, trainer_kit.dataset(), reward=reward)) for reward in rewards))
