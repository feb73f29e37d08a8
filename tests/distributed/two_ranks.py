"""Run plainly or under torchrun: trains the tiny model on every case and saves what this rank saw.

usage: two_ranks.py OUT [fsdp2 | zero2 | zero3]
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trainer_kit
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import build_model
from peft import LoraConfig
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from pgpo.errors import UserError

FSDP2 = dict(fsdp=True, fsdp_config=dict(version=2))
ZERO2 = dict(use_cpu=False, deepspeed=dict(zero_optimization=dict(stage=2), gradient_clipping="auto"))


ZERO3 = dict(  # every parameter is cut up, however small
    use_cpu=False,
    deepspeed=dict(zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0), gradient_clipping="auto"),
)


def first_half_fails(prompts, completions, **kwargs):
    """The questions of rank 0 (the first half of every step of four) are never solved."""
    right = trainer_kit.parity_reward(prompts, completions)
    return [r * (i % 4 >= 2) for r, i in zip(right, kwargs["index"], strict=True)]


def nobody_succeeds(prompts, completions, **kwargs):
    return [0.0] * len(prompts)


def ids_decide(prompts, completions, completion_ids, **kwargs):
    """What ids alone tell: the end-of-text token, and which tokens came before."""
    return [float(ids[-1] == 1 and sum(ids) % 2) for ids in completion_ids]


def form(prompts, completions, **kwargs):
    return [0.25] * len(prompts)


def untied():
    model = build_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(1).clone())
    return model


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


CASES: dict[str, dict] = {
    "plain": {},
    "twenty_steps": dict(max_steps=20, learning_rate=0.1),
    "split_groups": dict(prompts_per_step=3),  # 12 rows in groups of 4: the middle group lies on both ranks
    "one_rank_without_teacher": dict(reward=first_half_fails),
    "nobody": dict(reward=nobody_succeeds),
    "micro_batches": dict(micro_batch_size=2),
    "cross_fit": dict(information_source="cross_fit"),
    "watched": dict(watch_demonstrations=True),
    "placebo": dict(demonstration="placebo", prompts_per_step=3),  # from a question of the other rank, too
    "grpo": dict(objective="grpo"),
    "frozen": dict(teacher="frozen"),
    "live": dict(teacher="live"),
    "trust_region": dict(teacher="trust_region"),
    # rewards rise and fall from batch to batch: the ranks renew alike, or their teachers part
    "rehearsal": dict(rehearse_weight=0.5, rehearse_fraction=0.4, micro_batch_size=2),
    "pass_rate": dict(sample_weights="pass_rate", prompts_per_step=3, micro_batch_size=3),
    "rehearsal_one_rank": dict(rehearse_weight=0.5, reward=first_half_fails, distillation_weight=0.6),
    "gated": dict(teacher="gated", teacher_sync_steps=2, max_steps=8),
    # evaluation is greedy, in 5 calls of `generate` on one rank, in 3 and 2 on two
    "untied": dict(model=untied, micro_batch_size=3, max_grad_norm=0.1, eval_temperature=0.0, eval_batch_size=4),
    "seen_ids": dict(
        reward=[ids_decide, form],
        success_reward="ids_decide",
        generation_kwargs=dict(suppress_tokens=list(range(2, 25)), forced_eos_token_id=1, max_new_tokens=5),
        eval_temperature=0.0,
        eval_batch_size=4,
    ),
    # the sampler's random numbers belong to a completion, whichever rank samples it; evaluation is not greedy here
    "sampled": dict(rollout=None, prompts_per_step=3, eval_batch_size=4),
    "checkpointed": dict(gradient_checkpointing=True, fused_head=False),
    "lora": dict(peft_config=lora),
    "environment": dict(rollout=trainer_kit.environment_rollout, micro_batch_size=2, watch_demonstrations=True),
    "experts": dict(model=trainer_kit.build_experts, router_aux_loss_coef=0.5, micro_batch_size=3),
    "mixed": dict(distillation_weight=0.3, reward=first_half_fails, micro_batch_size=3),
    # probes are chosen and cut among the completions of all ranks; K and the cosine are of all of them
    "trust": dict(
        trust="measured", trust_tokens=13, optim="adamw_torch", adam_epsilon=1e-3, learning_rate=0.1, max_steps=8
    ),
    "trust_one_rank": dict(trust="measured", reward=first_half_fails, micro_batch_size=3, learning_rate=5.0),
    "trust_nobody": dict(trust="measured", reward=nobody_succeeds),
    "trust_lora": dict(trust="measured", peft_config=lora, learning_rate=5.0, prompts_per_step=3),
    "trust_lagged": dict(trust="measured", trust_form="lagged", micro_batch_size=2),
    # all that TRL's loss has beside its token sum, and a mean over the tokens of the batch
    "grpo_terms": dict(
        objective="grpo",
        model=trainer_kit.build_experts,
        rollout=trainer_kit.environment_rollout,
        loss_type="bnpo",
        use_adaptive_entropy=True,
        entropy_coef=0.3,
        entropy_target=9.0,
        top_entropy_quantile=0.6,
        router_aux_loss_coef=0.5,
        micro_batch_size=3,
        learning_rate=0.05,
    ),
}

_UNDO = {"trust", "trust_one_rank", "trust_nobody", "trust_lora"}
# What a kind refuses; and where layers are gathered, `generate` samples, by each rank's own generator.
REFUSED = {
    "fsdp2": {"sampled"},
    "zero2": {"cross_fit", *_UNDO},
    "zero3": {"sampled", "cross_fit", "trust_region", "lora", *_UNDO},
}


def shard_on_cpu() -> None:
    """Let accelerate shard without accelerators: it reads its FSDP plugin on those alone. All else is its own code."""
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def zero_on_cpu() -> None:
    """accelerate has no DeepSpeed without accelerators; DeepSpeed itself runs on CPUs (DS_ACCELERATOR=cpu)."""
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def make(folder: str, **options):
    options = {k: copy.deepcopy(v) if k == "deepspeed" else v for k, v in options.items()}  # it is written into
    options = {k: v() if k in ("model", "peft_config") else v for k, v in options.items()}
    return trainer_kit.trainer(folder, **(dict(optim="sgd", learning_rate=0.5, max_steps=3) | options))


def whole(tensors: dict) -> dict:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def held(tensors) -> float:
    """Share of the elements that this rank holds."""
    tensors = list(tensors)
    local = sum(t.to_local().numel() if isinstance(t, DTensor) else getattr(t, "ds_tensor", t).numel() for t in tensors)
    return local / sum(getattr(t, "ds_numel", t.numel()) for t in tensors)


def state(t) -> dict:
    model = t.accelerator.unwrap_model(t.model)
    with contextlib.ExitStack() as stack:
        if t.engine.gathers_layers and t.is_deepspeed_enabled:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(list(model.parameters())))
        weights = whole(trainer_kit.weights(model))
    return {
        "weights": weights,
        "teacher": t.teacher.state_dict()["parameters"] if t.teacher else {},
    }


def run(options: dict, folder: str) -> dict:
    t = make(folder, **options)
    hinted, deferred = [], []
    active_rows, no_sync = t.active_samples, t.accelerator.no_sync
    t.active_samples = lambda batch: hinted.append(rows := active_rows(batch)) or rows
    t.accelerator.no_sync = lambda model: deferred.append(model) or no_sync(model)
    logs = trainer_kit.train(t)
    saved = state(t)  # as a checkpoint would, which shards the teacher again
    # Before evaluation, which leaves the root's weights gathered until the next step.
    shares = [held(m.parameters()) for m in (t.model, t.teacher and t.teacher.module) if m is not None]
    questions = [dict(row, id=str(i)) for i, row in enumerate(trainer_kit.dataset(5))]
    evaluation = t.held_out_evaluation.run(questions)
    return {
        **saved,
        "evaluation": t.held_out_evaluation.metrics(evaluation),
        "logs": logs,
        "held": shares,
        "deferred": len(deferred),
        "ranks": t.accelerator.num_processes,
        "rank": t.accelerator.process_index,
        "active_rows": [len(rows) for rows in hinted],
        "records": [(r["question_id"], r["sample"], r["completion"], r["reward"]) for r in evaluation.records],
    }


# Under FSDP2 alone ----------------------------------------------------------------------------------------------------


def resumed(kind: str, folder: str) -> dict:
    """Four steps, and the last two of them again from the checkpoint."""
    options = dict(optim="adamw_torch", learning_rate=1e-2, max_steps=4)
    options |= dict(fsdp=True, fsdp_config=dict(version=2, state_dict_type=kind))
    first = make(folder, save_strategy="steps", save_steps=2, **options)
    trainer_kit.train(first)
    second = make(folder, **options)
    trainer_kit.train(second, resume_from_checkpoint=f"{folder}/checkpoint-2")
    saved = Path(folder, "checkpoint-4", "model.safetensors")
    result = {"first": state(first), "second": state(second), "saved": load_file(saved) if saved.exists() else {}}
    first.accelerator.wait_for_everyone()
    return result


def half_precision(folder: str) -> dict:
    """A teacher that reads what the student reads, weights and activations in bf16."""
    t = make(folder, model=lambda: build_model(dtype=torch.bfloat16), bf16=True, diagnostics_step_interval=0, **FSDP2)
    active_rows, run = t.active_samples, t.passes.forward
    t.active_samples = lambda batch: [dataclasses.replace(r, teacher_prompt=r.prompt) for r in active_rows(batch)]
    outputs, autocasts = [], []

    def watched(*args):
        autocasts.append(torch.is_autocast_enabled("cpu"))
        outputs.append(run(*args))
        return outputs[-1]

    t.passes.forward = watched
    logs = trainer_kit.train(t)
    student = next(o for o in outputs if hasattr(o, "loss"))
    return {
        "first_step": logs[0],
        "dtypes": [v.dtype for v in vars(student).values()],
        "autocasts": autocasts,
        "held": [held(tensors) for tensors in (t.teacher.module.parameters(), t.teacher._shadow.values())],
    }


def loaded_by_rank_0(folder: str) -> dict:
    """Only the first rank has read the weights from the disk."""

    def model():
        model = build_model()
        if not PartialState().is_main_process:
            for parameter in model.parameters():
                parameter.data.zero_()
        return model

    t = make(folder, model=model, fsdp=True, fsdp_config=dict(version=2, cpu_ram_efficient_loading=True))
    trainer_kit.train(t)
    return state(t)


def refusal(action) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def refusals(folder: str) -> dict:
    untrained = make(folder, **FSDP2)
    return {
        "offload": refusal(lambda: make(folder, fsdp=True, fsdp_config=dict(version=2, cpu_offload=True))),
        "evaluation": refusal(lambda: untrained.evaluate([dict(row) for row in trainer_kit.dataset(2)])),
    }


def sharded_only(folder: str) -> dict:
    return {
        "full": resumed("FULL_STATE_DICT", f"{folder}/full"),
        "sharded": resumed("SHARDED_STATE_DICT", f"{folder}/sharded"),
        "half_precision": half_precision(folder),
        "loaded_by_rank_0": loaded_by_rank_0(folder),
        "kept_whole": run(dict(fsdp=True, fsdp_config=dict(version=2, reshard_after_forward=False)), folder),
        "refusals": refusals(folder),
    }


# Under ZeRO-2 alone ---------------------------------------------------------------------------------------------------


def zero_state(t) -> dict:
    """Also what only DeepSpeed holds: this rank's part of the fp32 weights and of Adam's moments."""
    optimizer = t.deepspeed.optimizer
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flat = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    parts = dict(enumerate(p.detach().clone() for p in flat))
    moments = {
        (i, name): value.clone()
        for i, entry in enumerate(optimizer.optimizer.state.values())
        for name, value in entry.items()
    }
    return {**state(t), "parts": parts, "moments": moments}


def zero_resumed(zero: dict, folder: str, bf16: bool = False, **options) -> dict:
    options = zero | dict(bf16=bf16) | dict(optim="adamw_torch", learning_rate=1e-2, max_steps=4) | options
    first = make(folder, save_strategy="steps", save_steps=2, **options)
    trainer_kit.train(first)
    second = make(folder, **options)
    trainer_kit.train(second, resume_from_checkpoint=f"{folder}/checkpoint-2")
    plain = Path(folder, "checkpoint-4", "model.safetensors")
    saved = load_file(plain) if plain.exists() else {}
    result = {"first": zero_state(first), "second": zero_state(second), "saved": saved}
    first.accelerator.wait_for_everyone()
    return result


def zero_foreign_code(zero: dict, folder: str) -> dict:
    """A checkpoint that names a function, and one of another number of ranks; `folder` is that of `zero_resumed`."""
    t = make(folder, **zero | dict(optim="adamw_torch", learning_rate=1e-2, max_steps=4))
    part = Path(folder, "checkpoint-2", "global_step2", "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    ran = Path(folder, "ran")

    class Runs:
        def __reduce__(self):
            return open, (str(ran), "w")

    def attempt(change) -> str:
        if t.accelerator.is_main_process:
            change()
        t.accelerator.wait_for_everyone()
        t.host.trusted = part.parents[1].resolve()  # verified already, so that the seal does not find it first
        return refusal(lambda: trainer_kit.train(t, resume_from_checkpoint=str(part.parents[1])))

    foreign = attempt(lambda: torch.save({"optimizer_state_dict": Runs()}, part))
    missing = attempt(part.unlink)
    return {"foreign": foreign, "missing": missing, "ran": ran.exists()}


def zero_skipped(zero: dict, folder: str) -> dict:
    """The gradient of step 2 is not finite: that step is left out, and step 3 goes on from step 1."""

    def right(prompts, completions, **kwargs):  # nobody in step 3, so that there is no gradient at all
        return [r * (t.state.global_step != 2) for r in trainer_kit.parity_reward(prompts, completions)]

    options = dict(optim="adamw_torch", learning_rate=1e-2, lr_scheduler_type="linear")
    t = make(folder, reward=right, **zero | dict(on_nonfinite="skip", max_steps=4) | options)
    backward, after = t.engine.backward, []

    def poison(model, loss, last):
        broken = t.state.global_step == 1 and t.accelerator.process_index == 1
        backward(model, loss * (float("nan") if broken else 1.0), last)

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            after.append(zero_state(t))

    t.engine.backward = poison
    t.add_callback(Watch())
    logs = trainer_kit.train(t)
    again = refusal(lambda: trainer_kit.train(t))
    rates = [r["learning_rate"] for r in logs]
    return {"after": after, "skipped": [r["skipped_share"] for r in logs], "rates": rates, "again": again}


def zero_half_precision(zero: dict, folder: str) -> dict:
    t = make(folder, **zero | dict(bf16=True, max_steps=2))
    before = trainer_kit.bitwise_equal(trainer_kit.weights(t.model), trainer_kit.weights(t.teacher.module))
    logs = trainer_kit.train(t)
    return {
        "equal_at_first": before,
        "dtypes": {p.dtype for p in (*t.model.parameters(), *t.teacher.module.parameters())},
        "buffers": {b.dtype for m in (t.model, t.teacher.module) for b in m.buffers() if b.is_floating_point()},
        "sums": t.deepspeed.optimizer.gradient_accumulation_dtype,
        "between_ranks": t.deepspeed.communication_data_type,
        "average": {p.dtype for p in t.teacher.state_dict()["parameters"].values()},
        "logs": logs,
    }


def zero_memory(zero: dict, folder: str, **options) -> dict:
    """Bytes that this rank holds when the second step's gradients are complete, by what holds them."""
    t = make(folder, **zero | dict(optim="adamw_torch", learning_rate=1e-2, max_steps=2, micro_batch_size=2) | options)
    found: dict = {}

    def size(tensors) -> int:
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            optimizer, stage3 = t.deepspeed.optimizer, zero is ZERO3
            adapter = t.teacher.module is None
            named = list(t.model.named_parameters())
            twins = [p for name, p in named if ".teacher." in name]
            student = [getattr(p, "ds_tensor", p) for name, p in named if ".teacher." not in name]
            flat = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
            shared = {x.untyped_storage().data_ptr() for x in student}
            own = [x for x in flat if x.untyped_storage().data_ptr() not in shared]
            moments = [v for entry in optimizer.optimizer.state.values() for v in entry.values() if v.numel() > 1]
            sums = [x for group in optimizer.averaged_gradients.values() for x in group]
            found.update(
                {
                    "parameters": size(student),
                    "fp32 weights (ZeRO)": size(own),
                    "optimizer": size(moments),
                    "gradients": size(sums),
                    "teacher": size(twins if adapter else t.teacher.module.parameters()),
                    "teacher average": size(t.teacher._shadow.values()),
                    "reduce bucket (ZeRO)": size(b.buffer for b in optimizer.ipg_buckets.values()) if stage3 else 0,
                }
            )

    t.add_callback(Watch())
    if zero is ZERO2:
        plain = t.engine.backward

        def backward(*args):
            """Also the bucket, which is there during a backward alone."""
            buckets = []
            optimizer = t.deepspeed.optimizer
            release = optimizer._release_ipg_buffers
            optimizer._release_ipg_buffers = lambda: (
                buckets.extend(x for b in optimizer.ipg_buckets.values() for x in b.buffer) or release()
            )
            plain(*args)
            optimizer._release_ipg_buffers = release
            found["bucket of a backward"] = size(buckets)

        t.engine.backward = backward
    trainer_kit.train(t)
    settings = t.deepspeed._config.zero_config
    found["constants"] = (settings.reduce_bucket_size, settings.sub_group_size, settings.max_live_parameters)
    return found


