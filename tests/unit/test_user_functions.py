"""What reward and feedback functions return, raise, and how long they take: one sentence that names them, no update."""

from __future__ import annotations

import asyncio
import contextlib
import decimal
import fractions
import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
import trainer_kit
from processes import patient

from pgpo.errors import UserError
from pgpo.train.user_functions import call, check_rewards, time_limit

ROWS = 16  # 4 prompts x 4 completions

# What they return, or raise -------------------------------------------------------------------------------------------


class Evil:
    """Raises whatever is asked of it."""

    def __float__(self):
        raise KeyError("no number")

    def __repr__(self):
        raise RuntimeError("no name")

    __abs__ = __float__


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def failing_generator():
    yield 1.0
    raise LookupError("half-way")


def endless_generator():
    while True:
        yield 1.0


def assert_training_refuses(t, says: str) -> str:
    """UserError of one line, and no update happened."""
    start, teacher = trainer_kit.weights(t.model), trainer_kit.weights(t.teacher.module)
    with pytest.raises(UserError, match=says) as caught:
        trainer_kit.train(t)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert t.state.global_step == 0
    assert trainer_kit.bitwise_equal(start, trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(teacher, trainer_kit.weights(t.teacher.module))
    return str(caught.value)


def at(place: int, value) -> list:
    return [*[1.0] * place, value, *[1.0] * (ROWS - place - 1)]


RETURNED: list[tuple[Callable[[], object], str]] = [
    (lambda: [1.0] * 15, "returned 15 rewards for 16 completions at step 1"),
    (lambda: [], "returned 0 rewards for 16 completions"),
    (lambda: at(7, math.nan), "returned nan for sample 7 at step 1"),
    (lambda: at(0, math.inf), "returned inf for sample 0 at step 1"),
    (lambda: at(15, -math.inf), "returned -inf for sample 15 at step 1"),
    (lambda: at(3, "1.0"), "returned '1.0' for sample 3 at step 1"),
    (lambda: 1.0, "returned 1.0 at step 1; return a list with one reward per completion"),
    (lambda: None, "returned None at step 1; return a list with one reward per completion"),
    (lambda: "1" * ROWS, "returned '1+' at step 1; return a list with one reward per completion"),
    (lambda: b"1" * ROWS, "returned b'1+' at step 1; return a list"),
    (lambda: {float(i): 1 for i in range(ROWS)}, "returned {0.0: 1, .* at step 1; return a list"),
    (lambda: set(map(float, range(ROWS))), "returned {0.0, .* at step 1; return a list"),
    (lambda: torch.tensor(1.0), r"returned tensor\(1.\) at step 1; return a list"),
    (lambda: torch.ones(ROWS, 2), "returned tensor.* for sample 0 at step 1; a reward must be a finite number"),
    (lambda: [[1.0]] * ROWS, r"returned \[1.0\] for sample 0 at step 1"),
    (lambda: [1.0] * 15 + [1j], "returned 1j for sample 15 at step 1"),
    (lambda: [1.0] * 15 + [np.ones(2)], r"returned array\(.* for sample 15 at step 1; a reward must be a finite"),
    (lambda: [1.0] * 15 + [decimal.Decimal("sNaN")], r"returned Decimal\('sNaN'\) for sample 15 at step 1"),
    (lambda: [1.0] * 15 + [10**400], "returned .* for sample 15 at step 1; a reward must be a finite number"),
    (lambda: [1.0, Evil(), *[1.0] * 14], "returned <Evil instance at .*> for sample 1 at step 1"),
    (lambda: Evil(), "returned <Evil instance at .*> at step 1; return a list"),
    (lambda: [object()] * ROWS, "returned <object object at .*> for sample 0"),
    (lambda: [["x" * 10**6] * 10**4] * ROWS, r"returned \['xx.* for sample 0"),
    (lambda: [1.0] * 10**6, "returned 1000000 rewards for 16 completions"),
    (endless_generator, "returned more rewards for 16 completions"),
    (failing_generator, "raised LookupError at step 1 on the batch of 16 samples: half-way"),
    (lambda: (_ for _ in ()), "returned 0 rewards for 16 completions"),
    (lambda: sys.exit(0), "raised SystemExit at step 1 on the batch of 16 samples: 0"),
    (lambda: {}["a\nb"], r"raised KeyError at step 1 on the batch of 16 samples: 'a\\nb'"),
    (lambda: (_ for _ in ()).throw(Unspeakable), "raised Unspeakable at step 1 .*: no reason given"),
    (lambda: (_ for _ in ()).throw(ValueError("a\n b" * 400)), "raised ValueError at step 1 .*: a ba b"),
]


@pytest.mark.parametrize(("returned", "says"), RETURNED, ids=range(len(RETURNED)))
def test_whatever_a_reward_function_returns(returned, says):
    calls = []

    def verdict(prompts):
        calls.append(len(prompts))
        return returned()

    what, place = "reward function 'verdict'", "at step 1"
    with pytest.raises(UserError, match=f"^{what} {says}") as caught:
        rewards, problem = check_rewards(
            call(verdict, what, place, "reward", None, {"prompts": ROWS * ["w1"]}), what, place
        )
        raise UserError(problem or f"no problem with {rewards}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert calls == [ROWS]  # not called again to find the sample: it may send mail, or count


@pytest.mark.parametrize("number", [0, 2, 7, 8, 14, 15, 25, 27])
def test_what_a_reward_function_returns_reaches_no_update(tmp_path, number):
    returned, says = RETURNED[number]

    def verdict(prompts, completions, **kwargs):
        return returned()

    assert_training_refuses(trainer_kit.trainer(tmp_path, reward=verdict), f"^reward function 'verdict' {says}")


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (["no"] * 15, "returned 15 texts for 16 completions at step 1"),
        ([*["no"] * 9, 3.0, *["no"] * 6], "returned 3.0 for sample 9 at step 1; return a text or None"),
        ([*["no"] * 9, math.nan, *["no"] * 6], "returned nan for sample 9 at step 1"),
        (None, "returned None at step 1"),
        (2, "returned 2 at step 1"),
        (RuntimeError("no connection"), "raised RuntimeError at step 1 on the batch of 16 samples: no conn"),
        ("x" * ROWS, "returned 'x+' at step 1; return a list with one text per completion"),
        ([b"no"] * ROWS, "returned b'no' for sample 0 at step 1; return a text or None"),
        ({str(i): "no" for i in range(ROWS)}, "returned {.* at step 1; return a list with one text"),
        ([["no"]] * ROWS, r"returned \['no'\] for sample 0"),
        (endless_generator(), "returned more texts for 16 completions"),
    ],
    ids=lambda v: None if isinstance(v, str) else type(v).__name__,
)
def test_whatever_a_feedback_function_returns(tmp_path, returned, says):
    def remark(prompts, completions, **kwargs):
        if isinstance(returned, Exception):
            raise returned
        return returned

    assert_training_refuses(trainer_kit.trainer(tmp_path, feedback_funcs=remark), f"^feedback function 'remark' {says}")


