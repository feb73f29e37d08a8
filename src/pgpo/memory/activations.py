"""What autograd saves of a forward for the backward, per position."""

from __future__ import annotations

from pgpo.memory.shapes import FP32, ModelShape, TrainingSetting


def layer_activations(
    model: ModelShape, setting: TrainingSetting, width: int, masked: bool, joined: bool = False
) -> float:
    """Bytes per position that one block's forward leaves for its backward (transformers' Llama and Qwen3 blocks).

    A norm over D keeps its input and 1/rms in fp32, and what it multiplies by its weight:  4 D + 4 + w D.
        Two norms over H; Qwen3 also over Q and K, of the matmuls' dtype.
    A matrix keeps its input, c D. Autocast casts an fp32 input once per matrix: three times before q, k, v and twice
        before gate, up. A frozen matrix keeps nothing but itself; its adapter keeps its input and its r values.
    sdpa and flash (arXiv 2205.14135): query, key, value, output, and 4 per head for the log-normaliser. A mask, needed
        as soon as rows differ in length, costs c times the width, and keys and values repeated for every query head.
        The mask of joined rows is handed over in the form that sdpa adds (Passes._attention_mask), one for all blocks
        unless autocast casts it.
    eager: the softmax in fp32, and a bf16 copy: (4 + c) heads * width.
    SwiGLU: gate, silu(gate), up and their product, c I each. Residual sums keep nothing.

    Args:
        width: tokens of the longest row, for what grows with its square.
        masked: whether the micro-batch has a mask.
        joined: whether that is one of joined rows.
    """
    s, m = setting, model
    h, q, k, c = m.hidden, m.queries, m.keys, s.matmul
    eager = s.attention == "eager"

    def norm(size: int, heads: int, precision: int) -> int:
        return FP32 * size + FP32 * heads + (precision * size if s.full else 0)

    total: float = 2 * norm(h, 1, s.stream)
    total += _inputs(s, h, s.stream, ("q_proj", "k_proj", "v_proj"))
    if m.head_norms:
        total += norm(q, m.heads, c) + norm(k, m.kv_heads, c)
    repeated = m.heads > m.kv_heads and (eager or (masked and s.attention == "sdpa"))
    total += c * q + 2 * c * (q if repeated else k)
    after = _inputs(s, q, c, ("o_proj",))
    if eager:
        total += m.heads * width * (FP32 + (c if c < FP32 else 0)) + after
    else:
        total += (
            c * q
            + FP32 * m.heads
            + (c * width if masked and s.attention == "sdpa" and not (joined and c == s.stream) else 0)
        )
        # what the attention keeps as its output is what o_proj keeps as its input
        shared = s.full or ("o_proj" in s.lora_targets and _shares_input(s, c))
        total += after - (c * q if shared else 0)
    total += _inputs(s, h, s.stream, ("gate_proj", "up_proj"))
    total += 3 * c * m.intermediate + _inputs(s, m.intermediate, c, ("down_proj",))
    return total


def last_activations(model: ModelShape, setting: TrainingSetting) -> float:
    """Bytes per position outside the blocks: last norm, cosines and sines, token ids; and the last hidden state."""
    s = setting
    norm = FP32 * model.hidden + FP32 + (s.stream * model.hidden if s.full else 0)
    return norm + s.stream * model.hidden + 2 * s.stream * model.head_dim + 8


def _inputs(setting: TrainingSetting, size: int, precision: int, names: tuple[str, ...]) -> int:
    """Bytes per position that matrices keep of a common input of `size` elements of `precision` bytes."""
    s = setting
    if s.full:
        return s.matmul * size * (1 if precision == s.matmul else len(names))
    adapted = [name for name in names if name in s.lora_targets]
    copies = min(1, len(adapted)) if _shares_input(s, precision) else len(adapted)
    noise = (1 if s.device == "cuda" else FP32) if s.lora_dropout else 0  # CUDA keeps a mask, a CPU the factors
    return _adapter_precision(s) * size * copies + noise * size * len(adapted) + _adapter_values(s, names)


def _adapter_values(setting: TrainingSetting, names: tuple[str, ...]) -> int:
    rank = setting.lora or 0
    return sum(_adapter_precision(setting) * rank for name in names if name in setting.lora_targets)


def _adapter_precision(setting: TrainingSetting) -> int:
    """PEFT runs adapters in their own dtype, fp32, unless autocast makes it bf16."""
    return 2 if setting.autocast else FP32


def _shares_input(setting: TrainingSetting, precision: int) -> bool:
    """Whether an adapter keeps its input as it is: no dropout, no cast."""
    return not setting.lora_dropout and not setting.autocast and precision == FP32
