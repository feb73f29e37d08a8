"""Where `pgpo eval` is told to write is looked at before it samples; what its readers share, and what they do not."""

from __future__ import annotations

import pytest

from pgpo.command.eval import main as evaluate
from pgpo.errors import UserError
from pgpo.evaluate.runners import _request_seed
from pgpo.tasks.open_answers import STYLES, grade


@pytest.mark.parametrize(
    ("flag", "says"), [("--records", "which is a folder"), ("--lm_eval_folder", "which is a file; name a folder")]
)
def test_a_target_that_cannot_be_written_is_told_first(flag, says, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    target = tmp_path if flag == "--records" else file
    with pytest.raises(UserError, match=says):
        evaluate(["no-model", "--task", "lab_world", flag, str(target)])


def test_neighbouring_seeds_of_vllm_share_no_random_numbers():
    """vLLM seeds completion i of a request with its seed + i. Red if two evaluations sample the same completions."""
    k = 16
    used = [{_request_seed(seed, prompt) + i for prompt in range(50) for i in range(k)} for seed in (0, 1)]
    assert len(used[0]) == len(used[1]) == 50 * k and not used[0] & used[1]
    assert max(used[0]) < 2**63


@pytest.mark.parametrize("truth", ["4", "5"])
def test_a_text_with_two_answers_is_right_for_one_of_them_at_most(truth):
    """Hedging must not pay, and the vote is the answer that scored."""
    found = grade("4\nSo the answer is 5", STYLES["plain"], lambda answer: float(answer == truth))
    assert (found.reward, found.answer) == ((1.0, "4") if truth == "4" else (0.0, "4"))
    said = grade("The sum is 9.\n\nThe correct", STYLES["plain"], lambda answer: float(answer == "9"))
    assert (said.reward, said.answer) == (1.0, "9")
