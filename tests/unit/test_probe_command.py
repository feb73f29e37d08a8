"""`pgpo probe` from flags to a verdict: on lab models of which the truth is known, and on one that can do nothing."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from trainer_kit import train, trainer

from pgpo import cli
from pgpo.command import hints
from pgpo.command.probe import main
from pgpo.errors import UserError
from pgpo.lab.base_model import build_model, build_tokenizer, save
from pgpo.report.probe_figure import draw_probe, plot_probe
from pgpo.train.rows import active_samples

QUESTIONS = 24
SMALL = ["--questions", "10", "--num_generations", "4", "--hinted_samples", "2", "--temperatures", "1.0"]


def probed(*words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, folder = main(words)
    assert status == 0
    return folder, json.loads((folder / "probe.json").read_text())


def value(estimate):
    return estimate["value"]


# Measured on 256 questions x 8 (tasks/lab_checkpoints/*/provenance.json): student .53, right hint .93, wrong hint .03.
@pytest.mark.parametrize("variant", ["plain", "style"])
def test_the_lab_copies_whatever_it_is_shown(tmp_path, variant, capsys):
    flags = ["--variant", variant, "--questions", str(QUESTIONS), "--temperatures", "1.0"]
    folder, result = probed("--output_dir", str(tmp_path / "p"), *flags)
    (reading,) = result["readings"]
    right, wrong, placebo = (reading["hints"][kind] for kind in ("right", "wrong", "placebo"))
    # 24 questions: twice the standard error by question is about .13 for the student, .06 with a hint
    assert 0.35 < value(reading["pass_at_1"]) < 0.75
    assert value(reading["pass_at_k"]) > 0.9
    assert reading["well_formed"] > 0.95 * reading["completions"] and reading["clipped"] < 0.05
    assert value(right["success"]) > 0.8
    assert value(wrong["success"]) < 0.15 and value(wrong["followed"]) > 0.6 > 0.4 > value(wrong["unprompted"])
    assert value(placebo["success"]) < 0.15 and value(placebo["followed"]) > 0.5 > 0.1 > value(placebo["unprompted"])
    assert right["hinted_share"] > 0.85
    assert value(right["information"]) > value(placebo["information"]) + 0.05
    assert value(right["information"]) == pytest.approx(
        right["hinted_share"] * (right["student_entropy"] - right["teacher_entropy"])
    )
    assert right["divergence"] < wrong["divergence"] < placebo["divergence"]
    assert reading["rho"] == pytest.approx(min(2.718281828 ** value(right["information"]), 2.0))
    assert result["verdict"]["name"] == "copies" and result["verdict"]["worth"]
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"verdict: {result['verdict']['sentence']}"
    assert "temperature 1: 24 of 24 questions" in err  # progress off a terminal
    plot_probe(folder)
    assert (folder / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """The lab's network before its training."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    save(build_model(build_tokenizer()), folder, {})
    return folder


def test_a_model_that_can_do_nothing_has_nothing_to_distil(tmp_path, random_model):
    _, result = probed(str(random_model), "--output_dir", str(tmp_path / "p"), *SMALL)
    (reading,) = result["readings"]
    assert (reading["right"], reading["well_formed"], reading["completions"]) == (0, 0, 40)
    assert reading["hints"]["right"]["hinted_share"] == 0 and reading["hints"]["right"]["success"] is None
    assert result["verdict"]["name"] in ("cut", "no format") and not result["verdict"]["worth"]
    assert re.match(r"nothing to distil: \d+ of 40 answers ", result["verdict"]["sentence"])
    draw_probe(result)


def test_what_was_probed_before_ctrl_c_is_kept_and_the_rest_is_the_same(tmp_path, monkeypatch, capsys):
    whole, expected = probed("--output_dir", str(tmp_path / "whole"), *SMALL)
    plain, calls = hints.Sampler.round, []

    def stopped(self, rows, temperature, number):
        calls.append(number)
        if number == 1:
            raise KeyboardInterrupt
        return plain(self, rows, temperature, number)

    monkeypatch.setattr(hints.Sampler, "round", stopped)
    half = tmp_path / "half"
    assert cli.main(["probe", "--output_dir", str(half), *SMALL]) == 130
    assert f"stopped after 8 of 10 questions; continue with: pgpo probe --resume {half}" in capsys.readouterr().err
    lines = (half / "questions.jsonl").read_bytes()
    assert lines.count(b"\n") == 8 and not (half / "probe.json").exists()
    # a line that a power cut tore, and one of a round that is not whole
    (half / "questions.jsonl").write_bytes(lines + (whole / "questions.jsonl").read_bytes()[len(lines) :][:-5])
    monkeypatch.setattr(hints.Sampler, "round", plain)
    _, result = probed("--resume", str(half))
    assert (half / "questions.jsonl").read_bytes() == (whole / "questions.jsonl").read_bytes()
    assert result["readings"] == expected["readings"]
    with pytest.raises(UserError, match=r"cannot be given"):
        main(["--resume", str(half), "--questions", "12"])
    with pytest.raises(UserError, match=r"is not empty; go on with"):
        main(["--output_dir", str(half)])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--questions", "1"], "questions is 1"),
        (["--hinted_samples", "0"], "hinted_samples is 0"),
        (["--temperatures", "0"], "must be above 0"),
        (["--questions", "99999"], "4096 training questions, not 99999"),
        (["--objective", "grpo"], "distils nothing"),
        (["--num_generations", "1"], "no completion has a sibling|no sibling"),
        (["--top_k", "50"], "leave top_k out"),
        (["--generation_kwargs", '{"min_p": 0.1}'], "leave min_p out"),
        (["--no_such_flag", "1"], "no_such_flag.*pgpo probe --help"),
        (["no/such/model"], "no model folder no/such/model"),
        (["--resume", "nowhere"], "no readable setting.json"),
    ],
)
def test_what_cannot_be_probed_is_said_and_nothing_is_written(folder, words, match):
    with pytest.raises(UserError, match=match):
        main(words)
    assert not list(folder.rglob("*.json*"))


def test_the_measurement_is_that_of_a_step(tmp_path):
    t = trainer(tmp_path, prompts_per_step=5, divergence_top_k=7, temperature=0.7, micro_batch_size=3)
    found = []
    plain = t.optimize

    def optimize(model, batch):
        samples = active_samples(batch)
        found.append(t.distillation.measure(model, samples, len(batch["row"]) - len(samples)))
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        return plain(model, batch)

    t.optimize = optimize
    (log,) = train(t)
    ((information, sums, tokens),) = found
    assert 0 < information.hinted_samples < information.samples == 20
    assert information.information == pytest.approx(log["information"], abs=1e-6)
    assert information.student_entropy == pytest.approx(log["student_entropy"], abs=1e-6)
    assert information.teacher_entropy == pytest.approx(log["teacher_entropy"], abs=1e-6)
    assert sums.divergence / tokens == pytest.approx(log["divergence"], abs=1e-6)
    assert tokens == log["active_tokens"]
