"""The policy gradient's choices: how a ratio is taken, clipped and averaged, a row for each; and its options.

To add one, write its function in `objectives.policy_gradient` or a module of your own, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_dtrpo.config.rows import function_named, setting


@dataclass(frozen=True)
class Ratio:
    """What one importance ratio covers.

    Attributes:
        function: ``module:function``, of `objectives.policy_gradient`.
        estimators: those whose targets it can be taken of.
    """

    function: str
    estimators: tuple[str, ...]

    @property
    def of(self) -> Callable:
        return function_named(self.function)


RATIOS: dict[str, Ratio] = {
    "token": Ratio(
        "megatron_dtrpo.objectives.policy_gradient:token_ratio", ("exact_trajectory", "trajectory", "exact")
    ),
    "step": Ratio("megatron_dtrpo.objectives.policy_gradient:step_ratio", ("exact_trajectory", "trajectory")),
    "sequence": Ratio(
        "megatron_dtrpo.objectives.policy_gradient:sequence_ratio", ("exact_trajectory", "exact", "elbo", "vrpo")
    ),
}
CLIPS = {
    "ppo": "megatron_dtrpo.objectives.policy_gradient:pessimistic",
    "always": "megatron_dtrpo.objectives.policy_gradient:always_clipped",
}
KL_ESTIMATORS = {
    "k1": "megatron_dtrpo.objectives.policy_gradient:k1",
    "k3": "megatron_dtrpo.objectives.policy_gradient:k3",
}
MEANS = ("token", "response", "group")


@dataclass
class PolicyGradientOptions:
    """Options of ``objective policy_gradient``."""

    ratio: str = setting(
        "token",
        "What one ratio of policy to rollout policy covers: a token (TraceRL, DiRL), what a decoding step wrote, or "
        "the whole sequence (EBPO; with length_normalization per token, as GSPO).",
        tuple(RATIOS),
    )
    clip_low: float = setting(0.2, "Ratios are clipped below 1 - clip_low.", at_least=0, at_most=1)
    clip_high: float = setting(0.2, "Ratios are clipped above 1 + clip_high.", at_least=0)
    clip: str = setting(
        "ppo",
        "ppo: the smaller of the plain and the clipped gain; always: the clipped ratio weighs grad log p, whatever the "
        "advantage's sign (StableDRL; with ratio token CISPO).",
        tuple(CLIPS),
    )
    self_normalize: bool = setting(
        False,
        "With clip always: a group's weights are divided by their mean (StableDRL). Costs a forward pass of every "
        "update but a rollout's first.",
    )
    mean: str = setting(
        "token",
        "What the loss is a mean over: all tokens alike (DAPO), responses (GRPO), or groups.",
        MEANS,
    )
    kl_coefficient: float = setting(0.0, "Weight of the KL divergence from the reference; 0: none is read.", at_least=0)
    kl_estimator: str = setting(
        "k3",
        "Its estimate of a token: k3 as GRPO's; k1, log p - log p_reference, as a penalty in the reward.",
        tuple(KL_ESTIMATORS),
    )
    likelihood_coefficient: float = setting(
        0.0, "Weight of mean -log p of the responses of positive reward (LightningRL: 0.1).", at_least=0
    )
