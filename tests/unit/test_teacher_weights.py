"""Teacher weights: equal to the student's at the start, its own afterwards, exact averages, exact resume."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pgpo.teacher import TEACHER_ADAPTER, Teacher
from pgpo.teacher.weights import KINDS, _buckets, follow, follow_reference

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
IDS = torch.arange(14).reshape(2, 7) % 37


def qwen(tied: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied, **options)).train()


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, **options)).train()


def lora(model: Any = None, **options: Any) -> Any:
    """A LoRA student in the middle of training: no weight of its adapter is at its initial value."""
    model = qwen() if model is None else model
    student = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options}))
    perturb(student)
    return student.train()


def perturb(model: nn.Module, seed: int = 1, scale: float = 0.1) -> None:
    """An optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def forward(module: nn.Module) -> Tensor:
    return module(input_ids=IDS).logits


def evaluated(module: nn.Module) -> Tensor:
    """The student's logits as the teacher must see them: no dropout."""
    training = module.training
    with torch.no_grad():
        logits = forward(module.eval())
    module.train(training)
    return logits


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


LORA_KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lora(lora_dropout=0.5),
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True, lora_alpha=5, rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 7}),
    "lora_bias": lambda: lora(lora_bias=True),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head", "norm"]),
    "modules_to_save_tied": lambda: lora(qwen(tied=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "trainable_tokens": lambda: lora(trainable_token_indices=[1, 5]),
    "trainable_tokens_tied": lambda: lora(qwen(tied=True), trainable_token_indices=[1, 5]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "llama": lambda: lora(llama(attention_bias=True), target_modules="all-linear"),
    "bf16": lambda: lora(qwen().bfloat16()),
    "bf16 adapter": lambda: lora(qwen().bfloat16(), modules_to_save=["lm_head"]).bfloat16(),
    "fp64": lambda: lora(qwen().double()),
}


@pytest.fixture(params=LORA_KINDS)
def peft_student(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield LORA_KINDS[request.param]()


# --- separate module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [qwen, llama, lambda: qwen(tied=True)])
def test_kinds_agree_at_the_start_and_part_afterwards(make: Callable[[], Any]) -> None:
    student = make().double()
    start = evaluated(student)
    teachers = {kind: Teacher(student, kind, rate=0.25) for kind in ("ema", "live", "frozen", "trust_region")}
    for teacher in teachers.values():
        torch.testing.assert_close(teacher.logits(forward), start, rtol=0, atol=0)
    before = values(student)
    perturb(student)
    for teacher in teachers.values():
        teacher.update()
    now = evaluated(student)
    assert (now - start).abs().max() > 1e-3
    torch.testing.assert_close(teachers["live"].logits(forward), now, rtol=0, atol=0)
    torch.testing.assert_close(teachers["frozen"].logits(forward), start, rtol=0, atol=0)
    torch.testing.assert_close(teachers["trust_region"].logits(forward), 0.75 * start + 0.25 * now)
    expected = make().double()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(0.75 * before[name] + 0.25 * student.get_parameter(name))
    torch.testing.assert_close(teachers["ema"].logits(forward), evaluated(expected))
    assert teachers["live"].module is None


def test_outputs_are_the_parts_of_the_logits() -> None:
    student = qwen().double()
    teacher = Teacher(student, "trust_region", rate=0.25)
    perturb(student)

    def hidden_and_head(module: Any) -> tuple[Tensor, Tensor]:
        return module.model(input_ids=IDS).last_hidden_state, module.lm_head.weight

    parts = teacher.outputs(hidden_and_head)
    assert [share for share, _ in parts] == [0.75, 0.25]
    logits = sum(share * hidden @ weight.T for share, (hidden, weight) in parts)
    torch.testing.assert_close(logits, teacher.logits(forward))


def test_teacher_survives_a_forward_patched_onto_the_student() -> None:
    """A trainer that patches model.forward with a closure over the model, and its copy made afterwards."""
    student = qwen()
    original, original_head = student.forward, student.lm_head.forward
    student.forward = lambda *args, **kwargs: original(*args, **kwargs)
    student.lm_head.forward = lambda hidden: original_head(hidden)
    wrong = copy.deepcopy(student)
    zero(wrong)
    assert forward(wrong).abs().max() > 0  # the trap is real: zeroed, it still answers, with the student's weights

    teacher = Teacher(student)
    before = evaluated(student)
    torch.testing.assert_close(teacher.logits(forward), before, rtol=0, atol=0)
    assert teacher.module is not None
    zero(teacher.module)
    assert teacher.logits(forward).abs().max() == 0
    torch.testing.assert_close(evaluated(student), before, rtol=0, atol=0)
    assert "forward" in student.__dict__  # the student keeps its patch


@torch.no_grad()
def zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()


def test_clone_that_moves_with_the_student_is_refused() -> None:
    def tied_to_student(student: nn.Module) -> nn.Module:
        module: Any = copy.deepcopy(student)
        module.lm_head.weight = student.get_parameter("lm_head.weight")
        return module

    clones: list[Callable[[nn.Module], nn.Module]] = [lambda m: m, copy.copy, tied_to_student]
    for clone in clones:
        student = qwen()
        head = student.lm_head.forward
        student.lm_head.forward = lambda x, head=head: head(x)
        with pytest.raises(ValueError, match="student's own memory"):
            Teacher(student, clone=clone)
        assert "forward" in student.lm_head.__dict__  # refused before anything was changed


def test_clone_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'lm_head.weight' of the clone belongs to no tensor"):
        Teacher(qwen(tied=True), clone=lambda m: qwen(tied=False))
    with pytest.raises(ValueError, match=r"'lm_head.weight' is missing from the clone"):
        Teacher(qwen(tied=False), clone=lambda m: qwen(tied=True))
    narrow = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "vocab_size": 36}))
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight' of the clone has shape \(36, 16\) instead of \(37, 16\)"
    ):
        Teacher(qwen(), clone=lambda m: narrow)


