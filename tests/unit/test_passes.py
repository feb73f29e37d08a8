"""Hidden-state passes against one plain forward per row; the trainer's fast paths against its slow ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import SHAPE, WORDS, build_model
from torch import nn
from trainer_kit import Spy, largest_difference, train, trainer, weights

from pgpo import UserError
from pgpo.forward import passes as passes_module
from pgpo.forward.batching import Limits
from pgpo.forward.layout import joined, packed, padded
from pgpo.forward.open_model import head_error, head_problem, joins, open_forward
from pgpo.forward.passes import Passes, States, combined
from pgpo.teacher import Teacher

CPU = torch.device("cpu")
PROMPTS = [[2, 10, 11, 3], [2, 12, 3], [2, 10, 11, 3], [2, 13, 14, 15, 16, 17, 3], [2, 10, 11, 3], [2, 12, 3]]
COMPLETIONS = [[20, 21, 22, 1], [23], [24, 1], [25, 26, 27, 28, 29, 1], [30], [31, 32, 1]]


def row_by_row(model, prompts=PROMPTS, completions=COMPLETIONS):
    """[N, V], no padding anywhere."""
    parts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        out = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
        parts.append(out[0, len(prompt) - 1 : -1])
    return torch.cat(parts)


def passes(model, **options):
    open_forward(model)
    return Passes(model, 0, CPU, **options)


def small(kind: str, **options):
    """A tiny model of another family, with weights large enough that logits differ."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | options))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_hidden_states_predict_what_each_row_alone_predicts(kind, pack):
    model = build_model(kind=kind).eval()
    expected = row_by_row(model).detach()
    got = passes(model, pack=pack).forward(model, PROMPTS, COMPLETIONS, lambda hidden, head: head.logits(hidden))
    torch.testing.assert_close(got.detach(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("pack", [False, True])
def test_flex_attention_keeps_packed_rows_apart(pack):
    """Values alone: on a CPU it has no backward."""
    model = build_model().eval()
    expected = row_by_row(model).detach()
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        got = passes(model, pack=pack).forward(model, PROMPTS, COMPLETIONS, lambda hidden, head: head.logits(hidden))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_the_head_is_used_inside_its_own_modules_forward_and_left_as_it_was():
    """Where FSDP's hooks, on the head module, have gathered its weight."""
    model = build_model().eval()
    calls = []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append("after"))
    passes(model).forward(model, PROMPTS, COMPLETIONS, lambda hidden, head: calls.append("finish"))
    assert calls == ["before", "finish", "after"]
    with pytest.raises(ZeroDivisionError):
        passes(model).forward(model, PROMPTS, COMPLETIONS, lambda hidden, head: 1 / 0)
    assert "forward" not in vars(model.lm_head)


def test_whole_logits_are_handed_over_without_a_head():
    model = build_model().eval()
    own = Passes(model, 0, CPU, whole_logits=True)
    seen = []
    got = own.forward(model, PROMPTS, COMPLETIONS, lambda logits, head: seen.append(head) or logits)
    torch.testing.assert_close(got, row_by_row(model), atol=2e-5, rtol=0)
    assert seen == [None]


def test_layouts_by_hand():
    inputs = padded([[5, 6, 7], [8]], [[1, 2], [3, 4, 9]], pad=0)
    assert inputs.ids.tolist() == [[5, 6, 7, 1], [8, 3, 4, 0]]
    assert inputs.mask is None
    assert inputs.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert inputs.keep.tolist() == [2, 3, 4, 5, 6]
    row = packed([[5, 6, 7], [8]], [[1, 2], [3, 4, 9]])
    assert row.ids.tolist() == [[5, 6, 7, 1, 8, 3, 4]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert row.keep.tolist() == [2, 3, 4, 5, 6] and row.mask is None


def test_joined_rows_by_hand():
    inputs = joined([[5, 6], [5, 6], [8]], [[1, 2, 3], [4, 9], [7]], [2, 1], pad=0)
    assert inputs.ids.tolist() == [[5, 6, 1, 2, 4], [8, 0, 0, 0, 0]]
    assert inputs.positions.tolist() == [[0, 1, 2, 3, 2], [0, 0, 0, 0, 0]]
    assert inputs.keep.tolist() == [1, 2, 3, 1, 4, 5]
    assert inputs.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # not the sibling before it
    ]
    assert inputs.mask[1, 0].any(-1).all()  # padding too looks somewhere


BY_PROMPT, COUNTS = [0, 2, 4, 1, 5, 3], [3, 2, 1]  # rows of PROMPTS with equal prompts, and how many


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_joined_siblings_have_the_states_and_gradients_of_rows_alone(kind, attention, checkpointing):
    prompts, completions = ([rows[i] for i in BY_PROMPT] for rows in (PROMPTS, COMPLETIONS))
    model = build_model(kind=kind)
    model.set_attn_implementation(attention)
    expected = row_by_row(model, prompts, completions)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    own = passes(model)
    assert joins(model)
    got = own.forward(model, prompts, completions, lambda hidden, head: head.logits(hidden), COUNTS)
    torch.testing.assert_close(got.detach(), expected.detach(), atol=2e-5, rtol=0)
    got.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5 * float(gradients[name].abs().max()), rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("Mistral", dict(sliding_window=4), False),
        ("Mistral", dict(sliding_window=None), True),
        ("Gemma2", dict(sliding_window=4), False),
        ("Qwen2", dict(), True),
        ("Qwen2", dict(attn_implementation="flex_attention"), False),
    ],
)
def test_siblings_are_joined_where_a_mask_says_who_sees_whom(kind, options, expected):
    assert joins(small(kind, **options)) is expected


