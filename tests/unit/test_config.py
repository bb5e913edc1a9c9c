"""Flags, the YAML file and the checks at the door."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dtrpo.cli.settings import parse_settings
from megatron_dtrpo.config.command_line import command_parser
from megatron_dtrpo.config.notes import notes
from megatron_dtrpo.config.parser import add_settings, parse, parse_command, settings_parser
from megatron_dtrpo.config.rules import (
    validate,
    validate_data,
    validate_precomputing,
    validate_training,
)
from megatron_dtrpo.config.settings import FIELDS, GROUPS, Config
from megatron_dtrpo.config.yaml_file import TYPES, read_yaml
from megatron_dtrpo.errors import UserError

COMPLETE = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "data_path": "pairs.jsonl",
    "save": "runs/one",
    "train_iters": 10,
}


def config_of(**changes) -> Config:
    return Config.from_flat({**COMPLETE, **changes})


def write(tmp_path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def parsed(*argv: str):
    return parse(list(argv), "train", "Trains.")


def refused(world_size: int = 1, **changes) -> str:
    with pytest.raises(UserError) as caught:
        config = config_of(**changes)
        data_parallel = validate(config, world_size)
        validate_data(config)
        validate_training(config, data_parallel)
    return str(caught.value)


# One name, one type, one help text


def test_every_setting_is_one_key_one_flag_and_one_help_text():
    names = [f.name for kind in GROUPS.values() for f in dataclasses.fields(kind)]
    assert len(names) == len(set(names)) == len(TYPES) == len(FIELDS)
    assert all(FIELDS[name].metadata["help"] for name in names)
    help_text = settings_parser("train", "Trains.").format_help()
    for name in names:
        assert "--" + name.replace("_", "-") in help_text
    assert set(Config().to_flat()) == set(names)


def test_defaults_have_the_declared_types():
    for name, value in Config().to_flat().items():
        assert value is None or isinstance(value, TYPES[name]), name


def test_flat_there_and_back():
    config = config_of(lr=0.25, trainable_modules=["mlp"])
    assert Config.from_flat(config.to_flat()) == config


# Reading


def test_nothing_given_is_the_defaults():
    config, given = parsed()
    assert config == Config() and given == set()


def test_flags_have_types():
    config, given = parsed(
        "--num-layers",
        "3",
        "--lr",
        "1e-4",
        "--bf16",
        "--no-shuffle",
        "--estimator",
        "dtrpo",
        "--trainable-modules",
        "mlp",
        "linear_proj",
        "--save=runs/a b",
    )
    assert config.model.num_layers == 3 and config.optimizer.lr == 1e-4
    assert config.parallel.bf16 is True and config.data.shuffle is False
    assert config.objective.trainable_modules == ["mlp", "linear_proj"] and config.run.save == "runs/a b"
    assert given == {"num_layers", "lr", "bf16", "shuffle", "estimator", "trainable_modules", "save"}


def test_yaml_numbers_have_the_settings_type(tmp_path):
    path = write(tmp_path, "lr: 1e-4\nmin_lr: 0\nbeta: 1\nnum_epochs: '2'\nseed: 7\nwandb_project: 12\n")
    config, given = parsed("--config", path)
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (1e-4, float)
    assert (config.optimizer.min_lr, type(config.optimizer.min_lr)) == (0.0, float)
    assert (config.objective.beta, type(config.objective.beta)) == (1.0, float)
    assert config.optimizer.num_epochs == 2.0
    assert (config.optimizer.seed, type(config.optimizer.seed)) == (7, int)
    assert config.run.wandb_project == "12"
    assert given == {"lr", "min_lr", "beta", "num_epochs", "seed", "wandb_project"}


def test_flags_win_over_the_file(tmp_path):
    path = write(tmp_path, "lr: 1e-4\nnum_layers: 2\nbf16: true\ntrainable_modules: [mlp]\n")
    config, given = parsed("--config", path, "--lr", "3e-5", "--no-bf16", "--trainable-modules", "embedding")
    assert config.optimizer.lr == 3e-5 and config.model.num_layers == 2
    assert config.parallel.bf16 is False and config.objective.trainable_modules == ["embedding"]
    assert given == {"lr", "num_layers", "bf16", "trainable_modules"}
    # A flag wins even where it says what the default says.
    assert parsed("--config", path, "--lr", "5e-7")[0].optimizer.lr == Config().optimizer.lr


def fitted(*argv: str) -> Config:
    """What a command makes of its words."""
    return parse_settings(settings_parser("train", "Trains."), list(argv))[1]


FILE = """\
estimator: dtrpo
steps_per_block: 4
num_views: 2
loss_type: [simpo, sft]
loss_weights: [1.0, 0.5]
simpo_gamma: 0.2
min_lr: 1e-6
"""


@pytest.mark.parametrize(
    "flags, left_out",
    [
        (["--lr", "1e-4"], {}),
        (["--lr-decay-style", "constant"], {"min_lr": "1e-06 (belongs to a decay)"}),
        (["--estimator", "vrpo"], {"steps_per_block": "4 (belongs to estimator dtrpo)"}),
        (
            ["--estimator", "mean_field"],
            {
                "steps_per_block": "4 (belongs to estimator dtrpo)",
                "num_views": "2 (estimator mean_field has no noise to average over views)",
            },
        ),
        (
            ["--loss-type", "hinge"],
            {
                "simpo_gamma": "0.2 (belongs to loss_type simpo)",
                "loss_weights": "1.0 0.5 (loss_type is hinge)",
            },
        ),
        (["--loss-type", "hinge", "sft"], {"simpo_gamma": "0.2 (belongs to loss_type simpo)"}),
        (["--loss-type", "hinge", "--loss-weights", "2"], {"simpo_gamma": "0.2 (belongs to loss_type simpo)"}),
        (
            ["--objective", "sft"],
            {
                "estimator": "dtrpo (belongs to objective preference)",
                "steps_per_block": "4 (belongs to estimator dtrpo)",
                "simpo_gamma": "0.2 (belongs to objective preference)",
                "loss_type": "simpo sft (belongs to objective preference)",
                "loss_weights": "1.0 0.5 (belongs to objective preference)",
            },
        ),
    ],
)
def test_a_choice_made_as_a_flag_leaves_out_what_the_file_says_of_another(tmp_path, capsys, flags, left_out):
    path = write(tmp_path, FILE)
    config = fitted("--config", path, *flags)
    told = capsys.readouterr().err
    assert told.count("\n") == bool(left_out)
    assert told.startswith(f"note: {path}: left out: ") or not left_out
    assert all(f"{key} {text}" in told for key, text in left_out.items()), told
    config.model = config_of().model
    validate(config, 1)
    before, after = read_yaml(path), config.to_flat()
    typed = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    assert {key for key, value in before.items() if after[key] != value} - typed == left_out.keys() - typed


@pytest.mark.parametrize(
    "text, flags, note",
    [
        ("block_start: noisy\nestimator: vrpo\n", ["--estimator", "dtrpo"], "block_start noisy (estimator dtrpo would"),
        ("reference: base\n", ["--loss-type", "simpo"], "reference base (loss_type simpo has no reference)"),
        ("reference_cache: c\n", ["--objective", "sft"], "reference_cache c (objective sft has no reference)"),
        ("objective: sft\nassistant_turns: all\n", ["--objective", "preference"], "assistant_turns all (belongs to"),
    ],
)
def test_what_a_choice_rules_out_is_left_out_of_the_file_too(tmp_path, capsys, text, flags, note):
    config = fitted("--config", write(tmp_path, text), *flags)
    assert note in capsys.readouterr().err
    config = Config.from_flat({**config.to_flat(), **COMPLETE})
    validate_training(config, validate(config, 1))


def test_what_does_not_fit_a_choice_is_refused_where_both_are_flags_or_both_in_the_file(tmp_path, capsys):
    path = write(tmp_path, FILE)
    for argv in (
        ["--config", path, "--estimator", "vrpo", "--steps-per-block", "4"],
        ["--config", write(tmp_path, "estimator: vrpo\nsteps_per_block: 4\n")],
    ):
        config = fitted(*argv)
        config.model = config_of().model
        with pytest.raises(UserError, match="steps_per_block belongs to estimator dtrpo: leave it out with vrpo"):
            validate(config, 1)
    assert "steps_per_block" not in capsys.readouterr().err


def test_one_process_of_several_names_what_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    config = fitted("--config", write(tmp_path, FILE), "--estimator", "vrpo")
    assert config.objective.steps_per_block == 8 and capsys.readouterr().err == ""


def test_an_empty_file_and_empty_values(tmp_path):
    assert read_yaml(write(tmp_path, "")) == {}
    assert read_yaml(write(tmp_path, "load:\nestimator: null\n")) == {"load": None, "estimator": None}
    with pytest.raises(UserError, match="run.yaml: lr has no value"):
        read_yaml(write(tmp_path, "lr:\n"))


@pytest.mark.parametrize(
    "flag, nearest",
    [
        ("--learning-rat", None),
        ("--micro-batch-sise", "--micro-batch-size"),
        ("--micro_batch_size", "--micro-batch-size"),
        ("--lrr", "--lr"),
        ("--tensor-model-parallel", "--tensor-model-parallel-size"),  # no abbreviations
        ("--no-shufle", "--no-shuffle"),
        ("--num-layer=3", "--num-layers"),
    ],
)
def test_unknown_flags_name_the_nearest(flag, nearest):
    with pytest.raises(UserError) as caught:
        parsed(flag, *([] if "=" in flag else ["1"]))
    message = str(caught.value)
    assert f"unknown flag {flag.split('=')[0]}:" in message and "\n" not in message
    known = message.rsplit(" ", 1)[1]
    assert known == nearest if nearest else known.startswith("--")


def test_unknown_keys_name_file_and_nearest(tmp_path):
    path = write(tmp_path, "micro_batch_sice: 3\n")
    with pytest.raises(UserError) as caught:
        parsed("--config", path)
    message = str(caught.value)
    assert path in message and "micro_batch_sice" in message and message.endswith("micro_batch_size")


@pytest.mark.parametrize(
    "line, key, wanted",
    [
        ("num_layers: many", "num_layers", "int"),
        ("num_layers: 2.5", "num_layers", "int"),
        ("num_layers: true", "num_layers", "int"),
        ("num_layers: [1, 2]", "num_layers", "int"),
        ("lr: fast", "lr", "float"),
        ("lr: {a: 1}", "lr", "float"),
        ("bf16: 1", "bf16", "bool"),
        ("bf16: 'true'", "bf16", "bool"),
        ("save: true", "save", "str"),
        ("trainable_modules: {mlp: 1}", "trainable_modules", "list"),
        ("trainable_modules: []", "trainable_modules", "list"),
        ("trainable_modules: [1]", "trainable_modules", "list"),
        ("estimator: dtrop", "estimator", "dtrpo"),
        ("loss_type: dpo", "loss_type", "sigmoid, hinge"),
        ("loss_type: [sigmoid, nll]", "loss_type", "sigmoid, hinge"),
        ("loss_weights: [1.0, high]", "loss_weights", "a list of numbers"),
        ("loss_weights: [true]", "loss_weights", "a list of numbers"),
    ],
)
def test_wrong_types_name_file_and_key(tmp_path, line, key, wanted):
    path = write(tmp_path, line + "\n")
    with pytest.raises(UserError) as caught:
        parsed("--config", path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {key} is ") and wanted in message and "\n" not in message


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--num-layers", "many"], ["--num-layers", "many"]),
        (["--num-layers"], ["--num-layers", "expected one argument"]),
        (["--loss-type", "sigmoid", "dpo"], ["--loss-type", "dpo", "sigmoid"]),
        (["--loss-weights", "1", "x"], ["--loss-weights", "float", "x"]),
        (["--rpo-alpha", "0.5"], ["flag --rpo-alpha is gone", "loss_type sigmoid sft", "loss_weights"]),
        (["pairs.jsonl"], ["pairs.jsonl", "--flag value"]),
        (["--config", "/nowhere/run.yaml"], ["/nowhere/run.yaml", "no such"]),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    with pytest.raises(UserError) as caught:
        parsed(*argv)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "text, words", [("a: [1\n", "not valid YAML"), ("- 1\n", "key: value"), ("word\n", "key: value")]
)
def test_files_that_are_not_settings(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(path) and words in str(caught.value)


# Checking


def test_a_complete_configuration_is_accepted():
    config = config_of(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
    data_parallel = validate(config, 8)
    validate_training(config, data_parallel)
    assert data_parallel == 2 and config.parallel.sequence_parallel is True


@pytest.mark.parametrize(
    "objective, block_size, estimator, block_start",
    [
        ("preference", 8, "dtrpo", "clean"),
        ("sft", 8, "sft", "noisy"),
        ("preference", 1, "exact", "clean"),
        ("sft", 1, "exact", "clean"),
    ],
)
def test_defaults_that_depend_on_the_objective(objective, block_size, estimator, block_start):
    config = config_of(objective=objective, block_size=block_size)
    validate(config, 1)
    assert (config.objective.estimator, config.objective.block_start) == (estimator, block_start)


@pytest.mark.parametrize(
    "objective, estimator, block_start",
    [("sft", "sft", "clean"), ("preference", "elbo", "noisy"), ("preference", "mean_field", "noisy")],
)
def test_the_other_block_start_where_it_is_unbiased(objective, estimator, block_start):
    config = config_of(objective=objective, estimator=estimator, block_start=block_start, num_views=1)
    validate(config, 1)
    assert config.objective.block_start == block_start


def test_other_dependent_defaults():
    config = config_of(num_query_groups=None, sequence_parallel=True, recompute_granularity="full")
    validate(config, 1)
    assert (config.model.num_query_groups, config.model.kv_channels) == (8, 8)
    assert config.parallel.sequence_parallel is False  # without tensor parallelism
    assert (config.parallel.recompute_method, config.parallel.recompute_num_layers) == ("uniform", 1)
    config = config_of(kv_channels=32)
    validate(config, 1)
    assert config.model.kv_channels == 32


@pytest.mark.parametrize(
    "key", ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "data_path", "save"]
)
def test_what_is_missing_is_named(key):
    assert f"{key} is missing" in refused(**{key: None})


@pytest.mark.parametrize(
    "world_size, changes, words",
    [
        (3, dict(tensor_model_parallel_size=2), ["world size 3", "tensor_model_parallel_size", "2"]),
        (4, dict(pipeline_model_parallel_size=4, tensor_model_parallel_size=2), ["world size 4", "8"]),
        (4, dict(global_batch_size=6), ["global_batch_size 6", "data-parallel", "4"]),
        (1, dict(num_query_groups=3), ["num_attention_heads 8", "num_query_groups 3"]),
        (3, dict(tensor_model_parallel_size=3), ["num_attention_heads 8", "tensor_model_parallel_size 3"]),
        (8, dict(tensor_model_parallel_size=8), ["num_query_groups 4", "tensor_model_parallel_size 8"]),
        (4, dict(tensor_model_parallel_size=4, ffn_hidden_size=98), ["ffn_hidden_size 98", "4"]),
        (
            4,
            dict(tensor_model_parallel_size=4, make_vocab_size_divisible_by=2),
            ["make_vocab_size_divisible_by 2", "tensor_model_parallel_size 4"],
        ),
        (3, dict(pipeline_model_parallel_size=3), ["num_layers 4", "pipeline_model_parallel_size 3"]),
        (
            6,
            dict(context_parallel_size=2, tensor_model_parallel_size=2),
            ["world size 6", "tensor_model_parallel_size x", "context_parallel_size", "4"],
        ),
        (3, dict(context_parallel_size=3), ["seq_length 8192", "context_parallel_size x block_size = 96"]),
        (2, dict(context_parallel_size=2, seq_length=1056), ["seq_length 1056", "context_parallel_size x block_size"]),
        (1, dict(context_parallel_size=0), ["context_parallel_size is 0"]),
        (1, dict(num_virtual_stages_per_pipeline_rank=2), ["num_virtual_stages_per_pipeline_rank 2", "pipeline_model"]),
        (
            2,
            dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=3),
            ["layers per stage 2", "num_virtual_stages_per_pipeline_rank 3"],
        ),
        (
            2,
            dict(
                pipeline_model_parallel_size=2,
                num_virtual_stages_per_pipeline_rank=2,
                recompute_granularity="full",
                recompute_num_layers=2,
            ),
            ["layers per virtual stage 1", "recompute_num_layers 2"],
        ),
        (1, dict(recompute_modules=["mlp"]), ["recompute_modules", "recompute_granularity selective"]),
        (
            1,
            dict(recompute_granularity="selective", recompute_modules=["moe"]),
            ["recompute_modules", "'moe'", "core_attn, mlp"],
        ),
        (
            1,
            dict(recompute_granularity="full", recompute_num_layers=3),
            ["layers per stage 4", "recompute_num_layers 3"],
        ),
        (1, dict(kv_channels=7), ["kv_channels 7", "odd"]),
        (1, dict(block_size=1, estimator="vrpo"), ["estimator vrpo: with block_size 1", "--estimator exact"]),
        (1, dict(block_size=1, estimator="dtrpo"), ["estimator dtrpo: with block_size 1", "--estimator exact"]),
        (1, dict(block_size=1, objective="sft", estimator="sft"), ["estimator sft: with", "--estimator exact"]),
        (1, dict(block_size=1, block_start="noisy"), ["block_start noisy", "no noisy views"]),
        (1, dict(block_size=1, steps_per_block=3), ["steps_per_block belongs to estimator dtrpo", "with exact"]),
        (1, dict(block_size=1, num_views=2), ["num_views is 2", "exact has no noise"]),
        (1, dict(estimator="exact"), ["estimator exact is for block_size 1", "has block_size 32"]),
        (1, dict(overlap_param_gather=True), ["overlap_param_gather", "use_distributed_optimizer"]),
        (1, dict(ddp_bucket_size=1000), ["ddp_bucket_size", "overlap_grad_reduce"]),
        (1, dict(optimizer_cpu_offload=True, bf16=True), ["optimizer_cpu_offload", "use_distributed_optimizer"]),
        (1, dict(optimizer_cpu_offload=True, use_distributed_optimizer=True), ["optimizer_cpu_offload", "bf16"]),
        (1, dict(optimizer_offload_fraction=0.5), ["optimizer_offload_fraction", "optimizer_cpu_offload"]),
        (1, dict(objective="sft", estimator="dtrpo"), ["estimator dtrpo", "sft"]),
        (1, dict(objective="preference", estimator="sft"), ["estimator sft", "preference"]),
        (1, dict(objective="sft", estimator="vrpo"), ["estimator vrpo", "sft"]),
        (1, dict(block_start="noisy"), ["estimator dtrpo with block_start noisy is biased", "--block-start clean"]),
        (1, dict(estimator="trajectory", block_start="noisy"), ["estimator trajectory with block_start noisy"]),
        (1, dict(estimator="mean_field", num_views=3), ["num_views is 3", "mean_field has no noise to average"]),
        (1, dict(objective="sft", reference_cache="scores"), ["reference_cache", "objective sft has no reference"]),
        (1, dict(loss_type=["ipo"], label_smoothing=0.1), ["label_smoothing", "sigmoid, robust, simpo", "ipo"]),
        (1, dict(simpo_gamma=0.1), ["simpo_gamma belongs to loss_type simpo", "sigmoid"]),
        (1, dict(estimator="vrpo", steps_per_block=3), ["steps_per_block belongs to estimator dtrpo", "with vrpo"]),
        (1, dict(min_timestep=0.1), ["min_timestep belongs to estimator sft", "with dtrpo"]),
        (1, dict(complementary=False), ["complementary belongs to estimator sft", "with dtrpo"]),
        (1, dict(objective="sft", steps_per_block=3), ["steps_per_block belongs to estimator dtrpo", "with sft"]),
        (1, dict(objective="sft", loss_type=["hinge"]), ["loss_type belongs to objective preference", "with sft"]),
        (1, dict(objective="sft", loss_weights=[2.0]), ["loss_weights belongs to objective preference", "with sft"]),
        (1, dict(objective="sft", length_normalization=True), ["length_normalization belongs to objective pref"]),
        (1, dict(objective="sft", beta=0.1), ["beta belongs to objective preference", "with sft"]),
        (1, dict(objective="sft", label_smoothing=0.1), ["label_smoothing belongs to objective preference"]),
        (1, dict(eval_threshold=0.5), ["eval_threshold goes with eval_interval and eval_data_path"]),
        (
            1,
            dict(eval_interval=1, eval_data_path="a", eval_threshold=0.5, block_size=1),
            ["eval_threshold: decoding by the rule leftmost has no threshold: leave it out"],
        ),
        (1, dict(eval_verifier="a:b"), ["eval_verifier goes with eval_interval and eval_data_path"]),
        (1, dict(lr_decay_style="constant", min_lr=1e-9), ["min_lr is where a decay ends", "constant"]),
        (1, dict(wandb_exp_name="a"), ["wandb_exp_name goes with wandb_project"]),
        (1, dict(tokenizer_type=None, tokenizer_model="a"), ["tokenizer_model goes with tokenizer_type"]),
        (1, dict(tokenizer_type="ByteLevelTokenizer", tokenizer_model="a"), ["reads no file: leave it out"]),
        (1, dict(loss_type=["dpo"]), ["loss_type: 'dpo'", "sigmoid, hinge"]),
        (1, dict(loss_type=["sft", "sft"]), ["loss_type has sft twice"]),
        (1, dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), ["loss_weights has 1 weights, loss_type 2 losses"]),
        (1, dict(loss_weights=[0.0]), ["loss_weights are all 0"]),
        (1, dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, -1.0]), ["loss_weights is -1.0", "at least 0"]),
        (1, dict(loss_weights=[float("inf")]), ["loss_weights is inf", "finite"]),
        (1, dict(loss_type=["robust"], label_smoothing=0.5), ["label_smoothing 0.5 with loss_type robust"]),
        (1, dict(loss_type=["simpo"], reference_cache="scores"), ["reference_cache", "simpo has no reference"]),
        (1, dict(num_epochs=2.0), ["exactly one", "train_iters", "num_epochs"]),
        (1, dict(train_iters=None), ["exactly one", "train_iters", "num_epochs"]),
        (1, dict(lr=1e-5, min_lr=1e-4), ["min_lr 0.0001", "lr 1e-05"]),
        (1, dict(label_smoothing=1.5), ["label_smoothing is 1.5", "at most 0.5"]),
        (1, dict(num_views=0), ["num_views is 0", "at least 1"]),
        (1, dict(steps_per_block=-1), ["steps_per_block is -1", "at least 1"]),
        (1, dict(lr=float("nan")), ["lr is nan"]),
        (1, dict(seed=-3), ["seed is -3", "at least 0"]),
    ],
)
def test_what_does_not_fit_is_named(world_size, changes, words):
    message = refused(world_size, **changes)
    assert all(word in message for word in words) and "\n" not in message, message


def test_losses_are_given_as_trl_has_them(tmp_path):
    path = write(tmp_path, "loss_type: [sigmoid, sft]\nloss_weights: [1, 0.5]\n")
    assert parsed("--config", path)[0].objective.losses() == {"sigmoid": 1.0, "sft": 0.5}
    config, _ = parsed("--config", path, "--loss-type", "simpo", "sft", "--loss-weights", "2", "1e-1")
    assert config.objective.losses() == {"simpo": 2.0, "sft": 0.1}
    config, _ = parsed("--config", write(tmp_path, "loss_type: ipo\n"))  # one text is a list of one
    assert config.objective.losses() == {"ipo": 1.0}
    assert parsed()[0].objective.losses() == {"sigmoid": 1.0}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"objective": "sft"}, "objective sft has no reference: there is nothing to precompute"),
        ({"loss_type": ["simpo", "sft"]}, "loss_type simpo, sft has no reference: there is nothing to precompute"),
    ],
)
def test_what_reads_no_reference_has_no_scores_to_precompute(changes, words):
    validate_precomputing(config_of(train_iters=1), 1)
    config = config_of(train_iters=1, **changes)
    validate(config, 1)
    with pytest.raises(UserError, match=words):
        validate_precomputing(config, 1)


def test_the_anchors_old_key_names_the_new_form(tmp_path):
    path = write(tmp_path, "rpo_alpha: 0.5\n")
    with pytest.raises(UserError) as caught:
        parsed("--config", path)
    message = str(caught.value)
    assert path in message and "rpo_alpha is gone" in message
    assert "loss_type" in message and "sft" in message and "loss_weights" in message


@pytest.mark.parametrize(
    "changes, views", [({}, 1), ({"estimator": "vrpo"}, 8), ({"estimator": "vrpo", "num_views": 2}, 2)]
)
def test_vrpo_has_eight_views_unless_told_otherwise(changes, views):
    config = config_of(**changes)
    validate(config, 1)
    assert config.objective.num_views == views


def test_context_parallel_processes_share_their_examples():
    assert validate(config_of(context_parallel_size=2, tensor_model_parallel_size=2), 12) == 3


def test_the_vocabulary_is_padded_whatever_the_layout():
    assert config_of(vocab_size=1000).model.padded_vocab_size == 1024
    assert config_of(vocab_size=1024).model.padded_vocab_size == 1024
    assert config_of(vocab_size=1000, make_vocab_size_divisible_by=1).model.padded_vocab_size == 1000


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_query_groups": 0}, "num_query_groups is 0"),
        ({"kv_channels": 0}, "kv_channels is 0"),
        ({"beta": 0.0}, "beta is 0"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"seed": 2**63}, "seed is"),
        ({"recompute_granularity": "selective", "recompute_num_layers": 1}, "recompute_num_layers"),
        ({"recompute_method": "uniform"}, "recompute_method"),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 99},
            "recompute_num_layers 99",
        ),
        ({"hidden_size": 70, "num_attention_heads": 8, "num_query_groups": 2}, "hidden_size 70"),
    ],
)
def test_values_that_would_fail_later_are_refused_at_the_door(values, words):
    base = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4, "data_path": "x"}
    with pytest.raises(UserError, match=words):
        validate(Config.from_flat({**base, **values}), 1)


@pytest.mark.parametrize("value", ["2024-01-01", ".inf", "1.5"])
def test_an_integer_setting_refuses_other_values(tmp_path, value):
    path = tmp_path / "c.yaml"
    path.write_text(f"seed: {value}\n")
    with pytest.raises(UserError, match="c.yaml: seed"):
        read_yaml(path)


def test_large_integers_are_kept(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 9007199254740993\n")
    assert read_yaml(path) == {"seed": 9007199254740993}


def test_a_flag_replaces_the_files_other_way_of_saying_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train_iters: 20\n")
    config, _ = parse(["--config", str(path), "--num-epochs", "1"], "train", "Trains.")
    assert (config.optimizer.train_iters, config.optimizer.num_epochs) == (None, 1.0)
    both, _ = parse(["--config", str(path), "--num-epochs", "1", "--train-iters", "3"], "train", "Trains.")
    assert (both.optimizer.train_iters, both.optimizer.num_epochs) == (3, 1.0)  # refused later: two flags disagree


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--learning-rate", "--lr"),
        ("--num-train-epochs", "--num-epochs"),
        ("--ref-model", "--reference"),
        ("--ref_model_name_or_path", "--reference"),
        ("--precompute-ref-log-probs", "--reference-cache"),
    ],
)
def test_names_of_trl_lead_to_ours(theirs, ours):
    with pytest.raises(UserError, match=f"{theirs}: the nearest known one is {ours}$"):
        parse([theirs, "1"], "train", "Trains.")


def test_a_tool_without_that_setting_does_not_name_it():
    with pytest.raises(UserError, match="unknown flag --ref-model: ") as error:
        parser = command_parser("tool", "Is a tool.")
        add_settings(parser, ["parallel"])
        parse_command(parser, ["--ref-model", "1"])
    assert not str(error.value).endswith(" --reference")


def test_a_configuration_that_is_no_text_file(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(UserError, match="not readable as a configuration file"):
            read_yaml(path)


ONLINE = {"objective": "policy_gradient", "rewards": ["numeric"]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"block_size": 0, "family": "llada", "add_qkv_bias": False, "num_query_groups": 4}, []),
        ({"block_size": 4}, ["note: steps_per_block 8 with block_size 4: a block is decoded a token a step"]),
        ({"block_size": 4, "estimator": "vrpo"}, []),
        ({**ONLINE, "clip_low": 0.1, "updates_per_rollout": 2}, []),
        (
            {**ONLINE, "clip": "always", "clip_low": 0.1},
            ["note: updates_per_rollout 1: every ratio is 1, and clip, clip_low changes nothing"],
        ),
        (
            {**ONLINE, "rollout_rule": "static", "rollout_small_block_size": 4, "rollout_denoising_steps": 8},
            ["note: rollout_denoising_steps 8 with sub-blocks of at most 4: they are written a token a step"],
        ),
        (
            {**ONLINE, "kl_estimator": "k1", "drop_equal_groups": False, "resamplings": 5},
            [
                "note: kl_estimator without kl_coefficient and resamplings without drop_equal_groups: changes nothing",
            ],
        ),
    ],
)
def test_notes_say_what_settings_amount_to(changes, expected):
    config = config_of(**changes)
    validate(config, 1)
    assert notes(config) == expected
