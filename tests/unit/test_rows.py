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

from megatron_dtrpo.checkpoint.folder import load_model_config
from megatron_dtrpo.config import settings
from megatron_dtrpo.config.backends import AUTO, BACKENDS, choose_backend, require_trainable
from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.config.losses import ALWAYS_READ, LOSSES, LossOptions
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.rows import function_named
from megatron_dtrpo.config.settings import ObjectiveSettings
from megatron_dtrpo.errors import UserError
from tests.support.launch import REPOSITORY, TINY_MODEL, Job, latest_iteration, write_lines

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
        assert name in ESTIMATORS[kind.estimator].objectives
        assert kind.block_start in ESTIMATORS[kind.estimator].block_starts
    assert {name for row in ESTIMATORS.values() for name in row.objectives} == set(OBJECTIVES)


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
        function, field, row = recipe(title)
        section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        assert f"megatron_dtrpo/{function_file}" in section and Path(table_file).name in section
        (package / function_file).write_text(function)
        text = (package / table_file).read_text()
        before, after = text.split("Options:\n", 1)  # the class of options, up to the blank lines behind it
        text = f"{before}Options:\n" + after.replace("\n\n\n", f"\n{field}\n\n", 1)
        before, after = text.split(f"\n{table}: ")
        (package / table_file).write_text(f"{before}\n{table}: " + after.replace("\n}\n", f"\n{row}}}\n", 1))
    in_new_process(READER, environment={**os.environ, "PYTHONPATH": str(tmp_path)}, folder=tmp_path)


DENSE = """
import torch
from megatron_dtrpo.config.backends import BACKENDS
from tests.unit.test_attention import attend, random_qkv, random_sequence

sequence = random_sequence(0)
qkv = random_qkv(len(sequence), 4, 2)
torch.testing.assert_close(*(attend(sequence, *qkv, backend=backend) for backend in ("dense", "sdpa")))
"""


def test_the_recipe_for_a_backend(tmp_path):
    """As above: in a copy of the package a file and a row are all."""
    package = tmp_path / "megatron_dtrpo"
    shutil.copytree(REPOSITORY / "megatron_dtrpo", package, ignore=shutil.ignore_patterns("__pycache__"))
    functions, row = recipe("An attention backend")
    (package / "model" / "dense.py").write_text(functions)
    table = package / "config" / "backends.py"
    before, after = table.read_text().split("\nBACKENDS: ")
    table.write_text(f"{before}\nBACKENDS: " + after.replace("\n}\n", f"\n{row}}}\n", 1))
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    in_new_process(DENSE, environment={**os.environ, "PYTHONPATH": path}, folder=tmp_path)


def test_the_recipe_for_a_trainer(tmp_path):
    (script,) = recipe("A trainer")
    (tmp_path / "until_enough.py").write_text(script)
    rows = [{"prompt": f"{number}+1=", "completion": f"{number + 1}."} for number in range(8)]
    run = {**TINY_MODEL, "objective": "sft", "data_path": write_lines(tmp_path / "rows.jsonl", rows)}
    run |= {"global_batch_size": 8, "train_iters": 30, "lr": 1e-2, "save": tmp_path / "run"}
    result = Job(run, tmp_path / "log", 2, command=[str(tmp_path / "until_enough.py")]).wait()
    assert result.status == 0, result.output
    loss, steps = re.search(r"loss ([\d.]+) after (\d+) steps", result.output).groups()
    assert float(loss) < 4.0 and 1 < int(steps) < 30
    assert latest_iteration(tmp_path / "run") == int(steps)
    assert load_model_config(tmp_path / "run").num_layers == TINY_MODEL["num_layers"]


def recipe(title: str) -> list[str]:
    """The blocks of Python in a section of docs/extending.md."""
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page.split(f"\n## {title}\n")[1].split("\n## ")[0], re.DOTALL)
