"""Held-out evaluation sees what training sees, says early what cannot work, and counts the reward that decides."""

from __future__ import annotations

import asyncio
import functools
import math

import pytest
import torch
import trainer_kit
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from pgpo.errors import UserError
from pgpo.tasks.graders import Grade
from pgpo.train.seam.rollouts import HeldOutSampler

GREEDY = dict(top_k=1, eval_temperature=0.0, max_completion_length=8)
STOPS = [1, 42, 49]
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "reasoning_content": {"open": "w1 ", "close_pattern": "feedback:", "content": "text"},
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}


def make(path, reward, data=None, **options):
    """A trainer that samples by itself, and is evaluated on what it is trained on."""
    data = trainer_kit.dataset(4) if data is None else data
    return trainer_kit.trainer(path, reward=reward, rollout=None, data=data, **({"eval_dataset": data} | options))


def seen_in_both(path, **options):
    """{prompt: (completion, ids)} that a reward function gets in evaluation, and in the first training step."""
    seen = {"eval": {}, "train": {}}
    mode = ["eval"]

    def reward(prompts, completions, completion_ids, **columns):
        assert "id" not in columns and "domain" not in columns
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
            seen[mode[0]][str(prompt)] = (completion, ids)
        return [float(len(ids) % 2) for ids in completion_ids]

    t = make(path, reward, **(GREEDY | options))
    t.evaluate()
    mode[0] = "train"
    trainer_kit.train(t)
    return seen["eval"], seen["train"]


def template_with_option():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% if loud %}w5 w5 {% endif %}" + CHAT_TEMPLATE
    return tokenizer


def with_response_template():
    tokenizer = build_tokenizer()
    tokenizer.response_template = RESPONSE
    return tokenizer


def without_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def own_stops(key="eos_token_id", value=STOPS):
    model = build_model()
    setattr(model.generation_config, key, value)
    return model


def texts():
    return Dataset.from_list([{"prompt": f"w{i} w7 w{3 * i}"} for i in range(1, 5)])


