"""Prompts, columns and models that cannot be used are named before the first step; what TRL takes, trains."""

from __future__ import annotations

import functools
import math
import random
import re
from pathlib import Path

import pytest
import torch
import trainer_kit
import trl
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer
from datasets import Dataset, IterableDataset
from fuzz import any_value, fuzzed
from trainer_kit import bitwise_equal, parity_reward, train, weights

from pgpo import PGPOTrainer, UserError
from pgpo.teacher import ContextTemplates, build_contexts
from pgpo.train.prompts import Prompts, rendered_mark, template_marks

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
USER = [{"role": "user", "content": "w1 w2"}]
OBJECTIVES = ["pgpo", "sdpo", "grpo"]


def templated(text: str):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def template(name: str):
    """A tokenizer with a chat template that TRL ships."""
    return templated((TEMPLATES / f"{name}.jinja").read_text())


def make(path, data, rollout_func=trainer_kit.fake_rollout, **options):
    """A trainer on these rows (a list, or a dataset)."""
    data = Dataset.from_list(data) if isinstance(data, list) else data
    return trainer_kit.trainer(path, data=data, rollout=rollout_func, **options)


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
    *("What is 2 + 2?", "Question: x\nAnswer:", "User: hi\nAssistant:"),
    *("### Instruction:\nDo it.\n\n### Response:\n", "What does <|im_start|> mean?", "<b>bold</b> words"),
    *("[INST] is a token of which model?", "You are a helpful assistant. Solve: 1 + 1", "system", "assistant"),
    *("<think>", " Hello\n"),
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
@pytest.mark.parametrize("kind", [list, stream])
def test_data_that_cannot_fill_a_step(tmp_path, kind, objective):
    refuses(tmp_path, "has 3 rows, fewer than prompts_per_step = 4", kind(rows(count=3)), objective=objective)
    refuses(tmp_path, "train_dataset is empty", kind([]), objective=objective)
    says = "has the columns question, answer but no 'prompt'; rename"
    refuses(tmp_path, says, kind([{"question": "w1", "answer": "w2"}] * 6), objective=objective)


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
def test_what_the_first_step_of_a_stream_needs_is_read_ahead(tmp_path, objective):
    refuses(tmp_path, "^row 2 of train_dataset", stream(rows(None, count=2) + rows(count=6)), objective=objective)
    refuses(tmp_path, "is a stream, whose length is not known; set max_steps", stream(rows()), max_steps=-1)


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
@pytest.mark.parametrize("reward", [None, []])
def test_without_a_reward_function(tmp_path, reward, objective):
    refuses(tmp_path, "reward_funcs is empty; pass a function", rows(), reward=reward, objective=objective)


def test_the_configuration_of_another_trainer(tmp_path):
    args = trl.GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(UserError, match="args is a GRPOConfig; PGPOTrainer needs a PGPOConfig"):
        PGPOTrainer(build_model(), parity_reward, args, trainer_kit.dataset(), processing_class=build_tokenizer())


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
@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("eos_token", r"no eos token, by which a completion ends; set tokenizer\.eos_token"),
        ("chat_template", r"no chat template; set tokenizer\.chat_template"),
    ],
)
def test_a_tokenizer_that_lacks_something(tmp_path, missing, says, objective):
    tokenizer = build_tokenizer()
    setattr(tokenizer, missing, None)
    refuses(tmp_path, says, rows(), tokenizer=tokenizer, objective=objective)


def test_rows_with_other_roles_are_evaluated(tmp_path):
    make(tmp_path, rows(), eval_dataset=Dataset.from_list(rows(SYSTEM)))


# How the chat template opens an answer --------------------------------------------------------------------------------

THINKS_WHEN_LONG = CHAT_TEMPLATE.replace(
    "<assistant>{% endif %}", "<assistant>{% if messages[-1]['content'] | length > 60 %} w9{% endif %}{% endif %}"
)
THINKS_ALWAYS = CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant> w9{% endif %}")
# Not only behind the messages: what the template opens changes what stands before, too.
THINKS_AND_SAYS_SO = "w3 " + THINKS_ALWAYS + "{% if not add_generation_prompt %} end.{% endif %}"


