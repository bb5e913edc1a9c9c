"""The tables of choices: read without torch, and complete, so that a new choice is a function and a row."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_dtrpo.config import settings
from megatron_dtrpo.config.backends import AUTO, BACKENDS, choose_backend, require_trainable
from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.config.losses import ALWAYS_READ, LOSSES, LossOptions
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.rows import function_named
from megatron_dtrpo.config.settings import ObjectiveSettings
from megatron_dtrpo.errors import UserError
from tests.support.launch import REPOSITORY

HEAVY = ("torch", "megatron", "numpy", "transformers")


def in_new_process(script: str, *arguments: str, environment=None, folder=None) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_are_read_and_checked_without_torch(tmp_path):
    file = tmp_path / "run.yaml"
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 99}
    file.write_text("".join(f"{key}: {value}\n" for key, value in sizes.items()) + "estimator: vrpo\n")
    script = f"""
        import sys
        from megatron_dtrpo.config import parser, rules, settings
        config, given = parser.parse(["--config", sys.argv[1], "--beta", "0.25"], prog="test", about="")
        assert rules.validate(config, 4) == 4
        assert (config.objective.num_views, config.objective.beta) == (8, 0.25)
        print([name for name in {HEAVY} if name in sys.modules])
    """
    assert in_new_process(script, str(file)).strip() == "[]"


FUNCTIONS = [
    *(row.function for table in (ESTIMATORS, LOSSES, OBJECTIVES) for row in table.values()),
    *(name for row in BACKENDS.values() for name in (row.plan_function, row.attend_function)),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_row_names_a_function(name):
    assert callable(function_named(name))


@pytest.mark.parametrize(("table", "options"), [(ESTIMATORS, EstimatorOptions), (LOSSES, LossOptions)])
def test_every_option_is_read_and_declared_once(table, options):
    declared = {f.name for f in dataclasses.fields(options)}
    assert {name for row in table.values() for name in row.options} | set(ALWAYS_READ) & declared == declared
    inherited = {f.name: f for f in dataclasses.fields(ObjectiveSettings)}
    assert not declared & set(vars(ObjectiveSettings)["__annotations__"])
    for f in dataclasses.fields(options):
        assert inherited[f.name].default == f.default and inherited[f.name].metadata is f.metadata


def test_choices_are_the_tables():
    choices = {key: tuple(f.metadata["choices"]) for key, f in settings.FIELDS.items()}
    assert choices["estimator"] == tuple(ESTIMATORS)
    assert choices["loss_type"] == tuple(LOSSES)
    assert choices["objective"] == tuple(OBJECTIVES)
    assert choices["attention_backend"] == (AUTO, *BACKENDS)


def test_defaults_of_an_objective_fit_it():
    for name, kind in OBJECTIVES.items():
        assert ESTIMATORS[kind.estimator].objective == name
        assert kind.block_start in ESTIMATORS[kind.estimator].block_starts
    assert {row.objective for row in ESTIMATORS.values()} == set(OBJECTIVES)


def test_rows_of_backends_decide_the_default_and_what_trains():
    assert [choose_backend(AUTO, device) for device in ("cpu", "cuda")] == ["sdpa", "flex"]
    for device in ("cpu", "cuda"):
        assert sum(device in row.default_on for row in BACKENDS.values()) == 1
        require_trainable(AUTO, device)
    assert choose_backend("flex", "cpu") == "flex"
    with pytest.raises(UserError, match="attention_backend flex has no backward pass on a CPU: leave it at auto"):
        require_trainable("flex", "cpu")


RECIPES = {
    "An estimator": ("diffusion/half.py", "config/estimators.py", "ESTIMATORS"),
    "A preference loss": ("objectives/cube.py", "config/losses.py", "LOSSES"),
}
READER = """
import sys
from megatron_dtrpo.config import parser, rules
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.config.losses import LossOptions
from megatron_dtrpo.config.rows import options_of

sizes = "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --vocab-size 9".split()

def read(*flags):
    config, _ = parser.parse([*sizes, *flags], prog="test", about="")
    rules.validate(config, 1)
    return config.objective

def refused(*flags):
    try:
        read(*flags)
    except UserError as error:
        return str(error)

ours = read("--estimator", "half", "--share", "0.25", "--loss-type", "cube", "--depth", "2")
assert refused("--estimator", "half", "--share", "2") == "share is 2.0: it must be at most 1"
assert refused("--loss-type", "hinge", "--depth", "2") == "depth belongs to loss_type cube: leave it out with hinge"
assert "torch" not in sys.modules

import torch
from megatron_dtrpo.diffusion.estimators import NoiseRequest
from megatron_dtrpo.objectives.preference import preference_loss

request = NoiseRequest(torch.ones(3, 8, dtype=torch.bool), [torch.Generator()], options_of(EstimatorOptions, ours))
assert ESTIMATORS["half"].draw(request).masked.sum() == 3 * 2
policy = torch.tensor([4.0, 3.0])
options = options_of(LossOptions, ours)
loss, _ = preference_loss(policy, policy * 0, torch.ones(2), losses=ours.losses(), options=options)
assert loss.item() == (1 - 0.5) ** 2
"""


def test_the_recipes_for_an_estimator_and_a_loss(tmp_path):
    """What docs/extending.md has a reader write, in a copy of the package: a function, a field and a row are all."""
    package = tmp_path / "megatron_dtrpo"
    shutil.copytree(REPOSITORY / "megatron_dtrpo", package, ignore=shutil.ignore_patterns("__pycache__"))
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    for title, (function_file, table_file, table) in RECIPES.items():
        recipe = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        function, field, row = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
        assert f"megatron_dtrpo/{function_file}" in recipe and Path(table_file).name in recipe
        (package / function_file).write_text(function)
        text = (package / table_file).read_text()
        before, after = text.split("Options:\n", 1)  # the class of options, up to the blank lines behind it
        text = f"{before}Options:\n" + after.replace("\n\n\n", f"\n{field}\n\n", 1)
        before, after = text.split(f"\n{table}: ")
        (package / table_file).write_text(f"{before}\n{table}: " + after.replace("\n}\n", f"\n{row}}}\n", 1))
    in_new_process(READER, environment={**os.environ, "PYTHONPATH": str(tmp_path)}, folder=tmp_path)