def test_attention_that_heeds_no_mask_is_noticed():
    model = build_model().eval()
    own = passes(model)
    assert own.join_error(model, len(WORDS)) < 1e-5
    plain = model.forward
    model.forward = lambda *args, attention_mask=None, **kwargs: plain(*args, **kwargs)
    assert own.join_error(model, len(WORDS)) > 0.02


def test_an_open_forward_changes_nothing_without_finish():
    model = build_model().eval()
    ids = torch.tensor([PROMPTS[0]])
    before = model(input_ids=ids).logits
    open_forward(model)
    open_forward(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Gemma2", dict(final_logit_softcapping=3.0)),
        ("Granite", dict(logits_scaling=4.0)),
        ("Cohere", dict(logit_scale=0.25)),
        ("Llama", dict(tie_word_embeddings=False)),
    ],
)
def test_heads_with_a_scale_or_a_cap(kind, options):
    model = small(kind, **options)
    assert head_problem(model) is None
    open_forward(model)
    assert head_error(model, torch.tensor([PROMPTS[3]])) < 1e-5


def test_another_formula_is_noticed():
    model = build_model().eval()
    plain = model.forward

    def doubled(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled
    open_forward(model)
    assert head_error(model, torch.tensor([PROMPTS[3]])) > 0.3


def test_a_head_with_lora_is_refused():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert head_problem(adapted) is None
    untied = small("Llama", tie_word_embeddings=False)
    adapted = get_peft_model(untied, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert "LoRA" in head_problem(adapted)
    assert "not a transformers model" in head_problem(nn.Linear(2, 2))


# The teacher ------------------------------------------------------------------------------------------


AT_ONCE, IN_TWOS = Limits(), Limits(most=2)
JOINING = Limits(forward_cost=1.0)  # where attention is for nothing, the shortest rows are those that share a prompt


@pytest.mark.parametrize("limits", [None, AT_ONCE, IN_TWOS, JOINING, replace(JOINING, most=2)], ids=str)
@pytest.mark.parametrize("kind", ["ema", "live", "frozen", "trust_region"])
def test_shared_prompts_give_the_logits_of_each_row_alone(kind, limits):
    student = build_model()
    teacher = Teacher(student, kind, 0.25)
    own = passes(student)
    if teacher.module is not None:
        open_forward(teacher.module)
    with torch.no_grad():
        for p in student.parameters():  # so that teacher and student differ
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    expected = teacher.logits(row_by_row)
    states = own.teacher(teacher, PROMPTS, COMPLETIONS, limits, join=limits is not None and limits.forward_cost == 1.0)
    torch.testing.assert_close(states.head.logits(states.hidden), expected, atol=2e-5, rtol=0)
    assert not states.hidden.requires_grad


def counted(model):
    tokens = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return tokens


def test_a_shared_prompt_is_run_once():
    student = build_model()
    teacher, own = Teacher(student, "frozen"), passes(student)
    open_forward(teacher.module)
    tokens = counted(teacher.module)
    prompt = list(range(2, 30))
    own.teacher(teacher, [prompt] * 8, [[7, 8, 9]] * 8, AT_ONCE)
    assert tokens == [30, 14]  # the prompt with one completion, then two tokens of the seven others
    tokens.clear()
    own.teacher(teacher, [prompt] * 8, [[7, 8, 9]] * 8)
    assert tokens == [8 * 30]


def test_siblings_are_joined_where_that_is_cheaper_than_a_cache():
    """One run of 8 + 3 * 2 tokens against two; where attention costs, two."""
    student = build_model()
    teacher, own = Teacher(student, "frozen"), passes(student)
    open_forward(teacher.module)
    tokens = counted(teacher.module)
    rows = [list(range(2, 10))] * 3, [[7, 8, 9], [7, 9], [8, 7]]
    for pair_cost, expected in ((0.0, [12]), (10.0, [10, 2])):
        own.teacher(teacher, *rows, Limits(forward_cost=4.0, pair_cost=pair_cost), join=True)
        assert tokens == expected
        tokens.clear()
    own.teacher(teacher, *rows, Limits(forward_cost=4.0))
    assert tokens == [10, 2]


def test_checkpointing_and_training_mode_do_not_lose_the_prompt():
    """transformers drops the cache of a layer that is checkpointed in training mode."""
    student = build_model()
    student.gradient_checkpointing_enable()
    student.train()
    teacher, own = Teacher(student, "live"), passes(student)
    expected = teacher.logits(row_by_row)
    states = own.teacher(teacher, PROMPTS, COMPLETIONS, AT_ONCE)
    torch.testing.assert_close(states.head.logits(states.hidden), expected, atol=2e-5, rtol=0)
    assert student.training


def test_a_lora_teacher_runs_its_own_adapter():
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(
        build_model(),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    teacher, own = Teacher(student, "ema", 0.25), passes(student)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if ".default." in name:
                p.mul_(3.0)
    expected = teacher.logits(row_by_row)
    states = own.teacher(teacher, PROMPTS, COMPLETIONS, AT_ONCE)
    torch.testing.assert_close(states.head.logits(states.hidden), expected, atol=2e-5, rtol=0)
    assert (expected - row_by_row(student)).abs().max() > 0.05


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mistral", dict(sliding_window=4)),  # a cache that forgets the start of the prompt
        ("Gemma2", dict(sliding_window=4, final_logit_softcapping=3.0)),  # every other layer forgets
        ("Qwen2", dict()),
    ],
)
def test_other_families_share_or_fall_back(kind, options):
    student = small(kind, **options)
    teacher, own = Teacher(student, "frozen"), passes(student)
    open_forward(teacher.module)
    expected = teacher.logits(row_by_row)
    states = own.teacher(teacher, PROMPTS, COMPLETIONS, AT_ONCE)
    torch.testing.assert_close(states.head.logits(states.hidden), expected, atol=3e-5, rtol=0)


def test_mixed_logits_are_one_head_of_both_states():
    generator = torch.Generator().manual_seed(0)
    a, b = build_model(1), build_model(2)
    own, other = (passes(m).forward(m, PROMPTS, COMPLETIONS, States) for m in (a, b))
    mixed = combined([(0.7, own), (0.3, other)])
    expected = 0.7 * own.head.logits(own.hidden) + 0.3 * other.head.logits(other.hidden)
    torch.testing.assert_close(mixed.head.logits(mixed.hidden), expected, atol=1e-5, rtol=0)
    raw = [States(torch.randn(3, 4, generator=generator), None) for _ in range(2)]
    torch.testing.assert_close(
        combined([(0.7, raw[0]), (0.3, raw[1])]).hidden, 0.7 * raw[0].hidden + 0.3 * raw[1].hidden
    )


# The trainer's paths ------------------------------------------------------------------------------------------

SGD = dict(optim="sgd", learning_rate=0.5, weight_decay=0.0, max_grad_norm=0.0, max_steps=2)
SLOW = dict(fused_head=False, share_teacher_prompts=False)  # the last turns joining off too


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    found = {}
    for kind in ("ema", "trust_region"):
        t = trainer(tmp_path_factory.mktemp("slow"), teacher=kind, teacher_rate=0.25, **SGD, **SLOW)
        found[kind] = train(t), weights(t.model)
    return found


@pytest.mark.parametrize("kind", ["ema", "trust_region"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(share_teacher_prompts=False),
        dict(join_siblings=False),
        dict(fused_head=False),
        dict(packing=True),
        dict(packing=True, join_siblings=True),
        dict(packing=True, share_teacher_prompts=False, max_tokens_per_microbatch=60),
        dict(max_tokens_per_microbatch=40),  # several blocks of prompts
        dict(max_tokens_per_microbatch=40, join_siblings=False),
        dict(micro_batch_size=3),
        dict(gradient_checkpointing=True),
        dict(gradient_checkpointing=True, join_siblings=False),
    ],
    ids=str,
)
def test_every_path_takes_the_step_of_the_slow_one(tmp_path, slow, options, kind, monkeypatch):
    logs, moved = slow[kind]
    batches = []
    monkeypatch.setattr(passes_module, "joined", lambda *given: batches.append(given) or joined(*given))
    t = trainer(tmp_path, teacher=kind, teacher_rate=0.25, **SGD, **options)
    own = train(t)
    assert not t.passes.whole_logits
    asked = options.get("join_siblings", not options.get("packing")) and options.get("share_teacher_prompts", True)
    assert (len(batches) > 1) is asked  # one is the check's
    assert largest_difference(weights(build_model()), moved) > 1e-3
    assert largest_difference(weights(t.model), moved) < 2e-6
    for a, b in zip(logs, own, strict=True):
        for name in ("information", "rho", "loss", "divergence", "sampled_kl", "sampled_kl_wrong", "teacher_entropy"):
            assert a[name] == pytest.approx(b[name], abs=2e-6), name


@pytest.mark.parametrize("options", [dict(bf16=True), dict(lora=True)], ids=str)
def test_joined_rows_take_the_same_step_under_autocast_and_with_an_adapter(tmp_path, options, monkeypatch):
    from peft import LoraConfig

    batches = []
    monkeypatch.setattr(passes_module, "joined", lambda *given: batches.append(given) or joined(*given))
    moved = []
    for join in (False, True):
        more = dict(options)
        if more.pop("lora", False):
            more["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)  # of the adapter's start
        t = trainer(tmp_path, join_siblings=join, **SGD, **more)
        before = weights(t.model)
        train(t)
        moved.append(weights(t.model))
        assert (len(batches) > 1) is join
    way = largest_difference(before, moved[0])
    assert largest_difference(*moved) < (0.05 if "bf16" in options else 1e-4) * way


def test_a_request_to_join_that_has_no_effect_is_answered(tmp_path, caplog):
    with pytest.raises(UserError, match="join_siblings needs share_teacher_prompts"):
        trainer(tmp_path, join_siblings=True, share_teacher_prompts=False)
    windowed = small("Mistral", sliding_window=4)
    for join, warned in ((None, False), (True, True)):
        caplog.clear()
        with caplog.at_level("WARNING", "pgpo.train.forwards"):
            trainer(tmp_path, model=copy.deepcopy(windowed), join_siblings=join)
        assert ("join_siblings has no effect" in caplog.text) is warned


def masks(t):
    """Whether a student's forward had a mask, run by run."""
    seen = []
    t.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask") is not None), with_kwargs=True
    )
    return seen


def test_the_trainer_joins_on_a_cpu_unless_told_otherwise(tmp_path):
    assert any(train_and_watch(tmp_path, SGD))
    for options in (dict(join_siblings=False), dict(share_teacher_prompts=False)):
        assert not any(train_and_watch(tmp_path, SGD | options))


def train_and_watch(tmp_path, options):
    t = trainer(tmp_path, **options)
    t.distillation.forwards._checked = True  # the check itself joins
    seen = masks(t)
    train(t)
    return seen


@pytest.mark.parametrize("what", ["ignores", "refuses"])
def test_a_model_that_takes_no_such_mask_still_trains_right(what, tmp_path, caplog, slow):
    model = build_model()

    class Heedless(type(model.model)):
        def forward(self, *args, attention_mask=None, **kwargs):
            given = attention_mask is not None and attention_mask.dim() == 4
            if given and what == "refuses":
                raise IndexError("too many indices")
            return super().forward(*args, attention_mask=None if given else attention_mask, **kwargs)

    model.model.__class__ = Heedless
    t = trainer(tmp_path, model=model, teacher="ema", teacher_rate=0.25, **SGD)
    with caplog.at_level("WARNING", "pgpo.train.forwards"):
        train(t)
    assert "stay apart" in caplog.text
    assert largest_difference(weights(t.model), slow["ema"][1]) < 2e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "sampled_token"])
