"""Calls of a user's reward and feedback functions. A wrong result, an exception or a timeout becomes one sentence."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Set, Sized
from typing import Any

from pgpo.errors import UserError, reason
from pgpo.settings.field_types import shown

CONTEXT_COLUMN = "privileged_context"  # TRL's name: a text per row that the teacher reads as feedback
# What TRL hands to reward functions beside the dataset's columns: a column of that name collides, or is hidden.
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
FEEDBACK_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state")
_LARGEST = 3.4028234663852886e38  # of single precision, in which TRL keeps rewards
_AGAIN = 1.0  # seconds, ours
_REWARD = (
    "a reward must be a finite number (in single precision, below 3.4e38), or None where the function does not apply."
)


class _TimeUp(BaseException):
    """Not an Exception, because functions catch those."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise _TimeUp inside the block after so many seconds, and again every second should it be caught there.

    It uses the alarm signal, which interrupts Python code and blocking calls (sleep, sockets, locks, processes). It
    cannot interrupt a C function that does not return to the interpreter, nor a block that sets an alarm of its own
    (signal.alarm), which replaces this one.

    Raises:
        UserError: not in the main thread, or a system without the signal (Windows).
    """
    if seconds is None:
        yield
        return
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        raise UserError(
            f"reward_timeout is {seconds:g}, which needs Linux or macOS and training in the main thread; leave it at "
            "None."
        )
    running = True

    def stop(number: int, frame: Any) -> None:
        if running:
            raise _TimeUp

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        try:
            yield
        finally:
            running = False
    finally:  # an outer one: the alarm may still fire in the inner `finally`
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def call(
    function: Callable[..., Any], what: str, place: str, unit: str, timeout: float | None, kwargs: Mapping[str, Any]
) -> list[Any]:
    """What the function returns, one item per completion.

    Args:
        what, place, unit: for sentences, e.g. "reward function 'grade'", "at step 3", "reward".

    Raises:
        UserError: it raised, took longer than `timeout` seconds, or returned something else.
    """
    try:
        with time_limit(timeout):
            return _items(function(**kwargs), what, place, unit, len(kwargs["prompts"]))
    except _TimeUp:
        raise _too_slow(what, place, timeout) from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise _raised(error, what, place, kwargs) from error


async def call_async(
    function: Callable[..., Any], what: str, place: str, unit: str, timeout: float | None, kwargs: Mapping[str, Any]
) -> list[Any]:
    """`call` for a coroutine function; the limit cannot interrupt one that never awaits."""

    async def run() -> tuple[Any, BaseException | None]:
        try:
            return await function(**kwargs), None
        except (Exception, SystemExit) as error:  # its own TimeoutError is not ours
            return None, error

    try:
        returned, error = await asyncio.wait_for(run(), timeout)
    except TimeoutError:
        raise _too_slow(what, place, timeout) from None
    if error is not None:
        raise _raised(error, what, place, kwargs) from error
    return _items(returned, what, place, unit, len(kwargs["prompts"]))


def call_grader(grade: Callable[[str, Any], Any], text: str, row: Mapping[str, Any], timeout: float | None) -> Any:
    """A held-out grader's result for one completion.

    Raises:
        UserError: it raised, or took longer than `timeout` seconds.
    """
    place = f"for question {row['id']!r}"
    try:
        with time_limit(timeout):
            return grade(text, row)
    except _TimeUp:
        raise _too_slow("grade", place, timeout) from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"grade raised {type(error).__name__} {place}: {reason(error)}.") from error


def check_rewards(rewards: list[Any], what: str, place: str) -> tuple[list[float | None], str | None]:
    """Rewards as floats, and what is not finite among them (those are None then).

    None passes: in TRL it means that the function does not apply to a sample. Any other number does: of Python (bool,
    Decimal, Fraction), numpy, or a tensor with one element.

    Raises:
        UserError: something that is no number.
    """
    checked: list[float | None] = []
    problem = None
    for i, reward in enumerate(rewards):
        if reward is None:
            checked.append(None)
            continue
        try:
            value = _number(reward)
            finite = abs(value) <= _LARGEST  # nan compares false
            checked.append(value if finite else None)
        except Exception:
            raise UserError(f"{what} returned {shown(reward)} for sample {i} {place}; {_REWARD}") from None
        if not finite:
            problem = problem or f"{what} returned {shown(reward)} for sample {i} {place}; {_REWARD}"
    return checked, problem


def _number(reward: Any) -> float:
    """float(reward), but no text; beyond a float's range it is infinite."""
    if isinstance(reward, (str, bytes, bytearray)):
        raise TypeError
    try:
        return float(reward)
    except OverflowError:
        return math.inf


def check_texts(texts: list[Any], what: str, place: str) -> list[str | None]:
    """Raises UserError unless each is a text or None."""
    for i, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise UserError(f"{what} returned {shown(text)} for sample {i} {place}; return a text or None.")
    return texts


def is_async(function: Any) -> bool:
    """As TRL judges: a coroutine function, or an object whose call is one."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _items(returned: Any, what: str, place: str, unit: str, count: int) -> list[Any]:
    """A list of the items returned; an iterator is read no further than needed."""
    try:
        if isinstance(returned, (str, bytes, Mapping, Set)):
            raise TypeError
        items = iter(returned)
    except TypeError:
        raise UserError(
            f"{what} returned {shown(returned)} {place}; return a list with one {unit} per completion."
        ) from None
    found = list(itertools.islice(items, count + 1))
    if len(found) != count:
        number = len(returned) if isinstance(returned, Sized) else len(found) if len(found) < count else "more"
        raise UserError(
            f"{what} returned {number} {unit}s for {count} completions {place}; return one {unit} or None per "
            "completion."
        )
    return found


def _raised(error: BaseException, what: str, place: str, kwargs: Mapping[str, Any]) -> UserError:
    samples = len(kwargs["prompts"])
    return UserError(
        f"{what} raised {type(error).__name__} {place} on the batch of {samples} samples: {reason(error)}."
    )


def _too_slow(what: str, place: str, timeout: float | None) -> UserError:
    return UserError(
        f"{what} did not return within reward_timeout = {timeout:g} seconds {place}; make it faster, or raise the "
        "limit."
    )
