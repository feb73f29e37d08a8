"""Whether a change of structure has changed a result: fixed-seed runs, hashed file by file.

usage: same_bits.py write NOTES.json        before the change
       same_bits.py compare NOTES.json      after it; exit status 1 and the names of what differs

The runs are `pgpo train` on the lab world (sampling, training, evaluation, checkpoints, alarms), and under torchrun two
CPU ranks with FSDP2 (distributed/two_ranks.py). Compared are the names of all files and their contents, but for times,
the environment and figures. Both calls must be made on one machine with the same versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUN = "--max_steps 4 --eval_steps 2 --save_steps 2 --test_rows 8 --eval_rows 4 --eval_k 2 --prompts_per_step 4"
CASES = {
    "pgpo": "--guard warn --watch_demonstrations true",
    "pgpo_resampled": "--num_iterations 2 --max_tokens_per_microbatch 300 --protocol strict",
    "sdpo": "--objective sdpo --variant style --feedback_mode never --teacher frozen",
    "cross_fit": "--information_source cross_fit",
    "lagged_smooth": "--information_source lagged --rho_law smooth --information_baseline running_mean",
    "grpo": "--objective grpo --max_tokens_per_microbatch 300",
    "lora": "--use_peft true --lora_r 4 --lora_target_modules q_proj down_proj",
    "bf16": "--use_cpu true --bf16 true --gradient_checkpointing true",
}
NOT_COMPARED = {"environment.json", "figure.png"}
# Not their contents: a set in any order (adapter_config.json), the command and all fields (config.json), versions and
# checksums of other files.
STRUCTURE_ONLY = {"adapter_config.json", "config.json", "manifest.json", "README.md", "trainer_state.json"}
STRUCTURE_ONLY |= {"rng_state.pth"}
TIMES = ("seconds", "time", "runtime", "per_second")


def timeless(value: Any) -> Any:
    """JSON without what a clock has measured."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(word in k for word in TIMES)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def digest(file: Path) -> str:
    if file.suffix in (".json", ".jsonl"):
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        content = json.dumps([timeless(json.loads(line)) for line in lines]).encode()
    elif file.suffix == ".pt":
        content = tensors(file)
    else:
        content = file.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def tensors(file: Path) -> bytes:
    """A torch file's values; its bytes as a zip archive hold the folder's name."""
    import torch

    def flat(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return hashlib.sha256(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        if isinstance(value, dict):
            return {str(k): flat(v) for k, v in value.items()}
        return [flat(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)

    return json.dumps(timeless(flat(torch.load(file, weights_only=False, map_location="cpu")))).encode()


def digests(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in NOT_COMPARED)
    return {str(f.relative_to(folder)): "exists" if f.name in STRUCTURE_ONLY else digest(f) for f in files}


def run() -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CI": "true"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, words in CASES.items():
            command = [sys.executable, "-m", "pgpo", "train", *RUN.split(), *words.split(), "--output_dir", case]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{case}: {done.stderr[-2000:]}")
            found[f"{case}/output"] = hashlib.sha256(done.stdout.encode()).hexdigest()[:16]
            found |= {f"{case}/{path}": value for path, value in digests(folder / case).items()}
        script = Path(__file__).parent / "distributed" / "two_ranks.py"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        subprocess.run([*launcher, str(folder / "fsdp2"), "fsdp2"], env=environment, capture_output=True, check=True)
        for file in sorted(folder.glob("fsdp2.*.pt")):
            found |= {f"{file.stem}/{case}": value for case, value in ranks(file).items()}
    return found


def ranks(file: Path) -> dict[str, str]:
    """Weights, teacher and logs of every case that a rank has trained."""
    import torch

    results = torch.load(file, weights_only=False)
    found = {}
    for case, result in results.items():
        values = {k: v for k, v in result.items() if k in ("weights", "teacher", "logs", "records")}
        part = file.with_suffix(f".{case}.pt")
        torch.save(values, part)
        found[case] = digest(part)
        part.unlink()
    return found


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "compare"):
        sys.exit(__doc__)
    notes, found = Path(sys.argv[2]), run()
    if sys.argv[1] == "write":
        notes.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} digests in {notes}")
        return
    before = json.loads(notes.read_text())
    differing = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    for name in differing:
        print(f"{name}: {before.get(name, 'absent')} -> {found.get(name, 'absent')}")
    print(f"{len(found) - len(differing)} of {len(found)} as before")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
