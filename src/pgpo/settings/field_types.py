"""Values against the annotations of a dataclass's fields, which dataclasses themselves never check."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any

import numpy as np

from pgpo.errors import UserError

_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    type(None): "None",
}
# Infinity means no clip, or no bound.
_MAY_BE_INFINITE = {"importance_clip", "epsilon_high", "delta", "off_policy_mask_threshold", "entropy_coef_max"}
_MAY_BE_INFINITE |= {"vllm_importance_sampling_clip_max"}
# TRL and transformers take more than they annotate.
_ALSO: dict[str, tuple[type, ...]] = {
    "fsdp": (bool, list),
    "scale_rewards": (bool,),  # True: "group", False: "none"
    "guard_signals": (list,),
    **dict.fromkeys(("top_k", "top_p", "repetition_penalty"), (type(None),)),  # the generation config's own default
    "max_grad_norm": (type(None),),  # no clipping
    "prompts_per_step": (type(None),),  # a number once the batch is folded
}
# What YAML 1.1 reads as a text, and every user as a number.
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_SHOWN = 120  # characters
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 60, 60


def fit(instance: Any) -> None:
    """Check the values of a dataclass against its annotations, and write them in the annotated form.

    A whole number is a number, a number with a fraction of zero is not a whole number, true and false are neither. A
    path is a text, a tuple a list, a scalar of numpy a number of Python, and "1e-5" a number.

    Raises:
        UserError: a value of another type than its field's, nan, inf or beyond 64 bits, or a text with a NUL character.
    """
    cls: type = type(instance)
    hints = _hints(cls)
    for field in dataclasses.fields(instance):
        name, given = field.name, getattr(instance, field.name)
        kinds = _alternatives(hints[name])
        value = _plain(given, {typing.get_origin(kind) or kind for kind in kinds} | {*_ALSO.get(name, ())})
        if value is not given:
            setattr(instance, name, value)
        if not any(_fits(value, kind) for kind in kinds) and not isinstance(value, _ALSO.get(name, ())):
            known = [_KINDS[k] for k in dict.fromkeys(typing.get_origin(k) or k for k in kinds) if k in _KINDS]
            raise UserError(f"{name} is {shown(value)}; it must be {' or '.join(known)}.")
        _check_value(name, value)


def _plain(value: Any, kinds: set[Any]) -> Any:
    """The value in the form that the kinds of its field ask for; itself if there is none."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike) and str in kinds:
        return os.fspath(value)
    if isinstance(value, tuple) and list in kinds:
        return list(value)
    if isinstance(value, str) and float in kinds and str not in kinds and _SCIENTIFIC.fullmatch(value):
        return float(value)
    return value


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, numbers.Integral):
        if huge(value):
            raise UserError(f"{name} is {shown(value)}, which takes more than 64 bits; choose a smaller one.")
    elif isinstance(value, numbers.Real):
        unbounded = math.isinf(value) and name in _MAY_BE_INFINITE
        if math.isfinite(value) or unbounded:
            return
        raise UserError(f"{name} is {value}; it must be a finite number.")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} is {shown(value)}, which holds a NUL character; remove it.")


def huge(value: Any) -> bool:
    """A whole number that no tensor holds."""
    return isinstance(value, numbers.Integral) and not -(2**63) <= int(value) < 2**63


def shown(value: Any) -> str:
    """A value for a sentence: short, whatever it holds."""
    try:
        text = _REPR.repr(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    except ValueError:  # Python writes no number of more than 4300 digits
        return f"a {type(value).__name__} with a huge number"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def file_name(text: str) -> str:
    """The text as a part of a file's name: no separators, no leading dot."""
    return re.sub(r"[^\w.-]+", "_", text).lstrip(".") or "_"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin in (list, dict):
        kind = origin
    if value is None:
        return kind in (type(None), Any, list, dict)  # argparse's default for a list that was not given
    if kind is dict:
        return isinstance(value, Mapping) or dataclasses.is_dataclass(value)  # as transformers' AcceleratorConfig
    if isinstance(value, bool):
        return kind is bool or kind is Any
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real)
    if kind is str:
        return isinstance(value, (str, Enum))
    if isinstance(kind, type) and kind in _KINDS:
        return isinstance(value, kind)
    return isinstance(value, kind) if isinstance(kind, type) else True
