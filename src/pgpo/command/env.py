"""`pgpo env`: versions, devices, settings and paths for a bug report, in one paste: no secret, no home folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil

from pgpo import __version__
from pgpo.errors import reason
from pgpo.provenance import environment, public, version

_PACKAGES = ("datasets", "peft", "tokenizers", "huggingface_hub", "deepspeed", "triton", "vllm", "matplotlib")
# Variables that change what a run does, none of which is a secret by its meaning.
_VARIABLES = (
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG", "WORLD_SIZE", "RANK"),
    *("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "PGPO_SCIENCE_DATA", "VLLM_CPU_KVCACHE_SPACE"),
    *("ACCELERATE_CONFIG_FILE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"),
)
_GIB = 2**30


def main() -> int:
    """Print the report."""
    for name, value in _lines():
        print(f"{name + ':':16s} {public(str(value))}")
    return 0


def _lines() -> Iterator[tuple[str, object]]:
    found = environment()
    yield "pgpo", f"{__version__}, commit {found['git_commit'] or 'unknown'}, in {Path(__file__).parents[1]}"
    yield "python", f"{found['python']} on {found['platform']}"
    versions = {**found["packages"], **{name: version(name) for name in _PACKAGES}}
    yield "packages", ", ".join(f"{name} {number}" for name, number in versions.items() if number is not None)
    yield "not installed", ", ".join(name for name, number in versions.items() if number is None) or "none of these"
    cores = f"{psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} threads"
    memory = psutil.virtual_memory().total / _GIB
    yield "cpu", f"{_cpu_name()}, {cores}, {memory:.0f} GiB of memory"
    yield from _gpus()
    set_here = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    yield "variables", " ".join(set_here) or "none of those that change a run"
    yield from _paths()


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> Iterator[tuple[str, object]]:
    try:
        import torch
    except Exception as error:  # a report of just that is wanted, too
        yield "gpu", f"torch cannot be imported ({type(error).__name__}: {reason(error)})"
        return
    if not torch.cuda.is_available():
        yield "gpu", f"none that torch can use (built for CUDA {torch.version.cuda})"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        yield (
            f"gpu {i}",
            (
                f"{device.name}, {device.total_memory / _GIB:.0f} GiB, compute {device.major}.{device.minor}, "
                f"CUDA {torch.version.cuda}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
            ),
        )


def _paths() -> Iterator[tuple[str, object]]:
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    config = cache / "accelerate/default_config.yaml"
    yield "accelerate", config if config.exists() else "no default configuration"
    yield "hub cache", cache if cache.exists() else f"{cache} (does not exist)"
    runs = Path("runs").resolve()
    yield "runs", runs if runs.exists() else f"{runs} (does not exist)"
