"""What one GPU holds at each moment of a training step, from shapes alone.

A step has five moments; the largest peak is the step's:

    rollout    sampling (KV cache, logits of one token), or vLLM's fixed share
    teacher    the teacher's states of a block of completions, the KV cache of its prompts
    loss       the end of the student's forward, heads included: all that autograd has saved, one chunk of logits
    backward   the same without the chunk, and what the first layer to be differentiated needs
    step       gradients, optimizer, teacher average

Every number is counted from the code, none is fitted: transformers' Llama block (activations.py),
core/head.py (`Step._head`), forward/passes.py and train/forwards.py (`Step.teacher`), train/probe.py (`Step.probe`),
teacher/weights.py (parameters.py), torch's autograd and AdamW, DeepSpeed 0.19 with the config of train/zero.py
(`Step._zero`).
benchmarks/plan_accuracy.py compares them with measured peaks.

Assumptions: every prompt and completion has the largest length allowed; micro-batches are full; every completion has a
teacher; if there are several micro-batches, gradients exist already. Not planned: the second gradient of
information_source='cross_fit', guard snapshots, the hinted rows of rehearsal, the measurement of every tenth step with
trust='off', a divergence over the full vocabulary with fused_head=False. Which siblings share a row on a CPU is asked
of the trainer's own function (forward/batching.py:join).

Symbols: N positions of a micro-batch, H hidden size, Q = heads * head size, K the same of keys, I intermediate size,
V vocabulary; w bytes of a parameter, c of a matmul (2 under autocast), always bytes per element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from pgpo.forward import batching
from pgpo.forward.batching import Limits
from pgpo.memory.activations import last_activations, layer_activations
from pgpo.memory.parameters import REDUCE_BUCKET, gradients, static, stored_bytes, trained_parameters
from pgpo.memory.shapes import FP32, FP64, GIB, ModelShape, TrainingSetting

HELD, CACHED, ROOM = 8, 4, 128  # train.forwards.HELD, forward.passes._CACHED, forward.sampling._ROOM
BUCKET = 2**26  # teacher.weights._BUCKET
KEPT, PROBE_LOGITS = 256, 2**24  # train.probe.KEPT_TOKENS, _CHUNK_LOGITS
CHUNK_LOGITS = {"cpu": 20_000_000, "cuda": 160_000_000}  # core._head_chunks
COMPILE_FROM, EAGER_LOGITS = 2**15, 2**18  # core._head_kernels, on a CPU
TRL_TILE = (4096, 32768)  # trl.kernels.chunked_logprob: tokens and vocabulary of one tile
# Elements, DeepSpeed 0.19's defaults of sub_group_size and stage3_max_live_parameters, which the recipes keep.
SUB_GROUP, MAX_LIVE = 10**9, 10**9
# Ours, not measured: CUDA context, libraries and NCCL's buffers, and the allocator's fragmentation.
RESERVE = GIB
RESERVE_SHARE = 0.05
# Of a process on a CPU, where they share the memory with the model: interpreter and libraries. Measured: VmRSS after
# the imports of `pgpo train` (Linux, torch 2.13 without CUDA).
PROCESS = 440 * 2**20


@dataclass(frozen=True)
class Joined:
    """Rows of joined siblings in one forward, `width` tokens each; and how many such forwards there are."""

    rows: int
    width: int
    completions: int
    parts: int


@dataclass(frozen=True)
class Step:
    """Memory of one GPU over a training step with a token budget. Items are in bytes."""

    model: ModelShape
    setting: TrainingSetting
    budget: int  # max_tokens_per_microbatch

    @property
    def rows(self) -> int:
        """Completions of one GPU."""
        return self.setting.prompts_per_step * self.setting.num_generations // self.setting.gpus

    @property
    def row(self) -> int:
        """Tokens of the longest prompt and completion."""
        return self.setting.max_prompt_length + self.setting.max_completion_length

    @property
    def teacher_row(self) -> int:
        return self.setting.teacher_prompt_length + self.setting.max_completion_length

    @property
    def shares(self) -> bool:
        """Prefix sharing for the teacher (trainer._shares_prompts; passes._whole_cache)."""
        return not self.setting.gathers_layers and self.model.expandable

    @property
    def fitting(self) -> int:
        """Rows of full length in a micro-batch; one row may exceed the budget (batching.split)."""
        slot = self.row
        if self.setting.distills and (self.setting.fsdp or not self.shares):
            slot = max(slot, self.teacher_row)
        return max(1, min(self.rows, self.budget // slot))

    @property
    def positions(self) -> int:
        """N: a full micro-batch."""
        if self.joined is not None:
            return self.joined.rows * self.joined.width
        return min(max(self.budget, self.row), self.rows * self.row)

    @property
    def completions(self) -> int:
        """Completion tokens among them."""
        if self.joined is not None:
            return self.joined.completions * self.setting.max_completion_length
        return math.ceil(self.positions * self.setting.max_completion_length / self.row)

    @property
    def width(self) -> int:
        """Tokens of the longest row in a forward."""
        return self.row - 1 if self.joined is None else self.joined.width

    @property
    def several(self) -> bool:
        """More than one micro-batch: gradients exist during the later ones."""
        return self.rows > self.fitting if self.joined is None else self.joined.parts > 1

    @property
    def masked(self) -> bool:
        """Joined rows are kept apart by a mask. Of others, only TRL pads prompts on the left; rows padded at the end
        need no mask (forward.layout.padded)."""
        return self.joined is not None or (self.fitting > 1 and not self.setting.distills)

    @cached_property
    def joined(self) -> Joined | None:
        """The student's largest micro-batch of joined siblings; None where rows stay apart."""
        return self._join(self.setting.max_prompt_length, (self.setting.num_generations,))

    @cached_property
    def teacher_joined(self) -> Joined | None:
        """The same of the teacher's forwards, where that is cheaper than prefix sharing. One sibling reads another
        demonstration than the others, and so another prompt."""
        return self._join(self.setting.teacher_prompt_length, (self.setting.num_generations - 1, 1), cache=True)

    def _join(self, prompt: int, groups: tuple[int, ...], cache: bool = False) -> Joined | None:
        """What forward/batching.py:join does with rows of the largest length; so many completions have one prompt."""
        s = self.setting
        if not (s.joins and self.shares):
            return None
        length, questions = s.max_completion_length, max(1, self.rows // s.num_generations)
        prompts = [([i, k] * prompt)[:prompt] for i in range(questions) for k, n in enumerate(groups) for _ in range(n)]
        lengths = [length] * len(prompts)
        forward_cost, pair_cost = batching.costs_of(
            self.model.parameters - self.model.head * (1 if self.model.tied else 2),
            self.model.layers,
            self.model.queries,
            s.device,
        )
        limits = Limits(budget=self.budget, forward_cost=forward_cost, pair_cost=pair_cost)
        parts, cost = batching.join(prompts, lengths, limits)
        if cache:
            carriers = {rows[0]: rows[1:] for rows in batching.siblings(prompts, lengths)}
            if cost >= batching.shared_cost(prompts, lengths, limits, carriers):
                return None
        largest = max(parts, key=lambda part: len(part) * max(map(len, part)))
        most = max(map(len, largest))
        if most < 2:
            return None
        # The prompt's last token predicts every first one (forward.layout.joined).
        width = prompt + most * (length - 1)
        return Joined(len(largest), width, sum(map(len, largest)), len(parts))

    @property
    def held(self) -> int:
        """Completion tokens whose teacher states are held: _HELD budgets, but whole groups (trainer._schedule)."""
        everything = self.rows * self.setting.max_completion_length
        if not self.shares:
            return min(self.completions, everything)
        group = self.setting.num_generations * self.setting.max_completion_length
        return min(everything, max(HELD * self.budget, group))

    @property
    def blocks(self) -> int:
        return math.ceil(self.rows * self.setting.max_completion_length / self.held)

    # Moments --------------------------------------------------------------------------------------------------------

    def moments(self, memory: float = 0.0) -> dict[str, dict[str, float]]:
        """{moment: {item: bytes}}; `memory` is what vLLM's share is a part of."""
        s = self.setting
        always = static(self.model, s)
        if s.vllm_share is not None:
            always["vLLM"] = s.vllm_share * memory
        found: dict[str, dict[str, float]] = {"rollout": self.rollout()}
        if s.distills:
            found["teacher"] = self.teacher()
        found |= {"loss": self.loss(), "backward": self.backward(), "step": self.step()}
        for name, own in found.items():
            if s.trust != "off" and name in self.keeping:
                own["log-probabilities before (trust)"] = self.kept()
            if s.zero:
                self._zero(name, own)
            items = always | {item: size + always.get(item, 0) for item, size in own.items()}
            if s.device == "cpu":
                items["process"] = PROCESS
            if s.device == "cuda":
                items["reserve"] = RESERVE + RESERVE_SHARE * sum(v for k, v in items.items() if k != "vLLM")
            found[name] = items
        return found

    def rollout(self) -> dict[str, float]:
        """All rows at once (sampling without top-k or top-p), by forward/sampling.py; by transformers' generate where
        layers are gathered. With vLLM, TRL's log-probabilities of what it sampled, a micro-batch at a time.

        KV cache: 2 w K per layer and token; and the prompts' forward. Logits of one token per row: as computed, in
        fp32, as probabilities and summed up (fp64), or copied, as probabilities, and multinomial's noise.
        """
        s, m = self.setting, self.model
        if s.vllm_share is None:
            per_token = m.layers * self._cache()
            logits = self.rows * m.vocabulary * (s.matmul + 4 * FP32)
            if s.fsdp or s.zero == 3:
                prompts = self.rows * s.max_prompt_length
                last = (per_token + self._cache()) * self.rows * self.row + logits
            else:
                prompts = math.ceil(self.rows / s.num_generations) * s.max_prompt_length
                last = max(self._expanded(per_token, prompts), self._grown(per_token) + logits)
            first = per_token * prompts + self._forward(prompts, prompts, s.max_prompt_length, self.rows > 1)
            items = {"generation": max(first, last)}
        else:
            n = self.positions
            items = {"log-probabilities": max(self._forward(n, n, self.row, self.fitting > 1), self._tile(12))}
        return items | self._cast_weights(every=s.full) | self._gathered(reduced=False)

    def _expanded(self, per_token: float, prompts: int) -> float:
        """The KV cache of the prompts, its copies for all rows with room, and the last copy without."""
        s = self.setting
        row = s.max_prompt_length + min(ROOM, s.max_completion_length)
        return per_token * (prompts + self.rows * row) + self._cache() / 2 * self.rows * s.max_prompt_length

    def _grown(self, per_token: float) -> float:
        """The KV cache with its last room, and keys or values of one layer before they got it."""
        s, room = self.setting, min(ROOM, self.setting.max_completion_length)
        times = max(1, math.ceil((s.max_completion_length - 1) / room))
        before = s.max_prompt_length + (times - 1) * room if times > 1 else 0
        return self.rows * (per_token * (s.max_prompt_length + times * room) + self._cache() / 2 * before)

    def teacher(self) -> dict[str, float]:
        """The teacher's forwards of the last block: gradients and the block before are still held
        (trainer._with_teacher).

        States: w H per completion token held, twice while they are put together.
        Prefix sharing: KV cache of the prompts, each with its longest completion, of the copies (twice while they are
            handed over, beside those of the forward before), and of the completions behind them.
        Other prompts: a plain forward of prompts and completions within the budget.
        """
        s, m = self.setting, self.model
        states = float(self.held * m.hidden * s.stream)
        tokens = min(max(self.budget, self.teacher_row), self.rows * self.teacher_row)
        passes = [states, self._forward(tokens, tokens, self.teacher_row, masked=False)]
        if self.teacher_joined is not None:
            found = self.teacher_joined
            tokens = found.rows * found.width
            passes = [states, self._forward(tokens, tokens, found.width, masked=True)]
        elif self.shares:
            prompt, completion = s.teacher_prompt_length, s.max_completion_length
            groups = math.ceil(self.held / (s.num_generations * completion))
            first = min(max(self.budget, self.teacher_row), 2 * groups * self.teacher_row)
            rows = self.budget // (math.ceil(prompt / CACHED) + completion)
            # The longest row of a prompt carries it, and a demonstration's own row reads another prompt.
            sharing = max(1, math.ceil(self.held / completion) - 2 * groups)
            rows = max(1, min(rows, sharing))
            cache = m.layers * self._cache()
            passes.append(cache * first + self._forward(first, first, self.teacher_row, masked=False))
            kept = cache * first
            keys, more = rows * self.teacher_row, min(rows, sharing - rows)
            passes += [kept + 2 * cache * rows * prompt, kept + cache * (keys + 2 * more * prompt)]
            passes.append(kept + cache * keys + self._forward(rows * completion, keys, self.teacher_row, masked=True))
        items = {"teacher states": states * (2 if self.blocks > 1 else 1), "teacher pass": max(passes)}
        if self.blocks > 1:
            items["gradients"] = gradients(m, s)
        # autocast keeps what it casts of parameters that train only
        return items | self._cast_weights(every=s.full and s.teacher == "live") | self._gathered(reduced=False)

    def loss(self) -> dict[str, float]:
        """The end of the student's forward: at the heads, or before them, where a probed row is seen."""
        heads = self._head()
        if self.setting.trust != "off" and self.repeats_itself:
            length = self.setting.max_completion_length
            seen = {"probe (trust)": self._probe_logits(length, keeps=True) + self._state_bytes(length)}
            heads = max(heads, seen, key=lambda items: sum(items.values()))
        items = self._saved() | self._states() | heads
        if self.several:
            items["gradients"] = gradients(self.model, self.setting)
        every = self.setting.full or not self.setting.gradient_checkpointing
        # kept by autocast until the forward ends, and of frozen weights by autograd
        return items | self._cast_weights(every) | self._gathered()

    def backward(self) -> dict[str, float]:
        """The largest of three times in the backward pass.

        Heads: all logits only (log-probabilities, their gradient and the logits', 3 [N, V] in fp32), and TRL's kernel,
            which adds up the gradients of head and states in fp32.
        First block: its saved tensors (made anew with checkpointing), the gradient of the stream w H, and in the MLP
            the gradients of silu(gate), up and their product, c I each, less the product itself; with eager attention
            the gradients of two matrices of scores, after the MLP's are gone. A tied head's gradient waits for the end.
        End: all gradients, and V H for the embedding beside the waiting one.
        """
        s, m, n = self.setting, self.model, self.positions
        c, w = s.matmul, s.stream
        total = gradients(m, s)
        head = float(w * m.head) if s.full else 0.0
        during = self._states() | ({"gradients": total} if self.several else {})
        casts = self._cast_weights(not s.gradient_checkpointing)
        heads: dict[str, float] = {}
        if not s.distills:
            sums = FP32 * (m.head * s.full + m.hidden * self.completions)
            rounded = head if w < FP32 and s.device == "cuda" else 0.0
            heads = self._saved() | during | casts | {"head gradient": sums + rounded, "logits": self._tile(29)}
        elif not s.fused_head:
            heads = self._saved() | during | casts | {"logits": 3.0 * FP32 * m.vocabulary * self.completions}

        mlp = (2 if s.full or "down_proj" in s.lora_targets else 3) * c * m.intermediate
        if s.attention == "eager":
            mlp = max(mlp, 2 * FP32 * m.heads * self.width - 4 * c * m.intermediate)
        again = 0.0
        if s.gradient_checkpointing:
            again = layer_activations(m, s, self.width, self.masked, self.joined is not None)
        block = {
            "block in backward": n * (w * m.hidden + mlp + again) + c * m.largest * s.full,
            "head gradient": head if m.tied or not self.several else 0.0,
        }
        end = {
            "gradients": total,
            "block in backward": float(n * w * m.hidden),
            "head gradient": head * (m.tied + 1 if self.several else m.tied),
        }
        times = (heads, self._saved() | during | casts | block, self._states() | end)
        return max(times, key=lambda items: sum(items.values())) | self._gathered()

    def step(self) -> dict[str, float]:
        """Fused AdamW works in place. SGD adds the weight decay in a copy of the gradients: of all on CUDA, where torch
        steps them together, else of the largest. The teacher's average takes an fp32 copy of a bf16 student in buckets.
        """
        s, m = self.setting, self.model
        items = {"gradients": gradients(m, s)}
        if s.undoes:  # in the optimizer's dtype, from the end of the backward pass (train/trust.py)
            items["weights before the step (trust)"] = items["gradients"]
        update: dict[str, float] = {}
        if s.optimizer == "sgd":
            together = s.device == "cuda" or not s.full or s.zero is not None  # one flat tensor under ZeRO
            update["optimizer"] = items["gradients"] if together else float(s.parameter_bytes * max(m.head, m.largest))
        if "teacher average" in static(m, s):
            update["teacher average"] = float(min(trained_parameters(m, s), max(BUCKET, m.head)) * FP32)
        if s.trust == "off":
            return items | update
        return items | max(update, self.probe(), key=lambda found: sum(found.values()))

    # Measured trust -------------------------------------------------------------------------------------------------

    @property
    def probed(self) -> int:
        """Rows of one GPU that are probed, at most: one per question, to so many tokens."""
        s = self.setting
        return min(math.ceil(s.prompts_per_step / s.gpus), math.ceil(s.trust_tokens / s.max_completion_length))

    @property
    def repeats_itself(self) -> bool:
        """The loss shows the policy before the step (train/forwards.py:Forwards.repeats_itself)."""
        s = self.setting
        return not s.autocast and s.parameter_bytes == FP32 and not (s.lora is not None and s.lora_dropout)

    @property
    def keeping(self) -> set[str]:
        """Moments with log-probabilities from before a step: from its loss, or its end, until the next step begins."""
        seen = {"loss", "backward"} | ({"teacher"} if self.setting.distills and self.blocks > 1 else set())
        return {"rollout", "step"} | (seen if self.repeats_itself else set())

    def kept(self) -> float:
        """Bytes of these: fp32, and int64 for the tokens."""
        s = self.setting
        tokens = min(s.trust_tokens, self.probed * s.max_completion_length)
        return float(tokens * self._kept_bytes)

    @property
    def _kept_bytes(self) -> int:
        """Per token: the KEPT most likely ones and which they are, or the whole vocabulary."""
        return self.model.vocabulary * FP32 if self.model.vocabulary <= KEPT else KEPT * (FP32 + 8)

    def probe(self) -> dict[str, float]:
        """A forward of probed rows without gradient: its blocks, or their hidden states, a chunk of logits and what is
        compared of them (train/probe.py:Probe._moved)."""
        s, m = self.setting, self.model
        n = min(max(self.budget, self.row), self.probed * self.row)
        tokens = math.ceil(n * s.max_completion_length / self.row)
        end = float(n * m.hidden * s.stream) + self._state_bytes(tokens) + tokens * self._kept_bytes
        end += self._probe_logits(tokens, keeps=False)
        items = {"probe (trust)": max(self._forward(n, n, self.row, masked=False), end)}
        return items | self._cast_weights(every=s.full) | self._gathered(reduced=False)

    def _state_bytes(self, tokens: int) -> float:
        return float(tokens * self.model.hidden * self.setting.stream)

    def _probe_logits(self, tokens: int, keeps: bool) -> float:
        """Of a chunk: as computed, divided by the temperature and as log-probabilities. Where likely tokens are kept,
        the log-probabilities of the chunk before too; where they are compared, five values of each."""
        vocabulary, stored = self.model.vocabulary, self.setting.stream
        rows = min(tokens, max(1, PROBE_LOGITS // vocabulary))
        whole = vocabulary * (stored + 2 * FP32)
        if keeps:
            return float(max(rows * whole, rows * vocabulary * FP32 + min(rows, tokens - rows) * whole))
        return float(rows * max(whole, vocabulary * stored + 5 * FP32 * min(KEPT, vocabulary)))

    # Parts ----------------------------------------------------------------------------------------------------------

    def _cache(self) -> float:
        """Bytes of KV cache per token and layer; DynamicCache raises values to the keys' dtype, w."""
        return 2.0 * self.model.keys * self.setting.stream

    def _forward(self, queries: int, keys: int, width: int, masked: bool) -> float:
        """Bytes held in a block's forward without gradient: stream and norm w H each, and the larger of

        MLP         silu(gate), up and their product, c I each
        attention   query and output; keys and values repeated for masked rows, and cast; mask; eager: two fp32
                    matrices of scores
        """
        s, m = self.setting, self.model
        c, w = s.matmul, s.stream
        cast = c if w != c else 0
        mlp = queries * (3 * c * m.intermediate + cast * m.hidden)
        grows = m.heads > m.kv_heads and (s.attention == "eager" or (masked and s.attention == "sdpa"))
        per_key = 2 * (m.queries * w if grows else 0) + 2 * cast * (m.queries if grows else m.keys)
        attention = float(queries * m.queries * (w + cast + c) + keys * per_key)
        if s.attention == "eager":
            attention += queries * width * m.heads * 2 * FP32
        elif masked and s.attention == "sdpa":
            attention += queries * width * (1 + c)
        return queries * 2 * w * m.hidden + max(mlp, attention)

    def _saved(self) -> dict[str, float]:
        """What autograd holds of the student's forward; with checkpointing the blocks' inputs and masks."""
        s, m, n = self.setting, self.model, self.positions
        width, joined = self.width, self.joined is not None
        if s.gradient_checkpointing:
            masked = self.masked and s.attention != "flash" and not joined
            mask = (s.stream if s.attention == "eager" else 1) * width if masked else 0
            blocks = float(n * (m.layers * s.stream * m.hidden + mask))
        else:
            blocks = float(n * m.layers * layer_activations(m, s, width, self.masked, joined))
        if joined:
            blocks += n * width * s.stream  # the mask
        return {"activations": blocks + n * last_activations(m, s)}

    def _states(self) -> dict[str, float]:
        """Teacher states: of the block, and the micro-batch's copy."""
        s, m = self.setting, self.model
        if not s.distills:
            return {}
        held = self.held + (self.completions if self.shares else 0)
        return {"teacher states": float(held * m.hidden * s.stream)}

    def _head(self) -> dict[str, float]:
        """Heads of student and teacher.

        Fused (core/head.py): two buffers of a chunk's logits, on CUDA in fp32 and a third in the matmul's dtype
        (of a lone chunk the teacher's is gone when the weight's gradient comes: the larger of the two counts);
        the student's kept states and their gradient, w H each; the weight's gradient, in fp32 where it is added up in
        fp32, and rounded; under autocast bf16 copies of both heads and both states.
        All logits: both sides in fp32, and in the entropy log-probabilities, probabilities, the two masked and
        multiplied: 6 [N, V] in fp32.
        GRPO: one tile of TRL's kernel.
        """
        s, m = self.setting, self.model
        tokens, c, w = self.completions, s.matmul, s.stream
        kept = float(w * m.hidden * tokens)
        if not s.distills:
            return {"logits": self._tile(12), "head states": kept}
        casts = 0.0 if w == c else 2.0 * c * (tokens * m.hidden + m.head)
        if not s.fused_head:
            return {"logits": 6.0 * FP32 * m.vocabulary * tokens, "head states": kept, "head in bf16": casts}
        wide = s.device == "cuda" and c == 2
        chunk = max(1, CHUNK_LOGITS[s.device] // m.vocabulary)
        if s.full and tokens <= min(2 * chunk, m.hidden):
            chunk *= 2  # core._head_chunks.default_chunk_size
        chunks = math.ceil(tokens / chunk)
        step = math.ceil(tokens / chunks)
        gradient = 0
        if s.full:
            gradient = (FP32 if wide or c != w else w) * m.head + (w * m.head if wide and w < FP32 else 0)
        temporary = 0
        if s.device == "cpu":  # torch's scatter_ into bf16 works in an fp32 copy; without a compiler, six of a few rows
            eager = 6 * FP32 * min(EAGER_LOGITS, step * m.vocabulary) if m.vocabulary < COMPILE_FROM else 0
            temporary = max(eager, FP32 * step * m.vocabulary if c == 2 else 0)
        student, teacher = (step * m.vocabulary * width for width in ((FP32 + 2, FP32) if wide else (c, c)))
        while_both = teacher + temporary
        if chunks == 1:  # they are gone when the weight's gradient is made
            while_both = max(0, while_both - gradient)
        return {
            "logits": float(student + while_both),
            "head states": 2 * kept,
            "head gradient": float(gradient),
            "head in bf16": casts,
        }

    def _cast_weights(self, every: bool) -> dict[str, float]:
        """Autocast's bf16 copies of fp32 matrices: of all blocks, or of one."""
        if not (self.setting.autocast and self.setting.stream == FP32):
            return {}
        return {"weights in bf16 (autocast)": 2.0 * self.model.block * (self.model.layers if every else 1)}

    def _tile(self, temporaries: int) -> float:
        """TRL's tile of logits; on a CPU its positions are not compacted and fp32 temporaries go with it."""
        s, m = self.setting, self.model
        n, more = (self.completions, 0) if s.device == "cuda" else (self.positions, temporaries)
        return float(min(n, TRL_TILE[0]) * min(m.vocabulary, TRL_TILE[1]) * (s.matmul + more))

    def _gathered(self, reduced: bool = True) -> dict[str, float]:
        """FSDP2, not measured: embedding and head whole from forward to backward, and the teacher's; three blocks (the
        one that runs and two ahead); `reduced`: gradients of a block and of the head, whole, and in fp32 to be summed.
        """
        s, m = self.setting, self.model
        if not s.fsdp:
            return {}
        heads = m.head * (1 if m.tied else 2) * (2 if "teacher" in static(m, s) and s.full else 1)
        whole = s.stream * (heads + 3 * m.block)
        if reduced and s.full:
            whole += (m.block + m.head) * (s.stream + FP32)
        return {"gathered (FSDP)": float(whole)}

    def _zero(self, moment: str, items: dict[str, float]) -> None:
        """Add what DeepSpeed holds for a moment, from runtime/zero/ of its source.

        Gradients   this GPU's part of the fp32 sum: stage 2 makes it in the first backward
                    (_build_compact_grad_partition_buffer), stage 3 at the start (grad_partitions_flat_buffer). Stage 2
                    without bf16 holds the part of one micro-batch beside the sum, and copies it flat for the step.
        Reducing    stage 2: a bucket in the parameters' dtype (setup_buckets), in the backward alone, its slices put
                    together and in fp32 (allreduce_bucket). Stage 3: the bucket's slices put together
                    (reduce_scatter_coalesced). A tensor larger than the bucket goes by itself.
        Step        the norm takes an fp64 copy of one tensor's part (get_grad_norm_direct); stage 3 then copies the
                    gradients, a sub-group at a time (_prepare_fp32_grad_for_sub_group). Or what the teacher's average
                    takes, if that is more: when it follows, stage 2 holds gradients no more.
        Gathered    stage 3: at most stage3_max_live_parameters, or a larger head; everything for transformers'
                    generation (TRL: ds3_gather_for_generation), for TRL's merge of adapters for vLLM, and for the
                    teacher's average, whose tensors are gathered one by one but held until all are there
                    (teacher/weights.py, `update`). Norms, which stay whole, are not counted.
        """
        s, m = self.setting, self.model
        trained, part, stored = trained_parameters(m, s), gradients(m, s), stored_bytes(s)
        largest = min(trained, max(m.head, m.largest))
        if s.zero == 3 or moment == "backward":
            items.setdefault("gradients", part)
        if moment in ("backward", "step") and s.zero == 2 and stored == FP32:
            items["gradients"] += part
        if moment == "backward":
            reduced = max(min(REDUCE_BUCKET, trained), largest)
            together = stored + (FP32 if stored < FP32 else 0) if s.zero == 2 else FP32
            items["reduce bucket (ZeRO)"] = float(reduced * together + (REDUCE_BUCKET * stored if s.zero == 2 else 0))
        everything = float(s.stream * m.parameters)
        live = min(everything, float(s.stream * max(MAX_LIVE, m.head)))
        if moment == "step":
            norm = FP64 * (largest / s.gpus if s.zero == 3 else min(largest, trained / s.gpus))
            copy = FP32 * min(SUB_GROUP, trained / s.gpus) if s.zero == 3 else 0.0
            update: dict[str, float] = {"norm, flat gradients (ZeRO)": max(norm, copy)}
            average: dict[str, float] = {"teacher average": items.pop("teacher average", 0.0)}
            if s.zero == 2:
                update["gradients"] = items.pop("gradients")
            elif s.distills and s.teacher not in ("live", "frozen"):
                average["gathered (ZeRO)"] = float(s.stream * max(m.head, m.largest))  # one parameter at a time
            items.update(update if sum(update.values()) > sum(average.values()) else average)
        elif s.zero == 3:
            whole = moment == "rollout" and (s.vllm_share is None or not s.full)
            unused = moment == "teacher" and s.teacher != "live"
            items["gathered (ZeRO)"] = 0.0 if unused else everything if whole else live
