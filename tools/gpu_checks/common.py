"""What the parts of the check share: sizes, results, and commands of this project that they run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]


class Size(NamedTuple):
    """``model``: settings of the runs' and the decoder's model; ``layers``: shape (of tools/benchmarks/layers.py) and
    number of the layers whose memory and profile are taken; ``tokens``: packed tokens there; ``lengths``: packed tokens
    that FlexAttention is compared at; ``batches``: prompts that are decoded at once."""

    model: dict
    layers: tuple[str, int]
    tokens: int
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int


_TINY = dict(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, block_size=8)
_FULL = dict(
    num_layers=8, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8, num_query_groups=2, block_size=32
)
SIZES = {
    "tiny": Size(_TINY, ("tiny", 2), 512, (512, 1024), (1, 4), 12),
    "full": Size(_FULL, ("7b", 6), 8192, (3072, 8192, 16384), (1, 16, 64), 64),
}


@dataclass
class Result:
    """``status``: ok, failed or skipped; ``detail``: one line; ``numbers``: whatever was measured, for the JSON."""

    status: str
    detail: str
    numbers: dict = field(default_factory=dict)


def verdict(good: bool, detail: str, **numbers) -> Result:
    return Result("ok" if good else "failed", detail, numbers)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def why_no_fp8() -> str | None:
    """Why FP8 cannot run here, in a line; None where it can."""
    from megatron_dtrpo.config.settings import ParallelSettings
    from megatron_dtrpo.errors import UserError
    from megatron_dtrpo.runtime.precision import check_machine

    try:
        check_machine(ParallelSettings(bf16=True, fp8_format="hybrid"))
    except UserError as error:
        return str(error)
    return None


def environment(on_cpu: bool = False) -> dict[str, str]:
    """Of a command: this checkout before any that is installed, and no GPU if so asked."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})


class CommandFailed(Exception):
    """The last line that a command printed."""


def run_python(words: list[str], log: Path, on_cpu: bool = False) -> str:
    """Runs Python on ``words`` in the checkout and returns what was printed, also kept in ``log``. Raises CommandFailed
    for another exit status than 0."""
    with log.open("ab") as file:
        start = file.tell()
        done = subprocess.run(
            [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment(on_cpu)
        )
    output = log.read_bytes()[start:].decode(errors="replace")
    if done.returncode != 0:
        lines = [line for line in output.splitlines() if line.strip()]
        last = next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "nothing")
        raise CommandFailed(f"{' '.join(words[:3])} ended with {done.returncode}: {last}")
    return output
