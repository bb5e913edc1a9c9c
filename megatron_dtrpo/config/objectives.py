"""The objectives that a run may have: a row for each."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dtrpo.config.rows import function_named


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective, and the settings that it starts from.

    Attributes:
        function: ``module:function``, from the settings of the objective to what a step evaluates.
        estimator, block_start: where none is given.
        may_read_reference: whether it compares two responses, perhaps with a reference policy.
    """

    function: str
    estimator: str
    block_start: str
    may_read_reference: bool = False

    def __call__(self, settings):
        """The objective under these ``settings``, an ``ObjectiveSettings``."""
        return function_named(self.function)(settings)


OBJECTIVES: dict[str, ObjectiveKind] = {
    "preference": ObjectiveKind(
        "megatron_dtrpo.objectives.objective:preference_objective",
        estimator="dtrpo",
        block_start="clean",
        may_read_reference=True,
    ),
    "sft": ObjectiveKind("megatron_dtrpo.objectives.objective:sft_objective", estimator="sft", block_start="noisy"),
}
