"""Which weights the self-teacher has: an average of the student's, the student's own, or the first student's.

    ema            teacher <- teacher + rate * (student - teacher) after every optimizer step
    live           the student itself
    frozen         the student as it was at construction
    trust_region   logits = lerp(initial, student, rate)
    periodic       teacher <- student, at every n-th step (the caller's clock): ema at rate 1
    gated          the same, where the reward has risen and completions have not grown long (refresh.py)

SDPO (arXiv 2601.20802) names the first four; rate 0.05 is its setting for ema and trust_region alike.

Where the weights live: a separate module (full fine-tuning), or a second adapter named "teacher" in the same PeftModel
(LoRA), so that the base is in memory once. Averages are kept in fp32 whatever the model's dtype: a step of 0.05 * gap
is below half a bf16 unit long before the gap is closed, and would be rounded away.

Departures from the reference code (lasgroup/SDPO): it averages in the model's dtype, pairs parameters by position
(here by name, so a mismatch is an error), and keeps no teacher in its checkpoints.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from pgpo.teacher.refresh import RefreshCondition

Kind: TypeAlias = Literal["ema", "live", "frozen", "trust_region", "periodic", "gated"]
KINDS: tuple[Kind, ...] = ("ema", "live", "frozen", "trust_region", "periodic", "gated")
COPIES: tuple[Kind, ...] = ("periodic", "gated")
FOLLOWERS: tuple[Kind, ...] = ("ema", *COPIES)
"""Kinds that `Teacher.update` moves."""
T = TypeVar("T")

TEACHER_ADAPTER = "teacher"
"""Name of the teacher's adapter in a PEFT student. Leave it out of save_pretrained (selected_adapters=[...])."""

# Attribute of a base model whose adapter TEACHER_ADAPTER was added here, not by the user.
_OURS = "_pgpo_teacher_adapter"

# Elements averaged in one go, ours: bounds the fp32 copy of a bf16 student to 256 MiB (or its largest tensor) while
# keeping the kernels few.
_BUCKET = 2**26

# LoRA options under which a second adapter is an exact twin of the first. Any other option that differs from its
# default is refused: it changes the base, or needs state that is not a named parameter.
# fmt: off
_TWINNED_OPTIONS = {
    # what is adapted and how strongly
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "lora_dropout",
    "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    # initialization, done when the student was made
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # bookkeeping
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
}
# fmt: on


