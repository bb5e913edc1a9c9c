"""What differs between the versions of megatron-core that are supported, 0.16 to 0.19: the one place that knows."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import megatron.core
from megatron.core import dist_checkpointing

from megatron_dtrpo.errors import UserError


def save_options() -> dict:
    """Further arguments of ``dist_checkpointing.save``. From 0.19 on NVIDIA's resiliency extension, a package of its
    own, makes an asynchronous save by default; megatron-core's own way is as before."""
    parameters = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in parameters else {}


def holds_plain_values(keys: Iterable[str]) -> bool:
    """Whether a checkpoint's ``.distcp`` files, which hold ``keys``, also hold its plain values, as from 0.19 on.
    Before, ``common.pt`` held them."""
    return any(key.startswith("common_state/") for key in keys)


def require_readable(folder: Path, keys: Iterable[str]) -> None:
    """Raises UserError for a checkpoint ``folder`` that a newer megatron-core wrote than this one reads. ``keys``: of
    what its ``.distcp`` files hold."""
    reads_both = hasattr(dist_checkpointing.serialization, "_legacy_common_state_exists")
    if not reads_both and holds_plain_values(keys):
        raise UserError(
            f"{folder}: written by megatron-core 0.19 or newer, and this is {megatron.core.__version__}: go on with "
            "the version that wrote it, or take the weights over with megatron-dtrpo convert export and import"
        )


def has_hybrid_model() -> bool:
    """Whether megatron-core has the class that is to replace its GPTModel. From 0.18 on."""
    return find_spec("megatron.core.models.hybrid") is not None


def require_model_class(name: str) -> None:
    """Raises UserError where megatron-core lacks the class that the setting ``model_class`` names."""
    if name == "hybrid" and not has_hybrid_model():
        raise UserError(
            f"model_class hybrid needs megatron-core 0.18 or newer, and this is {megatron.core.__version__}: leave it "
            "out here"
        )
