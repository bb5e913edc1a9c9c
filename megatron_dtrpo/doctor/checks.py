"""Judges: what a machine has against what a configuration needs, one small function for each thing.

A thing that the configuration needs and the machine lacks is a failure; lacking anything else is a note. Each line
names the command that mends it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_dtrpo.config.backends import BACKENDS, choose_backend
from megatron_dtrpo.config.fp8 import RECIPES
from megatron_dtrpo.doctor.machine import Machine
from megatron_dtrpo.doctor.requirements import GIB, Requirements

OK, NOTE, MISSING, OLD, WRONG = "ok", "note", "missing", "too old", "wrong"
FAILURES = (MISSING, OLD, WRONG)
INSTALL = "bash requirements/setup_cpu.sh, or pip install -e . beside your own torch"
CONTAINER = "docker build --target gpu (docs/container.md)"
CORE = ((0, 16), (0, 20))  # from the first, before the second: each release so far changed what we build on
CORE_NEEDS_TRITON = (0, 18)
CORE_HAS_HYBRID = (0, 18)
# The Transformer Engine that a megatron-core takes: from the first, before the second. 0.16 declares its range; later
# ones declare none.
TRANSFORMER_ENGINE = {(0, 16): ((2, 9), (2, 12)), (0, 17): ((2, 9), None)}


class Line(NamedTuple):
    status: str
    name: str
    detail: str
    fix: str = ""


Check = Callable[[Machine, Requirements], Iterator[Line]]


class Package(NamedTuple):
    """A distribution, the oldest version of it, when a run needs it, how to get it, and the first that is too new."""

    name: str
    least: tuple[int, ...]
    needed: Callable[[Requirements], bool]
    why: str
    fix: str
    below: tuple[int, ...] | None = None


def _always(requirements: Requirements) -> bool:
    return True


PACKAGES = (
    Package("torch", (2, 6), _always, "everything", INSTALL),
    Package("megatron-core", CORE[0], _always, "everything", "pip install 'megatron-core>=0.16,<0.20'", CORE[1]),
    Package("numpy", (), _always, "everything", INSTALL),
    Package("pyyaml", (), _always, "settings", "pip install pyyaml"),
    Package(
        "psutil",
        (),
        _always,
        "checkpoints; without it megatron-core hangs for ever when it saves one",
        "pip install psutil",
    ),
    Package("safetensors", (), _always, "Hugging Face checkpoints", "pip install safetensors"),
    Package(
        "transformers",
        (),
        lambda n: n.tokenizer == "HuggingFaceTokenizer",
        "HuggingFaceTokenizer",
        "pip install transformers",
    ),
    Package(
        "sentencepiece",
        (),
        lambda n: n.tokenizer == "SentencePieceTokenizer",
        "SentencePieceTokenizer",
        "pip install sentencepiece",
    ),
    Package(
        "tensorboard", (), lambda n: n.tensorboard, "TensorBoard events", "pip install tensorboard, or --no-tensorboard"
    ),
    Package(
        "pyarrow",
        (),
        lambda n: n.data_format in (".parquet", ".arrow"),
        "data in Parquet or Arrow",
        "pip install pyarrow",
    ),
    Package("datasets", (), lambda n: n.data_format == "", "saved Hugging Face data sets", "pip install datasets"),
    Package("wandb", (), lambda n: n.wandb, "Weights & Biases", "pip install wandb"),
    Package("lm-eval", (0, 4, 13), lambda n: False, "megatron-dtrpo evaluate", "pip install 'lm-eval>=0.4.13,<0.5'"),
)


def version_of(text: str) -> tuple[int, ...]:
    """``"2.10.0a0+b4e4ee81d3"`` -> ``(2, 10, 0)``: pre-releases of NVIDIA's images count as the release."""
    return tuple(int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", text)[0]))


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _wants_te(requirements: Requirements) -> bool:
    return (
        requirements.fp8_recipe is not None
        or requirements.transformer_impl == "transformer_engine"
        or requirements.offloads
    )


def _unless(needed: bool, status: str) -> str:
    return status if needed else NOTE


def configuration(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    if requirements.unread:
        yield Line(NOTE, "configuration", f"not read: {requirements.unread}", INSTALL)
    elif requirements.mistake:
        yield Line(WRONG, "configuration", requirements.mistake)
    elif requirements.configured:
        yield Line(OK, "configuration", "the trainer takes it")
    else:
        yield Line(NOTE, "configuration", "none given: what any run needs is checked", "add --config FILE or flags")
    for name, path, exists in requirements.paths:
        if not exists:
            yield Line(MISSING, name, f"{path}: no such file or folder")


def python(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    good = machine.python >= (3, 10)
    yield Line(OK if good else OLD, "Python", dotted(machine.python), "" if good else "install Python 3.10 or newer")


def packages(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    for package in PACKAGES:
        have, needed = machine.versions.get(package.name), package.needed(requirements)
        if have is None:
            detail = f"not installed, for {package.why}"
            yield Line(_unless(needed, MISSING), package.name, detail, package.fix)
        elif package.name in machine.broken:
            detail = f"{have} is installed and cannot be imported: {machine.broken[package.name]}"
            yield Line(_unless(needed, WRONG), package.name, detail, package.fix)
        elif version_of(have) < package.least:
            detail = f"{have}, needed is {dotted(package.least)} or newer"
            yield Line(_unless(needed, OLD), package.name, detail, package.fix)
        elif package.below and version_of(have) >= package.below:
            detail = f"{have} is too new: what is before {dotted(package.below)} was tried"
            yield Line(_unless(needed, WRONG), package.name, detail, package.fix)
        else:
            yield Line(OK, package.name, have)


def triton(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    core = machine.versions.get("megatron-core", "0")
    if version_of(core) < CORE_NEEDS_TRITON:
        return
    if have := machine.versions.get("triton"):
        yield Line(OK, "triton", have)
    else:
        detail = f"not installed: megatron-core {core} imports it, and a CPU build of torch does not bring it"
        yield Line(MISSING, "triton", detail, "pip install --no-deps triton")


def model_class(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    core = machine.versions.get("megatron-core")
    if core and requirements.model_class == "hybrid" and version_of(core) < CORE_HAS_HYBRID:
        detail = f"megatron-core {core} has no HybridModel, which {dotted(CORE_HAS_HYBRID)} and newer have"
        yield Line(WRONG, "model_class", detail, "leave model_class out, or take a newer megatron-core")


def gpus(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    if machine.gpus:
        for gpu in machine.gpus:
            capability = f"sm{gpu.capability[0]}{gpu.capability[1]}"
            yield Line(OK, "GPU", f"{gpu.name}, {gpu.memory / GIB:.0f} GiB, {capability}, CUDA {machine.torch_cuda}")
        yield Line(OK, "NCCL", machine.nccl) if machine.nccl else Line(MISSING, "NCCL", "torch has none", CONTAINER)
    elif machine.driver and machine.torch_cuda is None and "torch" in machine.versions:
        yield Line(WRONG, "GPU", "there is a driver, but torch is a CPU build", "pip install torch, or " + CONTAINER)
    elif machine.driver:
        yield Line(WRONG, "GPU", "there is a driver, but torch sees no GPU", "nvidia-smi; unset CUDA_VISIBLE_DEVICES")
    else:
        yield Line(
            _unless(_wants_te(requirements), MISSING),
            "GPU",
            "none: runs use the CPU and gloo, for tests and small models",
        )


def layout(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    tensor, pipeline, context = requirements.layout
    detail = f"{requirements.processes} processes, TP {tensor} x PP {pipeline} x CP {context}"
    if requirements.processes % requirements.least_processes:
        yield Line(
            WRONG, "layout", f"{detail}: not divisible", f"torchrun --nproc-per-node {requirements.least_processes}"
        )
    elif machine.gpus and requirements.local > len(machine.gpus):
        fix = f"torchrun --nproc-per-node {len(machine.gpus)}, with a layout that fits"
        yield Line(WRONG, "layout", f"{detail}: {requirements.local} of them here, on {len(machine.gpus)} GPUs", fix)
    else:
        yield Line(OK, "layout", f"{detail} x DP {requirements.processes // requirements.least_processes}")


def transformer_engine_range(core: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The Transformer Engine that version ``core`` of megatron-core takes: from the first, before the second."""
    return TRANSFORMER_ENGINE[
        max((known for known in TRANSFORMER_ENGINE if known <= version_of(core)), default=CORE[0])
    ]


def transformer_engine(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    name, needed = "Transformer Engine", _wants_te(requirements)
    have = machine.versions.get("transformer-engine")
    core = machine.versions.get("megatron-core", dotted(CORE[0]))
    low, high = transformer_engine_range(core)
    wanted = f"megatron-core {core} takes {dotted(low)} and newer" + (f", before {dotted(high)}" if high else "")
    bounds = f">={dotted(low)}" + (f",<{dotted(high)}" if high else "")
    fix = f"pip install --no-build-isolation 'transformer-engine[pytorch]{bounds}', or " + CONTAINER
    if have is None:
        yield Line(_unless(needed, MISSING), name, "not installed, for FP8 and fused layers", fix)
    elif "transformer-engine" in machine.broken:
        fix = fix if machine.gpus else "pip uninstall transformer-engine, which needs a GPU"
        # Without a GPU its mere presence may stop megatron-core: then megatron-core's own line fails.
        detail = f"{have} is installed and cannot be imported: {machine.broken['transformer-engine']}"
        yield Line(_unless(needed or bool(machine.gpus), WRONG), name, detail, fix)
    elif version_of(have) < low:
        yield Line(_unless(needed, OLD), name, f"{have}: {wanted}", fix)
    elif high and version_of(have) >= high:
        yield Line(_unless(needed, WRONG), name, f"{have} is too new: {wanted}", fix)
    else:
        yield Line(OK, name, have)


def apex(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    fused = "fused_weight_gradient_mlp_cuda"
    by_layers = "transformer-engine" in machine.versions and requirements.transformer_impl != "local"
    lacking = requirements.fuses_gradients and fused not in machine.apex_extensions and not by_layers
    has_adam = "transformer-engine" in machine.versions or (
        machine.apex == "nvidia" and "amp_C" in machine.apex_extensions
    )
    lacks_adam = requirements.distributed_optimizer and bool(machine.gpus) and not has_adam
    source = "build it from https://github.com/NVIDIA/apex (PyPI's apex is something else), or " + CONTAINER
    if machine.apex == "other":
        status = _unless(lacking or lacks_adam, WRONG)
        yield Line(status, "Apex", "this is PyPI's web toolkit, not NVIDIA's", "pip uninstall apex")
    elif lacking:
        yield Line(
            MISSING, "Apex", f"gradient_accumulation_fusion needs its extension {fused}, or Transformer Engine", source
        )
    elif lacks_adam:
        detail = "no fused Adam, nor Transformer Engine's: the distributed optimizer cannot resume on a GPU"
        yield Line(MISSING, "Apex", detail, source)
    elif machine.apex:
        yield Line(OK, "Apex", "extensions: " + (", ".join(machine.apex_extensions) or "none"))
    else:
        yield Line(NOTE, "Apex", "not installed, and not needed for this run", source)


def flex_attention(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    backend = choose_backend(requirements.attention_backend, "cuda" if machine.gpus else "cpu")
    needed = BACKENDS[backend].compiles
    eager = next(name for name, row in BACKENDS.items() if not row.compiles)
    fix = f"--attention-backend {eager}"
    if machine.flex is None:
        yield Line(_unless(needed, MISSING), "FlexAttention", "this torch has none", fix)
    elif machine.flex == "compiles":
        yield Line(OK, "FlexAttention", "forward and backward compile")
    elif machine.flex != "imports":
        yield Line(_unless(needed, WRONG), "FlexAttention", f"does not compile: {machine.flex}", fix)
    else:
        yield Line(
            _unless(needed, WRONG), "FlexAttention", f"has no backward pass on a CPU; {eager} is used", fix * needed
        )


def precision(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    native = bool(machine.gpus) and machine.bf16
    lacking = bool(machine.gpus) and requirements.bf16 and not machine.bf16
    detail = "the GPU has it" if native else "slow: not native to this processor or GPU"
    yield Line(WRONG if lacking else OK if native else NOTE, "bf16", detail, "leave --bf16 out" * lacking)
    cuda = version_of(machine.torch_cuda or "0")
    able = [name for name in RECIPES if machine.gpus and all(_runs(name, g.capability, cuda) for g in machine.gpus)]
    detail = f"recipes that run here: {', '.join(able)}" if able else "no GPU here runs it"
    wanted = requirements.fp8_recipe
    if wanted is None or wanted in able:
        yield Line(OK if able else NOTE, "FP8", detail)
    else:
        fix = f"--fp8-recipe {able[0]}" if able else "leave --fp8-format out"
        yield Line(MISSING, "FP8", f"fp8_recipe {wanted}: {detail}", fix)


def _runs(recipe: str, capability: tuple[int, int], cuda: tuple[int, ...]) -> bool:
    rule = RECIPES[recipe]
    return rule.least <= capability and (rule.below is None or capability < rule.below) and rule.cuda <= cuda


def host(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    """Limits and resources of the operating system."""
    threads = machine.threads or str(machine.cores)
    busy = threads.isdigit() and int(threads) * requirements.local > machine.cores
    detail = f"{machine.cores} cores, {requirements.local} processes of {threads} threads"
    yield Line(
        NOTE if busy else OK,
        "CPU",
        detail,
        f"export OMP_NUM_THREADS={max(machine.cores // requirements.local, 1)}" if busy else "",
    )
    if machine.shm is not None:
        small = bool(machine.gpus) and requirements.local > 1 and machine.shm < GIB
        fix = "docker run --ipc=host, or --shm-size 8g" if small else ""
        yield Line(
            WRONG if small else OK, "/dev/shm", f"{machine.shm / GIB:.1f} GiB" + " is too small for NCCL" * small, fix
        )
    if machine.files is not None:
        few = 0 <= machine.files < 1024
        yield Line(NOTE if few else OK, "open files", f"at most {machine.files}", "ulimit -n 65536" if few else "")
    if machine.port_free is not None:
        needed = requirements.processes > 1
        detail = f"MASTER_PORT {machine.port} is " + ("free" if machine.port_free else "taken")
        fix = "" if machine.port_free else f"torchrun --master-port {machine.port + 1}"
        yield Line(OK if machine.port_free else _unless(needed, WRONG), "port", detail, fix)
    if not machine.hostname_resolves:
        detail = f"{machine.hostname} has no address: torchrun's processes would wait for each other"
        fix = f"echo 127.0.0.1 {machine.hostname} >> /etc/hosts"
        yield Line(_unless(requirements.processes > 1, WRONG), "host name", detail, fix)


def room(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    if requirements.save is None:
        return
    if not requirements.save_writable:
        yield Line(WRONG, "save", f"{requirements.save} cannot be written", "--save another folder")
    elif requirements.save_free is not None:
        size = requirements.checkpoint or 0
        detail = f"{requirements.save_free / GIB:.0f} GiB free" + (
            f", a checkpoint takes about {size / GIB:.1f}" if size else ""
        )
        full = requirements.save_free < max(size, GIB // 10)
        yield Line(WRONG if full else OK, "save", detail, "free some, or --save another folder" if full else "")


def browser(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    detail = machine.browser or "none; only the test of the page that replays a decoding opens one"
    yield Line(
        OK if machine.browser else NOTE, "browser", detail, "" if machine.browser else "apt-get install chromium"
    )


def unanswered(machine: Machine, requirements: Requirements) -> Iterator[Line]:
    for probe, why in machine.failures.items():
        yield Line(NOTE, probe.replace("_", " "), f"could not be found out: {why}")


CHECKS: tuple[Check, ...] = (
    configuration,
    python,
    packages,
    triton,
    model_class,
    gpus,
    layout,
    transformer_engine,
    apex,
    flex_attention,
    precision,
    host,
    room,
    browser,
    unanswered,
)


def examine(machine: Machine, requirements: Requirements) -> list[Line]:
    """Every line of the report, in its order."""
    return [line for check in CHECKS for line in check(machine, requirements)]


def can_run(lines: list[Line]) -> bool:
    return not any(line.status in FAILURES for line in lines)
