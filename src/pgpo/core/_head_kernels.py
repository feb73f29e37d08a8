"""The fused head's device code: the elementwise formulas by the fastest available backend, and the matmuls.

Elementwise: on CUDA with PGPO_TRITON=1 the kernels of triton_kernels.py, which have not run on a GPU yet; on CUDA, and
on a CPU with a large vocabulary, torch.compile; else eager code. A backend that fails is not used again in the
process; one warning says so.

Precision: logits of a bf16 or fp16 head are fp32 on CUDA, where a matmul can write its accumulator at no cost.
Elsewhere they are rounded to the head's dtype, as in every dense half-precision head: on a CPU an fp32 matmul takes 4
times as long (errors of both: docs/PERFORMANCE.md).
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._head_formulas import Spec, statistics

# Eager code processes a few rows at a time, so that temporaries stay in a CPU's cache (1 MiB).
_EAGER_LOGITS = {"cpu": 2**18}
_EAGER_LOGITS_ELSEWHERE = 2**24
# Compiling takes tens of seconds, once; on a CPU it pays off only for vocabularies of language models.
_COMPILE_FROM_VOCABULARY = 2**15


# Elementwise ----------------------------------------------------------------------------------------------------------

_failed: set[str] = set()  # ways given up in this process


def pays_to_compile(device: torch.device, vocabulary: int) -> bool:
    """Whether to use torch.compile by default: it must repay its compile time."""
    return device.type == "cuda" or (device.type == "cpu" and vocabulary >= _COMPILE_FROM_VOCABULARY)


def elementwise(
    function: Callable[..., Any], compiled: bool | None, spec: Spec, dtype: torch.dtype, *tensors: Tensor | None
) -> Any:
    """`statistics` or `logit_gradient` of a chunk.

    Args:
        compiled: True: by torch.compile, whose failure is raised. False: eagerly. None: by the first that works.
        tensors: [rows, V], or [rows, ...]; the first is not None.
    """
    for name, way in _ways(compiled, tensors[0]):  # type: ignore[arg-type]
        try:
            return way(function)(spec, dtype, *tensors)
        except Exception as error:
            # For example no C compiler, a GPU that Triton does not support, or too many recompilations. Nothing is
            # written yet, so the next backend can start. For bad arguments eager code raises the error again.
            if compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            _failed.add(name)
            _warn(name, error)
    return _eagerly(function, spec, dtype, *tensors)


def _ways(compiled: bool | None, first: Tensor) -> list[tuple[str, Callable[..., Any]]]:
    ways: list[tuple[str, Callable[..., Any]]] = []
    if compiled is None and _has_triton(first.device):
        ways.append(("its Triton kernels", _in_triton))
    # The compiler never treats a length of 1 as dynamic and would compile again for it.
    if compiled is not False and len(first) > 1:
        ways.append(("torch.compile", _compiled))
    return [(name, way) for name, way in ways if compiled or name not in _failed]


@lru_cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _has_triton(device: torch.device) -> bool:
    """Opt-in: the kernels have not run on a GPU yet."""
    return device.type == "cuda" and os.environ.get("PGPO_TRITON") == "1" and _triton_installed()


def _in_triton(function: Callable[..., Any]) -> Callable[..., Any]:
    from . import triton_kernels  # Triton is optional

    return triton_kernels.statistics if function is statistics else triton_kernels.logit_gradient


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(spec: Spec, dtype: torch.dtype, *tensors: Tensor | None) -> Any:
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        # Make floats of the spec constants; otherwise a float that changes becomes an fp64 input of the kernel.
        with torch._dynamo.config.patch(specialize_float=True):
            return _compile(function)(spec, dtype, *tensors)

    return call


@lru_cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


def _eagerly(function: Callable[..., Any], spec: Spec, dtype: torch.dtype, *tensors: Tensor | None) -> Any:
    rows, vocabulary = tensors[0].shape  # type: ignore[union-attr]
    block = max(1, _EAGER_LOGITS.get(tensors[0].device.type, _EAGER_LOGITS_ELSEWHERE) // vocabulary)  # type: ignore[union-attr]
    results = [
        function(spec, dtype, *(t if t is None else t[i : i + block] for t in tensors)) for i in range(0, rows, block)
    ]
    return None if results[0] is None else torch.cat(results)


def _warn(way: str, error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(f"the fused head runs without {way}, which failed: {reason}", stacklevel=3)


# Matmuls --------------------------------------------------------------------------------------------------------------


class Head:
    """One side's hidden states and head in the matmul's dtype, and a buffer for a chunk's logits [step, V]."""

    def __init__(self, tensors: list[Any], dtype: torch.dtype, step: int) -> None:
        hidden, weight, self.bias = tensors
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.wide = _writes_fp32(hidden.device, dtype)
        self.buffer = self.hidden.new_empty((step, len(weight)), dtype=torch.float32 if self.wide else dtype)

    def logits(self, rows: slice) -> Tensor:
        """hidden @ weight.T + bias of some rows; overwrites the previous chunk's."""
        out = self.buffer[: rows.stop - rows.start]
        if self.wide:
            _mm_fp32(self.hidden[rows], self.weight.t(), out)
            if self.bias is not None:
                out.add_(self.bias)
        elif self.bias is not None:
            torch.addmm(self.bias.to(out.dtype), self.hidden[rows], self.weight.t(), out=out)
        else:
            torch.mm(self.hidden[rows], self.weight.t(), out=out)
        return out