def test_rebuilt_clone_takes_the_students_values() -> None:
    student = qwen()
    perturb(student)
    teacher = Teacher(student, clone=lambda m: Qwen3ForCausalLM(m.config))
    torch.testing.assert_close(teacher.logits(forward), evaluated(student), rtol=0, atol=0)


def test_module_whose_forward_is_only_on_the_instance_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.forward = lambda x: self.inner(x)

    with pytest.raises(ValueError, match="forward on the instance only"):
        Teacher(Bare())


def test_teacher_runs_without_dropout_and_gradient_and_restores_every_mode() -> None:
    student = qwen(attention_dropout=0.9)
    student.model.layers[1].eval()  # a mixed mode must come back as it was
    modes = {name: m.training for name, m in student.named_modules()}
    for kind in ("ema", "live", "frozen", "trust_region"):
        teacher = Teacher(student, kind)
        logits = teacher.logits(forward)
        assert not logits.requires_grad
        torch.testing.assert_close(logits, teacher.logits(forward), rtol=0, atol=0)

        def fails(module: nn.Module) -> Tensor:
            assert not module.training and not torch.is_grad_enabled()
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            teacher.logits(fails)
        assert {name: m.training for name, m in student.named_modules()} == modes
        assert torch.is_grad_enabled() and all(p.requires_grad for p in student.parameters())
        if teacher.module is not None:
            assert not any(p.requires_grad for p in teacher.module.parameters())


# --- averages ------------------------------------------------------------------------------------------------------


def test_average_is_the_closed_form_after_many_updates() -> None:
    student = qwen().double()
    start = values(student)
    teacher = Teacher(student, rate=0.1)
    perturb(student, scale=1.0)
    for _ in range(7):
        teacher.update()
    for name, parameter in teacher_parameters(teacher).items():
        goal = student.get_parameter(name)
        torch.testing.assert_close(parameter, goal + 0.9**7 * (start[name] - goal))


def teacher_parameters(teacher: Teacher) -> dict[str, Tensor]:
    assert teacher.module is not None
    return {name: p.detach() for name, p in teacher.module.named_parameters()}


