"""minimal.py: its model is Qwen3, its sampler samples the model, its step is the paper's."""

from __future__ import annotations

import ast
import copy
import math
import sys
from pathlib import Path

import pytest
import torch

from pgpo import minimal
from pgpo.tasks import lab_world, load_task

PATH = lab_world.checkpoint_path("plain")


@pytest.fixture(scope="module")
def model():
    return minimal.load_model(PATH)


def test_it_is_one_short_file_on_torch_alone():
    source = Path(minimal.__file__).read_text()
    assert len(source.splitlines()) <= 300
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "pgpo"}


def test_model_computes_what_transformers_computes(model):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(PATH)
    ids = torch.randint(0, reference.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(ids) - reference(input_ids=ids).logits).abs().max() < 1e-5


def test_cached_decoding_equals_the_full_forward(model):
    """Rows of unequal length, each written to its own place of the cache."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 100, (n,), generator=generator).tolist() for n in (3, 9, 5)]
    lengths = torch.tensor([3, 9, 5])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    size = (3, model.kv_heads, 12, model.head_dim)
    cache = [(torch.zeros(size), torch.zeros(size)) for _ in range(model.layers)]
    with torch.no_grad():
        model(ids, cache)
        for step in range(2):
            token = torch.tensor([[7 + step], [8 + step], [9 + step]])
            logits = model(token, cache, lengths + step)[:, 0]
            prompts = [p + t for p, t in zip(prompts, token.tolist())]
            for row, prompt in enumerate(prompts):
                full = model(torch.tensor([prompt]))[0, -1]
                assert (logits[row] - full).abs().max() < 5e-5  # logits up to 20 in fp32


def test_samples_follow_the_models_distribution(model):
    """First tokens of 4,000 completions of one prompt against the softmax: chi-square within its 99.9 % point."""
    words = minimal.Words(PATH)
    prompt = words.prompt(load_task("lab_world").test[0]["prompt"])
    torch.manual_seed(0)
    s = minimal.Settings(temperature=2.0, max_new_tokens=1)
    drawn = torch.tensor([c[0] for c in minimal.sample(model, [prompt] * 4000, s, words.end)])
    with torch.no_grad():
        p = (model(torch.tensor([prompt]))[0, -1] / 2.0).softmax(-1)
    counts = torch.bincount(drawn, minlength=len(p)).double()
    expected = p.double() * 4000
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    chi2 = ((observed - wanted).square() / wanted).sum().item()
    freedom = len(wanted) - 1
    assert freedom >= 3
    assert chi2 < freedom + 3.1 * math.sqrt(2 * freedom) + 6  # Wilson-Hilferty's neighbourhood of the 99.9 % point


def test_completions_end_with_the_end_token_or_at_the_limit(model):
    words = minimal.Words(PATH)
    rows = load_task("lab_world").test[:16]
    torch.manual_seed(0)
    out = minimal.sample(model, [words.prompt(r["prompt"]) for r in rows], minimal.Settings(), words.end)
    for completion in out:
        assert words.end not in completion[:-1]
        assert completion[-1] == words.end or len(completion) == 24
    assert any(len(c) < 24 for c in out)


def by_hand(student, teacher, batch, s):
    """I, rho and the loss from loops over floats, straight from the page of the paper."""
    gaps, losses = [], []
    for x in batch:
        if x.teacher_prompt is None:
            gaps.append(0.0)
            continue
        gap = []
        for t, token in enumerate(x.completion):
            del token
            with torch.no_grad():
                zs = student(torch.tensor([x.prompt + x.completion[:t]]))[0, -1].double()
                zt = teacher(torch.tensor([x.teacher_prompt + x.completion[:t]]))[0, -1].double()
            p, q = zs.softmax(-1).tolist(), zt.softmax(-1).tolist()
            gap.append(-sum(a * math.log(a) for a in p) + sum(b * math.log(b) for b in q))
            top = sorted(range(len(p)), key=lambda i: -p[i])[: s.top_k]
            ps, qs = [p[i] for i in top], [q[i] for i in top]
            ps.append(1 - sum(ps))
            qs.append(1 - sum(qs))
            m = [(1 - s.beta) * a + s.beta * b for a, b in zip(ps, qs)]
            losses.append(
                sum(
                    (1 - s.beta) * a * math.log(a / c) + s.beta * b * math.log(b / c)
                    for a, b, c in zip(ps, qs, m)
                    if a > 0 and b > 0
                )
            )
        gaps.append(sum(gap) / len(gap))
    information = sum(gaps) / len(batch)
    return information, min(math.exp(s.alpha * information), s.rho_max), sum(losses) / len(losses)


def test_the_step_is_the_papers(model):
    words = minimal.Words(PATH)
    rows = load_task("lab_world", variant="plain").train[:3]
    s = minimal.Settings(alpha=2.0, top_k=50, beta=0.3, lr=1e-2)
    batch = []
    for i, row in enumerate(rows):
        completion = [*(words.ids[w] for w in row["solution"].split()), words.end][: 5 + i]
        hint = (
            None if i == 1 else words.prompt(minimal.teach([row] * 2, [row["solution"], ""], [1.0, 0.0], _pair(s))[1])
        )
        batch.append(minimal.Sample(words.prompt(row["prompt"]), completion, hint))
    student, teacher = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    before = [p.detach().clone() for p in student.parameters()]
    information, rho, loss = by_hand(student, teacher, batch, s)
    record = minimal.update(student, teacher, minimal.adamw(student, s), batch, s)
    assert record["information"] == pytest.approx(information, abs=1e-6)
    assert record["rho"] == pytest.approx(rho, abs=1e-6) and record["rho"] != 1.0
    assert record["loss"] == pytest.approx(loss, abs=1e-6)
    # Adam's first step is lr * rho wherever the gradient is not tiny.
    moved = torch.cat([(p.detach() - b).abs().flatten() for p, b in zip(student.parameters(), before)])
    assert moved[moved > 0].median().item() == pytest.approx(s.lr * rho, rel=0.02)
    for t, b, p in zip(teacher.parameters(), before, student.parameters()):
        assert torch.allclose(t, b + s.ema * (p - b), atol=1e-6)


def _pair(s):
    return minimal.Settings(**{**s.__dict__, "group": 2})


def test_it_learns():
    """Thirty steps from the shipped base: the batch reward of the last ten beats the first ten."""
    torch.set_num_threads(1)
    rewards = [r["reward"] for r in minimal.train(minimal.Settings(), steps=30, seed=0)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.03
