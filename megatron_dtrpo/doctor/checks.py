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
from megatron_dtrpo.doctor.machine import Facts
from megatron_dtrpo.doctor.requirements import GIB, Needs

OK, NOTE, MISSING, OLD, WRONG = "ok", "note", "missing", "too old", "wrong"
FAILURES = (MISSING, OLD, WRONG)
INSTALL = "bash requirements/setup_cpu.sh, or pip install -e . beside your own torch"
CONTAINER = "docker build --target gpu (docs/container.md)"
# What megatron-core 0.16 takes: from the first, before the second.
TRANSFORMER_ENGINE = ((2, 9), (2, 12))


class Line(NamedTuple):
    status: str
    name: str
    said: str
    mend: str = ""


Check = Callable[[Facts, Needs], Iterator[Line]]


class Package(NamedTuple):
    """A distribution, the oldest version of it, when a run needs it, and how to get it."""

    name: str
    least: tuple[int, ...]
    needed: Callable[[Needs], bool]
    why: str
    mend: str


def _always(needs: Needs) -> bool:
    return True


PACKAGES = (
    Package("torch", (2, 6), _always, "everything", INSTALL),
    Package("megatron-core", (0, 16), _always, "everything", "pip install 'megatron-core>=0.16'"),
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


def _wants_te(needs: Needs) -> bool:
    return needs.fp8_recipe is not None or needs.transformer_impl == "transformer_engine" or needs.offloads


def _unless(needed: bool, status: str) -> str:
    return status if needed else NOTE


def configuration(facts: Facts, needs: Needs) -> Iterator[Line]:
    if needs.unread:
        yield Line(NOTE, "configuration", f"not read: {needs.unread}", INSTALL)
    elif needs.mistake:
        yield Line(WRONG, "configuration", needs.mistake)
    elif needs.configured:
        yield Line(OK, "configuration", "the trainer takes it")
    else:
        yield Line(NOTE, "configuration", "none given: what any run needs is checked", "add --config FILE or flags")
    for name, path, exists in needs.paths:
        if not exists:
            yield Line(MISSING, name, f"{path}: no such file or folder")


def python(facts: Facts, needs: Needs) -> Iterator[Line]:
    good = facts.python >= (3, 10)
    yield Line(OK if good else OLD, "Python", dotted(facts.python), "" if good else "install Python 3.10 or newer")


def packages(facts: Facts, needs: Needs) -> Iterator[Line]:
    for package in PACKAGES:
        have, needed = facts.versions.get(package.name), package.needed(needs)
        if have is None:
            said = f"not installed, for {package.why}"
            yield Line(_unless(needed, MISSING), package.name, said, package.mend)
        elif package.name in facts.broken:
            said = f"{have} is installed and cannot be imported: {facts.broken[package.name]}"
            yield Line(_unless(needed, WRONG), package.name, said, package.mend)
        elif version_of(have) < package.least:
            said = f"{have}, needed is {dotted(package.least)} or newer"
            yield Line(_unless(needed, OLD), package.name, said, package.mend)
        else:
            yield Line(OK, package.name, have)


def gpus(facts: Facts, needs: Needs) -> Iterator[Line]:
    if facts.gpus:
        for gpu in facts.gpus:
            capability = f"sm{gpu.capability[0]}{gpu.capability[1]}"
            yield Line(OK, "GPU", f"{gpu.name}, {gpu.memory / GIB:.0f} GiB, {capability}, CUDA {facts.torch_cuda}")
        yield Line(OK, "NCCL", facts.nccl) if facts.nccl else Line(MISSING, "NCCL", "torch has none", CONTAINER)
    elif facts.driver and facts.torch_cuda is None and "torch" in facts.versions:
        yield Line(WRONG, "GPU", "there is a driver, but torch is a CPU build", "pip install torch, or " + CONTAINER)
    elif facts.driver:
        yield Line(WRONG, "GPU", "there is a driver, but torch sees no GPU", "nvidia-smi; unset CUDA_VISIBLE_DEVICES")
    else:
        yield Line(
            _unless(_wants_te(needs), MISSING), "GPU", "none: runs use the CPU and gloo, for tests and small models"
        )


def layout(facts: Facts, needs: Needs) -> Iterator[Line]:
    tensor, pipeline, context = needs.layout
    said = f"{needs.processes} processes, TP {tensor} x PP {pipeline} x CP {context}"
    if needs.processes % needs.least_processes:
        yield Line(WRONG, "layout", f"{said}: not divisible", f"torchrun --nproc-per-node {needs.least_processes}")
    elif facts.gpus and needs.local > len(facts.gpus):
        mend = f"torchrun --nproc-per-node {len(facts.gpus)}, with a layout that fits"
        yield Line(WRONG, "layout", f"{said}: {needs.local} of them here, on {len(facts.gpus)} GPUs", mend)
    else:
        yield Line(OK, "layout", f"{said} x DP {needs.processes // needs.least_processes}")


def transformer_engine(facts: Facts, needs: Needs) -> Iterator[Line]:
    name, needed = "Transformer Engine", _wants_te(needs)
    have = facts.versions.get("transformer-engine")
    low, high = TRANSFORMER_ENGINE
    wanted = f"megatron-core 0.16 takes {dotted(low)} and newer, before {dotted(high)}"
    mend = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9,<2.12', or " + CONTAINER
    if have is None:
        yield Line(_unless(needed, MISSING), name, "not installed, for FP8 and fused layers", mend)
    elif "transformer-engine" in facts.broken:
        mend = mend if facts.gpus else "pip uninstall transformer-engine, which needs a GPU"
        # Without a GPU its mere presence may stop megatron-core: then megatron-core's own line fails.
        said = f"{have} is installed and cannot be imported: {facts.broken['transformer-engine']}"
        yield Line(_unless(needed or bool(facts.gpus), WRONG), name, said, mend)
    elif version_of(have) < low:
        yield Line(_unless(needed, OLD), name, f"{have}: {wanted}", mend)
    elif version_of(have) >= high:
        yield Line(_unless(needed, WRONG), name, f"{have} is too new: {wanted}", mend)
    else:
        yield Line(OK, name, have)


def apex(facts: Facts, needs: Needs) -> Iterator[Line]:
    fused = "fused_weight_gradient_mlp_cuda"
    by_layers = "transformer-engine" in facts.versions and needs.transformer_impl != "local"
    lacking = needs.fuses_gradients and fused not in facts.apex_extensions and not by_layers
    has_adam = "transformer-engine" in facts.versions or (facts.apex == "nvidia" and "amp_C" in facts.apex_extensions)
    lacks_adam = needs.distributed_optimizer and bool(facts.gpus) and not has_adam
    source = "build it from https://github.com/NVIDIA/apex (PyPI's apex is something else), or " + CONTAINER
    if facts.apex == "other":
        status = _unless(lacking or lacks_adam, WRONG)
        yield Line(status, "Apex", "this is PyPI's web toolkit, not NVIDIA's", "pip uninstall apex")
    elif lacking:
        yield Line(
            MISSING, "Apex", f"gradient_accumulation_fusion needs its extension {fused}, or Transformer Engine", source
        )
    elif lacks_adam:
        detail = "no fused Adam, nor Transformer Engine's: the distributed optimizer cannot resume on a GPU"
        yield Line(MISSING, "Apex", detail, source)
    elif facts.apex:
        yield Line(OK, "Apex", "extensions: " + (", ".join(facts.apex_extensions) or "none"))
    else:
        yield Line(NOTE, "Apex", "not installed, and not needed for this run", source)


def flex_attention(facts: Facts, needs: Needs) -> Iterator[Line]:
    backend = choose_backend(needs.attention_backend, "cuda" if facts.gpus else "cpu")
    needed = BACKENDS[backend].compiles
    eager = next(name for name, row in BACKENDS.items() if not row.compiles)
    mend = f"--attention-backend {eager}"
    if facts.flex is None:
        yield Line(_unless(needed, MISSING), "FlexAttention", "this torch has none", mend)
    elif facts.flex == "compiles":
        yield Line(OK, "FlexAttention", "forward and backward compile")
    elif facts.flex != "imports":
        yield Line(_unless(needed, WRONG), "FlexAttention", f"does not compile: {facts.flex}", mend)
    else:
        yield Line(
            _unless(needed, WRONG), "FlexAttention", f"has no backward pass on a CPU; {eager} is used", mend * needed
        )


def precision(facts: Facts, needs: Needs) -> Iterator[Line]:
    native = bool(facts.gpus) and facts.bf16
    lacking = bool(facts.gpus) and needs.bf16 and not facts.bf16
    said = "the GPU has it" if native else "slow: not native to this processor or GPU"
    yield Line(WRONG if lacking else OK if native else NOTE, "bf16", said, "leave --bf16 out" * lacking)
    cuda = version_of(facts.torch_cuda or "0")
    able = [name for name in RECIPES if facts.gpus and all(_runs(name, g.capability, cuda) for g in facts.gpus)]
    said = f"recipes that run here: {', '.join(able)}" if able else "no GPU here runs it"
    wanted = needs.fp8_recipe
    if wanted is None or wanted in able:
        yield Line(OK if able else NOTE, "FP8", said)
    else:
        mend = f"--fp8-recipe {able[0]}" if able else "leave --fp8-format out"
        yield Line(MISSING, "FP8", f"fp8_recipe {wanted}: {said}", mend)


def _runs(recipe: str, capability: tuple[int, int], cuda: tuple[int, ...]) -> bool:
    rule = RECIPES[recipe]
    return rule.least <= capability and (rule.below is None or capability < rule.below) and rule.cuda <= cuda


def machine(facts: Facts, needs: Needs) -> Iterator[Line]:
    """What the operating system gives."""
    threads = facts.threads or str(facts.cores)
    busy = threads.isdigit() and int(threads) * needs.local > facts.cores
    said = f"{facts.cores} cores, {needs.local} processes of {threads} threads"
    yield Line(
        NOTE if busy else OK,
        "CPU",
        said,
        f"export OMP_NUM_THREADS={max(facts.cores // needs.local, 1)}" if busy else "",
    )
    if facts.shm is not None:
        small = bool(facts.gpus) and needs.local > 1 and facts.shm < GIB
        mend = "docker run --ipc=host, or --shm-size 8g" if small else ""
        yield Line(
            WRONG if small else OK, "/dev/shm", f"{facts.shm / GIB:.1f} GiB" + " is too small for NCCL" * small, mend
        )
    if facts.files is not None:
        few = 0 <= facts.files < 1024
        yield Line(NOTE if few else OK, "open files", f"at most {facts.files}", "ulimit -n 65536" if few else "")
    if facts.port_free is not None:
        needed = needs.processes > 1
        said = f"MASTER_PORT {facts.port} is " + ("free" if facts.port_free else "taken")
        mend = "" if facts.port_free else f"torchrun --master-port {facts.port + 1}"
        yield Line(OK if facts.port_free else _unless(needed, WRONG), "port", said, mend)
    if not facts.hostname_resolves:
        said = f"{facts.hostname} has no address: torchrun's processes would wait for each other"
        mend = f"echo 127.0.0.1 {facts.hostname} >> /etc/hosts"
        yield Line(_unless(needs.processes > 1, WRONG), "host name", said, mend)


def room(facts: Facts, needs: Needs) -> Iterator[Line]:
    if needs.save is None:
        return
    if not needs.save_writable:
        yield Line(WRONG, "save", f"{needs.save} cannot be written", "--save another folder")
    elif needs.save_free is not None:
        size = needs.checkpoint or 0
        said = f"{needs.save_free / GIB:.0f} GiB free" + (
            f", a checkpoint takes about {size / GIB:.1f}" if size else ""
        )
        full = needs.save_free < max(size, GIB // 10)
        yield Line(WRONG if full else OK, "save", said, "free some, or --save another folder" if full else "")


def browser(facts: Facts, needs: Needs) -> Iterator[Line]:
    said = facts.browser or "none; only the test of the page that replays a decoding opens one"
    yield Line(OK if facts.browser else NOTE, "browser", said, "" if facts.browser else "apt-get install chromium")


def unanswered(facts: Facts, needs: Needs) -> Iterator[Line]:
    for probe, why in facts.failures.items():
        yield Line(NOTE, probe.replace("_", " "), f"could not be found out: {why}")


CHECKS: tuple[Check, ...] = (
    configuration,
    python,
    packages,
    gpus,
    layout,
    transformer_engine,
    apex,
    flex_attention,
    precision,
    machine,
    room,
    browser,
    unanswered,
)


def examine(facts: Facts, needs: Needs) -> list[Line]:
    """Every line of the report, in its order."""
    return [line for check in CHECKS for line in check(facts, needs)]


def can_run(lines: list[Line]) -> bool:
    return not any(line.status in FAILURES for line in lines)