def test_numbers_and_verdicts_of_numpy_and_torch_are_rewards(tmp_path):
    ends = []
    for convert in (
        list,
        np.array,
        torch.tensor,
        lambda r: [torch.tensor(x) for x in r],
        lambda r: [bool(x) for x in r],
        lambda r: torch.tensor(r) > 0.5,
        lambda r: np.array(r) > 0.5,
    ):
        t = trainer_kit.trainer(
            tmp_path,
            reward=lambda prompts, completions, c=convert, **k: c(trainer_kit.parity_reward(prompts, completions)),
        )
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert all(trainer_kit.bitwise_equal(ends[0], end) for end in ends[1:])


def test_an_object_with_an_async_call_is_a_reward_function(tmp_path):
    class Judge:
        async def __call__(self, prompts, completions, **kwargs):
            await asyncio.sleep(0)
            return trainer_kit.parity_reward(prompts, completions)

    ends = []
    for reward in (trainer_kit.parity_reward, Judge(), functools.partial(Judge())):
        t = trainer_kit.trainer(tmp_path, reward=reward)
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(ends[0], ends[1]) and trainer_kit.bitwise_equal(ends[0], ends[2])


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.bool_(True),
        torch.tensor(True),
        torch.tensor(1),
        torch.tensor([1.0]),
        torch.tensor(1.0, dtype=torch.bfloat16),
        torch.tensor(1.0, requires_grad=True),
        np.float16(1),
        np.array(1.0),
        decimal.Decimal(1),
        fractions.Fraction(1),
    ],
    ids=repr,
)
def test_every_number_is_a_reward(value):
    assert check_rewards([value, None], "f", "here") == ([1.0, None], None)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, 1e39, 10**400, torch.tensor(math.nan), np.float64("-inf"), decimal.Decimal("NaN")],
    ids=str,
)
def test_what_is_not_finite_is_said(value):
    rewards, problem = check_rewards([value], "f", "here")
    assert rewards == [None] and "a reward must be a finite number" in problem