class Teacher:
    """The teacher's weights, equal to the student's at construction.

    Build it from the bare model (not wrapped by DDP, torch.compile or a mixed-precision `forward`), after freezing
    what does not train. Later both may be sharded in place (FSDP2), `module` as the student is: parameters are looked
    up by name at each call, and each rank averages its own shards.

    Args:
        student: the model that trains. A PeftModel with one active LoRA adapter gets a twin adapter "teacher"; any
            other module is cloned (all kinds but "live").
        kind: see the module's head.
        rate: averaging rate (ema) or share of the student's logits (trust_region), in [0, 1].
        clone: makes the separate module from the student; its values are overwritten with the student's.

    Attributes:
        module: the separate module, in eval mode and without gradients; None for "live" and for a PeftModel.
        condition: decides whether `update` moves a "gated" teacher; None for the other kinds.

    Raises:
        ValueError: unknown kind, rate out of range, nothing trains, a clone that runs or shares the student's
            weights, a PEFT option that has no exact twin.
    """

    def __init__(
        self,
        student: nn.Module,
        kind: Kind = "ema",
        rate: float = 0.05,
        clone: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"The teacher kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"The teacher rate is {rate!r}; it must lie in [0, 1] (SDPO uses 0.05).")
        self.student = student
        self.kind: Kind = kind
        self.rate = 1.0 if kind in COPIES else float(rate)
        self.condition = RefreshCondition() if kind == "gated" else None
        self.module: nn.Module | None = None
        self._adapter: str | None = None  # the student's adapter, if the teacher is a second one
        self._parameters: dict[str, str] = {}  # student name -> teacher name, of what trains
        self._buffers: dict[str, str] = {}
        # fp32 averages of parameters in a narrower dtype, made when first needed
        self._shadow: dict[str, Tensor] = {}
        if kind == "live":
            return
        trained = [name for name, p in student.named_parameters() if p.requires_grad]
        if kind in FOLLOWERS and not trained:
            raise ValueError(
                "No parameter of the student has requires_grad, so there is nothing to follow; "
                "build the teacher from the model that trains."
            )
        if _is_peft(student):
            self._adapter = _single_adapter(student)
            self._parameters, self._buffers = _add_twin_adapter(student, self._adapter, trained)
        else:
            self.module = _independent_clone(student, clone)
            self._parameters = {name: name for name in trained}
            self._buffers = {name: name for name, _ in student.named_buffers()}

    def logits(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        """The teacher's logits [..., V], without gradient.

        Args:
            forward: calls the module it is given and returns its logits. It must call THAT module: a forward that
                closes over the student returns the student's logits. Called twice for "trust_region".
        """
        outputs = self.outputs(forward)
        if self.kind == "trust_region":
            (_, initial), (_, student) = outputs
            return torch.lerp(initial, student, self.rate)
        return outputs[0][1]

    def outputs(self, forward: Callable[[nn.Module], T]) -> list[tuple[float, T]]:
        """`forward`'s results with their shares in the teacher's logits (shares sum to 1).

        For callers that never form [tokens, V]: `forward` may return hidden states and the head's weight (read it
        inside `forward`, where the right adapter is active). logits = sum of share * hidden @ weight.T.
        One entry, but two for "trust_region" (initial, student). Eval mode and no_grad; modes, the active adapter
        and requires_grad are as before afterwards, also if `forward` raises.
        """
        if self.kind == "live":
            return [(1.0, frozen(self.student, forward))]
        if self._adapter is None:
            assert self.module is not None
            own = frozen(self.module, forward)
        else:
            with _active_adapter(self.student, TEACHER_ADAPTER):
                own = frozen(self.student, forward)
        if self.kind != "trust_region":
            return [(1.0, own)]
        return [(1.0 - self.rate, own), (self.rate, frozen(self.student, forward))]

    @torch.no_grad()
    def update(self, student: nn.Module | None = None, rate: float | None = None) -> bool:
        """Let the teacher follow; call after every optimizer step, or every n-th. Does nothing for the other kinds.

        Args:
            student: the module to follow, by default the one given at construction. Same parameter names.
            rate: of this time, in [0, 1]; by default the one given at construction.

        Returns:
            False if the condition kept the teacher where it was.

        Raises:
            ValueError: a parameter is missing, or one trains that did not when the teacher was built.
        """
        if self.kind not in FOLLOWERS:
            return True
        if self.condition is not None and not self.condition.holds:
            return False
        student = self.student if student is None else student
        reshard(student)
        parameters = _parameters_of(student)
        for name in self._parameters:
            if name not in parameters:
                raise ValueError(f"The student has no parameter {name!r} any more; pass the unwrapped model.")
        late = next((n for n, p in parameters.items() if p.requires_grad and n not in self._parameters), None)
        if late is not None:
            raise ValueError(f"{late!r} trains now but did not when the teacher was built; unfreeze it before.")
        masters = self._masters()
        names = list(masters)
        # What DeepSpeed has cut up is whole for one parameter at a time.
        together = 1 if any(hasattr(parameters[name], "ds_tensor") for name in names) else max(len(names), 1)
        for i in range(0, len(names), together):
            pairs = [_shards(masters[name], parameters[name]) for name in names[i : i + together]]
            follow(
                [average for average, _ in pairs], [target for _, target in pairs], self.rate if rate is None else rate
            )
        self._publish(masters)
        sources = dict(student.named_buffers())
        for name, buffer in self._own_buffers().items():
            buffer.copy_(sources[name])
        if self.condition is not None:
            self.condition.renewed()
        return True

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """A step's metrics, equal on all ranks, for the condition if there is one (RefreshCondition.observe)."""
        if self.condition is not None:
            self.condition.observe(metrics)

    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """Everything needed to continue: kind, rate, and CPU copies of what trains and of the buffers.

        {"kind": str, "rate": float, "parameters": {student's name: fp32, or wider if the model is}, "buffers": {...}},
        and "condition" where there is one. "live" has no tensors. Sharded tensors (FSDP2) are gathered, one after the
        other, so call it on every rank; with keep=False a rank that writes nothing only takes part, and its parts are
        empty.
        """
        parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "buffers": {}}
        for part, tensors in (("parameters", self._masters()), ("buffers", self._own_buffers())):
            for name, tensor in tensors.items():
                whole = _whole(tensor)
                if keep:
                    dtype = _master_dtype(tensor) if part == "parameters" else tensor.dtype
                    parts[part][name] = whole.to("cpu", dtype, copy=True)
        condition = {} if self.condition is None else {"condition": self.condition.state_dict()}
        return {"kind": self.kind, "rate": self.rate, **condition, **parts}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the weights of `state_dict()`. Nothing is changed if it does not fit.

        Raises:
            ValueError: another kind or rate, or a missing, extra or mis-shaped tensor.
        """
        for key, own in (("kind", self.kind), ("rate", self.rate)):
            if key not in state:
                raise ValueError(f"The saved teacher has no {key!r}; pass what Teacher.state_dict() returned.")
            if state[key] != own:
                raise ValueError(
                    f"The saved teacher has {key} {state[key]!r}, this one {own!r}; keep the saved setting."
                )
        masters, buffers = self._masters(), self._own_buffers()
        for part, targets in (("parameters", masters), ("buffers", buffers)):
            _require_same_tensors(part, state.get(part, {}), targets)
        for part, targets in (("parameters", masters), ("buffers", buffers)):
            for name, target in targets.items():
                target.copy_(_like(state[part][name], target))
        self._publish(masters)
        if self.condition is not None:
            self.condition.load_state_dict(state["condition"])

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """The teacher's parameters that follow, under the student's names."""
        holder = self.student if self.module is None else self.module
        reshard(holder)
        parameters = _parameters_of(holder)
        return {name: parameters[twin] for name, twin in self._parameters.items()}

    def _own_buffers(self) -> dict[str, Tensor]:
        holder = self.student if self.module is None else self.module
        buffers = dict(holder.named_buffers())
        return {name: buffers[twin] for name, twin in self._buffers.items()}

    def _masters(self) -> dict[str, Tensor]:
        """The tensors to read and write: the parameters, or fp32 shadows of averaged ones in a narrower dtype."""
        masters: dict[str, Tensor] = {}
        for name, parameter in self._own_parameters().items():
            if self.kind != "ema" or parameter.dtype == _master_dtype(parameter):
                masters[name] = parameter.data
                continue
            shadow = self._shadow.get(name, parameter.data)
            self._shadow[name] = masters[name] = shadow.to(parameter.device, _master_dtype(parameter))
        return masters

    def _publish(self, masters: Mapping[str, Tensor]) -> None:
        """Round the averages into the parameters that forwards use."""
        for name, parameter in self._own_parameters().items():
            if parameter.dtype != masters[name].dtype:
                parameter.data.copy_(masters[name])


def follow(averages: Sequence[Tensor], targets: Sequence[Tensor], rate: float) -> None:
    """averages += rate * (targets - averages), in place and in the averages' dtype. Fast twin of `follow_reference`."""
    for bucket in _buckets(averages):
        own = [averages[i] for i in bucket]
        torch._foreach_lerp_(own, [targets[i].detach().to(own[0].device, own[0].dtype) for i in bucket], rate)


def follow_reference(averages: Sequence[Tensor], targets: Sequence[Tensor], rate: float) -> None:
    """Plain twin of `follow`: one tensor at a time."""
    for average, target in zip(averages, targets, strict=True):
        average.add_(rate * (target.detach().to(average.device, average.dtype) - average))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Runs of indices of one device and dtype, at most _BUCKET elements each (but at least one tensor)."""
    bucket: list[int] = []
    size = 0
    for i, tensor in enumerate(tensors):
        first = tensors[bucket[0]] if bucket else tensor
        alike = (tensor.device, tensor.dtype) == (first.device, first.dtype)
        if bucket and (not alike or size + tensor.numel() > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(i)
        size += tensor.numel()
    if bucket:
        yield bucket


def _master_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def frozen(module: nn.Module, forward: Callable[[nn.Module], T]) -> T:
    """forward(module), in eval mode and without gradient; modes are as before afterwards."""
    with torch.no_grad(), _evaluating(module):
        return forward(module)


# --- separate module -----------------------------------------------------------------------------------------------


def _independent_clone(student: nn.Module, clone: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A clone with the student's values that neither uses nor shares the student's weights."""
    module = clone(student)
    ours, theirs = _named_tensors(module), _named_tensors(student)
    _require_same_tensors("clone", ours, theirs)
    students_memory = {_storage(tensor) for tensor in theirs.values()} - {None}
    for name, tensor in ours.items():
        if _storage(tensor) in students_memory:
            raise ValueError(
                f"{name!r} of the clone is the student's own memory, so the teacher would move with the student; "
                "use a clone that copies (copy.deepcopy does)."
            )
    # Trainers patch `forward` on the instance with a closure over the model they patch (TRL's fused head, mixed
    # precision). Copied with the clone, that closure would run the student's weights under the teacher's name.
    for name, part in module.named_modules():
        if part.__dict__.pop("forward", None) is not None and not _has_own_forward(part):
            raise ValueError(
                f"{type(part).__name__} {name or '(the model)'} has its forward on the instance only, so a clone "
                "would run the student's weights; build the teacher from the bare model, before it is compiled."
            )
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
    return module.requires_grad_(False).eval()


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _has_own_forward(module: nn.Module) -> bool:
    return inspect.getattr_static(type(module), "forward") is not inspect.getattr_static(nn.Module, "forward")


def _storage(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Which memory a tensor is in; None for one without memory of its own."""
    address = tensor.untyped_storage().data_ptr()
    return (tensor.device, address) if address else None


def _require_same_tensors(what: str, ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in expected:
        if name not in ours:
            raise ValueError(f"{name!r} is missing from the {what}; both must come from the same model.")
        if ours[name].shape != expected[name].shape:
            raise ValueError(
                f"{name!r} of the {what} has shape {tuple(ours[name].shape)} instead of "
                f"{tuple(expected[name].shape)}; both must come from the same model."
            )
    for name in ours:
        if name not in expected:
            raise ValueError(f"{name!r} of the {what} belongs to no tensor here; both must come from the same model.")


# --- second adapter ------------------------------------------------------------------------------------------------


def _is_peft(student: nn.Module) -> bool:
    peft = sys.modules.get("peft")  # code that made a PeftModel has imported it
    return peft is not None and isinstance(student, peft.PeftModel)


def release_adapter(model: Any) -> None:
    """Take the teacher's adapter, if an earlier `Teacher` has added one, off a PeftModel or off the base that one was
    made of."""
    is_peft = _is_peft(model)
    base = model.get_base_model() if is_peft else model
    if not getattr(base, _OURS, False):
        return
    delattr(base, _OURS)
    if is_peft and TEACHER_ADAPTER in model.peft_config:
        model.delete_adapter(TEACHER_ADAPTER)
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    getattr(base, "peft_config", {}).pop(TEACHER_ADAPTER, None)
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(TEACHER_ADAPTER)


def _single_adapter(student: Any) -> str:
    """The student's active adapter, or a ValueError if a twin of it would not be exact."""
    if len(student.active_adapters) != 1:
        raise ValueError(f"The student's active adapters are {student.active_adapters}; activate exactly one.")
    active = student.active_adapters[0]
    if TEACHER_ADAPTER in student.peft_config:
        raise ValueError(f"The student has an adapter named {TEACHER_ADAPTER!r} already; delete or rename it.")
    config = student.peft_config[active]
    if config.peft_type != "LORA":
        raise ValueError(
            f"The student's adapter is of type {config.peft_type.value}; a teacher beside it needs LoRA (any adapter "
            "will do for teacher kind 'live')."
        )
    defaults = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _TWINNED_OPTIONS and value != getattr(defaults, field.name):
            raise ValueError(
                f"The student's LoRA option {field.name}={value!r} has no exact twin beside it; leave it at "
                f"{getattr(defaults, field.name)!r} or use teacher kind 'live'."
            )
    return active


def _add_twin_adapter(student: Any, active: str, trained: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Add the adapter TEACHER_ADAPTER with the values of `active`.

    Returns the names of parameters and of buffers, the student's -> its twin's.
    """
    outside = next((name for name in trained if active not in name.split(".")), None)
    if outside is not None:
        raise ValueError(
            f"{outside!r} trains but belongs to the base, of which the teacher has no copy; freeze it or list its "
            "module in modules_to_save."
        )
    old_parameters = dict(student.named_parameters())
    old_buffers = dict(student.named_buffers())
    flags = [(p, p.requires_grad) for p in old_parameters.values()]
    config = copy.deepcopy(student.peft_config[active])
    config.init_lora_weights = True  # PiSSA, OLoRA, ... would change the base a second time
    with torch.random.fork_rng(devices=[]):  # the throw-away initialization must not shift the run's random numbers
        student.add_adapter(TEACHER_ADAPTER, config)
    setattr(student.get_base_model(), _OURS, True)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    new_parameters = {n: p for n, p in student.named_parameters() if n not in old_parameters}
    new_buffers = {n: b for n, b in student.named_buffers() if n not in old_buffers}
    parameters = _twin_names(old_parameters, new_parameters, active)
    buffers = _twin_names(old_buffers, new_buffers, active)
    unmatched = sorted(
        (set(trained) - set(parameters))
        | (set(new_parameters) - set(parameters.values()))
        | (set(new_buffers) - set(buffers.values()))
    )
    if unmatched:
        student.delete_adapter(TEACHER_ADAPTER)
        raise ValueError(f"{unmatched[0]!r} has no twin in the teacher's adapter; use teacher kind 'live'.")
    for name, twin in parameters.items():
        new_parameters[twin].data = old_parameters[name].detach().clone()
        new_parameters[twin].requires_grad_(False)
    for name, twin in buffers.items():
        new_buffers[twin].copy_(old_buffers[name])
    for module in student.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and active in scaling:
            scaling[TEACHER_ADAPTER] = scaling[active]  # it may have been changed since the student was made
    return parameters, buffers


def _twin_names(old: Mapping[str, Any], new: Mapping[str, Any], active: str) -> dict[str, str]:
    """{name of the active adapter's tensor: name of the teacher's}, the same path but for the adapter's name."""
    names = {}
    for name in old:
        path = name.split(".")
        for i, part in enumerate(path):
            twin = ".".join([*path[:i], TEACHER_ADAPTER, *path[i + 1 :]])
            if part == active and twin in new:
                names[name] = twin
    return names


@contextmanager
def _active_adapter(model: Any, adapter: str) -> Iterator[None]:
    """`adapter` runs inside; afterwards the former one, and every requires_grad, are as before."""
    (former,) = model.active_adapters
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.set_adapter(adapter)
        yield
    finally:
        model.set_adapter(former)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


# --- sharded tensors (FSDP2) ---------------------------------------------------------------------------------------


def reshard(module: nn.Module) -> None:
    """Reshard every parameter (FSDP2); a plain module stays as it is.

    A root module keeps its gathered copy after a forward without backward: `parameters()` gives that copy, and what is
    written into it is lost.
    """
    for part in module.modules():
        reshard = getattr(part, "reshard", None)
        if callable(reshard):
            reshard()


def _parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they had before layers were wrapped for FSDP's activation checkpointing."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in module.named_parameters()}


def _shards(average: Any, target: Any) -> tuple[Tensor, Tensor]:
    """What this rank holds of the two; plain tensors as they are. Call it without gradient."""
    if hasattr(target, "ds_tensor"):  # DeepSpeed's ZeRO-3
        return average, _gathered(target)
    if not hasattr(average, "to_local"):
        return average, _whole(target)
    # Nothing moves where both are laid out alike.
    return average.to_local(), target.redistribute(average.device_mesh, average.placements).to_local()


def _gathered(parameter: Any) -> Tensor:
    """All of a parameter that DeepSpeed has cut up (ZeRO-3); every rank calls it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _whole(tensor: Any) -> Tensor:
    """All of a tensor, gathered if it is a DTensor."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def _like(value: Tensor, target: Any) -> Tensor:
    """`value` laid out as `target` is."""
    value = value.to(target.device, target.dtype)
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements)