def test_other_divergences_through_both_heads(tmp_path, divergence):
    moved = []
    for fused in (True, False):
        t = trainer(tmp_path, divergence=divergence, fused_head=fused, **SGD)
        train(t)
        moved.append(weights(t.model))
    assert largest_difference(*moved) < 2e-6


def test_a_model_whose_logits_are_no_plain_head_still_trains_right(tmp_path, caplog):
    class Doubled(type(build_model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    model = build_model()
    model.__class__ = Doubled
    t = trainer(tmp_path, model=copy.deepcopy(model), temperature=2.0, **SGD)
    spy = Spy(t)
    with caplog.at_level("WARNING", "pgpo.train.forwards"):
        (first, _) = train(t)
    assert t.passes.whole_logits and "holds all logits" in caplog.text and len(caplog.records) == 1
    # Logits twice as large at temperature 2 are the plain model's at temperature 1.
    reference = trainer(tmp_path, **SGD)
    plain = reference.active_samples(spy.batches[0])
    assert plain
    (same, _) = train(reference)
    assert first["loss"] == pytest.approx(same["loss"], abs=1e-6)
    assert first["information"] == pytest.approx(same["information"], abs=1e-6)


def test_the_slow_twin_and_the_switch_are_what_they_say(tmp_path, monkeypatch):
    import pgpo.train.heads as module

    def forbidden(*args, **kwargs):
        raise AssertionError("the other head ran")

    monkeypatch.setattr(module, "dense_distillation_head", forbidden)
    train(trainer(tmp_path, **SGD))
    monkeypatch.undo()
    monkeypatch.setattr(module, "fused_distillation_head", forbidden)
    train(trainer(tmp_path, **SGD, **SLOW))


def test_a_window_that_no_layer_type_declares_keeps_siblings_apart():
    """GPT-Neo's local layers count places in the row, so that siblings would push their prompt out of sight."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    shape = dict(vocab_size=50, hidden_size=16, num_heads=2, num_layers=2, attention_types=[[["global", "local"], 1]])
    assert not joins(GPTNeoForCausalLM(GPTNeoConfig(**shape)))
