"""The fused head's Triton kernels against the functions that define them: under Triton's interpreter, compiled for GPUs
that are not here, and on one that is. Which way the head takes.

What triton_cases.py does runs in processes of its own: Triton would change how torch.compile works in this one.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_cases as cases
from processes import patient
from test_head import build, check, gradients

from pgpo.core import _head_formulas as formulas
from pgpo.core import _head_kernels as kernels
from pgpo.core import dense_distillation_head, fused_distillation_head
from tests.oracles import head as oracle

ROOT = Path(__file__).parents[2]
TRITON = Path(sys.prefix, "triton")  # `make test` puts it there, apart from what all other tests see


def results(folder: Path, mode: str) -> dict[str, Any]:
    if not (TRITON / "triton").is_dir() and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; `make test` puts it into .venv/triton where it can")
    places = [str(ROOT / "src"), str(ROOT), *([str(TRITON)] if TRITON.is_dir() else [])]
    places += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TRITON_")},
        "PYTHONPATH": os.pathsep.join(places),
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(folder),  # an old kernel would hide that the new one does not compile
    }
    if mode == "interpreted":
        environment["TRITON_INTERPRET"] = "1"
    out = folder / f"{mode}.json"
    command = [sys.executable, str(Path(cases.__file__)), str(out), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patient(90))
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("interpreted"), "interpreted")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("compiled"), "compiled")


@pytest.mark.parametrize("name", cases.INTERPRETED)
def test_under_the_interpreter(name: str, interpreted: dict[str, Any]) -> None:
    assert interpreted[name]["error"] is None, interpreted[name]["error"]


@pytest.mark.parametrize("name", cases.COMPILED)
def test_compiled_without_a_gpu(name: str, compiled: dict[str, Any]) -> None:
    assert compiled[name]["error"] is None, compiled[name]["error"]


# ------------------------------------------------------------------------------------------------ which way is taken


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that are taken, in order; CPU tensors count as CUDA's. A way that fails is put in by a test."""
    taken: list[str] = []

    def through(way: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            taken.append(way)
            return function(*arguments)

        return call

    monkeypatch.setattr(kernels, "_has_triton", lambda device: True)
    monkeypatch.setattr(kernels, "_COMPILE_FROM_VOCABULARY", 1)
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.setattr(kernels, "_in_triton", lambda function: through("triton", function))
    monkeypatch.setattr(kernels, "_compile", lambda function: through("compile", function))
    return taken


def fails(way: str, taken: list[str], error: Exception) -> Any:
    def call(*arguments: Any) -> Any:
        taken.append(way)
        raise error

    return lambda function: call


@pytest.mark.parametrize(("compiled", "way"), [(None, "triton"), (True, "compile"), (False, None)])
def test_the_way_that_was_asked_for(compiled: bool | None, way: str | None, ways: list[str]) -> None:
    case = build()
    out = fused_distillation_head(**case.arguments(), token_weights=case.weights, compiled=compiled)
    assert ways == ([way] * 2 if way else [])
    dense = dense_distillation_head(**case.arguments())
    torch.testing.assert_close(out.divergence, dense.divergence, rtol=1e-12, atol=1e-14)


def test_a_row_alone_goes_to_triton_too(ways: list[str]) -> None:
    fused_distillation_head(**build(n=1).arguments())
    assert ways == ["triton"]


@pytest.mark.parametrize("compiler", [True, False])
def test_kernels_that_fail_are_given_up_with_one_warning(
    compiler: bool, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_in_triton", fails("triton", ways, RuntimeError("no such GPU\nmore")))
    if not compiler:
        monkeypatch.setattr(kernels, "_compile", fails("compile", ways, RuntimeError("no C++ compiler")))
    case = build()
    expected = oracle.head(**case.arguments())
    with pytest.warns(UserWarning, match="the fused head runs without") as caught:
        check(case, expected, chunk_size=4)  # two chunks; two forms with a table and a gradient each
    messages = ["the fused head runs without its Triton kernels, which failed: no such GPU"]
    if not compiler:
        messages.append("the fused head runs without torch.compile, which failed: no C++ compiler")
    assert [str(w.message) for w in caught] == messages
    assert ways == ["triton", *["compile"] * (8 if compiler else 1)]


def test_kernels_that_fail_at_the_gradient(ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is Triton's, the gradient another way's."""
    broken = fails("triton", ways, RuntimeError("no"))
    monkeypatch.setattr(kernels, "_in_triton", lambda f: f if f is formulas.statistics else broken(f))
    case = build()
    expected = oracle.head(**case.arguments())
    with pytest.warns(UserWarning, match="without its Triton kernels"):
        check(case, expected)


def test_no_memory_is_no_fault_of_the_kernels(ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_in_triton", fails("triton", ways, torch.OutOfMemoryError("full")))
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError, match="full"):
        warnings.simplefilter("error")
        fused_distillation_head(**build().arguments())
    assert ways == ["triton"] and not kernels._failed


def test_a_triton_that_cannot_be_imported(ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, it says, and broken."""

    def broken(function: Any) -> Any:
        raise ImportError("libcuda.so.1 not found")

    monkeypatch.setattr(kernels, "_in_triton", broken)
    with pytest.warns(UserWarning, match="without its Triton kernels, which failed: libcuda.so.1 not found"):
        fused_distillation_head(**build().arguments())
    assert ways == ["compile"]


@pytest.mark.parametrize("installed", [True, False])
def test_triton_is_for_cuda_where_it_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._triton_installed.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.delenv("PGPO_TRITON", raising=False)
    assert not kernels._has_triton(torch.device("cuda", 1))
    monkeypatch.setenv("PGPO_TRITON", "1")
    try:
        assert kernels._has_triton(torch.device("cuda", 1)) == installed
        assert not kernels._has_triton(torch.device("cpu"))
        assert not kernels._has_triton(torch.device("mps"))
    finally:
        kernels._triton_installed.cache_clear()


# ------------------------------------------------------------------------------------------------ on a GPU

on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and Triton"
)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ["neutral", "everything"])
def test_the_kernels_on_a_gpu(head: str, dtype: torch.dtype) -> None:
    from pgpo.core import triton_kernels

    wide = torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if wide == torch.float64 else 1e-5  # exp is good to 2^-22 there
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    for (kind, beta), (rows, vocabulary) in itertools.product(cases.KINDS, ((1, 1), (5, 2049), (3, 151_936))):
        spec = cases.spec_of(kind, beta, **cases.HEADS[head])
        student, teacher = (cases.random(rows, vocabulary, seed=i).to(dtype) for i in (1, 2))
        student[-1, 1:2] = teacher[-1, 1:2] = -torch.inf
        table = formulas.statistics(spec, torch.float64, student, teacher)
        ours = triton_kernels.statistics(spec, wide, student.cuda(), teacher.cuda())
        for i in range(8):
            cases.close(ours[:, i].cpu(), table[:, i], tolerance, f"column {i}")
        weights = [cases.random(rows, 1, scale=1.0, seed=10 + i) for i in range(3)]
        labels = torch.randint(vocabulary, (rows, 1))
        expected = torch.empty(rows, vocabulary, dtype=torch.float64)
        formulas.logit_gradient(spec, torch.float64, student, teacher, table, *weights, labels, expected)
        on_gpu = [w.to("cuda", wide) for w in weights]
        for in_place in (False, True):
            given = student.cuda()
            out = None if in_place else torch.full_like(given, torch.nan)
            triton_kernels.logit_gradient(spec, wide, given, teacher.cuda(), ours, *on_gpu, labels.cuda(), out)
            cases.close((given if out is None else out).cpu(), expected, tolerance + rounding, "gradient")


@on_a_gpu
@pytest.mark.parametrize(("kind", "beta"), cases.DIRECTIONS)
@pytest.mark.parametrize("side", [0, 1])
def test_nan_on_a_gpu(side: int, kind: str, beta: float) -> None:
    """A GPU's maximum drops NaN, the interpreter's keeps it."""
    from pgpo.core import triton_kernels

    spec = cases.spec_of(kind, beta)
    pair = [cases.random(2, 5000, seed=i).float().cuda() for i in (1, 2)]
    pair[side][1, 4321] = torch.nan
    table = triton_kernels.statistics(spec, torch.float32, *pair)
    weight, out = torch.ones(2, 1, device="cuda"), torch.empty_like(pair[0])
    triton_kernels.logit_gradient(spec, torch.float32, *pair, table, weight, None, None, None, out)
    expected = torch.empty_like(out)
    theirs = formulas.statistics(spec, torch.float32, *pair)
    formulas.logit_gradient(spec, torch.float32, *pair, theirs, weight, None, None, None, expected)
    assert torch.equal(out.isnan(), expected.isnan())
    used = [formulas.D, formulas.K, *([formulas.H_S] if side == 0 else [formulas.H_T])]
    assert torch.equal(table[:, used].isnan(), theirs[:, used].isnan())


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_whole_head_on_a_gpu(top_k: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels, none of which fails, as by eager code."""
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.setenv("PGPO_TRITON", "1")
    sides = []
    for compiled in (None, False):
        case = build(n=40, hidden=16, teacher_hidden=8, vocabulary=4001, dtype=dtype)
        for name, value in vars(case).items():
            moved = value.detach().cuda().requires_grad_(value.requires_grad)
            setattr(case, name, moved)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            out = fused_distillation_head(
                **case.arguments(top_k=top_k, beta=0.2, **cases.EVERYTHING),
                token_weights=case.weights,
                chunk_size=16,
                compiled=compiled,
            )
        sides.append((out, gradients(out.loss, case)))
    (a, grads_a), (b, grads_b) = sides
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name in ("divergence", "student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob", "loss"):
        cases.close(getattr(a, name).detach(), getattr(b, name).detach(), tolerance, name)
    for x, y in zip(grads_a, grads_b, strict=True):
        assert (x - y).norm() <= (1e-2 if dtype == torch.bfloat16 else 10 * tolerance) * y.norm()


@on_a_gpu
def test_more_than_two_to_the_31_logits_on_a_gpu() -> None:
    from pgpo.core import triton_kernels

    rows, vocabulary = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB")
    spec = cases.spec_of("jsd", 0.5)
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    last = cases.random(1, vocabulary).to(logits)
    logits[-1:] = last
    teacher = torch.zeros(1, vocabulary, dtype=torch.bfloat16, device="cuda").expand(rows, -1)
    table = triton_kernels.statistics(spec, torch.float32, logits, teacher)
    alone = triton_kernels.statistics(spec, torch.float32, last, teacher[:1])
    assert torch.equal(table[-1:], alone) and (table[:-1] == table[:1]).all()
    weight = torch.ones(rows, 1, device="cuda")
    triton_kernels.logit_gradient(spec, torch.float32, logits, teacher, table, weight, None, None, None, None)
    triton_kernels.logit_gradient(spec, torch.float32, last, teacher[:1], alone, weight[:1], None, None, None, None)
    assert torch.equal(logits[-1:], last) and last.abs().max() > 0