def test_tied_weights_move_once_per_update() -> None:
    student = qwen(tied=True).double()
    teacher = Teacher(student, rate=0.1)
    module: Any = teacher.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    start = module.lm_head.weight.clone()
    with torch.no_grad():
        student.lm_head.weight += 1
    teacher.update()
    torch.testing.assert_close(module.lm_head.weight.detach(), start + 0.1)


def test_frozen_parameters_stay_and_are_not_saved() -> None:
    student = qwen()
    student.model.embed_tokens.requires_grad_(False)
    teacher = Teacher(student)
    before = teacher_parameters(teacher)["model.embed_tokens.weight"].clone()
    perturb(student)
    teacher.update()
    assert torch.equal(teacher_parameters(teacher)["model.embed_tokens.weight"], before)
    assert "model.embed_tokens.weight" not in teacher.state_dict()["parameters"]
    student.model.embed_tokens.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embed_tokens.weight' trains now"):
        teacher.update()


def test_buffers_are_copied_not_averaged() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = Teacher(student, rate=0.5)
    student(torch.randn(8, 3))
    teacher.update()
    own, theirs = dict(teacher.module.named_buffers()), dict(student.named_buffers())  # type: ignore[union-attr]
    assert own["1.num_batches_tracked"] == 1
    for name, buffer in theirs.items():
        assert torch.equal(own[name], buffer)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_fast_average_equals_its_plain_twin(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgpo.teacher.weights._BUCKET", 40)  # several buckets, one of them a single large tensor
    torch.manual_seed(0)
    shapes = [(), (3,), (5, 7), (0,), (9, 9), (2, 3, 4), (1,)]
    dtypes = [torch.float64, torch.float64, torch.float64, torch.float32, torch.float32, torch.float64, torch.float64]
    averages = [torch.randn(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)]
    averages[2] = averages[2].T.contiguous().T  # strides of its own
    targets = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    fast, plain = ([a.clone() for a in averages] for _ in range(2))
    addresses = [a.data_ptr() for a in fast]
    follow(fast, targets, rate)
    follow_reference(plain, targets, rate)
    assert [a.data_ptr() for a in fast] == addresses
    for f, p in zip(fast, plain):
        torch.testing.assert_close(f, p, rtol=1e-6 if f.dtype == torch.float32 else 1e-14, atol=1e-7)
    assert sorted(i for bucket in _buckets(averages) for i in bucket) == list(range(7))


def test_bf16_average_closes_the_gap_that_a_bf16_update_never_closes() -> None:
    start, goal = 1.0, 1.0078125  # one bf16 unit above 1, a 0.8 % gap: both are exact in bf16
    student = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.constant_(student.weight, start)
    teacher = Teacher(student, rate=0.05)
    nn.init.constant_(student.weight, goal)
    wrong = torch.full((4, 4), start, dtype=torch.bfloat16)
    for _ in range(200):
        teacher.update()
        wrong.lerp_(student.weight.detach(), 0.05)
    average = teacher.state_dict()["parameters"]["weight"]
    assert average.dtype == torch.float32
    # Left of the gap: 0.95**200 = 3.5e-5, plus fp32 rounding.
    assert ((goal - average) / (goal - start)).abs().max() < 0.01
    assert torch.equal(teacher_parameters(teacher)["weight"], student.weight.detach())
    assert teacher_parameters(teacher)["weight"].dtype == torch.bfloat16
    assert ((wrong.float() - start) / (goal - start)).max() < 0.1


def test_student_handed_to_update_is_followed() -> None:
    student = qwen().double()
    teacher = Teacher(student, rate=1.0)
    other = copy.deepcopy(student)
    perturb(other)
    teacher.update(other)
    torch.testing.assert_close(teacher.logits(forward), evaluated(other), rtol=0, atol=0)
    with pytest.raises(ValueError, match="unwrapped"):
        teacher.update(nn.ModuleDict({"module": student}))


# --- PEFT ----------------------------------------------------------------------------------------------------------


def student_names(student: Any) -> list[str]:
    return [name for name, p in student.named_parameters() if p.requires_grad]


def test_peft_teacher_is_exact_then_follows_exactly(peft_student: Any) -> None:
    student = peft_student
    start, trained = values(student), student_names(student)
    start_logits = evaluated(student)
    teacher = Teacher(student, rate=0.25)
    assert teacher.module is None
    torch.testing.assert_close(teacher.logits(forward), start_logits, rtol=0, atol=0)
    torch.testing.assert_close(evaluated(student), start_logits, rtol=0, atol=0)

    perturb(student, seed=2)
    perturbed = values(student)
    now = evaluated(student)
    assert (now - start_logits).abs().max() > 1e-3
    torch.testing.assert_close(teacher.logits(forward), start_logits, rtol=0, atol=0)

    teacher.update()
    average = teacher.state_dict()["parameters"]
    assert set(average) == set(trained)
    for name in trained:
        wide = average[name].dtype
        torch.testing.assert_close(average[name], 0.75 * start[name].to(wide) + 0.25 * perturbed[name].to(wide))
    # The student did not move by it, and the base never did.
    after = values(student)
    for name, value in perturbed.items():
        if TEACHER_ADAPTER not in name.split("."):
            assert torch.equal(after[name], value), name
    for name, value in start.items():
        if name not in trained:
            assert torch.equal(after[name], value), name

    # A student that has the averaged weights answers as the teacher does.
    answer = teacher.logits(forward)
    with torch.no_grad():
        for name in trained:
            student.get_parameter(name).copy_(average[name])
    torch.testing.assert_close(answer, evaluated(student), rtol=0, atol=1e-2 if "bf16" in str(answer.dtype) else 1e-6)


def test_peft_switching_leaves_no_trace(peft_student: Any) -> None:
    student = peft_student
    trained = student_names(student)
    teacher = Teacher(student, "trust_region")
    adapter = student.active_adapter
    modes = {name: m.training for name, m in student.named_modules()}

    def fails(module: Any) -> Tensor:
        assert module.active_adapter == TEACHER_ADAPTER
        raise RuntimeError("out of memory")

    for run in (forward, fails):
        try:
            teacher.logits(run)
        except RuntimeError as error:
            assert str(error) == "out of memory"
        teacher.update()
        assert student.active_adapter == adapter and student.active_adapters == [adapter]
        assert student_names(student) == trained
        assert not any(TEACHER_ADAPTER in name.split(".") for name in student_names(student))
        assert {name: m.training for name, m in student.named_modules()} == modes
    torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    before = values(student)
    forward(student).square().mean().backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    assert all(torch.equal(v, before[n]) for n, v in values(student).items())


def test_peft_gradients_are_the_same_with_a_teacher_run_in_between() -> None:
    """The loss reads the student first, then the teacher, then goes backward."""
    gradients = []
    for kind in ("live", "ema"):
        student = lora(modules_to_save=["lm_head"])
        teacher = Teacher(student, kind)
        logits = forward(student)
        (logits - teacher.logits(forward) - 1).square().mean().backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 9 and set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, gradients[1][name])


