"""Physics-Guided Policy Optimization in one file: read it top-down with the paper (arXiv 2606.03620) at hand.

    prompt -> completions -> rewards -> teacher context -> divergence and entropies -> I_k -> rho_k -> step -> teacher

Only torch. `python -m pgpo.minimal` trains the tiny lab model with it on a CPU. The trainer in `pgpo.train` is tested
against `update` below: same batch, same weights, same step.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgpo.tasks import Row, lab_world, load_task
from pgpo.teacher.contexts import build_contexts


@dataclass(frozen=True)
class Settings:
    """Numbers of the method (paper, SDPO's settings) and of the lab (ours, marked)."""

    alpha: float = 1.0  # sensitivity of Eq. 9; 0 is SDPO
    rho_max: float = 2.0  # cap of Eq. 9; the paper gives no number, ours
    beta: float = 0.5  # Jensen-Shannon weight of the teacher
    top_k: int = 100  # student's most likely tokens, plus one bucket for the rest
    ema: float = 0.05  # teacher <- teacher + ema * (student - teacher)
    temperature: float = 1.0  # of sampling, and of both softmaxes in the loss
    group: int = 8  # completions per prompt: one right one teaches its siblings
    weight_decay: float = 0.01
    clip: float = 1.0  # gradient norm
    prompts: int = 8  # lab; the paper takes 32
    lr: float = 1e-3  # lab; the paper takes 1e-5 for 8B parameters
    max_new_tokens: int = 24  # lab; the paper allows 8192


@dataclass(frozen=True)
class Sample:
    """One completion as token ids. teacher_prompt is None where there is nothing to show the teacher."""

    prompt: list[int]
    completion: list[int]
    teacher_prompt: list[int] | None


# ------------------------------------------------------------------------------------------------ the method


def update(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, batch: list[Sample], s: Settings
) -> dict[str, float]:
    """One optimizer step of PGPO on a batch of completions; the teacher follows."""
    hinted = [x for x in batch if x.teacher_prompt is not None]
    if not hinted:  # nobody solved anything: nothing to learn from, I = 0
        return {"information": 0.0, "rho": 1.0, "loss": 0.0, "active_share": 0.0}
    completions = [x.completion for x in hinted]

    # The same completion, read by the student from the question and by the teacher from question + solution.
    student_logits = completion_logits(student, [x.prompt for x in hinted], completions) / s.temperature
    with torch.no_grad():
        teacher_prompts = [x.teacher_prompt or [] for x in hinted]
        teacher_logits = completion_logits(teacher, teacher_prompts, completions) / s.temperature
    log_s, log_t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)  # [tokens, V]

    # SDPO: pull the student towards the teacher on every token of its own completions (mean over tokens).
    loss = jensen_shannon(log_s, log_t, s.beta, s.top_k).mean()

    # PGPO, Eq. 8: how much surer is the one who saw the solution? Mean over tokens, then over ALL samples.
    gap = (entropy(log_s) - entropy(log_t)).detach()  # [tokens] nats
    per_sample = torch.stack([g.mean() for g in gap.split([len(c) for c in completions])])
    information = per_sample.sum().item() / len(batch)
    # Eq. 9: an informative correction lowers the viscosity.
    rho = min(math.exp(s.alpha * information), s.rho_max)

    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(student.parameters(), s.clip)
    # theta <- theta - lr * rho * (update direction): Adam's moments never see rho.
    rates = [g["lr"] for g in optimizer.param_groups]
    for g in optimizer.param_groups:
        g["lr"] = g["lr"] * rho
    optimizer.step()
    for g, lr in zip(optimizer.param_groups, rates):
        g["lr"] = lr

    with torch.no_grad():
        for t, p in zip(teacher.parameters(), student.parameters()):
            t.lerp_(p, s.ema)
    record = {"information": information, "rho": rho, "loss": loss.item(), "grad_norm": norm.item()}
    return {**record, "active_share": len(hinted) / len(batch)}


