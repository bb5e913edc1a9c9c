"""The preference losses: a row for each, and their options.

To add one, write its function, ``(Pairs, LossOptions) -> [P]``, in `objectives.preference` or a module of your own,
and a row here. An option of its own is a field of `LossOptions`, and is thereby a flag and a YAML key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dtrpo.config.rows import function_named, setting


@dataclass
class LossOptions:
    """Options of the losses; the table says which loss reads which."""

    beta: float = setting(0.5, "Strength of the preference: the paper's lambda, DPO's beta.", at_least=0)
    label_smoothing: float = setting(
        0.0, "sigmoid, robust, simpo: probability that a preference label is wrong.", at_least=0, at_most=0.5
    )
    simpo_gamma: float = setting(0.5, "simpo: the reward margin that is aimed at.", at_least=0)


# Read whatever the loss is: logged rewards are beta times a gain.
ALWAYS_READ = ("beta",)


@dataclass(frozen=True)
class Loss:
    """A loss and the properties that its callers ask about.

    Attributes:
        function: ``module:function``.
        options: the fields of `LossOptions` that it reads.
        per_token: it sees log-likelihoods divided by their responses' tokens, whatever ``length_normalization`` is.
        reads_reference: it looks at ``S``.
    """

    function: str
    options: tuple[str, ...] = ("beta",)
    per_token: bool = False
    reads_reference: bool = True

    @property
    def of(self) -> Callable:
        """``(Pairs, LossOptions) -> [P]`` of `objectives.preference`."""
        return function_named(self.function)


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss("megatron_dtrpo.objectives.preference:sigmoid", ("beta", "label_smoothing")),
    "hinge": Loss("megatron_dtrpo.objectives.preference:hinge"),
    "ipo": Loss("megatron_dtrpo.objectives.preference:ipo", per_token=True),
    "robust": Loss("megatron_dtrpo.objectives.preference:robust", ("beta", "label_smoothing")),
    "apo_zero": Loss("megatron_dtrpo.objectives.preference:apo_zero"),
    "simpo": Loss(
        "megatron_dtrpo.objectives.preference:simpo",
        ("beta", "label_smoothing", "simpo_gamma"),
        per_token=True,
        reads_reference=False,
    ),
    "sft": Loss("megatron_dtrpo.objectives.preference:sft", (), per_token=True, reads_reference=False),
}


def reads_reference(losses: Sequence[str]) -> bool:
    """Whether one of these losses looks at a reference policy."""
    return any(LOSSES[name].reads_reference for name in losses)