def conversations():
    turns = ("user", "assistant", "user")
    return Dataset.from_list(
        [{"prompt": [{"role": r, "content": f"w{i} w{i + k}"} for k, r in enumerate(turns)]} for i in range(4)]
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What reward functions see in evaluation without any option, by objective."""
    return functools.cache(lambda objective: seen_in_both(tmp_path_factory.mktemp("plain"), objective=objective)[0])


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name)
        for name, options in {
            "plain": {},
            "stops": dict(generation_kwargs=dict(eos_token_id=STOPS)),
            "stops of the model": dict(model=lambda: own_stops()),
            "suppressed by the model": dict(model=lambda: own_stops("suppress_tokens", list(range(25)))),
            "suppressed": dict(generation_kwargs=dict(suppress_tokens=list(range(20, 40)))),
            "bad words": dict(generation_kwargs=dict(bad_words_ids=[[i] for i in range(13, 40)])),
            "bias": dict(generation_kwargs=dict(sequence_bias=[[[i], -50.0] for i in range(13, 40)])),
            "shorter": dict(generation_kwargs=dict(max_new_tokens=3)),
            "forced end": dict(generation_kwargs=dict(forced_eos_token_id=1)),
            "no repetition": dict(generation_kwargs=dict(no_repeat_ngram_size=1)),
            "parsed": dict(tokenizer=with_response_template),
            "template option": dict(tokenizer=template_with_option, chat_template_kwargs=dict(loud=True)),
            "text": dict(tokenizer=without_template, data=texts),
            "conversation": dict(data=conversations),
        }.items()
    ],
)
def test_a_reward_function_sees_in_evaluation_what_it_sees_in_training(tmp_path, plain, options, objective):
    """Red if stops, forbidden words or limits hold in one only, or if ids or prompts are made anew from texts."""
    options = {k: v() if callable(v) else v for k, v in options.items()}
    held_out, trained = seen_in_both(tmp_path, objective=objective, **options)
    assert len(held_out) == 4
    if objective == "grpo" and "eos_token_id" in options.get("generation_kwargs", {}):
        # TRL itself leaves what fills a row up behind such a stop
        trained = {p: (c, ids[: ids.index(0)] if 0 in ids else ids) for p, (c, ids) in trained.items()}
    assert held_out == trained
    if options:
        without = [ids for _, ids in plain(objective).values()]
        assert [ids for _, ids in held_out.values()] != without or "tokenizer" in options
    if getattr(options.get("tokenizer"), "response_template", None):
        assert any("reasoning_content" in completion[0] for completion, _ in held_out.values())


def test_sampled_ids_end_in_eos_where_it_was_sampled(tmp_path):
    ids_seen = []

    def reward(completions, completion_ids, **kwargs):
        ids_seen.extend(completion_ids)
        return [0.0] * len(completions)

    options = dict(generation_kwargs=dict(suppress_tokens=list(range(8, 49))), eval_temperature=2.0, eval_top_p=1.0)
    t = make(tmp_path, reward, eval_k=16, **options)
    metrics = t.evaluate()
    share = sum(ids[-1] == 1 for ids in ids_seen) / len(ids_seen)
    assert len(ids_seen) == 64 and share > 0.2
    assert all(1 not in ids[:-1] for ids in ids_seen)
    assert metrics["eval_completions/mean_length"] == pytest.approx(sum(map(len, ids_seen)) / 64)
    assert metrics["eval_completions/clipped_ratio"] == pytest.approx(
        sum(ids[-1] not in (0, 1) for ids in ids_seen) / 64
    )


def test_sampling_parameters_of_training_do_not_leak(tmp_path):
    options = dict(top_k=1, min_p=0.9, repetition_penalty=5.0, generation_kwargs=dict(top_p=0.01, num_beams=1))
    hot = dict(eval_temperature=2.0, eval_top_p=1.0, eval_k=8)
    t, plain = (make(tmp_path, trainer_kit.parity_reward, **hot, **o) for o in (options, {}))
    rows = trainer_kit.dataset(4)
    assert t.held_out_records(rows) == plain.held_out_records(rows)


def byte_tokenizer():
    vocabulary = {"<pad>": 0, "<eos>": 1}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_stop_strings_end_completions_in_training_and_evaluation(tmp_path):
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    config = build_model().config
    config.vocab_size, config.tie_word_embeddings = len(tokenizer), False
    model = type(build_model())(config)
    other = [i for token, i in tokenizer.get_vocab().items() if token not in "abcd"]
    generation = dict(stop_strings=["a", "bc"], suppress_tokens=other)
    held_out, trained = seen_in_both(
        tmp_path, tokenizer=tokenizer, model=model, generation_kwargs=generation, data=trainer_kit.dataset(4)
    )
    assert held_out == trained
    answers = [completion[0]["content"] for completion, _ in held_out.values()]
    assert all(len(a) == 8 or a.endswith(("a", "bc")) for a in answers) and any(len(a) < 8 for a in answers)
    assert not any("a" in a[:-1] or "bc" in a[:-1] for a in answers)
    assert all(0 not in ids for _, ids in held_out.values())


class Engine:
    """As TRL's vLLM engine: what a call finds set is kept."""

    temperature, top_p, top_k, min_p, repetition_penalty = 1.0, 1.0, 7, 0.1, 1.3

    def __init__(self, generation_kwargs):
        self.generation_kwargs = generation_kwargs
        self.synced, self.calls = 0, []

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs")
        self.calls.append({name: getattr(self, name) for name in names} | {"number": num_generations})
        ids = [[13 + len(prompt) % 3, 14, 1] for prompt in prompts]
        return prompts, ids, [[[0.0]] * 3] * len(prompts), None


def test_vllm_keeps_stops_and_drops_the_sampling_of_training(tmp_path):
    given = dict(stop=["w5"], bad_words=["w6"], stop_token_ids=[9], max_tokens=5, temperature=0.1, seed=3, top_k=2)
    seen = []

    def reward(completions, completion_ids, **kwargs):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [1.0] * len(completions)

    t = make(tmp_path, reward, eval_k=2)
    t.args.generation_kwargs, t.use_vllm, t._last_loaded_step = given, True, -1
    t.vllm_generation = engine = Engine(given)
    t.evaluate()
    (call,) = engine.calls
    shared = dict(stop=["w5"], bad_words=["w6"], stop_token_ids=[9], max_tokens=5)
    assert call == dict(
        temperature=0.6, top_p=0.95, top_k=0, min_p=None, repetition_penalty=1.0, generation_kwargs=shared, number=2
    )
    assert engine.synced == 1 and engine.temperature == 1.0 and engine.top_k == 7 and engine.generation_kwargs is given
    assert len(seen) == 8 and all(ids[-1] == 1 and c[0]["content"].endswith("w1") for c, ids in seen)


# Rewards --------------------------------------------------------------------------------------------------------------


def accuracy(prompts, completions, **kwargs):
    return [float(i % 4 == 1) for i in range(len(prompts))]


def form(prompts, completions, **kwargs):
    return [1.0] * len(prompts)


def test_rewards_are_logged_under_the_names_of_trl(tmp_path):
    t = make(
        tmp_path,
        [accuracy, form],
        success_reward="accuracy",
        reward_weights=[1.0, 0.5],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_reward",
        load_best_model_at_end=True,
    )
    trainer_kit.train(t)
    (logged,) = [r for r in t.state.log_history if "eval_reward" in r]
    assert logged["eval_reward"] == pytest.approx(0.25 + 0.5) and t.state.best_metric == pytest.approx(0.75)
    assert logged["eval_rewards/accuracy/mean"] == 0.25 and logged["eval_rewards/form/mean"] == 1.0
    assert logged["eval_avg_at_k"] == 0.25 and logged["eval_pass_at_k"] == 1.0
    assert not [name for name in logged if "maj_at_k" in name or "well_formed" in name]
    assert {(r["answer"], r["well_formed"]) for r in t.last_records} == {(None, None)}


def test_async_rewards_and_reward_models_grade_held_out_completions(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=51)
    judge = LlamaForSequenceClassification(LlamaConfig(num_labels=1, pad_token_id=0, **shape)).eval()
    judge.config._name_or_path = "somebody/judge"

    async def later(completions, **kwargs):
        await asyncio.sleep(0)
        return [0.5] * len(completions)

    t = make(tmp_path, [judge, later], success_reward="later", reward_processing_classes=[tokenizer, None], **GREEDY)
    metrics = t.evaluate()
    assert metrics["eval_rewards/later/mean"] == 0.5 == metrics["eval_avg_at_k"]
    rows, expected = trainer_kit.dataset(4), []
    for record in t.last_records:
        chat = [*rows[int(record["question_id"])]["prompt"], {"role": "assistant", "content": record["completion"]}]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt")
        expected.append(judge(**{k: ids[k] for k in ("input_ids", "attention_mask")}).logits.item())
    assert metrics["eval_rewards/judge/mean"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_what_rewards_log_in_evaluation_stays_out_of_training(tmp_path):
    def reward(completions, log_metric, log_extra, trainer_state, **kwargs):
        log_metric("twice", 2.0 if trainer_state.global_step else 4.0)
        log_extra("text", ["x"] * len(completions))
        return [float(i % 2) for i in range(len(completions))]

    t = make(tmp_path, reward, eval_strategy="steps", eval_steps=1, max_steps=2, eval_batch_size=4)
    trainer_kit.train(t)
    steps = [r for r in t.state.log_history if "grad_norm" in r]
    evaluations = [r for r in t.state.log_history if "eval_reward" in r]
    assert [r["twice"] for r in steps] == [4.0, 2.0]
    assert [r["eval_twice"] for r in evaluations] == [2.0, 2.0]
    assert len(t._logs["extra"]["text"]) == len(t._logs["prompt"])


@pytest.mark.parametrize("objective", ["pgpo", "sdpo", "grpo"])
def test_training_is_the_same_with_and_without_evaluation_by_rewards(tmp_path, objective):
    options = dict(max_steps=2, objective=objective, temperature=1.5)
    trained = []
    for more in ({}, dict(eval_strategy="steps", eval_steps=1)):
        trained.append(make(tmp_path, trainer_kit.parity_reward, data=trainer_kit.dataset(8), **options, **more))
        trainer_kit.train(trained[-1])
    plain, t = trained
    assert trainer_kit.bitwise_equal(trainer_kit.weights(plain.model), trainer_kit.weights(t.model))
    assert plain.state.num_input_tokens_seen == t.state.num_input_tokens_seen


# Which reward decides -------------------------------------------------------------------------------------------------


def train_with(path, rewards, names, **options):
    """Train one step where function j rewards sample i with rewards[j][i]; the trainer and its step's log."""

    def function(values, name):
        def reward(prompts, **kwargs):
            return [values[i % len(values)] for i in range(len(prompts))]

        reward.__name__ = name
        return reward

    said = []
    t = trainer_kit.trainer(path, reward=[function(v, n) for v, n in zip(rewards, names, strict=True)], **options)
    t.host.say = said.append
    (log,) = trainer_kit.train(t)
    return t, log, said


@pytest.mark.parametrize("objective", ["pgpo", "sdpo"])
def test_the_named_reward_alone_decides(tmp_path, objective):
    """A format reward makes no wrong answer right, and a small penalty no right one wrong."""
    values = [[0.0, 1.0, 0.0, None], [1.0, -0.01, 0.0, 1.0]]
    t, log, said = train_with(tmp_path, values, ["accuracy", "form"], success_reward="accuracy", objective=objective)
    assert log["success_share"] == 0.25
    assert log["active_share"] == 0.75  # the right one has no right sibling
    success = t.last_rollout.success
    assert success[:3] == [0.0, 1.0, 0.0] and math.isnan(success[3])
    assert t.last_rollout.rewards[:3] == pytest.approx([1.0, 0.99, 0.0])
    assert said == []


@pytest.mark.parametrize(("rule", "share"), [("sum", 0.75), ("all", 0.25)])
def test_rules_over_several_rewards(tmp_path, rule, share):
    values = [[0.0, 1.0, 0.5, 1.0], [1.0, 1.0, 0.0, 0.0]]
    _, log, _ = train_with(tmp_path, values, ["accuracy", "form"], success_reward=rule)
    assert log["success_share"] == share


def test_the_reward_counts_without_its_weight(tmp_path):
    _, log, _ = train_with(tmp_path, [[1.0, 0.0, 0.0, 0.0]], ["accuracy"], reward_weights=[0.5])
    assert log["success_share"] == 0.25


def test_grpo_needs_no_decision_and_then_logs_none(tmp_path):
    values = [[0.0, 1.0, 0.5, 1.0], [1.0, 1.0, 0.0, 0.0]]
    t, log, _ = train_with(tmp_path, values, ["accuracy", "form"], objective="grpo")
    assert "success_share" not in log
    metrics = t.evaluate(trainer_kit.dataset(2))
    assert metrics["eval_avg_at_k"] == pytest.approx(metrics["eval_reward"]) and "eval_pass_at_k" not in metrics
    _, log, _ = train_with(tmp_path, values, ["accuracy", "form"], objective="grpo", success_reward="form")
    assert log["success_share"] == 0.5


@pytest.mark.parametrize(
    ("names", "success_reward", "message"),
    [
        (["accuracy", "form"], None, r"2 reward functions \(accuracy, form\).*set success_reward to the name"),
        (["accuracy", "form"], "acuracy", "success_reward is 'acuracy', but the reward functions are accuracy, form"),
        (["same", "same"], "same", "the name of 2 reward functions"),
    ],
)
def test_several_rewards_are_refused_until_one_decides(tmp_path, names, success_reward, message):
    with pytest.raises(UserError, match=message):
        train_with(tmp_path, [[1.0], [0.0]], names, success_reward=success_reward)


def test_rewards_in_percent_are_pointed_out_once(tmp_path):
    values = [[40.0, 100.0, 0.0, 10.0]]
    _, log, said = train_with(tmp_path, values, ["accuracy"], prompts_per_step=4)
    assert log["success_share"] == 0.75
    assert [text for text in said if "gave 40, outside [0, 1]" in text] == said and len(said) == 1
    _, log, said = train_with(tmp_path, values, ["accuracy"], success_threshold=100.0)
    assert log["success_share"] == 0.25 and said == []
    _, _, said = train_with(tmp_path, values, ["accuracy"], objective="grpo")
    assert said == []


def test_evaluation_counts_the_deciding_reward_from_the_same_threshold(tmp_path):
    def half(prompts, completions, **kwargs):
        return [0.5 * (i % 4 == 0) for i in range(len(prompts))]

    t = make(tmp_path, [half, form], success_reward="half", success_threshold=0.5)
    metrics = t.evaluate()
    assert metrics["eval_avg_at_k"] == 0.125 and metrics["eval_pass_at_k"] == 1.0
    assert metrics["eval_reward"] == pytest.approx(1.125)


# Said at construction -------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "w1"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "eval_dataset is empty"),
        ([{"question": CHAT}], "row 0 of eval_dataset has no 'prompt'"),
        ([{"prompt": CHAT}, {"prompt": "w1"}], "row 1 of eval_dataset mixes text and chat messages"),
        ([{"prompt": CHAT, "id": "a"}] * 2, "2 rows have the id 'a'"),
        ([{"prompt": CHAT, "id": 1}, {"prompt": CHAT, "id": "1"}], "2 rows have the id '1'"),
        ([{"prompt": CHAT, "id": "a"}, {"prompt": CHAT, "id": None}], "row 1 of eval_dataset has no id"),
        ([{"prompt": CHAT, "id": "a"}, {"prompt": CHAT}], "row 1 of eval_dataset has no id"),
        (
            [{"prompt": [{"role": "user", "content": "w1 " * 90}]}],
            "a prompt with 92 tokens, more than max_prompt_length = 80",
        ),
        ({"hard": [{"prompt": CHAT}], "easy": []}, r"eval_dataset\['easy'\] is empty"),
        ({"hard": [{"prompt": CHAT}, {"prompt": None}]}, r"row 1 of eval_dataset\['hard'\] has the prompt None"),
        (iter([{"prompt": CHAT}]), "can be read only once"),
        ("some/name", "eval_dataset is 'some/name'; give a dataset"),
    ],
)
@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
def test_rows_that_cannot_be_evaluated_are_named_at_construction(tmp_path, rows, message, objective):
    with pytest.raises(UserError, match=message):
        make(tmp_path, accuracy, eval_dataset=rows, max_prompt_length=80, objective=objective)


