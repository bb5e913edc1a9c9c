"""The objectives that a run may have: a row for each."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dtrpo.config.rows import function_named

_OFFLINE, _ONLINE = "training.trainer:Trainer", "online.loop:OnlineTrainer"


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective, and the settings that it starts from.

    Attributes:
        function: ``module:function``, from the settings of the objective to what a step evaluates.
        estimator, block_start: where none is given.
        may_read_reference: whether it may compare the policy with a reference policy.
        compares_pairs: whether its examples are pairs, and it has preference losses.
        is_online: whether it trains on what the policy itself decodes.
    """

    function: str
    estimator: str
    block_start: str
    may_read_reference: bool = False
    compares_pairs: bool = False
    is_online: bool = False

    @property
    def trainer(self):
        """The class that runs it."""
        return function_named(f"megatron_dtrpo.{_ONLINE if self.is_online else _OFFLINE}")

    def __call__(self, settings):
        """The objective under these ``settings``, an ``ObjectiveSettings``."""
        return function_named(self.function)(settings)


OBJECTIVES: dict[str, ObjectiveKind] = {
    "preference": ObjectiveKind(
        "megatron_dtrpo.objectives.objective:preference_objective",
        estimator="dtrpo",
        block_start="clean",
        may_read_reference=True,
        compares_pairs=True,
    ),
    "sft": ObjectiveKind("megatron_dtrpo.objectives.objective:sft_objective", estimator="sft", block_start="noisy"),
    "policy_gradient": ObjectiveKind(
        "megatron_dtrpo.objectives.policy_gradient:policy_gradient_objective",
        estimator="exact_trajectory",
        block_start="clean",
        may_read_reference=True,
        is_online=True,
    ),
}
