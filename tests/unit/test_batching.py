"""Micro-batches and joined siblings: every row once, within the limits, at the cost that is claimed."""

from __future__ import annotations

import math

import pytest
from conftest import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpo.forward.batching import _WIDEST, Limits, costs, forward_cost, join, shared_cost, siblings, split

LIMITS = st.builds(
    Limits,
    budget=st.sampled_from([5.0, 40.0, 300.0, math.inf]),
    most=st.sampled_from([1.0, 2.0, 5.0, math.inf]),
    forward_cost=st.sampled_from([0.0, 7.0, 100.0, math.inf]),
    pair_cost=st.sampled_from([0.0, 0.01, 1.0]),
)
ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 60)), max_size=24)


def prompts_of(rows):
    """A prompt per kind, longer for a later one."""
    return [[kind] * (1 + 6 * kind) for kind, _ in rows], [length for _, length in rows]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60)), max_size=24), LIMITS, st.booleans())
def test_parts_hold_every_row_once_and_keep_to_the_limits(sizes, limits, packed):
    limits = Limits(limits.budget, limits.most, limits.forward_cost, packed=packed)
    parts = split(sizes, limits)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    flat = [sum(sizes[i]) for part in parts for i in part]
    assert flat == sorted(flat, reverse=True)
    for part in parts:
        own = [sum(sizes[i]) for i in part]
        needed = sum(own) if packed else len(own) * max(own)
        assert len(part) == 1 or (needed <= limits.budget and len(part) <= limits.most)
        assert needed - sum(own) <= limits.forward_cost


@settings(deadline=None, max_examples=150)
@given(ROWS, LIMITS)
def test_bundles_hold_every_completion_once_behind_its_own_prompt(rows, limits):
    prompts, lengths = prompts_of(rows)
    parts, cost = join(prompts, lengths, limits)
    bundles = [bundle for part in parts for bundle in part]
    assert sorted(i for bundle in bundles for i in bundle) == list(range(len(rows)))
    longest = max([len(p) + n for p, n in zip(prompts, lengths)], default=0)

    def width(bundle):
        assert len({tuple(prompts[i]) for i in bundle}) == 1
        return len(prompts[bundle[0]]) + sum(lengths[i] for i in bundle)

    recomputed = 0.0
    for part in parts:
        widths = [width(bundle) for bundle in part]
        masked = any(len(bundle) > 1 for bundle in part)
        recomputed += forward_cost(len(part), max(widths), limits, share=1.0 if masked else 0.5)
        assert len(part) == 1 or len(part) * max(widths) <= limits.budget
        assert sum(map(len, part)) <= limits.most or sum(map(len, part)) == 1
        for bundle, own in zip(part, widths):
            assert len(bundle) == 1 or own <= min(limits.budget, max(longest, _WIDEST))
    assert cost == pytest.approx(recomputed)
    apart = split([(len(p), n) for p, n in zip(prompts, lengths)], limits)
    alone = sum(
        forward_cost(len(part), max(len(prompts[i]) + lengths[i] for i in part), limits, share=0.5) for part in apart
    )
    assert cost <= alone


def test_siblings_are_joined_unless_attention_costs_more_than_it_saves():
    prompts, lengths = [[1] * 20] * 4 + [[2] * 20] * 4, [10] * 8
    assert join(prompts, lengths, Limits(forward_cost=5.0)) == ([[[0, 1, 2, 3], [4, 5, 6, 7]]], 5 + 2 * 60)
    apart, cost = join(prompts, lengths, Limits(forward_cost=5.0, pair_cost=1.0))
    assert apart == [[[i] for i in range(8)]] and cost == 5 + 8 * 30 * (1 + 15)
    few = join(prompts, lengths, Limits(forward_cost=5.0, budget=45))[0]
    assert few == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]  # a row of three would take 50 tokens


def test_nothing_to_do():
    assert split([], Limits()) == [] and join([], [], Limits()) == ([], 0.0)


def test_siblings_longest_first():
    assert siblings([[1], [2], [1], [1]], [3, 9, 5, 4]) == [[1], [2, 3, 0]]


def test_what_shared_keys_and_values_cost_by_hand():
    prompts, lengths = [[1] * 10] * 3 + [[2] * 4], [5, 3, 1, 2]
    limits = Limits(forward_cost=7.0, pair_cost=0.1)
    # Two carriers, 9 tokens of padding: apart. Of the followers one has a token left after its first.
    first = 7 + 15 * (1 + 0.1 * 7.5) + 7 + 6 * (1 + 0.1 * 3)
    assert shared_cost(prompts, lengths, limits, {0: [1, 2], 3: []}) == pytest.approx(first + 7 + 2 * (1 + 0.1 * 12))


def test_costs_follow_the_size_of_a_layer():
    """Of the models of the fit: 2 layers of 49 thousand parameters, 4 of 0.79 million."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    def of(hidden, layers, kv_heads):
        shape = dict(
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=hidden // 4,
        )
        return costs(Qwen3ForCausalLM(Qwen3Config(vocab_size=200, **shape)), "cpu")

    (small, small_pair), (large, large_pair) = of(64, 2, 4), of(256, 4, 2)
    assert small == pytest.approx(190, rel=0.05) and large == pytest.approx(44, rel=0.1)
    assert small_pair == pytest.approx(2 * 64 / 56_000, rel=0.1) and large_pair == pytest.approx(2 * 256 / 8e5, rel=0.1)
    assert costs(build_model(), "cuda")[0] == 1024


def test_a_model_without_attention_has_costs_too():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
    run, pair = costs(model, "cpu")
    assert run > 0 and pair == 0