def test_messages_without_a_chat_template_are_named_at_construction(tmp_path):
    with pytest.raises(
        UserError, match="row 0 of eval_dataset has chat messages as its prompt, but the tokenizer has no chat"
    ):
        make(tmp_path, accuracy, data=texts(), eval_dataset=[{"prompt": CHAT}], tokenizer=without_template())


EVERY = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "metric_for_best_model is 'loss', which no evaluation gives; set it to eval_avg_at_k"),
        (dict(metric_for_best_model="eval_accuracy"), "metric_for_best_model is 'eval_accuracy'"),
        (dict(metric_for_best_model="eval_maj_at_k"), "'eval_maj_at_k', which no evaluation gives"),
        (dict(metric_for_best_model="rewards/form/mean"), "no evaluation gives.*eval_rewards/accuracy/mean"),
        (dict(metric_for_best_model="rewards/accuracy/mean", grade=lambda *_: None), "no evaluation gives"),
        (dict(grade=0.5), "grade is 0.5; pass a plain function"),
    ],
)
def test_a_metric_or_grader_that_cannot_be_is_named_at_construction(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, accuracy_alone, **(EVERY | options))


def accuracy_alone(prompts, completions, **kwargs):  # names no log_metric
    return [0.0] * len(prompts)


accuracy_alone.__name__ = "accuracy"