def test_peft_kinds() -> None:
    student = lora(qwen().double())
    parameters = len(list(student.parameters()))
    live = Teacher(student, "live")
    assert len(list(student.parameters())) == parameters  # no adapter for the live teacher
    start = evaluated(student)
    trust = Teacher(student, "trust_region", rate=0.25)
    perturb(student)
    trust.update()
    now = evaluated(student)
    torch.testing.assert_close(live.logits(forward), now, rtol=0, atol=0)
    torch.testing.assert_close(trust.logits(forward), 0.75 * start + 0.25 * now)


def test_peft_base_is_not_copied_and_random_numbers_are_not_used() -> None:
    student = lora()
    state = torch.get_rng_state()
    before = {id(p) for p in student.parameters()}
    Teacher(student)
    assert torch.equal(torch.get_rng_state(), state)
    new = [p for p in student.parameters() if id(p) not in before]
    # 2 layers * (q, v) * (A, B): r = 2 times the widths 16 -> 16 and 16 -> 8.
    assert sum(p.numel() for p in new) == 2 * 2 * ((16 + 16) + (16 + 8))


def test_peft_scaling_changed_by_hand_is_taken_over() -> None:
    student = lora()
    for module in student.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    start = evaluated(student)
    torch.testing.assert_close(Teacher(student).logits(forward), start, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["student", "model", "q_proj"])
