"""The shipped recipes: they parse, they say what the paper says, and so does `PGPOConfig.paper()`.

The expected numbers are written out here, so that a slip in a recipe or in a default shows on either side.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import GRPOConfig

from pgpo import PGPOConfig
from pgpo.errors import UserError
from pgpo.lab.plan import Study, argv, read_study
from pgpo.settings.arguments import Parsed, parse

ROOT = Path(__file__).parents[2]
STUDIES = [
    ROOT / "recipes" / name
    for name in ("lab-study.yaml", "trust-study.yaml", "trust-late.yaml", "lm/study.yaml", "paper/table.yaml")
]
LAUNCHERS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))  # read by accelerate: test_sharding.py
RECIPES = sorted(set((ROOT / "recipes").rglob("*.yaml")) - {*STUDIES, *LAUNCHERS})
PAPER = sorted((ROOT / "recipes/paper").glob("*/*.yaml"))
DOMAINS = ("biology", "chemistry", "materials", "physics")
METHODS = ("sdpo", "pgpo-0.5", "pgpo-1.0", "pgpo-1.5")


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


# bf16 is checked against the hardware of the moment; use_cpu skips that check and changes no other field.
CPU = "--use_cpu"

METHOD: dict[str, Any] = {
    # PGPO's experiment
    "prompts_per_step": 32,
    "num_generations": 8,
    "max_prompt_length": 2048,
    "max_completion_length": 8192,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "eval_k": 16,
    "eval_temperature": 0.6,
    "eval_top_p": 0.95,
    "seed": 42,
    "chat_template_kwargs": {"enable_thinking": False},
    # Eq. 8 and 9
    "alpha": 1.0,
    "alpha_end": None,
    "rho_max": 2.0,
    "rho_min": 0.0,
    "information_denominator": "all",
    "modulated_weight_decay": "scaled",
    # SDPO's settings
    "divergence": "jsd",
    "divergence_beta": 0.5,
    "divergence_top_k": 100,
    "divergence_tail": True,
    "importance_clip": 2.0,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 2.0,
    "rho_law": "exponential",
    "rho_file": None,
    "information_source": "same_batch",
    "information_baseline": "zero",
    "teacher": "ema",
    "teacher_rate": 0.05,
    "success_threshold": 1.0,
    "demonstration": "first",
    "allow_own_success": False,
    "remove_thinking": True,
    "reprompt_template": None,
    "solution_template": None,
    "feedback_template": None,
    "max_teacher_prompt_length": 10240,
    # one optimizer step per 256 completions, on policy
    "per_device_train_batch_size": 256,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
}
ENGINE = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": 10240,
    "bf16": True,
    "gradient_checkpointing": True,
}


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch) -> None:
    monkeypatch.delenv("PGPO_SCIENCE_DATA", raising=False)


def read(path: Path, tmp_path: Path) -> Parsed:
    return parse(["--config", str(path), "--output_dir", str(tmp_path), CPU])


def study(path: Path, monkeypatch) -> Study:
    """bf16 is checked against the hardware of the moment; a CPU is asked for in its place."""
    from pgpo.settings import arguments

    monkeypatch.setattr(arguments, "parse", lambda words: parse([*words, CPU]))
    return read_study(path)


def differing(a: PGPOConfig, b: PGPOConfig) -> set[str]:
    x, y = a.to_dict(), b.to_dict()
    assert x.keys() == y.keys()
    return {name for name in x if x[name] != y[name]}


def test_the_recipes_are_those_that_are_documented() -> None:
    assert {f"{p.parent.name}/{p.name}" for p in PAPER} == {f"{d}/{m}.yaml" for d in DOMAINS for m in METHODS}
    assert {p.name for p in set(RECIPES) - set(PAPER)} == {
        *("lab.yaml", "lab-style.yaml", "science-small.yaml", "smollm2.yaml")
    }
    assert all(p.exists() for p in STUDIES)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_value_of_a_recipe_arrives(path: Path, tmp_path: Path) -> None:
    """A recipe that does not parse, or a name that stands twice and so loses a value."""
    parsed = read(path, tmp_path)
    arrived = {**vars(parsed.model), **vars(parsed.config), **vars(parsed.run)}
    for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        kind = type(arrived[name])
        assert arrived[name] == (kind(value) if kind in (int, float) else value), name
    names = re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_a_paper_recipe_has_the_papers_numbers(path: Path, tmp_path: Path) -> None:
    parsed = read(path, tmp_path)
    domain, (objective, _, alpha) = path.parent.name, path.stem.partition("-")
    assert (parsed.run.task, parsed.run.domain, parsed.run.prompt_style) == ("science_qa", domain, "boxed")
    assert parsed.model.model_name_or_path == "Qwen/Qwen3-8B"
    assert parsed.config.objective == objective
    for name, value in (METHOD | ENGINE | {"alpha": float(alpha or 1.0)}).items():
        assert getattr(parsed.config, name) == value, name
    assert (parsed.config.max_steps, parsed.config.num_train_epochs) == (-1, 3.0)  # TRL's: the paper gives no steps


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_a_paper_recipe_says_that_it_was_not_run_and_how_to_run_it(path: Path) -> None:
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    name = path.relative_to(ROOT).as_posix()
    launch = "accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m pgpo train --config"
    assert first == f"# Not run here: {launch} {name}"
    assert all(line.startswith("#") or "  # " in line for line in rest)  # every value names its source


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_methods_differ_in_objective_and_alpha_alone(domain: str, tmp_path: Path) -> None:
    sdpo, *pgpo = (read(ROOT / f"recipes/paper/{domain}/{m}.yaml", tmp_path) for m in METHODS)
    assert [p.config.alpha for p in pgpo] == [0.5, 1.0, 1.5]
    for other in pgpo:
        assert differing(other.config, sdpo.config) <= {"objective", "alpha"}
        assert other.config.objective != sdpo.config.objective
        assert (other.run, other.model) == (sdpo.run, sdpo.model)


def test_the_table_trains_what_the_recipes_train(monkeypatch, tmp_path: Path) -> None:
    """Every arm of the study and the recipe of that name; the study needs a number of steps and a curve."""
    arms = {run.arm.name: run.arm for run in study(ROOT / "recipes/paper/table.yaml", monkeypatch).queue}
    assert {f"{d}/{m}" for d in DOMAINS for m in METHODS} <= arms.keys()
    for domain in DOMAINS:
        for method in METHODS:
            recipe = read(ROOT / f"recipes/paper/{domain}/{method}.yaml", tmp_path)
            arm = parse([*argv(arms[f"{domain}/{method}"].flags), "--output_dir", str(tmp_path), CPU])
            assert differing(recipe.config, arm.config) == {"max_steps", "eval_strategy", "do_eval", "eval_steps"}
            assert dataclasses.replace(recipe.run, samples_per_step=0) == arm.run
            assert recipe.model == arm.model


def test_the_trust_study_is_the_documented_one(monkeypatch) -> None:
    """Fixed before it was run: seeds that no search has seen, and trust's controls in every setting that ranks it."""
    read = study(ROOT / "recipes/trust-study.yaml", monkeypatch)
    assert read.seeds == list(range(400, 408)) and read.test_k == 16
    assert {run.seed for run in read.queue} == set(read.seeds)
    arms = {run.arm.name: run.arm for run in read.queue}
    rates = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    for variant, steps in (("plain", 150), ("style", 200)):
        names = [f"{variant}-{rate}" for rate in ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3")]
        for name, rate in zip(names, rates, strict=True):
            for method in ("sdpo", "trust"):
                arm = arms[f"{name}/{method}"]
                assert (arm.learning_rate, arm.max_steps, arm.flags["variant"]) == (rate, steps, variant)
        for name in (f"{variant}-2e-3", f"{variant}-2e-3-long"):
            assert arms[f"{name}/sdpo-lr-trust"].lr_times_mean_rho_of == "trust"
            assert arms[f"{name}/trust-shuffled"].rho_shuffled_from == "trust"
    assert {arm.trust for arm in arms.values() if arm.method.startswith(("trust", "auto", "pgpo-trust"))} == {
        "measured",
        "off",  # trust-shuffled
    }


def test_the_lab_study_is_the_documented_one(monkeypatch) -> None:
    """Fixed before it was run: a change of a number here is a change of the experiment."""
    read = study(ROOT / "recipes/lab-study.yaml", monkeypatch)
    assert read.seeds == list(range(100, 108)) and read.test_k == 16
    settings = list(dict.fromkeys(run.arm.setting for run in read.queue))
    rates = {
        run.arm.setting: (run.arm.learning_rate, run.arm.max_steps) for run in read.queue if run.arm.method == "sdpo"
    }
    assert settings[:4] == ["plain-1e-3", "plain-2e-3", "style-3e-4", "style-1e-3"]
    assert settings[4:8] == ["physics", "chemistry", "biology", "materials"]
    assert [rates[s] for s in settings] == [
        (1e-3, 150),
        (2e-3, 150),
        (3e-4, 200),
        (1e-3, 200),
        *[(1e-3, 150)] * 5,
        (1e-3, 200),
    ]
    alphas = {run.arm.method: run.arm.flags["alpha"] for run in read.queue if "alpha" in run.arm.flags}
    assert alphas == {"pgpo-0.5": 0.5, "pgpo-1.0": 1.0, "pgpo-1.5": 1.5, "pgpo-two-sided": 1.0}
    for run in read.queue:
        reference = run.arm.lr_times_mean_rho_of or run.arm.rho_shuffled_from
        assert (reference is not None) == ("-lr-" in run.arm.method or "shuffled" in run.arm.method)
        if reference:
            assert reference.split("-")[1] == run.arm.method.replace("-shuffled", "").split("-")[-1]
        assert run.arm.flags.get("domain") == (run.arm.setting if run.arm.setting in DOMAINS else None)
        assert run.arm.base_seed == (1 if run.arm.setting.endswith("-base-1") else None)
        assert run.arm.setting.startswith(run.arm.flags["variant"]) or run.arm.setting in DOMAINS
    for method in ("sdpo-lr-0.5", "sdpo-lr-1.0", "sdpo-lr-1.5"):
        assert method.replace("sdpo-lr", "pgpo") in read.compare[method]
    # Each seed of the key arms of the four settings, before anything else.
    assert {run.arm.method for run in read.queue[:160]} == {"base", "sdpo", "pgpo-1.0", "sdpo-frozen", "sdpo-lr-1.0"}
    assert [run.seed for run in read.queue[:160]] == sorted([*range(100, 108)] * 20)


def test_the_preset_has_the_papers_numbers(tmp_path: Path) -> None:
    preset = PGPOConfig.paper(str(tmp_path), use_cpu=True)
    assert preset.objective == "pgpo"
    for name, value in METHOD.items():
        assert getattr(preset, name) == value, name


def test_a_paper_recipe_is_the_preset_and_its_engine(tmp_path: Path) -> None:
    """Whoever writes PGPOConfig.paper() in Python, or names an own model, trains what the recipe trains."""
    parsed = read(ROOT / "recipes/paper/physics/pgpo-1.0.yaml", tmp_path)
    flags = f"--task science_qa --domain physics --model_name_or_path Qwen/Qwen3-8B --output_dir {tmp_path} {CPU}"
    for other in (PGPOConfig.paper(str(tmp_path), use_cpu=True), parse(flags.split()).config):
        assert differing(parsed.config, other) == {"use_vllm", "vllm_max_model_length"}


def test_the_preset_yields(tmp_path: Path) -> None:
    own = PGPOConfig.paper(
        str(tmp_path), use_cpu=True, alpha=0.5, max_completion_length=100, per_device_train_batch_size=16
    )
    assert (own.alpha, own.max_completion_length, own.prompts_per_step, own.num_generations) == (0.5, 100, 2, 8)
    assert PGPOConfig.paper(use_cpu=True, output_dir=str(tmp_path)).output_dir == str(tmp_path)


STEP = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size", "steps_per_generation"),
    *("num_generations", "num_iterations", "max_completion_length", "num_train_epochs", "max_steps"),
}


