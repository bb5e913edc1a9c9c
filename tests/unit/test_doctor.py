"""The doctor judges invented machines. Its probes and its command: test_doctor_command.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib

from megatron_dtrpo.config.parser import parse
from megatron_dtrpo.doctor.checks import CORE, PACKAGES, can_run, dotted, examine, transformer_engine_range
from megatron_dtrpo.doctor.machine import Gpu, Machine
from megatron_dtrpo.doctor.requirements import GIB, Requirements, read_requirements

REPOSITORY = Path(__file__).resolve().parents[2]
VERSIONS = {package.name: "9.9" for package in PACKAGES} | {"megatron-core": "0.16.1"}


def requirements_of(argv: list[str], nproc: int | None = None, gpus: int = 0) -> Requirements:
    config, given = parse(argv, "doctor", "Looks.")
    return read_requirements(config, bool(given), nproc, gpus)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def laptop(**changes) -> Machine:
    machine = {"versions": VERSIONS, "flex": "imports", "cores": 4, "shm": 8 * GIB, "files": 4096, "port_free": True}
    return Machine(**{**machine, **changes})


def server(capability=(9, 0), gpus=8, **changes) -> Machine:
    machine = {
        "versions": {**VERSIONS, "transformer-engine": "2.10.0+abc"},
        "gpus": (Gpu("H100", 80 * GIB, capability),) * gpus,
        "driver": True,
        "torch_cuda": "12.9",
        "nccl": "2.27.3",
        "flex": "compiles",
        "apex": "nvidia",
        "apex_extensions": ("amp_C", "fused_weight_gradient_mlp_cuda"),
        "cores": 64,
        "threads": "1",
    }
    return laptop(**{**machine, **changes})


def judged(machine: Machine, **requirements) -> dict[str, str]:
    """Name -> status."""
    return {line.name: line.status for line in examine(machine, Requirements(**requirements))}


def failing(machine: Machine, **requirements) -> set[str]:
    lines = examine(machine, Requirements(**requirements))
    failed = {line.name for line in lines if line.status in ("missing", "too old", "wrong")}
    assert can_run(lines) == (not failed)
    return failed


def without(versions: dict, *names: str) -> dict:
    return {name: version for name, version in versions.items() if name not in names}


# What a run does without is a note


def test_a_laptop_runs_what_asks_for_nothing_and_lacks_only_notes():
    machine = laptop(versions=without(VERSIONS, "wandb", "lm-eval", "transformers", "sentencepiece"))
    assert failing(machine) == set()
    detail = judged(machine)
    for name in ("wandb", "lm-eval", "transformers", "Transformer Engine", "Apex", "FP8", "GPU", "browser"):
        assert detail[name] == "note", name


def test_a_server_is_all_ok():
    machine = server(browser="/usr/bin/chromium")
    requirements = {
        "bf16": True,
        "fp8_recipe": "tensorwise",
        "transformer_impl": "transformer_engine",
        "fuses_gradients": True,
    }
    lines = examine(machine, Requirements(configured=True, processes=8, local=8, layout=(4, 2, 1), **requirements))
    assert {line.status for line in lines} == {"ok"}


@pytest.mark.parametrize(
    ("package", "need"),
    [
        ("psutil", {}),
        ("torch", {}),
        ("megatron-core", {}),
        ("transformers", {"tokenizer": "HuggingFaceTokenizer"}),
        ("sentencepiece", {"tokenizer": "SentencePieceTokenizer"}),
        ("pyarrow", {"data_format": ".parquet"}),
        ("pyarrow", {"data_format": ".arrow"}),
        ("datasets", {"data_format": ""}),
        ("tensorboard", {"tensorboard": True}),
        ("wandb", {"wandb": True}),
    ],
)
def test_a_package_that_the_run_needs_is_missed(package, need):
    lines = examine(laptop(versions=without(VERSIONS, package)), Requirements(**need))
    (line,) = [line for line in lines if line.name == package]
    assert line.status == "missing" and "pip install" in line.fix
    assert package not in failing(laptop(), **need)


def test_old_and_broken_packages_fail():
    assert judged(laptop(versions={**VERSIONS, "megatron-core": "0.15.3"}))["megatron-core"] == "too old"
    assert judged(laptop(broken={"torch": "libcudart.so.13: cannot open"}))["torch"] == "wrong"


# FP8 and Transformer Engine


def test_fp8_fails_without_transformer_engine_or_a_gpu():
    fp8 = {"fp8_recipe": "tensorwise", "bf16": True}
    assert failing(laptop(), **fp8) == {"GPU", "Transformer Engine", "FP8"}
    assert failing(server(versions=VERSIONS), **fp8) == {"Transformer Engine"}
    assert failing(server(), **fp8) == set()


@pytest.mark.parametrize(
    ("core", "version", "status"),
    [
        ("0.16.1", "2.8.0", "too old"),
        ("0.16.1", "2.9.0", "ok"),
        ("0.16.1", "2.11.0+70f53666", "ok"),
        ("0.16.1", "2.12.0", "wrong"),
        ("0.16.1", "3.0", "wrong"),
        ("0.19.2", "2.8.0", "too old"),
        ("0.17.0", "2.12.0", "ok"),
        ("0.19.2", "2.14.0", "ok"),
    ],
)
def test_the_versions_of_transformer_engine_that_megatron_core_takes(core, version, status):
    machine = server(versions={**VERSIONS, "megatron-core": core, "triton": "3.7.1", "transformer-engine": version})
    assert judged(machine, fp8_recipe="delayed")["Transformer Engine"] == status
    assert judged(machine)["Transformer Engine"] == ("ok" if status == "ok" else "note")


def test_the_ranges_are_those_of_the_package():
    """pip brings megatron-core 0.16 to a Python before 3.12, and 0.19 to the others."""
    about = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (low, high), (later, _) = transformer_engine_range("0.16.1"), transformer_engine_range("0.19.2")
    assert about["optional-dependencies"]["te"] == [
        f"transformer-engine[pytorch]>={dotted(low)},<{dotted(high)}; python_version < '3.12'",
        f"transformer-engine[pytorch]>={dotted(later)}; python_version >= '3.12'",
    ]
    assert f"megatron-core>={dotted(CORE[0])},<{dotted(CORE[1])}" in about["dependencies"]


def test_a_hybrid_model_wants_a_newer_megatron_core():
    hybrid = {"model_class": "hybrid"}
    assert judged(laptop(), **hybrid)["model_class"] == "wrong"
    newer = laptop(versions={**VERSIONS, "megatron-core": "0.19.2", "triton": "3.7.1"})
    assert "model_class" not in judged(newer, **hybrid) and "model_class" not in judged(laptop())


def test_megatron_core_of_today_wants_triton():
    versions = {**VERSIONS, "megatron-core": "0.19.2"}
    assert judged(laptop(versions=versions))["triton"] == "missing"
    assert judged(laptop(versions={**versions, "triton": "3.7.1"}))["triton"] == "ok"
    assert "triton" not in judged(laptop(versions={**versions, "megatron-core": "0.17.1"}))


def test_a_megatron_core_that_nobody_tried_is_refused():
    assert judged(laptop(versions={**VERSIONS, "megatron-core": "0.20.0"}))["megatron-core"] == "wrong"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((8, 0), set()),
        ((8, 9), {"delayed", "tensorwise"}),
        ((9, 0), {"delayed", "tensorwise", "blockwise"}),
        ((10, 0), {"delayed", "tensorwise", "blockwise", "mxfp8"}),
    ],
)
def test_the_recipes_that_a_gpu_runs(capability, runs):
    machine = server(capability)
    assert {r for r in ("delayed", "tensorwise", "blockwise", "mxfp8") if not failing(machine, fp8_recipe=r)} == runs


def test_a_recipe_needs_its_cuda_too():
    assert failing(server(torch_cuda="12.4"), fp8_recipe="blockwise") == {"FP8"}
    assert failing(server(torch_cuda="12.4"), fp8_recipe="tensorwise") == set()


def test_bf16_is_refused_where_it_is_emulated_on_a_gpu():
    turing = server((7, 5), bf16=False)
    assert failing(turing, bf16=True) == {"bf16"}
    assert failing(turing) == set()


# Layout, GPUs and the machine


def test_processes_must_fit_the_layout_and_the_gpus():
    assert failing(server(gpus=2), processes=2, local=2, layout=(4, 1, 1)) == {"layout"}
    assert failing(server(gpus=2), processes=4, local=4, layout=(4, 1, 1)) == {"layout"}
    assert failing(server(gpus=4), processes=4, local=4, layout=(2, 2, 1)) == set()
    # Two machines of four.
    assert failing(server(gpus=4), processes=8, local=4, layout=(8, 1, 1)) == set()
    # A CPU takes any number.
    assert failing(laptop(), processes=8, local=8, layout=(2, 2, 2)) == set()


def test_a_cpu_build_of_torch_beside_a_gpu_is_wrong():
    assert failing(laptop(driver=True)) == {"GPU"}
    assert failing(laptop(driver=True, torch_cuda="12.9")) == {"GPU"}


def test_apex_of_the_package_index_is_not_nvidias():
    fusing = {"fuses_gradients": True, "transformer_impl": "local"}
    assert failing(server(apex="other", apex_extensions=()), **fusing) == {"Apex"}
    assert judged(server(apex="other", apex_extensions=()))["Apex"] == "note"
    assert failing(server(apex_extensions=("amp_C",)), **fusing) == {"Apex"}
    assert failing(server(apex_extensions=("amp_C",)), fuses_gradients=True) == set()  # Transformer Engine's layers do


def test_the_distributed_optimizer_on_a_gpu_needs_a_fused_adam():
    bare = {"versions": VERSIONS, "apex": None, "apex_extensions": ()}
    assert failing(server(**bare), distributed_optimizer=True) == {"Apex"}
    assert failing(server(**{**bare, "apex": "other"}), distributed_optimizer=True) == {"Apex"}
    assert failing(server(**{**bare, "apex": "nvidia"}), distributed_optimizer=True) == {"Apex"}  # without extensions
    assert failing(server(versions=VERSIONS), distributed_optimizer=True) == set()
    assert failing(server(**bare)) == set()
    assert failing(laptop(), distributed_optimizer=True) == set()


def test_flex_attention_fails_only_where_it_is_used():
    broken = server(flex="CompilationError: no C compiler")
    assert failing(broken) == {"FlexAttention"}
    assert failing(broken, attention_backend="sdpa") == set()
    assert failing(laptop(), attention_backend="flex") == {"FlexAttention"}


def test_limits_of_the_machine():
    assert failing(server(shm=GIB // 16), processes=8, local=8) == {"/dev/shm"}
    assert failing(server(shm=GIB // 16)) == set()
    assert failing(laptop(port_free=False), processes=2, local=2) == {"port"}
    assert failing(laptop(port_free=False)) == set()
    assert failing(laptop(hostname_resolves=False), processes=2, local=2) == {"host name"}
    assert failing(laptop(hostname_resolves=False)) == set()
    assert judged(laptop(files=256))["open files"] == "note"
    assert failing(laptop(), save="runs", save_free=GIB, checkpoint=2 * GIB) == {"save"}
    assert failing(laptop(), save="runs", save_free=4 * GIB, checkpoint=2 * GIB) == set()
    assert failing(laptop(), save="/", save_writable=False) == {"save"}


# Reading a configuration


def test_needs_are_read_from_the_settings(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "tensor_model_parallel_size: 2\nbf16: true\ntokenizer_type: ByteLevelTokenizer\n"
    )
    argv = ["--config", str(tmp_path / "run.yaml"), "--fp8-format", "hybrid", "--save", str(tmp_path / "new" / "run")]
    requirements = requirements_of([*argv, "--data-path", "nowhere.parquet"])
    assert (requirements.layout, requirements.bf16, requirements.fp8_recipe) == ((2, 1, 1), True, "tensorwise")
    assert (requirements.tokenizer, requirements.data_format) == ("ByteLevelTokenizer", ".parquet")
    assert requirements.paths == (("data_path", "nowhere.parquet", False),)
    assert requirements.save_writable and requirements.save_free > 0
    assert "num_layers is missing" in requirements.mistake
    assert {"configuration", "data_path"} <= failing(laptop(), **vars(requirements))


def test_what_the_trainer_refuses_is_said_in_its_words(tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    argv = ["--config", str(REPOSITORY / "examples" / "dtrpo_tiny.yaml"), "--data-path", str(tmp_path / "pairs.jsonl")]
    argv += ["--save", str(tmp_path / "run")]
    requirements = requirements_of(argv)
    assert requirements.mistake is None and requirements.checkpoint > 0
    assert failing(laptop(), **vars(requirements)) == set()
    assert "num_query_groups" in requirements_of([*argv, "--tensor-model-parallel-size", "4"]).mistake


def test_how_many_processes_there_are(monkeypatch):
    flags = ["--tensor-model-parallel-size", "2"]

    def counted(nproc=None, gpus=0):
        requirements = requirements_of(flags, nproc, gpus)
        return requirements.processes, requirements.local

    assert counted() == (2, 2)
    assert counted(gpus=8) == (8, 8)
    assert counted(nproc=4, gpus=8) == (4, 4)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert counted(gpus=8) == (16, 8)