def test_peft_adapter_may_have_any_name(name: str) -> None:
    student = get_peft_model(qwen(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=name)
    perturb(student)
    start = evaluated(student)
    teacher = Teacher(student, rate=1.0)
    perturb(student, seed=2)
    torch.testing.assert_close(teacher.logits(forward), start, rtol=0, atol=0)
    teacher.update()
    torch.testing.assert_close(teacher.logits(forward), evaluated(student))


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"bias": "all"}, "bias='all'"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ({"target_parameters": ["mlp.down_proj.weight"]}, "target_parameters"),
    ],
)
def test_peft_options_without_an_exact_twin_are_refused(options: dict[str, Any], complaint: str) -> None:
    student = get_peft_model(llama(attention_bias=True), LoraConfig(r=2, target_modules=["q_proj"], **options))
    names = [name for name, _ in student.named_parameters()]
    with pytest.raises(ValueError, match=complaint):
        Teacher(student)
    assert [name for name, _ in student.named_parameters()] == names
    Teacher(student, "live").logits(forward)


def test_peft_students_that_cannot_have_a_twin_are_refused() -> None:
    from peft import IA3Config

    student = lora()
    student.get_parameter("base_model.model.lm_head.weight").requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.weight' trains but belongs to the base"):
        Teacher(student)

    student = lora()
    Teacher(student)
    with pytest.raises(ValueError, match="adapter named 'teacher' already"):
        Teacher(student)

    student = get_peft_model(qwen(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="of type IA3"):
        Teacher(student)

    student = lora()
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to follow"):
        Teacher(student)

    student = lora()
    first = student.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    first.extra = nn.Parameter(torch.ones(1))  # PEFT will not make one for the second adapter
    start, trained, logits = values(student), student_names(student), evaluated(student)
    with pytest.raises(ValueError, match="has no twin in the teacher's adapter"):
        Teacher(student)
    assert set(values(student)) == set(start) and student_names(student) == trained
    torch.testing.assert_close(evaluated(student), logits, rtol=0, atol=0)


# --- saving --------------------------------------------------------------------------------------------------------

STUDENTS: dict[str, Callable[[], Any]] = {
    "fp32": qwen,
    "bf16": lambda: qwen().bfloat16(),
    "tied": lambda: qwen(tied=True),
    "lora": lora,
    "bf16 lora": LORA_KINDS["bf16 adapter"],
    "buffers": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STUDENTS)
def test_resume_is_exact(name: str, kind: Any, tmp_path: Path) -> None:
    student = STUDENTS[name]()
    teacher = Teacher(student, kind)
    perturb(student, seed=3)
    teacher.update()
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    saved = torch.load(tmp_path / "teacher.pt", weights_only=True)
    assert all(t.dtype == torch.float32 for t in saved["parameters"].values())

    resumed_student = STUDENTS[name]()
    trained = dict(student.named_parameters())
    with torch.no_grad():
        for key, parameter in resumed_student.named_parameters():
            parameter.copy_(trained[key])
        for key, buffer in resumed_student.named_buffers():
            buffer.copy_(dict(student.named_buffers())[key])
    resumed = Teacher(resumed_student, kind)
    resumed.load_state_dict(saved)
    if name != "buffers":
        torch.testing.assert_close(resumed.logits(forward), teacher.logits(forward), rtol=0, atol=0)
    for _ in range(3):
        for s, t in ((student, teacher), (resumed_student, resumed)):
            perturb(s, seed=4)
            t.update()
    assert_same_state(teacher, resumed)
    if name != "buffers":
        torch.testing.assert_close(resumed.logits(forward), teacher.logits(forward), rtol=0, atol=0)


def assert_same_state(left: Teacher, right: Teacher) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert (a["kind"], a["rate"]) == (b["kind"], b["rate"])
    for part in ("parameters", "buffers"):
        assert set(a[part]) == set(b[part])
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), name