def test_a_template_that_opens_thinking_for_long_prompts_alone_is_refused(tmp_path):
    says = (
        "at step 1: the chat template opens the student's answer with '<assistant>' and the teacher's with "
        "'<assistant> w9', so that they would judge different texts; set a template"
    )
    t = make(tmp_path, trainer_kit.dataset(), tokenizer=templated(THINKS_WHEN_LONG))
    start = weights(t.model)
    with pytest.raises(UserError, match=re.escape(says)):
        train(t)
    assert t.state.global_step == 0 and bitwise_equal(start, weights(t.model))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKS_ALWAYS, THINKS_AND_SAYS_SO])
def test_a_template_that_opens_every_answer_alike_is_taken(tmp_path, template):
    t = make(tmp_path, trainer_kit.dataset(), tokenizer=templated(template))
    spy = trainer_kit.Spy(t)
    (log,) = train(t)
    assert log["active_share"] > 0
    student = [
        ids[mask.bool()].tolist() for ids, mask in zip(spy.batches[0]["prompt_ids"], spy.batches[0]["prompt_mask"])
    ]
    opening = t.tokenizer(t.answer_prefix([{"role": "user", "content": "w1"}]))["input_ids"]
    assert len(opening) == (1 if template == CHAT_TEMPLATE else 2)
    for own, teachers in zip(student, spy.batches[0]["teacher_prompt_ids"], strict=True):
        assert own[-len(opening) :] == opening and (teachers is None or teachers[-len(opening) :] == opening)


def test_plain_text_has_no_opening(tmp_path):
    assert trainer_kit.trainer(tmp_path).answer_prefix("w1 w2") == ""


def any_prompt(rng: random.Random) -> object:
    """Chat messages in good order, or in which something is not."""
    messages: list[object] = [
        {"role": rng.choice(["user", "assistant", "system", "tool", "human"]), "content": f"w{rng.randint(0, 35)}"}
        for _ in range(rng.randint(0, 4))
    ]
    if rng.random() < 0.3:
        messages.append(any_value(rng))
    for message in messages:
        if isinstance(message, dict) and rng.random() < 0.3:
            message[rng.choice(["role", "content", "value", "from", "tool_calls"])] = any_value(rng)
    return rng.choice([messages, messages, messages, any_value(rng), f"w1 {any_value(rng)}"])


@fuzzed(400)
@pytest.mark.parametrize("hinted", [True, False])
def test_fuzzed_prompts_are_taken_or_refused_in_a_sentence(seeds, hinted):
    """And what is taken can be rendered, and hinted at."""
    tokenizer = build_tokenizer()
    ends: dict[bool, int] = {True: 0, False: 0}
    for seed in seeds:
        prompt = any_prompt(random.Random(seed))
        problem = Prompts(tokenizer, {}, hinted, limit=50, limit_name="max_prompt_length").problem(prompt)
        ends[problem is None] += 1
        if problem is not None:
            assert problem.endswith(".") and "\n" not in problem and len(problem) < 700, problem
            continue
        if not isinstance(prompt, str):
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        if hinted:
            assert build_contexts([prompt] * 2, ["w1", "w2"], [1.0, 0.0], 2)[1].prompt is not None
    assert min(ends.values()) > len(seeds) / 20, ends


# Templates of the hint ------------------------------------------------------------------------------------------------


@fuzzed(150)
def test_fuzzed_templates_are_taken_whole_or_refused(tmp_path, seeds):
    """Braces that are no placeholder are text; a value that looks like one stays as it is."""
    pieces = [
        *("{", "}", "{{", "}}", "{prompt}", "{solution}", "{feedback}", "{demonstration}", "{0}", "{prompt!r}"),
        "{ x }",
    ]
    pieces += ["%s", "$x", "\\", "{prompt.__class__}", "é", "\n", "text"]
    taken = 0
    for seed in seeds:
        rng = random.Random(seed)
        chosen = [rng.choice(pieces) for _ in range(rng.randint(0, 6))]
        if rng.random() < 0.5:
            chosen += ["{prompt}", "{solution}", "{feedback}"]
            rng.shuffle(chosen)
        text = "".join(chosen)
        names = sorted(re.findall(r"\{([A-Za-z_]\w*)\}", text))
        try:
            templates = ContextTemplates(reprompt=text)
        except ValueError:
            assert names != ["feedback", "prompt", "solution"], text
            continue
        assert names == ["feedback", "prompt", "solution"], text
        before, after = templates.around("{feedback} {0}", "{prompt}")
        expected = text.replace("{solution}", "\1").replace("{feedback}", "\2").replace("{prompt}", "\3")
        expected = expected.replace("\1", "\nCorrect solution:\n\n{feedback} {0}\n\n")
        said = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{prompt}\n\n"
        assert f"{before}\3{after}" == expected.replace("\2", said), text
        taken += 1
    assert taken > len(seeds) / 10