def test_metrics_that_will_be_are_taken(tmp_path):
    def logs(prompts, log_metric, **kwargs):
        return [0.0] * len(prompts)

    grade = lambda text, row: Grade(0.0, "B", True, None)  # noqa: E731
    rows = [{"prompt": CHAT}]
    for options in (
        dict(metric_for_best_model="avg_at_k"),
        dict(metric_for_best_model="eval_reward"),
        dict(metric_for_best_model="eval_rewards/accuracy/mean"),
        dict(metric_for_best_model="eval_maj_at_k", grade=grade),
        dict(metric_for_best_model="eval_hard_avg_at_k", eval_dataset={"hard": rows, "easy": rows}),
        dict(metric_for_best_model="eval_own", reward=logs),
    ):
        make(tmp_path, **({"reward": accuracy_alone} | EVERY | options))


def test_a_metric_that_cannot_be_stops_before_the_first_step(tmp_path):
    t = make(tmp_path, accuracy_alone, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_loss")
    with pytest.raises(UserError, match="metric_for_best_model is 'eval_loss'"):
        trainer_kit.train(t)
    assert t.state.global_step == 0


def test_evaluation_without_a_dataset_is_refused_at_construction(tmp_path):
    with pytest.raises(UserError, match="eval_strategy is 'steps', but there is no eval_dataset"):
        trainer_kit.trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    with pytest.raises(UserError, match="eval_on_start is True, but there is no eval_dataset"):
        trainer_kit.trainer(tmp_path, eval_on_start=True)


def test_streams_and_several_datasets_are_evaluated(tmp_path):
    rows = [dict(r) for r in trainer_kit.dataset(3)]
    t = make(
        tmp_path, accuracy, eval_dataset={"all": IterableDataset.from_generator(lambda: iter(rows)), "one": rows[:1]}
    )
    metrics = t.evaluate()
    assert metrics["eval_all_questions"] == 3 and metrics["eval_one_questions"] == 1
    assert t.evaluate("one") == {k.replace("eval_one_", "eval_"): v for k, v in metrics.items() if "_one_" in k}


# Graders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grade", "message"),
    [
        (lambda text, row: 1.0, "grade returned 1.0 for question '0'; it must return a pgpo.tasks.graders.Grade"),
        (lambda text, row: None, "grade returned None for question '0'"),
        (lambda text, row: Grade("right", None, True, None), "with a number as its reward"),
        (lambda text, row: Grade(math.nan, None, True, None), "a reward must be finite"),
        (lambda text, row: 1 / 0, "grade raised ZeroDivisionError for question '0'"),
    ],
)
def test_a_grader_that_fails_is_named(tmp_path, grade, message):
    t = make(tmp_path, accuracy, grade=grade)
    with pytest.raises(UserError, match=message):
        t.evaluate()
    assert t._held_out is None and t.model.training


