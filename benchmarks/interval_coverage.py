"""How often 95 % intervals of avg@k, pass@k and paired differences hold the truth at 20 to 200 questions.

    python benchmarks/interval_coverage.py --out benchmarks/results/interval_coverage.json

The chance that a completion of a question is right differs between questions. Of the 688 runs of results/lab-study
(256 questions, 16 completions) the median intraclass correlation is .14 in base models and .27 to .66 in trained ones:
Beta spreads with a + b from 6 to .5. These two ends are simulated, 1.5 between them, and a spread that is no Beta:
every other question has the mean chance, the rest .02 or .98. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pgpo.intervals import LEVEL, mean_interval, paired_difference, student_t, variance_of_mean, wilson

Array = npt.NDArray[np.float64]
Ends = tuple[Array, Array]

SEED = 0
QUESTIONS = (20, 50, 100, 200)
CHANCES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
SPREADS = ("beta .5", "beta 1.5", "beta 6", "two kinds")
KS = (16, 1)  # avg@16; scores that are 0 or 1, as those of pass@k and maj@k
RESAMPLES = 1000  # of the bootstrap: an end then has a standard error of 2 % of the width
Z = 1.959964
BIOLOGY = (*[1] * 31, 2, 2, 2, 3, 10)  # questions per stem, SciKnowEval L3, Biology's test set
MEANS = (np.arange(400) + 0.5) / 400  # grid of the beta-binomial posterior
SUMS = np.exp(np.linspace(math.log(0.05), math.log(200), 24))


def chances(rng: np.random.Generator, spread: str, p: float, shape: tuple[int, ...]) -> Array:
    """Chances of questions with mean p."""
    if spread == "two kinds":
        known = rng.random(shape) < (p - 0.02) / 0.96
        return np.where(rng.random(shape) < 0.5, p, np.where(known, 0.98, 0.02))
    total = float(spread.split()[1])
    return rng.beta(p * total, (1 - p) * total, size=shape)


class BetaBinomial:
    """Central posterior interval of the mean of a Beta, from counts of k (Bowyer et al. 2025, arXiv 2503.01747).

    The mean is uniform a priori; the prior of s = a + b is Gamma(1, 1), theirs, or 1 / (1 + s)^2 (ours, wider).
    """

    def __init__(self, k: int, prior: str) -> None:
        log_gamma = np.vectorize(math.lgamma)
        y = np.arange(k + 1)
        a, b = MEANS[:, None, None] * SUMS[:, None], (1 - MEANS)[:, None, None] * SUMS[:, None]
        table = log_gamma(a + y) + log_gamma(b + k - y) - log_gamma(a + b + k)
        table += log_gamma(a + b) - log_gamma(a) - log_gamma(b)
        density = np.exp(-SUMS) if prior == "gamma" else (1 + SUMS) ** -2
        self.k = k
        self.prior = np.log(density * SUMS)
        self.table = table.reshape(-1, k + 1)

    def __call__(self, counts: Array) -> Ends:
        """counts: [repetitions, questions]."""
        seen = np.stack([(counts == y).sum(1) for y in range(self.k + 1)]).astype(float)
        low, high = [], []
        for part in np.array_split(seen, max(1, seen.shape[1] // 250), axis=1):
            log = (self.table @ part).reshape(len(MEANS), len(SUMS), -1) + self.prior[:, None]
            mass = np.exp(log - log.max(axis=(0, 1))).sum(axis=1)
            below = np.cumsum(mass, axis=0) / mass.sum(axis=0)
            low.append(MEANS[np.argmax(below >= (1 - LEVEL) / 2, axis=0)] - 0.5 / len(MEANS))
            high.append(MEANS[np.argmax(below >= (1 + LEVEL) / 2, axis=0)] + 0.5 / len(MEANS))
        return np.concatenate(low), np.concatenate(high)


def methods(scores: Array, rng: np.random.Generator, posteriors: dict[str, BetaBinomial]) -> dict[str, Ends]:
    """Ends per repetition of every method; scores: [repetitions, questions]."""
    n = scores.shape[1]
    mean, error, t = scores.mean(1), scores.std(1, ddof=1) / math.sqrt(n), student_t(n - 1)
    alike = (mean == 0) | (mean == 1)
    flat = Z**2 / (n + Z**2)  # the normal interval was replaced there by Wilson's
    found = {name: clipped(mean, np.where(alike, flat, q * error)) for name, q in (("normal", Z), ("t", t))}
    with np.errstate(divide="ignore", invalid="ignore"):
        found["wilson"] = wilson(mean, np.where(alike | (error == 0), n, mean * (1 - mean) / error**2), t)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n
    low, high = np.quantile(weights @ scores.T, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    found["bootstrap"] = (
        np.where(alike, np.maximum(0, mean - flat), low),
        np.where(alike, np.minimum(1, mean + flat), high),
    )
    for name, posterior in posteriors.items():
        found[name] = posterior(np.rint(scores * posterior.k))
    return found


def clipped(mean: Array, half: Array) -> Ends:
    return np.maximum(0.0, mean - half), np.minimum(1.0, mean + half)


def single(rng: np.random.Generator, repetitions: int) -> Iterator[dict[str, Any]]:
    """One row per k, n, spread and chance: coverage and mean width of every method."""
    for k in KS:
        posteriors = {f"beta-binomial, {prior}": BetaBinomial(k, prior) for prior in ("gamma", "wide")} if k > 1 else {}
        # With k = 1 the spread between questions leaves no trace: one of them says all.
        for n, spread, p in itertools.product(QUESTIONS, SPREADS if k > 1 else SPREADS[:1], CHANCES):
            scores = rng.binomial(k, chances(rng, spread, p, (repetitions, n))) / k
            found = methods(scores, rng, posteriors)
            yield {
                **{"k": k, "questions": n, "spread": spread, "p": p},
                **{
                    "covered": {
                        name: round(float(((low <= p) & (p <= high)).mean()), 4) for name, (low, high) in found.items()
                    }
                },
                **{"width": {name: round(float((high - low).mean()), 4) for name, (low, high) in found.items()}},
            }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per k, n, spread and method: mean and lowest coverage over p = .1 to .9 and at .05 and .95, mean width."""
    lines = []
    kinds = {"beta": SPREADS[:3], "two kinds": SPREADS[3:]}
    for k, n, (kind, spreads) in itertools.product(KS, QUESTIONS, kinds.items()):
        cells = [row for row in rows if (row["k"], row["questions"]) == (k, n) and row["spread"] in spreads]
        for name in cells[0]["covered"] if cells else ():
            inner = [row["covered"][name] for row in cells if 0.1 <= row["p"] <= 0.9]
            outer = [row["covered"][name] for row in cells if not 0.1 <= row["p"] <= 0.9]
            ratio = [row["width"][name] / row["width"]["normal"] for row in cells]
            lines.append(
                {
                    **{"k": k, "questions": n, "spread": kind, "method": name},
                    **{"mean_inner": round(float(np.mean(inner)), 3), "lowest_inner": round(min(inner), 3)},
                    **{"mean_outer": round(float(np.mean(outer)), 3), "lowest_outer": round(min(outer), 3)},
                    **{"width_over_normal": round(float(np.mean(ratio)), 3)},
                }
            )
    return lines