@pytest.mark.parametrize("name", ["reprompt_template", "solution_template", "feedback_template"])
def test_a_template_without_its_placeholder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"The {name.split('_')[0]} template holds no placeholder; it must hold"):
        trainer_kit.trainer(tmp_path, **{name: "{} {0} {{ x }}"})


# Columns --------------------------------------------------------------------------------------------------------------

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


# A second trainer on the same model -----------------------------------------------------------------------------------


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)


def taken_over(path, model, first: dict, second: dict, between=lambda t: None) -> dict[str, torch.Tensor]:
    """Weights after a second trainer, made on the model of a first one whose training has been undone."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = make(path, trainer_kit.dataset(), model=model, max_steps=2, **first)
    train(one)
    between(one)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in start:
                p.copy_(start[name])
    return trained(make(path, trainer_kit.dataset(), model=model, max_steps=2, **second))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Weights after two steps on a model that nobody has used, by objective."""
    data, folder = trainer_kit.dataset(), tmp_path_factory.mktemp("fresh")
    return functools.cache(lambda objective: trained(make(folder, data, max_steps=2, objective=objective)))


@pytest.mark.parametrize("second", OBJECTIVES)
@pytest.mark.parametrize("first", OBJECTIVES)
def test_a_second_trainer_trains_as_on_a_fresh_model(tmp_path, fresh, first, second):
    assert bitwise_equal(
        fresh(second), taken_over(tmp_path, build_model(), {"objective": first}, {"objective": second})
    )


@pytest.mark.parametrize(
    "first", [{"bf16": True}, {"gradient_checkpointing": True}, {"temperature": 0.5}, {"teacher": "live"}]
)
def test_the_first_trainers_setting_leaves_no_trace(tmp_path, fresh, first):
    """bf16 wraps the forward in autocast, TRL binds the temperature to it."""
    assert bitwise_equal(fresh("grpo"), taken_over(tmp_path, build_model(), first, {"objective": "grpo"}))


@pytest.mark.parametrize("first", ["trl", "evaluated", "failed"])
def test_other_first_uses_of_a_model(tmp_path, fresh, first):
    model = build_model()
    if first == "trl":
        args = trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8)
        trl.GRPOTrainer(model, parity_reward, args, trainer_kit.dataset(), processing_class=build_tokenizer())
    elif first == "evaluated":
        one = make(tmp_path, trainer_kit.dataset(), model=model)
        one.evaluate(Dataset.from_list(rows(count=2)))
    else:
        refuses(tmp_path, "row 6 of", rows(None), model=model)
    assert bitwise_equal(fresh("pgpo"), trained(make(tmp_path, trainer_kit.dataset(), model=model, max_steps=2)))


def test_the_first_trainer_can_still_evaluate(tmp_path):
    model = build_model()
    one = make(tmp_path, trainer_kit.dataset(), model=model)
    make(tmp_path, trainer_kit.dataset(), model=model, objective="grpo")
    assert math.isfinite(one.evaluate(Dataset.from_list(rows(count=2)))["eval_avg_at_k"])


def test_a_forward_that_the_user_has_set_stays(tmp_path):
    model, calls = build_model(), []
    plain = model.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    model.forward = forward
    make(tmp_path, trainer_kit.dataset(), model=model, objective="grpo")
    make(tmp_path, trainer_kit.dataset(), model=model, objective="grpo")
    model(input_ids=torch.tensor([[2, 3]]))
    assert len(calls) == 1


def with_adapter():
    from peft import get_peft_model

    torch.manual_seed(3)
    return get_peft_model(build_model(), lora())


@pytest.mark.parametrize("second", OBJECTIVES)
def test_a_peft_model_with_a_teachers_adapter(tmp_path, second):
    fresh = trained(make(tmp_path, trainer_kit.dataset(), model=with_adapter(), max_steps=2, objective=second))
    for kind in ("ema", "frozen", "trust_region"):
        again = taken_over(tmp_path, with_adapter(), {"teacher": kind}, {"objective": second})
        assert bitwise_equal(fresh, again), kind


