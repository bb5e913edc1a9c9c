"""Names of the dtypes that weights may have: ours on the command line, safetensors' and Hugging Face's in files."""

from __future__ import annotations

import torch

from megatron_dtrpo.errors import UserError

# --params-dtype and --dtype
FLAGS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in SAFETENSORS.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``, as config.json has it."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str, where) -> torch.dtype:
    for dtype in CODES:
        if dtype_name(dtype) == name:
            return dtype
    raise UserError(f"{where}: unknown dtype {name!r}: known are {', '.join(map(dtype_name, CODES))}")
