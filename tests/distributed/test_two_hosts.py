"""Two network namespaces as two machines: the launch line of docs gives one process's run; a cut cable ends both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import on_cpus, patient, torchrun

from pgpo.runlog import read_run

NAMES, ADDRESSES = (f"pgpo-a-{os.getpid()}", f"pgpo-b-{os.getpid()}"), ("10.213.7.1", "10.213.7.2")
PORT = 29517
FLAGS = ["--save_steps", "5", "--test_rows", "2", "--eval_rows", "2", "--eval_k", "2", "--eval_steps", "20"]
FLAGS += ["--prompts_per_step", "4", "--num_generations", "4", "--use_cpu", "--rank_timeout", "15"]
NOT_COMPARED = ("seconds", "step_time")


def root(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def possible() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = subprocess.run(["ip", "netns", "add", NAMES[0]], capture_output=True)
    subprocess.run(["ip", "netns", "delete", NAMES[0]], capture_output=True)
    return probe.returncode == 0


pytestmark = pytest.mark.slow


@pytest.fixture
def hosts():
    """Two namespaces, a cable between them, and nothing else."""
    if not possible():
        pytest.skip("needs root, iproute2 and network namespaces (Linux)")
    for name in NAMES:
        root("ip", "netns", "add", name)
    root("ip", "link", "add", "cable-a", "netns", NAMES[0], "type", "veth", "peer", "cable-b", "netns", NAMES[1])
    for name, address, device in zip(NAMES, ADDRESSES, ("cable-a", "cable-b")):
        root("ip", "-n", name, "address", "add", f"{address}/24", "dev", device)
        root("ip", "-n", name, "link", "set", device, "up")
        root("ip", "-n", name, "link", "set", "lo", "up")
    yield
    for name in NAMES:
        root("ip", "netns", "delete", name)


class Host:
    """One process, started as the README of torchrun says, on host 0 or 1."""

    def __init__(self, number: int, folder: Path, run: Path, *flags: str) -> None:
        self.file = folder / f"host-{number}"
        device = ("cable-a", "cable-b")[number]
        command = [
            *("ip", "netns", "exec", NAMES[number], sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "1"),
            *("--master_addr", ADDRESSES[0], "--master_port", str(PORT)),
            *("-m", "pgpo", "train", "--output_dir", str(run), *FLAGS, *flags),
        ]
        self.process = subprocess.Popen(
            command,
            env=on_cpus(GLOO_SOCKET_IFNAME=device),
            stdout=self.file.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def said(self) -> str:
        return self.file.read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
        self.process.wait()


@pytest.fixture
def launch(hosts, tmp_path):
    started: list[Host] = []

    def both(run: Path, *flags: str) -> list[Host]:
        started.extend(Host(number, tmp_path, run, *flags) for number in range(2))
        return started

    yield both
    for host in started:
        host.close()


def one_machine(run: Path, *flags: str) -> None:
    """The same two ranks without the cable."""
    torchrun("-m", "pgpo", "train", "--output_dir", run, *FLAGS, *flags, quiet=90)


def test_two_machines_train_like_one(launch, tmp_path):
    runs = [tmp_path / "two", tmp_path / "one"]
    for host in launch(runs[0], "--max_steps", "20"):
        assert host.process.wait(patient(90)) == 0, host.said()
    one_machine(runs[1], "--max_steps", "20")
    two, one = (read_run(run).metrics for run in runs)
    assert [line["step"] for line in two] == list(range(1, 21))
    assert any(line["grad_norm"] > 0 and line["rho"] != 1 for line in two)
    for a, b in zip(two, one, strict=True):
        for name in a:
            if not name.endswith(NOT_COMPARED):
                assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), (a["step"], name)


def test_a_cut_cable_ends_both_machines(launch, tmp_path):
    run = tmp_path / "run"
    pair = launch(run, "--max_steps", "100000")
    metrics, start = run / "metrics.jsonl", time.monotonic()
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 7:
        assert time.monotonic() - start < patient(60) and all(h.process.poll() is None for h in pair), pair[0].said()
        time.sleep(0.2)
    root("ip", "-n", NAMES[1], "link", "set", "cable-b", "down")
    cut = time.monotonic()
    ended = {}
    while len(ended) < 2:
        assert time.monotonic() - cut < patient(30), [h.said() for h in pair]
        for number, host in enumerate(pair):
            if number not in ended and host.process.poll() is not None:
                ended[number] = time.monotonic() - cut
        time.sleep(0.1)
    print(json.dumps(ended), *(h.said() for h in pair), sep="\n")
    assert max(ended.values()) < 60
    assert all(host.process.returncode not in (0, 2) for host in pair)
    assert "pgpo: rank 1 (" in pair[0].said() and ") has sent no heartbeat for 1" in pair[0].said()
    assert f"the job's store at {ADDRESSES[0]}, rank 0's machine, has not answered for 1" in pair[1].said()
    for host in pair:  # the namespaces share the disk
        assert f"continue from step 5, with the same launcher, by: pgpo train --resume {run}" in host.said()