@pytest.mark.parametrize("second", ["pgpo", "grpo"])
def test_a_base_that_got_its_adapter_from_the_first_trainer(tmp_path, second):
    def last(model, objective):
        options = dict(max_steps=2, objective=objective, peft_config=lora())
        return trained(make(tmp_path, trainer_kit.dataset(), model=model, **options))

    base, expected = build_model(), last(build_model(), second)
    last(base, "pgpo")
    assert bitwise_equal(expected, last(base, second))


def test_a_users_own_adapter_named_teacher_is_still_refused(tmp_path):
    from peft import get_peft_model

    student = get_peft_model(build_model(), lora())
    student.add_adapter("teacher", lora())
    refuses(tmp_path, "has an adapter named 'teacher' already", rows(), model=student)


@pytest.mark.parametrize("second", OBJECTIVES)
def test_an_optimizer_that_the_first_trainer_has_modulated(tmp_path, second):
    def with_sgd():
        model = build_model()
        return model, {"optimizers": (torch.optim.SGD(model.parameters(), lr=1e-2), None)}

    (model, first), (other, optimizers) = with_sgd(), with_sgd()
    again = taken_over(tmp_path, model, first, first | {"objective": second})
    options = optimizers | {"objective": second, "max_steps": 2}
    assert bitwise_equal(again, trained(make(tmp_path, trainer_kit.dataset(), model=other, **options)))


# Positions ------------------------------------------------------------------------------------------------------------


