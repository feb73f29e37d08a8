"""Every private member of TRL and transformers that train/seam/ leans on exists and has the form it expects."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path

import pytest
import trl
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from transformers import Trainer
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

import pgpo
from pgpo.settings.rules import LOSSES
from pgpo.train.seam import policy as seam_policy

SOURCE = Path(pgpo.__file__).parent
SEAM = sorted((SOURCE / "train" / "seam").glob("*.py"))


def methods() -> set[str]:
    """Names of the functions of the seam's classes."""
    trees = [ast.parse(path.read_text()) for path in SEAM]
    classes = [
        n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith(("Seam", "Trainer"))
    ]
    return {n.name for cls in classes for n in cls.body if isinstance(n, ast.FunctionDef)}


OVERRIDES = {
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_tokenize_prompts": ["self", "prompts"],
    "_generate": ["self", "prompts"],
    "get_high_entropy_mask": ["self", "entropies", "mask", "threshold"],
    "_generate_single_turn": [
        *("self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
    ],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_output_dir": ["self", "trial"],
    "_get_train_sampler": ["self", "dataset"],
    "_save": ["self", "output_dir", "state_dict"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_rng_state": ["self", "checkpoint"],
    "_load_scaler": ["self", "checkpoint"],
}


def test_accelerate_tells_of_a_skipped_step_as_the_seam_does():
    """And the scheduler, which holds the optimizer, then waits too."""
    assert "return self._is_overflow" in inspect.getsource(AcceleratedOptimizer.step_was_skipped.fget)
    assert "step_was_skipped" in inspect.getsource(AcceleratedScheduler.step)
    assert "self.optimizer.step()" in inspect.getsource(Trainer._run_epoch)  # looked up anew, so an attribute counts


def test_trl_is_the_version_the_seam_was_written_for():
    assert re.match(r"1\.16\.", trl.__version__)


@pytest.mark.parametrize(("name", "parameters"), OVERRIDES.items())
def test_overridden_methods_have_the_expected_signature(name, parameters):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters


def test_log_prob_helper_takes_a_batch_size():
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert parameters[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    assert {"batch_size", "compute_entropy", "compute_aux_loss"} <= set(parameters)


def test_the_loss_reads_and_changes_no_more_than_the_seam_knows():
    """The seam hands it what all ranks hold, and takes back what it has changed."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    images = set(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    read = set(re.findall(r'inputs(?:\[|\.get\()"(\w+)"', source)) - images
    assert read == {*seam_policy._LOSS_INPUTS, "num_items_in_batch"}
    assert set(re.findall(r"self\.(\w+) (?:=|\+=) ", source)) == set(seam_policy._CONTROLLER)
    asked = set(re.findall(r"self\.accelerator\.(\w+)", source + inspect.getsource(GRPOTrainer.get_high_entropy_mask)))
    assert asked - {"sync_gradients"} <= {n for n in vars(seam_policy._OneProcess) if not n.startswith("_")}
    assert source.count("self._get_per_token_logps_and_entropies(") == 1


def test_the_loss_has_the_types_that_the_configuration_names():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    branches = source[source.index("mode = ") :]
    named = re.findall(r"self\.loss_type (?:==|in) (\[[^]]*\]|\"\w+\")", branches)
    assert set(re.findall(r"\w+", " ".join(named))) == set(LOSSES)


source_of = functools.cache(inspect.getsource)  # which parses the whole file each time


CALLED = ("_compute_loss", "_prepare_inputs", "_get_learning_rate", "_push_from_checkpoint", "_generate")


@pytest.mark.parametrize("name", CALLED)
def test_called_methods_exist(name):
    assert callable(getattr(GRPOTrainer, name))


@pytest.mark.parametrize(
    "attribute",
    [
        *("_metrics", "_step", "_tokenizer", "_is_vlm", "_dist", "_last_loaded_step", "chat_template"),
        *("reward_weights", "_buffered_inputs", "shuffle_dataset", "num_iterations", "generation_config"),
        *("_pending_metrics", "_pending_extra_logs", "_standalone_tools", "_sync_tool_dicts", "_async_tool_dicts"),
        *("reward_func_names", "eos_token_ids", "rollout_func", "num_generations_eval", "environment_factories"),
    ],
)
def test_attributes_are_set_by_trl(attribute):
    assert re.search(rf"self\.{attribute}\b[^\n]*=", source_of(GRPOTrainer))


@pytest.mark.parametrize("attribute", ["_tr_loss", "_globalstep_last_logged"])
def test_attributes_are_set_by_transformers_before_the_first_step(attribute):
    source = inspect.getsource(Trainer._inner_training_loop)
    assert re.search(rf"self\.{attribute}\b[^\n]*=", source[: source.index("self._run_epoch(")])


def test_a_checkpoint_is_written_where_get_output_dir_says():
    """And transformers loads no pickle but as weights."""
    assert "self._get_output_dir(trial=trial)" in inspect.getsource(Trainer._save_checkpoint)
    tree = ast.parse(inspect.getsource(inspect.getmodule(Trainer)))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert calls and all("weights_only=True" in ast.unparse(call) for call in calls)


def test_the_sampler_draws_one_permutation_per_pass():
    source = inspect.getsource(RepeatSampler)
    assert source.count("torch.randperm(self.num_samples, generator=self.generator)") == source.count("randperm") == 1


def test_held_out_rows_go_through_the_code_that_makes_completions_in_training():
    """`_generate` returns ids second and completions fourth, by the trainer's own sampler and in its mode."""
    source = inspect.getsource(GRPOTrainer._generate)
    returned = "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images"
    assert returned in source and "self._generate_single_turn(" in source
    assert 'self.num_generations if mode == "train" else self.num_generations_eval' in source
    assert 'mode = "train" if self.model.training else "eval"' in source


def test_every_private_name_of_the_seam_is_listed_here():
    """A new private member in the seam must come with its check."""
    own = methods() | {"_captured", "_grad_norm", "_recorded_before", "_held_out"}
    own |= {"_scratch", "_sampler", "_unlogged", "_failure", "_problem", "_distrusted", "_watching", "_forwarded"}
    listed = set(OVERRIDES) | set(CALLED)
    listed |= {
        "_pending_metrics",
        "_pending_extra_logs",
        "_standalone_tools",
        "_sync_tool_dicts",
        "_async_tool_dicts",
        "_buffered_inputs",
        "_tr_loss",
        "_globalstep_last_logged",
        "_metrics",
        "_step",
        "_tokenizer",
        "_is_vlm",
        "_dist",
        "_last_loaded_step",
        "_get_per_token_logps_and_entropies",
        "_is_overflow",
    }
    used = {
        node.attr
        for path in SEAM
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and isinstance(node.value, ast.Name | ast.Call)
    }
    assert used - own - listed == set()


def private_uses(path: Path) -> set[str]:
    """Underscored attributes of self or super() that the file's own classes do not define."""
    tree = ast.parse(path.read_text())
    defined: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id in ("self", "trainer"):
                (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
                used.add(node.attr)
    return used - defined


@pytest.mark.parametrize("path", sorted((SOURCE / "train").rglob("*.py")), ids=lambda p: p.name)
def test_no_other_file_names_private_members(path):
    if path in SEAM:
        assert private_uses(path) or path.name == "__init__.py"  # the check sees them where they are
    else:
        assert private_uses(path) == set()