def zero_refusals(folder: str) -> dict:
    def text(settings: dict, **options) -> str:
        config = {**ZERO2["deepspeed"], **settings}
        return refusal(lambda: make(folder, **ZERO2 | dict(deepspeed=config) | options))

    return {
        "stage 1": text(dict(zero_optimization=dict(stage=1))),
        "offload": text(dict(zero_optimization=dict(stage=2, offload_optimizer=dict(device="cpu")))),
        "cross_fit": text({}, information_source="cross_fit"),
        "rollback": text({}, guard="rollback"),
        "undo": text({}, trust="measured"),
        "trust_region": text(dict(zero_optimization=dict(stage=3)), teacher="trust_region"),
        "lora": text(dict(zero_optimization=dict(stage=3)), peft_config=lora),
    }


def zero_only(zero: dict, folder: str) -> dict:
    return {
        "resumed": zero_resumed(zero, f"{folder}/resumed"),
        **({} if zero is ZERO3 else {"resumed_lora": zero_resumed(zero, f"{folder}/lora", peft_config=lora)}),
        "resumed_half": zero_resumed(zero, f"{folder}/half", bf16=True),
        "foreign_code": zero_foreign_code(zero, f"{folder}/resumed"),
        "skipped": zero_skipped(zero, folder),
        "half_precision": zero_half_precision(zero, folder),
        "memory": {
            "float32": zero_memory(zero, folder),
            "bfloat16": zero_memory(zero, folder, bf16=True),
            **({} if zero is ZERO3 else {"lora": zero_memory(zero, folder, bf16=True, peft_config=lora)}),
        },
        "refusals": zero_refusals(folder),
    }


if __name__ == "__main__":
    out, kind = Path(sys.argv[1]), "".join(sys.argv[2:])
    extra = {"fsdp2": FSDP2, "zero2": ZERO2, "zero3": ZERO3}.get(kind, {})
    zero = "deepspeed" in extra
    if kind:
        (zero_on_cpu if zero else shard_on_cpu)()
    folder = str(out.parent / f"{out.name}-runs")  # the ranks share it
    cases = {name: options for name, options in CASES.items() if name not in REFUSED.get(kind, ())}
    results = {name: run(options | extra, folder) for name, options in cases.items()}
    rank = results["plain"]["rank"]
    if kind:
        results |= zero_only(extra, folder) if zero else sharded_only(folder)
    torch.save(results, f"{out}.{rank}.pt")
