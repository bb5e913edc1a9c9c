"""Converts a synthetic checkpoint of a model's full size in and out, and measures time, memory and exactness.

REFERENCE is a Hugging Face folder without weights: config.json, model.safetensors.index.json and a tokenizer. The
weights are made up in WORK, which needs three times their size. Each conversion runs as the command a user types; a
plain `cp` of the same bytes runs right before it. Peak memory is the largest sum of RssAnon over the command and its
children, sampled every 20 ms; checksums are SHA-256 of every tensor, read with safetensors' own reader. "On disk" adds
the time until the written files are flushed. Exits with 1 unless everything is within the limits.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, parse_flags
from megatron_dtrpo.conversion import mapping
from megatron_dtrpo.conversion.hf_config import CONFIG, model_settings, read_config, read_json
from megatron_dtrpo.conversion.safetensors_reader import INDEX
from megatron_dtrpo.conversion.safetensors_writer import Planned, write_shard

EXAMPLES = """
  python -m tools.benchmarks.full_size_roundtrip --reference Fast_dLLM_v2_7B --work /scratch/roundtrip
"""
PIECE = 1 << 25  # values made at a time


def make_checkpoint(reference: Path, target: Path) -> int:
    """Writes bf16 weights of the reference's shapes, in its shards. Returns the number of parameters."""
    target.mkdir(parents=True)
    for file in reference.iterdir():
        if file.is_file() and not file.name.endswith(".safetensors"):
            shutil.copyfile(file, target / file.name)
    model = model_settings(read_config(reference), reference / CONFIG)
    pieces = mapping.huggingface_tensors(mapping.megatron_tensors(model, model.vocab_size))
    weight_map = read_json(reference / INDEX)["weight_map"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 * PIECE, generator=generator).bfloat16()

    def values(planned: list[Planned]) -> Iterator[torch.Tensor]:
        for tensor in planned:
            left = tensor.nbytes // 2
            while left:
                start = int(torch.randint(PIECE, (1,), generator=generator))
                count = min(left, PIECE)
                yield noise[start : start + count]
                left -= count

    for file in sorted(set(weight_map.values())):
        names = sorted(name for name, where in weight_map.items() if where == file)
        planned = [Planned(name, torch.bfloat16, mapping.huggingface_shape(pieces[name])) for name in names]
        write_shard(target / file, planned, values(planned))
    return mapping.count_parameters(pieces)


def anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon of a process and its children."""
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            status = Path(f"/proc/{member.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:"))
    return total


def measured(command: list[str], written: Path) -> tuple[float, float, int]:
    """Runs a command. Returns its seconds, those until ``written`` is on disk, and its peak of anonymous memory."""
    flush(written.parent)  # what earlier steps wrote does not count
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(watched))
        time.sleep(0.02)
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    flush(written)
    return seconds, time.monotonic() - started, peak


def flush(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def checksums(folder: Path) -> dict[str, str]:
    """Tensor -> SHA-256 of its bytes, with its dtype and shape."""

    def of_file(file: Path) -> dict[str, str]:
        found = {}
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                tensor = weights.get_tensor(name)
                digest = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest()
                found[name] = f"{digest} {tensor.dtype} {list(tensor.shape)}"
        return found

    merged: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for found in pool.map(of_file, sorted(folder.glob("*.safetensors"))):
            merged |= found
    return merged


def build_parser() -> Parser:
    parser = command_parser("python -m tools.benchmarks.full_size_roundtrip", __doc__, EXAMPLES)
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="Folder without weights.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="Folder to make, and to remove again.")
    parser.add_argument("--max-memory", type=float, default=6.0, metavar="GIB", help="Default: 6.")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="Of the export. Default: 5GB.")
    return parser


def _run(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    work = arguments.work
    source, copy, megatron, back = (work / name for name in ("source", "copy", "megatron", "back"))
    work.mkdir(parents=True)
    convert = [sys.executable, "-m", "megatron_dtrpo", "convert"]
    try:
        parameters = make_checkpoint(arguments.reference, source)
        nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        print(f"{parameters:,} parameters, {nbytes / 1e9:.2f} GB, {len(list(source.glob('*.safetensors')))} shards")
        steps = {
            "import": [*convert, "import", "--hf-path", str(source), "--megatron-path", str(megatron)],
            "export": [
                *convert,
                "export",
                "--megatron-path",
                str(megatron),
                "--hf-path",
                str(back),
                "--max-shard-size",
                arguments.max_shard_size,
                "--hf-reference",
                str(source),
            ],
        }
        rows, peaks = [], []
        for name, command in steps.items():
            plain = measured(["cp", "-r", str(source), str(copy)], copy)
            shutil.rmtree(copy)
            mine = measured(command, megatron if name == "import" else back)
            rows += [("cp", *plain, 1.0, 1.0), (name, *mine, mine[0] / plain[0], mine[1] / plain[1])]
            peaks.append(mine[2] / 2**30)
        different = _differences(source, back)
    finally:
        shutil.rmtree(work)
    print(f"{'':<10}{'seconds':>10}{'on disk':>10}{'times cp':>10}{'on disk':>10}{'peak RssAnon, GiB':>20}")
    for name, seconds, on_disk, peak, times, times_on_disk in rows:
        print(f"{name:<10}{seconds:>10.1f}{on_disk:>10.1f}{times:>10.2f}{times_on_disk:>10.2f}{peak / 2**30:>20.2f}")
    print("every tensor is equal" if not different else f"{len(different)} tensors differ, first {different[0]}")
    if different or max(peaks) > arguments.max_memory:
        sys.exit(1)


def _differences(source: Path, back: Path) -> list[str]:
    before, after = checksums(source), checksums(back)
    return sorted(name for name in before | after if before.get(name) != after.get(name))


if __name__ == "__main__":
    sys.exit(run_command(_run))
