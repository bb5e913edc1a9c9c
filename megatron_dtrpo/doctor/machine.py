"""Gathers what this machine has, and judges nothing.

Every probe may meet a machine where it cannot work: no torch, a Transformer Engine built for another CUDA, a GPU
without a driver. It then has nothing to say, and what went wrong is kept for the report. What may take the whole
process down with it, such as importing megatron-core beside a broken Transformer Engine, runs in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from megatron_dtrpo.errors import one_line

DISTRIBUTIONS = (
    "torch megatron-core transformer-engine numpy psutil transformers safetensors sentencepiece tensorboard pyyaml "
    "tqdm pyarrow datasets wandb lm-eval triton"
).split()
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The modules that runs import and that fail on some machines although their packages are installed.
IMPORTS = {
    "megatron-core": "megatron.core.transformer.transformer_config",
    "transformer-engine": "transformer_engine.pytorch",
}


class Gpu(NamedTuple):
    name: str
    memory: int  # bytes
    capability: tuple[int, int]


@dataclass
class Machine:
    """Plain values, so that a test can invent a machine. None: could not be found out."""

    python: tuple[int, ...] = sys.version_info[:3]
    versions: dict[str, str] = field(default_factory=dict)  # distribution -> version, of those installed
    broken: dict[str, str] = field(default_factory=dict)  # installed, but its import says this
    torch_cuda: str | None = None  # the CUDA version that torch is built for
    nccl: str | None = None
    gpus: tuple[Gpu, ...] = ()
    driver: bool = False  # NVIDIA's, on this machine
    bf16: bool = True
    flex: str | None = None  # "compiles", "imports", or the error of its compilation
    apex: str | None = None  # "nvidia", "other"
    apex_extensions: tuple[str, ...] = ()
    cores: int = 1
    threads: str | None = None  # OMP_NUM_THREADS
    shm: int | None = None  # bytes
    files: int | None = None  # soft limit of open files; -1: none
    port: int = 29500
    port_free: bool | None = None
    hostname: str = "localhost"
    hostname_resolves: bool = True
    browser: str | None = None
    failures: dict[str, str] = field(default_factory=dict)  # probe -> why it had nothing to say


def gather() -> Machine:
    """Asks this machine; never raises."""
    machine = Machine()
    for probe in PROBES:
        try:
            probe(machine)
        except Exception as error:
            machine.failures[probe.__name__.strip("_")] = one_line(error)
    return machine


def _packages(machine: Machine) -> None:
    for name in DISTRIBUTIONS:
        try:
            machine.versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass


def _apex(machine: Machine) -> None:
    found = util.find_spec("apex")
    if found is None:
        return
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    # PyPI has a web toolkit of that name.
    machine.apex = "nvidia" if any((folder / "optimizers").is_dir() for folder in folders) else "other"
    names = ("amp_C", "fused_weight_gradient_mlp_cuda")
    machine.apex_extensions = tuple(name for name in names if util.find_spec(name))


def _torch(machine: Machine) -> None:
    if util.find_spec("torch") is None:
        return
    try:
        import torch
    except Exception as error:  # a library that it is linked to may be missing
        machine.broken["torch"] = one_line(error)
        return
    machine.versions["torch"] = torch.__version__
    machine.torch_cuda = torch.version.cuda
    if torch.cuda.is_available():
        machine.nccl = ".".join(map(str, torch.cuda.nccl.version()))
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            machine.gpus += (Gpu(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)),)
        # torch's own answer counts emulation.
        machine.bf16 = all(gpu.capability >= (8, 0) for gpu in machine.gpus)


def _flex(machine: Machine) -> None:
    if "torch" not in machine.versions or "torch" in machine.broken or not util.find_spec("torch.nn.attention"):
        return
    try:
        import torch
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        return
    machine.flex = "imports"
    if machine.gpus:
        try:
            tensor = torch.randn(1, 1, 128, 64, device="cuda", requires_grad=True)
            torch.compile(flex_attention)(tensor, tensor, tensor).sum().backward()
            machine.flex = "compiles"
        except Exception as error:
            machine.flex = one_line(error)


def _imports(machine: Machine) -> None:
    for name, module in IMPORTS.items():
        if name not in machine.versions:
            continue
        command = [sys.executable, "-c", f"import {module}"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=300, errors="replace")
        except subprocess.TimeoutExpired:
            machine.broken[name] = "its import does not come back"
            continue
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"its import ends with status {ended.returncode}"]
            machine.broken[name] = one_line(lines[-1])


def _driver(machine: Machine) -> None:
    machine.driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()


def _processor(machine: Machine) -> None:
    affinity = getattr(os, "sched_getaffinity", None)
    machine.cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    machine.threads = os.environ.get("OMP_NUM_THREADS")


def _shared_memory(machine: Machine) -> None:
    machine.shm = shutil.disk_usage("/dev/shm").total


def _open_files(machine: Machine) -> None:
    import resource

    machine.files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _port(machine: Machine) -> None:
    machine.port = int(os.environ.get("MASTER_PORT") or 29500)
    with socket.socket() as probe:
        # As torch's store does: a port that a finished run left waiting counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", machine.port))
            machine.port_free = True
        except OSError:
            machine.port_free = False


def _hostname(machine: Machine) -> None:
    machine.hostname = socket.gethostname()
    try:
        socket.getaddrinfo(machine.hostname, None)
    except OSError:
        machine.hostname_resolves = False


def _browser(machine: Machine) -> None:
    machine.browser = next(filter(None, map(shutil.which, BROWSERS)), None)


PROBES = (
    _packages,
    _apex,
    _torch,
    _flex,
    _imports,
    _driver,
    _processor,
    _shared_memory,
    _open_files,
    _port,
    _hostname,
    _browser,
)