def test_saved_state_is_a_copy() -> None:
    student = qwen()
    teacher = Teacher(student)
    saved = teacher.state_dict()
    before = copy.deepcopy(saved)
    perturb(student)
    teacher.update()
    assert all(torch.equal(saved["parameters"][n], v) for n, v in before["parameters"].items())


@pytest.mark.parametrize("make", [qwen, lora])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(make: Callable[[], Any]) -> None:
    teacher = Teacher(make())
    state = teacher.state_dict()
    name = next(iter(state["parameters"]))
    rest = {k: torch.zeros_like(v) for k, v in state["parameters"].items() if k != name}
    before = copy.deepcopy(state)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"kind": "frozen"}, "kind 'frozen', this one 'ema'"),
        ({"rate": 0.1}, "rate 0.1, this one 0.05"),
        ({"parameters": rest}, "is missing from the parameters"),
        ({"parameters": {**state["parameters"], "extra": torch.zeros(1)}}, "'extra' of the parameters"),
        ({"parameters": {**rest, name: torch.zeros(1, 1, 1)}}, r"shape \(1, 1, 1\) instead of"),
        ({"buffers": {"extra": torch.zeros(1)}}, "buffers"),
    ]
    for change, complaint in changes:
        with pytest.raises(ValueError, match=complaint):
            teacher.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="no 'kind'"):
        teacher.load_state_dict({})
    after = teacher.state_dict()
    assert all(torch.equal(after["parameters"][n], v) for n, v in before["parameters"].items())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of ema, live, frozen, trust_region"):
        Teacher(qwen(), "EMA")  # type: ignore[arg-type]
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            Teacher(qwen(), rate=rate)


# --- sharded -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_teacher_equals_the_plain_one(dtype: torch.dtype, one_rank: DeviceMesh) -> None:
    plain_student, student = (qwen(tied=True).to(dtype) for _ in range(2))
    plain, teacher = Teacher(plain_student, rate=0.3), Teacher(student, rate=0.3)
    models: list[Any] = [student, teacher.module]
    for model in models:
        for layer in model.model.layers:
            fully_shard(layer, mesh=one_rank)
        fully_shard(model, mesh=one_rank)
    for step in range(2):
        # A forward without backward leaves the root's parameters gathered; an update of that copy, or from it, would be
        # lost.
        torch.testing.assert_close(teacher.logits(forward), plain.logits(forward), rtol=0, atol=0)
        perturb(plain_student, seed=step)
        for name, value in plain_student.named_parameters():
            sharded = student.get_parameter(name)
            sharded.data.copy_(distribute_tensor(value.detach(), one_rank, sharded.placements))
        with torch.no_grad():
            forward(student)
        plain.update()
        teacher.update()
    torch.testing.assert_close(teacher.logits(forward), plain.logits(forward), rtol=0, atol=0)
    assert_same_state(teacher, plain)

    state = plain.state_dict()
    for tensor in state["parameters"].values():
        tensor.mul_(0.5)
    teacher.load_state_dict(state)
    plain.load_state_dict(state)
    torch.testing.assert_close(teacher.logits(forward), plain.logits(forward), rtol=0, atol=0)
    assert_same_state(teacher, plain)

    assert teacher.state_dict(keep=False) == {"kind": "ema", "rate": 0.3, "parameters": {}, "buffers": {}}


def test_layers_wrapped_for_checkpointing_are_found_by_their_names() -> None:
    plain_student, student = qwen(), qwen()
    plain, teacher = Teacher(plain_student, rate=0.3), Teacher(student, rate=0.3)
    student.model.layers[0] = checkpoint_wrapper(student.model.layers[0])  # accelerate's fsdp_activation_checkpointing
    perturb(plain_student, seed=0)
    for name, value in plain_student.named_parameters():
        part = "_checkpoint_wrapped_module." if name.startswith("model.layers.0.") else ""
        student.get_parameter(name.replace("layers.0.", f"layers.0.{part}")).data.copy_(value)
    plain.update()
    teacher.update()
    assert_same_state(teacher, plain)
