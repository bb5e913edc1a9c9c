"""The tables of choices: read without torch, and complete, so that a new choice is a function and a row."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import pytest

from megatron_dtrpo.config import parser
from megatron_dtrpo.config.backends import AUTO, BACKENDS, choose_backend, require_trainable
from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.config.losses import ALWAYS_READ, LOSSES, LossOptions
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.rows import function_named
from megatron_dtrpo.config.settings import ObjectiveSettings
from megatron_dtrpo.errors import UserError

HEAVY = ("torch", "megatron", "numpy", "transformers")


def in_new_process(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_are_read_and_checked_without_torch(tmp_path):
    file = tmp_path / "run.yaml"
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 99}
    file.write_text("".join(f"{key}: {value}\n" for key, value in sizes.items()) + "estimator: vrpo\n")
    script = f"""
        import sys
        from megatron_dtrpo.config import parser, rules, settings
        config, given = parser.parse(["--config", sys.argv[1], "--beta", "0.25"], prog="test", description="")
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
    choices = {key: tuple(f.metadata["choices"]) for key, f in parser.FIELDS.items()}
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


# What docs/extending.md tells a reader to write, as a copy of the package with two changed files would have it.
EXTENDED = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import dataclasses
    from megatron_dtrpo.config import estimators, losses, rows

    @dataclasses.dataclass
    class EstimatorOptions(estimators.EstimatorOptions):
        share: float = rows.setting(0.5, "half: share of a block that is masked.", at_least=0, at_most=1)

    @dataclasses.dataclass
    class LossOptions(losses.LossOptions):
        depth: float = rows.setting(2.0, "cube: its power.", at_least=1)

    estimators.EstimatorOptions, losses.LossOptions = EstimatorOptions, LossOptions
    estimators.ESTIMATORS["half"] = estimators.Estimator("toys:half", options=("share",))
    losses.LOSSES["cube"] = losses.Loss("toys:cube", ("beta", "depth"))

    from megatron_dtrpo.config import parser, rules

    argv = ["--estimator", "half", "--share", "0.25", "--loss-type", "cube", "--depth", "3"]
    argv += "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --vocab-size 9".split()
    config, _ = parser.parse(argv, prog="test", description="")
    rules.validate(config, 1)
    assert "torch" not in sys.modules
    def refused(*more):
        try:
            config, _ = parser.parse([*argv, *more], prog="test", description="")
            rules.validate(config, 1)
        except Exception as error:
            return str(error)
    assert refused("--share", "2") == "share is 2.0: it must be at most 1"
    assert refused("--loss-type", "hinge") == "depth belongs to loss_type cube: leave it out with hinge"

    import torch
    from megatron_dtrpo.diffusion.estimators import NoiseRequest
    from megatron_dtrpo.training.objectives import preference_loss
    options = estimators.EstimatorOptions.of(config.objective)
    request = NoiseRequest(torch.ones(3, 8, dtype=torch.bool), [torch.Generator()], options)
    assert estimators.ESTIMATORS["half"].draw(request).masked.sum() == 3 * 2
    policy, length = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0])
    loss, _ = preference_loss(
        policy, policy * 0, length, losses=config.objective.losses(), options=losses.LossOptions.of(config.objective)
    )
    assert loss.item() == -(1.5**3)
"""
TOYS = '''
import torch
from megatron_dtrpo.diffusion.estimators import Noise

def half(request):
    """Masks the first tokens of every block."""
    masked = torch.zeros_like(request.maskable)
    masked[:, : int(request.options.share * masked.shape[1])] = True
    masked = (masked & request.maskable).expand(len(request.generators), -1, -1)
    return Noise(masked, masked.double())

def cube(pairs, options):
    return -((options.beta * pairs.margin) ** options.depth)
'''


def test_a_row_and_a_field_are_all_that_a_new_choice_takes(tmp_path):
    """Flag, key, bounds, choices and the check that an option is read follow from them."""
    (tmp_path / "toys.py").write_text(TOYS)
    in_new_process(EXTENDED, str(tmp_path))