def test_one_changed_import_costs_what_it_cost(tmp_path: Path) -> None:
    """Batch and lengths are TRL's; the numbers of the method are the paper's."""
    ours, theirs = (cls(str(tmp_path), use_cpu=True) for cls in (PGPOConfig, GRPOConfig))
    assert {name: getattr(ours, name) for name in STEP} == {name: getattr(theirs, name) for name in STEP}
    assert (ours.prompts_per_step, ours.micro_batch_size, ours.max_prompt_length) == (1, None, None)
    of_the_step = STEP | {"prompts_per_step", "max_prompt_length"}
    for name, value in METHOD.items():
        assert name in of_the_step or getattr(ours, name) == value, name


@pytest.mark.parametrize(
    ("given", "ranks", "rows", "questions", "micro_batch"),
    [
        ({}, 1, 8, 1, None),
        ({}, 2, 8, 2, None),
        ({"num_generations": 4}, 1, 8, 2, None),
        ({"gradient_accumulation_steps": 4}, 1, 32, 4, 8),
        ({"gradient_accumulation_steps": 4, "micro_batch_size": 2}, 1, 32, 4, 2),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, 2, 16, 4, 2),
        ({"prompts_per_step": 6}, 2, 24, 6, None),
        ({"prompts_per_step": 6, "per_device_train_batch_size": 24}, 2, 24, 6, None),
    ],
    ids=str,
)
def test_a_step_is_what_trls_words_make(tmp_path, monkeypatch, given, ranks, rows, questions, micro_batch) -> None:
    plain = PGPOConfig._fold_batch

    def fold(self) -> None:
        with monkeypatch.context() as launched:  # not for longer: torch would look for the other ranks
            launched.setenv("WORLD_SIZE", str(ranks))
            plain(self)

    monkeypatch.setattr(PGPOConfig, "_fold_batch", fold)
    config = PGPOConfig(str(tmp_path), use_cpu=True, **given)
    found = (config.per_device_train_batch_size, config.prompts_per_step, config.micro_batch_size)
    assert found == (rows, questions, micro_batch)
    assert (config.gradient_accumulation_steps, config.steps_per_generation) == (1, 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompts_per_step": 2, "gradient_accumulation_steps": 2}, "without per_device_train_batch_size; give both"),
        ({"num_generations": None}, "num_generations is None; give"),
    ],
    ids=str,
)
def test_a_step_that_cannot_be(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PGPOConfig(str(tmp_path), use_cpu=True, **given)


def test_every_new_field_of_the_configuration_is_accounted_for() -> None:
    """A field added to PGPOConfig is the paper's (then it stands in METHOD), or one of these, which are ours."""
    ours = {
        "objective",
        "alpha_steps",
        "feedback_mode",
        "use_successful_as_teacher",
        "teacher_sync_steps",
        "diagnostics_flat_tolerance",
        "diagnostics_warning_interval",
        "distillation_weight",
        "success_reward",
        *("trust", "trust_budget", "trust_nats", "trust_fraction", "trust_form", "trust_tokens", "trust_tolerance"),
        *("trust_agreement", "trust_clock", "adaptive_clip", "diagnostics_step_interval"),
        *("rehearse_weight", "rehearse_fraction", "sample_weights"),
        *("sampler", "max_tokens_per_sampling", "profile"),
        "micro_batch_size",
        "max_tokens_per_microbatch",
        "eval_batch_size",
        "per_device_eval_batch_size",
        "logging_steps",
        "information_weight",
        "watch_demonstrations",
        "fused_head",
        "share_teacher_prompts",
        "join_siblings",
        "packing",
        "guard",
        "guard_signals",
        "guard_limits",
        "guard_warmup",
        "guard_patience",
        "guard_max_actions",
        "on_nonfinite",
        "reward_timeout",
        "rank_timeout",
    }
    assert not ours & METHOD.keys()
    assert set(PGPOConfig.__annotations__) <= ours | METHOD.keys()
    assert METHOD.keys() <= set(PGPOConfig.__dataclass_fields__)
    assert set(ENGINE) <= set(GRPOConfig.__dataclass_fields__)


def test_the_lab_recipe_is_the_bare_command(tmp_path: Path) -> None:
    written, bare = read(ROOT / "recipes/lab.yaml", tmp_path), parse(["--output_dir", str(tmp_path), CPU])
    assert differing(written.config, bare.config) == set()
    assert written.run == bare.run


def test_the_style_recipe_differs_in_variant_and_learning_rate(tmp_path: Path) -> None:
    plain, style = (read(ROOT / f"recipes/{name}.yaml", tmp_path) for name in ("lab", "lab-style"))
    assert differing(plain.config, style.config) == {"learning_rate"}
    assert (style.config.learning_rate, style.run.variant, style.run.task) == (3e-4, "style", "lab_world")


def test_the_small_science_recipe_is_the_preset(tmp_path: Path) -> None:
    written = read(ROOT / "recipes/science-small.yaml", tmp_path)
    bare = parse(["--task", "science_qa", "--domain", "physics", "--output_dir", str(tmp_path), CPU])
    assert differing(written.config, bare.config) == set()
    assert written.run == bare.run
    assert written.model.model_name_or_path is None