def completion_logits(model: nn.Module, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Logits that predict the completion tokens, all samples in a row: [tokens, V]."""
    rows = [torch.tensor(p + c) for p, c in zip(prompts, completions)]
    logits = model(nn.utils.rnn.pad_sequence(rows, batch_first=True))  # padding on the right: causal, unseen
    pieces = [z[len(p) - 1 : len(p) - 1 + len(c)] for z, p, c in zip(logits, prompts, completions)]
    return torch.cat(pieces).float()


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def jensen_shannon(log_s: Tensor, log_t: Tensor, beta: float, top_k: int) -> Tensor:
    """(1 - beta) KL(s || m) + beta KL(t || m) on the student's top-k tokens and one bucket for the rest: [tokens]."""
    if top_k < log_s.shape[-1]:
        log_s, index = log_s.topk(top_k)
        log_s, log_t = with_tail(log_s), with_tail(log_t.gather(-1, index))
    log_m = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
    return (1 - beta) * (log_s.exp() * (log_s - log_m)).sum(-1) + beta * (log_t.exp() * (log_t - log_m)).sum(-1)


def with_tail(log_p: Tensor) -> Tensor:
    mass = log_p.logsumexp(-1, keepdim=True).clamp_max(-1e-7)
    return torch.cat([log_p, torch.log(-torch.expm1(mass))], -1)


def teach(rows: list[Row], texts: list[str], rewards: list[float], s: Settings) -> list[list[dict[str, str]] | None]:
    """What the teacher reads: the question with the first right sibling, never the sample itself; None without one."""
    contexts = build_contexts([r["prompt"] for r in rows], texts, rewards, s.group)
    return [c.prompt for c in contexts]  # type: ignore[misc]


# ------------------------------------------------------------------------------- a language model (Qwen3's form)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Model(nn.Module):
    """Decoder with the parameters of a transformers Qwen3 checkpoint: GQA, q/k norms, RoPE, SwiGLU, tied head."""

    def __init__(self, config: dict, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers, self.eps = config["num_hidden_layers"], config["rms_norm_eps"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        self.frequencies = theta ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(w) for name, w in weights.items()})

    def w(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def forward(self, ids: Tensor, cache: list | None = None, position: Tensor | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, V]. With a cache, ids are one new token per row, at `position` [B]."""
        batch, length = ids.shape
        x = self.w("model.embed_tokens.weight")[ids]
        positions = torch.arange(length).expand(batch, -1) if position is None else position[:, None]
        angles = (positions[..., None] * self.frequencies).repeat(1, 1, 2)[:, None]  # [B, 1, T, head_dim]
        cos, sin = angles.cos(), angles.sin()
        for i in range(self.layers):
            name = f"model.layers.{i}."
            h = rms_norm(x, self.w(name + "input_layernorm.weight"), self.eps)
            q, k, v = (
                F.linear(h, self.w(f"{name}self_attn.{p}_proj.weight"))
                .view(batch, length, -1, self.head_dim)
                .transpose(1, 2)
                for p in "qkv"
            )
            q = self.rotate(rms_norm(q, self.w(name + "self_attn.q_norm.weight"), self.eps), cos, sin)
            k = self.rotate(rms_norm(k, self.w(name + "self_attn.k_norm.weight"), self.eps), cos, sin)
            mask = None
            if cache is not None and position is not None:  # each row writes at its own place and looks back
                rows, (keys, values) = torch.arange(batch), cache[i]
                keys[rows, :, position], values[rows, :, position] = k[:, :, 0], v[:, :, 0]
                k, v = keys, values
                mask = (torch.arange(k.shape[2]) <= position[:, None])[:, None, None]
            elif cache is not None:
                cache[i][0][:, :, :length], cache[i][1][:, :, :length] = k, v
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            h = h.transpose(1, 2).reshape(batch, length, -1)
            x = x + F.linear(h, self.w(name + "self_attn.o_proj.weight"))
            h = rms_norm(x, self.w(name + "post_attention_layernorm.weight"), self.eps)
            gate, up = (F.linear(h, self.w(f"{name}mlp.{p}_proj.weight")) for p in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, self.w(name + "mlp.down_proj.weight"))
        return F.linear(rms_norm(x, self.w("model.norm.weight"), self.eps), self.w("model.embed_tokens.weight"))

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin


class Words:
    """The lab's tokenizer: one token per word."""

    def __init__(self, path: Path) -> None:
        vocabulary: dict[str, int] = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
        self.ids, self.words = vocabulary, {i: w for w, i in vocabulary.items()}
        self.end = vocabulary[json.loads((path / "tokenizer_config.json").read_text())["eos_token"]]

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        text = " ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <assistant>"
        return [self.ids[w] for w in text.split()]

    def text(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids if i != self.end)


def load_model(path: Path) -> Model:
    """Read config.json and model.safetensors: an 8-byte length, a JSON header, raw tensors."""
    raw = bytearray((path / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    weights = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + o for o in entry["data_offsets"])
            weights[name] = torch.frombuffer(raw[begin:end], dtype=torch.float32).view(entry["shape"]).clone()
    return Model(json.loads((path / "config.json").read_text()), weights)


@torch.no_grad()
def sample(model: Model, prompts: list[list[int]], s: Settings, end: int) -> list[list[int]]:
    """One completion per prompt, at most max_new_tokens, the end token included."""
    lengths = torch.tensor([len(p) for p in prompts])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    size = (len(prompts), model.kv_heads, ids.shape[1] + s.max_new_tokens, model.head_dim)
    cache = [(torch.zeros(size), torch.zeros(size)) for _ in range(model.layers)]
    logits = model(ids, cache)[torch.arange(len(prompts)), lengths - 1]
    tokens: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for step in range(s.max_new_tokens):
        token = torch.multinomial((logits / s.temperature).softmax(-1), 1)
        tokens.append(token[:, 0])
        done |= token[:, 0] == end
        if done.all():
            break
        logits = model(token, cache, lengths + step)[:, 0]
    out = torch.stack(tokens, 1).tolist()
    return [c[: c.index(end) + 1] if end in c else c for c in out]


# ---------------------------------------------------------------------------------------------------- the loop


def adamw(model: nn.Module, s: Settings) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr)


def train(s: Settings, steps: int, seed: int = 0, variant: str = "plain") -> Iterator[dict[str, float]]:
    """Train the lab's base model; yields one record per step."""
    torch.manual_seed(seed)
    task, path = load_task("lab_world", variant=variant), lab_world.checkpoint_path(variant)
    words, student = Words(path), load_model(path)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = adamw(student, s)
    order = random.Random(seed)
    for step in range(steps):
        start = time.perf_counter()
        rows = [row for row in order.sample(task.train, s.prompts) for _ in range(s.group)]
        prompts = [words.prompt(row["prompt"]) for row in rows]
        completions = sample(student, prompts, s, words.end)
        texts = [words.text(c) for c in completions]
        rewards = [task.grade(text, row).reward for text, row in zip(texts, rows)]
        hints = [None if m is None else words.prompt(m) for m in teach(rows, texts, rewards, s)]
        batch = [Sample(p, c, h) for p, c, h in zip(prompts, completions, hints)]
        record = update(student, teacher, optimizer, batch, s)
        seconds = time.perf_counter() - start
        yield {"step": step + 1, "reward": sum(rewards) / len(rewards), "seconds": seconds, **record}


def main() -> None:
    parser = argparse.ArgumentParser(description="PGPO on the lab world, in one file.")
    parser.add_argument("--alpha", type=float, default=Settings.alpha, help="sensitivity of Eq. 9; 0 is SDPO")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a model this small gains nothing from a second thread
    for r in train(Settings(alpha=args.alpha), args.steps, args.seed):
        print(f"step {r['step']:4.0f}  reward {r['reward']:.3f}  I {r['information']:+.4f}  rho {r['rho']:.3f}")


if __name__ == "__main__":
    main()