def stems(rng: np.random.Generator, repetitions: int) -> Iterator[dict[str, Any]]:
    """Biology's test set: a question has the chance of its stem with probability `shared`, else one of its own."""
    owner = np.repeat(np.arange(len(BIOLOGY)), BIOLOGY)
    for shared, p in itertools.product((0.0, 0.5, 1.0), (0.5, 0.7)):
        hits: dict[str, list[bool]] = {"by question": [], "by stem": [], "by stem, without jackknife": []}
        widths: dict[str, list[float]] = {name: [] for name in hits}
        for _ in range(repetitions):
            of_stem, own = chances(rng, "beta 1.5", p, (len(BIOLOGY),)), chances(rng, "beta 1.5", p, (len(owner),))
            scores = rng.binomial(16, np.where(rng.random(len(owner)) < shared, of_stem[owner], own)) / 16
            sums = np.bincount(owner, weights=scores - scores.mean())
            plain = len(BIOLOGY) / (len(BIOLOGY) - 1) * float(sums @ sums) / len(owner) ** 2
            t = student_t(len(BIOLOGY) - 1)
            ends = {
                "by question": mean_interval(scores),
                "by stem": mean_interval(scores, owner.tolist()),
                "by stem, without jackknife": wilson(scores.mean(), scores.mean() * (1 - scores.mean()) / plain, t),
            }
            for name, (low, high) in ends.items():
                hits[name].append(bool(low <= p <= high))
                widths[name].append(float(high - low))
        yield {
            **{"shared": shared, "p": p},
            **{"covered": {name: round(float(np.mean(found)), 3) for name, found in hits.items()}},
            **{"width": {name: round(float(np.mean(found)), 3) for name, found in widths.items()}},
        }