def gpt2(positions: int = 48):
    """A table of positions: beyond it, an IndexError."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = dict(vocab_size=len(build_tokenizer()), n_positions=positions, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**shape, pad_token_id=0, eos_token_id=1, bos_token_id=1))


def rope(positions: int = 48):
    model = build_model()
    model.config.max_position_embeddings = positions
    return model


def long_feedback(prompts, **kwargs):
    return ["w1 " * 200] * len(prompts)


FEEDBACK = {"feedback_template": "\nfeedback: {feedback} end.\n", "feedback_mode": "always"}


@pytest.mark.parametrize("build", [gpt2, rope])
@pytest.mark.parametrize("limit", [10240, None, 41])
def test_teacher_prompts_are_limited_by_the_model(tmp_path, build, limit):
    options = {"feedback_funcs": long_feedback, "max_teacher_prompt_length": limit, **FEEDBACK}
    with pytest.warns(
        UserWarning, match=f"teacher prompts are shortened to 40 tokens, not .* = {limit}: .* 48 positions"
    ):
        t = make(tmp_path, trainer_kit.dataset(), model=build(), quiet=False, **options)
    spy = trainer_kit.Spy(t)
    (log,) = train(t)
    longest = max(len(ids) for ids in spy.batches[0]["teacher_prompt_ids"] if ids is not None)
    assert 38 <= longest <= 40 and log["truncated_contexts"] > 0.5 and log["active_share"] > 0.5


def test_a_lower_limit_stays_and_nothing_is_said(tmp_path):
    t = make(tmp_path, trainer_kit.dataset(), model=rope(), max_teacher_prompt_length=30, feedback_funcs=long_feedback)
    assert t.teacher_prompt_limit == 30
    t = make(tmp_path, trainer_kit.dataset(), model=build_model(), objective="grpo")
    assert t.teacher_prompt_limit == 10240


def test_a_model_without_positions_has_no_limit(tmp_path):
    from transformers import BloomConfig, FalconConfig, MambaConfig

    from pgpo.forward.batching import positions

    assert [positions(c) for c in (BloomConfig(), MambaConfig(), FalconConfig(alibi=True))] == [None] * 3
    assert positions(gpt2().config) == 48 and positions(FalconConfig()) == 2048


@pytest.mark.parametrize("build", [gpt2, rope])
@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
def test_prompts_beyond_the_models_positions(tmp_path, build, objective):
    long = [{"role": "user", "content": "w1 " * 39}]  # 41 with the template, 8 for the completion
    fits = [{"role": "user", "content": "w1 " * 38}]
    says = "has a prompt with 41 tokens, more than the model's positions less max_completion_length = 40: 'w1"
    options = {"objective": objective, "rollout_func": None}
    refuses(tmp_path, f"^row 6 of train_dataset {says}", rows(long), model=build(), **options)
    train(make(tmp_path, rows(fits, fits, count=2), model=build(), **options))
    streamed = stream(rows(long, *[USER] * 4))
    refuses(tmp_path, f"row 6 of train_dataset, .* {says}", streamed, late=True, model=build(), max_steps=2, **options)
    says = "max_completion_length is 48, which leaves no room for a prompt in the model's 48 positions"
    refuses(tmp_path, says, rows(), model=build(), max_completion_length=48, **options)
    with pytest.raises(UserError, match="row 0 of eval_dataset has a prompt with 41 tokens"):
        make(tmp_path, rows(), model=build(), eval_dataset=Dataset.from_list([{"prompt": long}]), **options)


def test_long_prompts_are_named_before_the_first_step(tmp_path):
    prompt = [{"role": "user", "content": "w1 " * 20}]
    says = (
        "^row 6 of train_dataset has a prompt with 22 tokens, more than max_prompt_length = 21: 'w1 .*raise the limit"
    )
    refuses(tmp_path, says, rows(prompt), max_prompt_length=21)
    make(tmp_path, rows(prompt), max_prompt_length=22)


def test_a_rollout_beyond_the_models_positions(tmp_path):
    def rollout(prompts, trainer):
        ids = [[5] * 45 for _ in prompts]
        return {
            "prompt_ids": [[2, 5, 3, 4] for _ in prompts],
            "completion_ids": ids,
            "logprobs": [[0.0] * 45 for _ in ids],
        }

    t = make(tmp_path, rows(), model=rope(), rollout_func=rollout)
    with pytest.raises(UserError, match=r"4 prompt and 45 completion tokens for sample 0 at step 1, more than .* 48"):
        train(t)


# What TRL's SDPOTrainer takes -----------------------------------------------------------------------------------------


def with_context(texts) -> list[dict]:
    return [row | {"privileged_context": text} for row, text in zip(trainer_kit.dataset(), texts)]


def nobody(prompts, completions, **kwargs):
    return [0.0] * len(prompts)


def hints(t, batch) -> list[str | None]:
    return [None if ids is None else t.tokenizer.decode(ids) for ids in batch["teacher_prompt_ids"]]


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_column_of_contexts_is_read_by_the_teacher(tmp_path, as_stream):
    data = with_context(["w30 w31", None, " ", "w32"])
    t = make(tmp_path, stream(data) if as_stream else data, reward=nobody, **FEEDBACK)
    spy = trainer_kit.Spy(t)
    (log,) = train(t)
    shown = hints(t, spy.batches[0])
    assert sorted({s.split("feedback: ")[1].split(" end.")[0] for s in shown if s}) == ["w30 w31", "w32"]
    assert sum(s is None for s in shown) == 8 and log["active_share"] == log["feedback_share"] == 0.5


def test_feedback_on_the_own_attempt_comes_before_the_column(tmp_path):
    def remark(prompts, **kwargs):
        return ["w20" if p[0]["content"].startswith("w0 ") else None for p in prompts]

    t = make(tmp_path, with_context(["w30"] * 4), reward=nobody, feedback_funcs=remark, **FEEDBACK)
    spy = trainer_kit.Spy(t)
    train(t)
    shown = hints(t, spy.batches[0])
    assert sum("feedback: w20" in s for s in shown) == 4 and sum("feedback: w30" in s for s in shown) == 12


def test_the_column_keeps_to_the_feedback_mode(tmp_path):
    for mode, share in (("never", 0.0), ("always", 1.0)):
        (log,) = train(make(tmp_path, with_context(["w30"] * 4), **(FEEDBACK | {"feedback_mode": mode})))
        assert log["feedback_share"] == share
    (log,) = train(make(tmp_path, with_context(["w30"] * 4), objective="grpo"))
    assert "feedback_share" not in log


def test_a_context_that_is_no_text_is_named(tmp_path):
    refuses(tmp_path, "^row 0 of train_dataset has 3 in privileged_context; give a text or None", with_context([3] * 4))
    data = stream(with_context([None] * 6 + [["w1"]] + [None] * 6))
    refuses(tmp_path, "^row 6 of train_dataset, .* has .'w1'. in privileged_context", data, late=True, max_steps=2)


@pytest.mark.parametrize("as_stream", [False, True])
def test_successes_need_not_teach(tmp_path, as_stream):
    data = with_context(["w30", None, "w31", None])
    options = {"use_successful_as_teacher": False, **FEEDBACK}
    t = make(tmp_path, stream(data) if as_stream else data, **options)
    spy = trainer_kit.Spy(t)
    (log,) = train(t)
    assert not any("solution:" in s for s in hints(t, spy.batches[0]) if s) and log["active_share"] == 0.5
    assert log["success_share"] > 0  # they are counted all the same
    plain = list(trainer_kit.dataset())
    says = "use_successful_as_teacher is False and there is no feedback, .* give feedback_funcs or a column"
    refuses(tmp_path, says, stream(plain) if as_stream else plain, use_successful_as_teacher=False)


def test_neither_successes_nor_feedback(tmp_path):
    with pytest.raises(UserError, match="use_successful_as_teacher is False and feedback_mode is 'never'"):
        trainer_kit.config(tmp_path, use_successful_as_teacher=False, feedback_mode="never")


@pytest.mark.parametrize("source", ["column", "function", "own_success"])
def test_one_completion_per_question(tmp_path, source):
    """The step is the mean over its tokens; no sibling, no advantage."""
    options = {"num_generations": 1, "prompts_per_step": 4}
    data = list(trainer_kit.dataset())
    if source == "column":
        data = with_context(["w30"] * 8)
    elif source == "function":
        options["feedback_funcs"] = lambda prompts, **k: ["w30"] * len(prompts)
    else:
        options |= {"allow_own_success": True, "reward": lambda prompts, **k: [1.0] * len(prompts)}
    t = make(tmp_path, data, max_steps=2, **options, **FEEDBACK)
    assert (t.args.num_generations, t.args.prompts_per_step, type(t.args.num_generations)) == (1, 4, int)
    spy = trainer_kit.Spy(t)
    logs = train(t)
    assert len(spy.batches[0]["teacher_prompt_ids"]) == 4
    assert [log["active_share"] for log in logs] == [1.0, 1.0]


def test_one_completion_per_question_of_one_question(tmp_path):
    t = make(tmp_path, with_context(["w30"] * 4), num_generations=1, prompts_per_step=1, reward=nobody, **FEEDBACK)
    (log,) = train(t)
    assert log["active_share"] == 1.0


def test_one_completion_without_feedback_is_refused(tmp_path):
    says = "num_generations is 1; .* no sibling can be a demonstration"
    refuses(tmp_path, says, rows(), num_generations=1)
    for options in ({"objective": "grpo"}, {"feedback_mode": "never"}):
        with pytest.raises(UserError, match=says):
            trainer_kit.config(tmp_path, num_generations=1, **options)
    with pytest.raises(UserError, match="num_generations is 0"):
        trainer_kit.config(tmp_path, num_generations=0)


@pytest.mark.parametrize("rate", [0.05, 1.0])
def test_the_teacher_follows_every_third_step(tmp_path, rate):
    t = make(tmp_path, trainer_kit.dataset(), max_steps=7, teacher_sync_steps=3, teacher_rate=rate)
    expected, seen = weights(t.model), []
    plain = t.teacher_follows

    def follows():
        plain()
        if t.state.global_step % 3 == 0:
            for name, p in t.model.named_parameters():
                expected[name] = torch.lerp(expected[name], p.detach(), rate)
        seen.append(bitwise_equal(expected, weights(t.teacher.module)))

    t.teacher_follows = follows
    train(t)
    assert seen == [True] * 7
    assert not bitwise_equal(expected, weights(t.model))


def test_a_step_between_two_meetings_is_not_lost_on_resume(tmp_path):
    """Steps 1 and 2 move the student, step 3 has no teacher at all: the teacher follows then."""

    def early(prompts, completions, trainer_state, **kwargs):
        moved = trainer_state.global_step < 2
        return parity_reward(prompts, completions) if moved else [0.0] * len(prompts)

    options = dict(reward=early, teacher_sync_steps=3, save_strategy="steps", save_steps=2)
    whole = make(tmp_path / "whole", trainer_kit.dataset(), max_steps=3, **options)
    start = weights(whole.model)
    train(whole)
    train(make(tmp_path / "parts", trainer_kit.dataset(), max_steps=2, **options))
    resumed = make(tmp_path / "parts", trainer_kit.dataset(), max_steps=3, **options)
    train(resumed, resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert not bitwise_equal(start, weights(whole.teacher.module))
    assert bitwise_equal(weights(whole.teacher.module), weights(resumed.teacher.module))


def test_only_an_average_has_steps_to_follow(tmp_path):
    with pytest.raises(UserError, match="teacher_sync_steps is 2, but teacher='frozen' follows no student"):
        trainer_kit.config(tmp_path, teacher_sync_steps=2, teacher="frozen")
    with pytest.raises(UserError, match="teacher_sync_steps is 0; it must be at least 1"):
        trainer_kit.config(tmp_path, teacher_sync_steps=0)


def said(path, steps: int, reward, **options) -> list[str]:
    t = make(path, trainer_kit.dataset(), reward=reward, max_steps=steps, num_train_epochs=9, **options)
    texts: list[str] = []
    t.host.say = texts.append
    train(t)
    return texts


def test_steps_without_signal_are_said(tmp_path):
    texts = said(tmp_path, 5, nobody)
    assert [t.split(":")[0] for t in texts] == ["at step 3, for 3 steps in a row"] * 2
    assert "all 16 rewards were 0, so no completion is better than another; look at the reward function" in texts[0]
    assert (
        "no completion had a teacher, so that nothing was learned (largest reward 0, success_threshold = 1)" in texts[1]
    )
    texts = said(tmp_path, 8, nobody, diagnostics_warning_interval=2)
    assert [t[8] for t in texts] == ["2", "2", "4", "4", "6", "6", "8", "8"]
    assert said(tmp_path, 5, nobody, diagnostics_warning_interval=0) == []
    assert len(said(tmp_path, 3, nobody, objective="grpo")) == 1  # no teacher is missed there


def test_a_step_with_signal_starts_the_count_anew(tmp_path):
    def now_and_then(prompts, completions, trainer_state, **kwargs):
        return parity_reward(prompts, completions) if trainer_state.global_step % 3 == 2 else [0.0] * len(prompts)

    assert said(tmp_path, 7, now_and_then) == [] and said(tmp_path, 4, parity_reward) == []


def test_nearly_equal_rewards_are_equal_by_the_tolerance(tmp_path):
    def nearly(prompts, completions, **kwargs):
        return [1.0 - 1e-6 * (i % 2) for i in range(len(prompts))]

    assert said(tmp_path, 3, nearly) == []
    assert len(said(tmp_path, 3, nearly, diagnostics_flat_tolerance=1e-5)) == 1


def test_a_step_without_a_teacher_logs_no_entropies(tmp_path):
    (log,) = train(make(tmp_path, trainer_kit.dataset(), reward=nobody))
    assert log["active_share"] == 0 and log["information"] == 0 and log["rho"] == 1
    assert {"student_entropy", "teacher_entropy", "divergence", "sampled_kl"} & log.keys() == set()
    (log,) = train(make(tmp_path, trainer_kit.dataset()))
    assert {"student_entropy", "teacher_entropy", "divergence", "sampled_kl"} <= log.keys()


# Environments ---------------------------------------------------------------------------------------------------------


class Room:
    """Scores by itself; what it says stands in the prompt."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1

    def reset(self, **kwargs) -> str:
        self.question = kwargs.get("index")
        return "w9 w8"

    def get_reward(self) -> float:
        return 1.0


