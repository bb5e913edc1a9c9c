"""Low-rank adapters (LoRA): their settings, and the linear layers that may have one."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dtrpo.config.rows import setting

# The linear layers of a transformer layer, by the names that megatron-core gives them.
LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
# Of these, those whose input tensor parallelism divides; of the others it divides the output.
ROW_PARALLEL = ("linear_proj", "linear_fc2")
DEFAULT_TARGETS = [name.rpartition(".")[2] for name in LINEAR]


@dataclass
class LoraSettings:
    """Low-rank adapters: small trained matrices beside the linear layers of a frozen model (docs/lora.md)."""

    lora_rank: int | None = setting(
        None,
        "Train adapters of this rank and freeze the model, which without them is the reference. Default: no adapters, "
        "the model itself is trained; with load_adapter, that adapter's.",
        at_least=1,
    )
    lora_alpha: float = setting(
        32.0, "What an adapter adds is multiplied by lora_alpha / lora_rank (use_rslora: by its root).", at_least=0
    )
    lora_dropout: float = setting(
        0.0, "Share of the adapters' input that training drops, the same under every layout.", at_least=0
    )
    lora_target_modules: list[str] | None = setting(
        None,
        "Linear layers that have an adapter: whole names, linear_qkv or layers.0.mlp, or wildcards. Default: "
        f"{' '.join(DEFAULT_TARGETS)}.",
    )
    use_rslora: bool = setting(False, "Rank-stabilized LoRA: divide lora_alpha by the root of lora_rank.")

    @property
    def scale(self) -> float:
        """The factor of what an adapter adds."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)


def is_target(name: str, patterns: Sequence[str]) -> bool:
    """Whether the linear layer ``name``, as in ``decoder.layers.0.mlp.linear_fc1``, has an adapter. A pattern is one
    name or several with dots between, each of them whole or with shell wildcards."""
    return any(fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*") for pattern in patterns)


def target_names(num_layers: int, patterns: Sequence[str]) -> list[str]:
    """The linear layers of a model that have an adapter, layer by layer."""
    names = [f"decoder.layers.{number}.{name}" for number in range(num_layers) for name in LINEAR]
    return [name for name in names if is_target(name, patterns)]