def test_reward_none_for_some_leaves_the_others_their_reward(tmp_path):
    def half(prompts, completions, **kwargs):
        rewards = trainer_kit.parity_reward(prompts, completions)
        return [None if i % 2 else r for i, r in enumerate(rewards)]

    t = trainer_kit.trainer(tmp_path, reward=half)
    (log,) = trainer_kit.train(t)
    judged = [r for r in t.last_rollout.rewards if not math.isnan(r)]
    assert len(judged) == ROWS // 2
    assert log["success_share"] == pytest.approx(sum(judged) / len(judged))
    assert 0 < log["active_share"] < 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_raising_reward_function_is_named_with_step_and_batch(tmp_path, is_async):
    def verdict(prompts, completions, index, **kwargs):
        return [{0: 1.0}.get(i, 0.0) if i != 5 else {}["answer"] for i in index]

    async def verdict_async(**kwargs):
        return verdict(**kwargs)

    # Without shuffling, question 5 stands in the second step: its four completions are samples 4 to 7.
    t = trainer_kit.trainer(tmp_path, reward=verdict_async if is_async else verdict, max_steps=2)
    with pytest.raises(UserError) as caught:
        trainer_kit.train(t)
    name = "verdict_async" if is_async else "verdict"
    says = f"reward function {name!r} raised KeyError at step 2 on the batch of 16 samples: 'answer'."
    assert str(caught.value) == says
    assert isinstance(caught.value.__cause__, KeyError)
    assert t.state.global_step == 1


def test_feedback_none_everywhere_is_no_feedback(tmp_path):
    ends = []
    for options in ({}, {"feedback_funcs": lambda prompts, **kwargs: [None] * len(prompts)}):
        t = trainer_kit.trainer(tmp_path, **options)
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(*ends)


# Functions that hang --------------------------------------------------------------------------------------------------


def sleeping():
    time.sleep(60)


def waiting():
    threading.Event().wait()


def computing():
    while True:
        pass


def catching():
    """Catches every Exception, as code around a flaky service does."""
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def catching_all():
    """Catches the first interruption altogether."""
    for _ in range(2):
        with contextlib.suppress(BaseException):
            time.sleep(60)
    time.sleep(60)


@pytest.mark.parametrize("hang", [sleeping, waiting, computing, catching, catching_all], ids=lambda f: f.__name__)
def test_a_reward_function_that_hangs_is_ended(tmp_path, hang):
    def verdict(prompts, completions, **kwargs):
        hang()
        return [1.0] * len(prompts)

    start = time.monotonic()
    t = trainer_kit.trainer(tmp_path, reward=verdict, reward_timeout=0.2)
    says = "^reward function 'verdict' did not return within reward_timeout = 0.2 seconds at step 1; make it faster"
    assert_training_refuses(t, says)
    assert time.monotonic() - start < patient(3)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("kind", ["async", "feedback", "endless"])
def test_other_functions_that_hang_are_ended(tmp_path, kind):
    async def verdict(prompts, completions, **kwargs):
        await asyncio.sleep(60)

    def remark(prompts, completions, **kwargs):
        time.sleep(60)

    def endless(prompts, completions, **kwargs):
        def items():
            time.sleep(60)
            yield 1.0

        return items()

    options = {"async": {"reward": verdict}, "feedback": {"feedback_funcs": remark}, "endless": {"reward": endless}}[
        kind
    ]
    name = {
        "async": "reward function 'verdict'",
        "feedback": "feedback function 'remark'",
        "endless": "reward .*'endless'",
    }
    t = trainer_kit.trainer(tmp_path, reward_timeout=0.2, **options)
    assert_training_refuses(t, f"^{name[kind]} did not return within reward_timeout = 0.2 seconds at step 1")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_functions_own_timeout_is_its_own(tmp_path, is_async):
    def verdict(prompts, completions, **kwargs):
        raise TimeoutError("the judge is away")

    async def verdict_async(prompts, completions, **kwargs):
        raise TimeoutError("the judge is away")

    t = trainer_kit.trainer(tmp_path, reward=verdict_async if is_async else verdict, reward_timeout=60.0)
    assert_training_refuses(t, "raised TimeoutError at step 1 on the batch of 16 samples: the judge is away")


def test_a_function_in_time_is_left_alone(tmp_path):
    ends = []
    for timeout in (None, 60.0):
        t = trainer_kit.trainer(tmp_path, reward_timeout=timeout)
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(*ends)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_limit_gives_back_another_ones_alarm():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        with time_limit(50):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 50
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        signal.raise_signal(signal.SIGALRM)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_the_limit_needs_the_main_thread():
    said = []

    def work():
        try:
            with time_limit(5):
                pass
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [
        "reward_timeout is 5, which needs Linux or macOS and training in the main thread; leave it at None."
    ]