class Broken(Room):
    def get_reward(self):
        return "much"


def environment(path, data, factory, reward=None, **options):
    options = {"objective": "grpo", "tokenizer": template("qwen3"), "rollout_func": None, "max_steps": 1} | options
    return make(path, data, reward=reward, environment_factory=factory, **options)


@pytest.mark.parametrize("data", ["prompts", "routes", "none"])
def test_environments_that_own_their_reward(tmp_path, data):
    rooms = {"a": Room, "b": Room}
    factory = rooms if data == "routes" else Room
    rows_of = {
        "prompts": list(trainer_kit.dataset()),
        "routes": [{"environment": "ab"[i % 2]} for i in range(8)],
        "none": None,
    }
    t = environment(tmp_path, rows_of[data], factory)
    train(t)
    assert t.last_rollout.rewards == [1.0] * 16
    assert t.last_rollout.prompts[0][-1]["content"].endswith("w9 w8")


def test_what_an_environment_returns_is_judged_as_a_reward(tmp_path):
    t = environment(tmp_path, list(trainer_kit.dataset()), Broken)
    with pytest.raises(UserError, match="reward function 'get_reward' returned 'much' for sample 0 at step 1"):
        train(t)


def test_a_route_that_is_missing(tmp_path):
    says = "environment_factory is a dict, but train_dataset has no column 'environment' .*: a, b"
    with pytest.raises(UserError, match=says):
        environment(tmp_path, rows(), {"a": Room, "b": Room})
    with pytest.raises(UserError, match="environment_factory is not supported with self-distillation"):
        environment(tmp_path, rows(), Room, objective="pgpo")


