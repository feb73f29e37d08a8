"""Values and bytes drawn from a seed, for inputs that mean harm or nonsense."""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Callable

import pytest


def any_value(rng: random.Random, depth: int = 0) -> object:
    """A value of some type that YAML has."""
    kinds: list[Callable[[], object]] = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice([0, 1, -1, 2, 7, 2**31, 2**63, -(2**70), 10**300]),
        lambda: rng.choice([0.0, -0.5, 1.5, 1e-300, 1e300, math.nan, math.inf, -math.inf]),
        lambda: rng.choice(
            ["", " ", "no", "{prompt}", "{}", "{{x}}", "%s", "\0", "\n", "é\u2028", "1e5", "~/x", "../x", "a" * 3000]
        ),
        lambda: datetime.date(2020, 1, rng.randint(1, 28)),
        lambda: b"\xff\x00",
        lambda: "".join(
            chr(rng.choice([rng.randint(32, 126), rng.randint(160, 0xD7FF)])) for _ in range(rng.randint(1, 20))
        ),
    ]
    if depth < 3:
        kinds.append(lambda: [any_value(rng, depth + 1) for _ in range(rng.randint(0, 3))])
        kinds.append(
            lambda: {rng.choice(["a", "b", 1, None]): any_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
        )
    return rng.choice(kinds)()


def spoiled(rng: random.Random, good: bytes) -> bytes:
    """A few bytes changed, put in, or taken out; or nothing but noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randint(0, 300))
    data = bytearray(good)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data) + 1)
        piece = rng.choice(
            [
                rng.randbytes(1),
                rng.choice(
                    [
                        *(b"\n", b":", b": ", b"\t", b"{", b"}", b"[", b"'", b'"', b"&a ", b"*a", b"!!", b"\0", b"-"),
                        *(b"#", b"\r", b"9"),
                    ]
                ),
            ]
        )
        match rng.randrange(3):
            case 0:
                data[place:place] = piece
            case 1:
                del data[place : place + rng.randint(1, 8)]
            case _:
                data[place : place + 1] = piece
    return bytes(data)


def fuzzed(default: int):
    """Seeds of the fuzzers: a few by default, ten times as many in the slow suite."""
    return pytest.mark.parametrize(
        "seeds", [range(default), pytest.param(range(default, 11 * default), marks=pytest.mark.slow)], ids=str
    )