class Gradients:
    """Gradients of the student's hidden states, weight and bias, summed over chunks. None where not needed.

    The weight gradient is summed in fp32 where a matmul can add to fp32, else in the weight's dtype (bf16 on a CPU
    rounds it once per chunk, as accumulating micro-batches does).
    """

    def __init__(
        self, student: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
    ) -> None:
        self.student, self.needs = student, needs
        wide = torch.promote_types(student.weight.dtype, torch.float32)
        same = not student.wide and student.weight.dtype == weight.dtype
        self.sum_dtype = weight.dtype if same else wide
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight: Tensor | None = None  # allocated when the first chunk needs it
        self.bias = torch.zeros_like(bias, dtype=wide) if needs[2] else None  # type: ignore[arg-type]
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)

    def add(self, rows: slice, logit_gradient: Tensor) -> None:
        """Add a chunk's contribution, from its d loss / d logits [rows, V] in the matmul's dtype."""
        hidden = self.student.hidden[rows]
        if self.hidden is not None:
            self.hidden[rows] = logit_gradient @ self.student.weight
        if self.needs[1]:
            self._add_to_weight(logit_gradient.t(), hidden)
        if self.bias is not None:
            self.bias += logit_gradient.sum(0, dtype=self.bias.dtype)

    def _add_to_weight(self, a: Tensor, b: Tensor) -> None:
        beta = 1.0
        if self.weight is None:
            beta = 0.0  # ignores the uninitialised memory
            self.weight = torch.empty_like(self.student.weight, dtype=self.sum_dtype)
        total = self.weight
        if self.student.wide:
            _addmm_fp32(total, a, b, beta)
        elif total.dtype == b.dtype:
            total.addmm_(a, b, beta=beta)
        else:  # product and sum differ in dtype: blocks of the vocabulary keep the product small
            for block in slices(0, len(total), 2**14):
                total[block] = a[block] @ b + (total[block] if beta else 0.0)

    def result(self) -> tuple[Tensor | None, ...]:
        if self.needs[1] and self.weight is None:
            self.weight = torch.zeros_like(self.student.weight)
        gradients = (self.hidden, self.weight, self.bias)
        return tuple(g if g is None else g.to(dtype) for g, dtype in zip(gradients, self.dtypes, strict=True))


def _writes_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a half-precision matmul can write its fp32 accumulator: CUDA, torch >= 2.8."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and "dtype_out" in torch.ops.aten.addmm.overloads()


def _mm_fp32(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out_dtype=torch.float32, out=out)


def _addmm_fp32(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)


def slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, max(step, 1))]