# Functions, and fields that are set late ------------------------------------------------------------------------------


def without_kwargs(prompts, completions):
    return [1.0] * len(prompts)


def of_a_column(completions, answer, **kwargs):
    return [float(bool(a)) for a in answer]


def of_the_prompt(prompt, **kwargs):
    return [1.0]


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
@pytest.mark.parametrize(
    ("reward", "options", "says"),
    [
        ({"grade": parity_reward}, {}, "reward_funcs holds {'grade': .*; pass a function, a reward model or its name"),
        ([parity_reward, None], {}, "reward_funcs holds None"),
        (parity_reward, dict(feedback_funcs="hint"), "feedback_funcs holds 'hint'; pass a function"),
        (
            parity_reward,
            dict(feedback_funcs=without_kwargs),
            "feedback function 'without_kwargs' takes no 'completion_",
        ),
        (without_kwargs, {}, "'without_kwargs' takes no 'completion_ids', .* add \\*\\*kwargs"),
        (of_a_column, {}, "needs 'answer', which it does not get from train_dataset .* the columns: index"),
        (of_the_prompt, {}, "needs 'prompt', .* add the column, or a default"),
        (parity_reward, dict(reward_weights=[1.0, 2.0]), "reward_weights has 2 numbers for 1 reward functions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_functions_that_cannot_be_called_are_found_at_construction(tmp_path, objective, reward, options, says):
    """Red if the first step, or the first evaluation, is what finds them."""
    options = {"objective": objective, "rollout_func": None} | options
    refuses(tmp_path, says, trainer_kit.dataset(), reward=reward, **options)


def test_columns_are_asked_of_every_dataset_and_no_more_than_known(tmp_path):
    data = trainer_kit.dataset()
    answered = data.add_column("answer", ["w1"] * len(data))
    make(tmp_path, answered, reward=of_a_column, rollout_func=None)
    make(tmp_path, data, reward=of_a_column)  # a rollout function may bring the column
    make(tmp_path, stream(list(data)), reward=of_a_column, rollout_func=None)  # a later row may have it
    says = "needs 'answer', which it does not get from eval_dataset"
    refuses(tmp_path, says, answered, reward=of_a_column, rollout_func=None, eval_dataset=data)
    says = "leave remove_unused_columns False"
    refuses(tmp_path, says, answered, reward=of_a_column, rollout_func=None, remove_unused_columns=True)


def test_a_tuple_of_functions_is_a_list_of_them(tmp_path):
    told = make(tmp_path, trainer_kit.dataset(), reward=(parity_reward,), feedback_funcs=(lambda **k: [None] * 16,))
    train(told)
    assert told.reward_func_names == ["parity_reward"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("num_generations", 7, "num_generations was set to 7 on a finished configuration, .* computed with 4"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps was set to 2 on a finished configuration"),
        ("per_device_train_batch_size", 8, "per_device_train_batch_size was set to 8"),
        ("objective", "spdo", "objective is 'spdo'; choose one of"),
        ("beta", 0.1, "beta is 0.1, which self-distillation does not have"),
        ("learning_rate", -1.0, "learning_rate is -1.0"),
    ],
)
def test_fields_set_on_a_finished_configuration_are_judged(tmp_path, name, value, says):
    """Red if accumulation splits a step behind the trainer's back, or if a field that does nothing is taken."""
    args = trainer_kit.config(tmp_path)
    args.check_again()
    setattr(args, name, value)
    with pytest.raises(UserError, match=says):
        PGPOTrainer(build_model(), parity_reward, args, trainer_kit.dataset(), processing_class=build_tokenizer())


def test_prediction_has_no_loss_under_self_distillation(tmp_path):
    with pytest.raises(UserError, match="call evaluate"):
        make(tmp_path, trainer_kit.dataset()).predict(trainer_kit.dataset())
