"""The attention backends: a row for each says when it is the default, what it asks of a machine and how it pads.

To add one, write its two functions in a module of ``model/``, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_dtrpo.config.rows import function_named
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.rounding import round_up

AUTO = "auto"


def any_length(length: int) -> int:
    return length


# Tokens below which a GPU is no faster for fewer of them: it reads the weights in any case.
_SHORTEST = 512


def few_lengths(length: int) -> int:
    """``length`` tokens, rounded up to one of eight lengths per doubling, multiples of 512: kernels are compiled for a
    length, and packed sequences of one token budget then have one or two. At most an eighth is padding, or 511."""
    return round_up(length, max(_SHORTEST, 2 ** (max(length, 1).bit_length() - 4)))


@dataclass(frozen=True)
class Backend:
    """An attention backend.

    Attributes:
        plan_function: ``module:function``, from the coordinates of queries and keys, block size and width to a plan.
        attend_function: ``module:function``, of ``[s, heads, d]`` tensors under the plan.
        default_on: kinds of device where ``auto`` is this backend.
        trains_on: kinds of device where it has a backward pass.
        compiles: it compiles a kernel for each length of a sequence, and asks for torch's compiler.
        padded: the length a packed sequence is padded to.
    """

    plan_function: str
    attend_function: str
    default_on: tuple[str, ...]
    trains_on: tuple[str, ...] = ("cuda", "cpu")
    compiles: bool = False
    padded: Callable[[int], int] = any_length

    @property
    def plan(self) -> Callable:
        return function_named(self.plan_function)

    @property
    def attend(self) -> Callable:
        return function_named(self.attend_function)


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(
        "megatron_dtrpo.model.segmented_sdpa:plan_chunks",
        "megatron_dtrpo.model.segmented_sdpa:segmented_sdpa",
        default_on=("cpu",),
    ),
    "flex": Backend(
        "megatron_dtrpo.model.flex:plan",
        "megatron_dtrpo.model.flex:attend",
        default_on=("cuda",),
        trains_on=("cuda",),
        compiles=True,
        padded=few_lengths,
    ),
}


def choose_backend(name: str, device: str) -> str:
    """Resolves ``attention_backend`` for a kind of ``device``: ``"cuda"`` or ``"cpu"``."""
    return name if name != AUTO else next(each for each, row in BACKENDS.items() if device in row.default_on)


def require_trainable(name: str, device: str) -> None:
    """Raises UserError where ``attention_backend`` cannot train on such a ``device``."""
    if device not in BACKENDS[choose_backend(name, device)].trains_on:
        where = {"cpu": "a CPU", "cuda": "a GPU"}[device]
        raise UserError(f"attention_backend {name} has no backward pass on {where}: leave it at {AUTO}")