def pairs(rng: np.random.Generator, repetitions: int) -> Iterator[dict[str, Any]]:
    """Differences of two methods on the same questions: three of ten questions change, and p rises by .1 there.

    Several runs: each has an effect of its own, sd .06 (median over the comparisons of results/lab-study), and a
    residual of sd .1 per question, besides that of 16 completions. Beside ours: the percentile bootstrap over runs and
    questions that it replaced.
    """
    for (runs, n), spread, p in itertools.product(
        ((1, 20), (1, 50), (1, 100), (1, 200), (2, 100), (4, 100), (8, 100), (8, 256)), SPREADS[:3:2], (0.6, 0.9)
    ):
        after = min(0.97, p + 0.1)
        truth = 0.3 * (after - p)
        hits: dict[str, list[bool]] = {"bootstrap": [], "t": []}
        ratios = []
        for _ in range(repetitions):
            before = chances(rng, spread, p, (n,))
            changed = np.where(rng.random(n) < 0.7, before, chances(rng, spread, after, (n,)))
            a, b = (rng.binomial(16, np.broadcast_to(q, (runs, n))) / 16 for q in (changed, before))
            of_runs = rng.normal(0, 0.06, (runs, 1)) + rng.normal(0, 0.1, (runs, n)) if runs > 1 else 0.0
            differences = a - b + of_runs
            found = paired_difference(differences)
            weights = [rng.multinomial(m, np.full(m, 1 / m), size=RESAMPLES) / m for m in (runs, n)]
            low, high = np.quantile(((weights[0] @ differences) * weights[1]).sum(1), [0.025, 0.975])
            hits["t"].append(found.low <= truth <= found.high)
            hits["bootstrap"].append(bool(low <= truth <= high))
            ratios.append((found.high - found.low) / (high - low) if high > low else math.nan)
        covered = {name: round(float(np.mean(found)), 3) for name, found in hits.items()}
        yield {
            **{"runs": runs, "questions": n, "spread": spread, "p": p, "covered": covered},
            **{"width_over_bootstrap": round(float(np.nanmedian(ratios)), 3)},
        }


def check() -> None:
    """The vectorized Wilson is the evaluator's."""
    scores = np.random.default_rng(1).binomial(16, 0.7, size=(1, 50)) / 16
    low, high = methods(scores, np.random.default_rng(0), {})["wilson"]
    assert np.allclose((low[0], high[0]), mean_interval(scores[0]), atol=1e-12)
    assert math.isclose(variance_of_mean(scores[0])[0], scores[0].var(ddof=1) / 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=None, help="write all numbers to this JSON file")
    parser.add_argument("--repetitions", type=int, default=2000, help="simulated evaluations per cell")
    args = parser.parse_args()
    check()
    start = time.process_time()
    rows = list(single(np.random.default_rng(SEED), args.repetitions))
    lines = summary(rows)
    print(f"{'k':>2s} {'n':>4s} {'spread':9s} {'method':22s} p .1-.9: mean, lowest  p .05, .95: the same  width/normal")
    for line in lines:
        inner, outer = (f"{line[f'mean_{part}']:14.3f} {line[f'lowest_{part}']:8.3f}" for part in ("inner", "outer"))
        head = f"{line['k']:2d} {line['questions']:4d} {line['spread']:9s} {line['method']:22s}"
        print(f"{head} {inner} {outer} {line['width_over_normal']:13.3f}")
    of_stems = list(stems(np.random.default_rng(SEED + 1), args.repetitions // 2))
    of_pairs = list(pairs(np.random.default_rng(SEED + 2), args.repetitions // 4))
    for row in (*of_stems, *of_pairs):
        print(row)
    if args.out is not None:
        about: dict[str, Any] = {
            **{"command": "python benchmarks/interval_coverage.py", "seed": SEED, "repetitions": args.repetitions},
            "cpu_seconds": round(time.process_time() - start),
        }
        parts = [json.dumps(about, indent=1)[:-2]]
        for key, found in (("summary", lines), ("stems", of_stems), ("paired", of_pairs), ("cells", rows)):
            parts.append(f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, found)) + "\n ]")
        args.out.write_text(",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