@pytest.mark.parametrize(
    ("answer", "well_formed", "present"),
    [
        ("B", True, {"maj", "well"}),
        (None, True, {"well"}),  # well-formed, yet no answer: the grader extracts none
        (None, False, {"maj", "well"}),  # no completion has one
        (None, None, set()),
    ],
)
def test_measures_that_a_grader_does_not_carry_are_left_out(tmp_path, answer, well_formed, present):
    t = make(tmp_path, accuracy, grade=lambda text, row: Grade(1.0, answer, well_formed, None))
    metrics = t.evaluate()
    found = {name for name in ("maj", "well") if any(k.startswith(f"eval_{name}_") for k in metrics)}
    assert found == present and metrics["eval_reward"] == metrics["eval_avg_at_k"] == 1.0


def test_a_reward_that_fails_in_an_evaluation_is_placed_there(tmp_path):
    t = make(tmp_path, lambda **kwargs: 1 / 0)
    with pytest.raises(UserError, match="in the evaluation after step 0 on the batch"):
        t.evaluate()


def test_tools_are_called_in_evaluation(tmp_path):
    """Red if the prompt does not list the tools, or if a call is not answered."""
    from trl.chat_template_utils import qwen3_template, qwen3_training_chat_template

    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first.
            b: the second.
        """
        return a + b

    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = qwen3_training_chat_template, qwen3_template
    model = build_model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.max_position_embeddings = 4096  # TRL drops a conversation that is longer
    turns, prompts_seen, answers = [], [], []
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 19, "b": 23}}\n</tool_call><|im_end|>'

    def sample(prompts, number):
        turns.append((len(prompts), number))
        prompts_seen.append(tokenizer.decode(prompts[0]))
        text = call if len(turns) == 1 else "It is 42.<|im_end|>"
        return [[*tokenizer(text)["input_ids"], 1] for _ in prompts]

    def reward(prompts, completions, **kwargs):
        answers.extend(completions)
        return [float(c[1]["content"] == "42") for c in completions]

    options = dict(objective="grpo", tools=[add], eval_k=2, max_completion_length=600, max_prompt_length=None)
    t = make(tmp_path, reward, tokenizer=tokenizer, model=model, **options)
    t.held_out_sampler = lambda repeats, seed, places: HeldOutSampler(sample, repeats)
    metrics = t.evaluate()
    assert turns == [(8, 2), (8, 1)] and metrics["eval_avg_at_k"] == 1.0
    assert '"name": "add"' in prompts_seen[0] and "42" in prompts_seen[1]
    assert [message["role"] for message in answers[0]] == ["assistant", "tool", "assistant"]
