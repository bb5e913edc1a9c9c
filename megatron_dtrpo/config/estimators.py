"""The estimators of a response's log-likelihood: a row for each, and their options.

To add one, write its function, ``NoiseRequest -> Noise``, in `diffusion.estimators` or a module of your own, and a row
here. An option of its own is a field of `EstimatorOptions`, and is thereby a flag and a YAML key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_dtrpo.config.rows import function_named, setting


@dataclass
class EstimatorOptions:
    """Options of the estimators; the table says which estimator reads which."""

    steps_per_block: int = setting(8, "T_B, decoding steps per block that the dtrpo estimator assumes.", at_least=1)
    complementary: bool = setting(True, "sft: a second view masks what the first left visible.")
    min_timestep: float = setting(
        1e-3, "sft: least masking probability; the default is Fast-dLLM v2's.", at_least=0, at_most=1
    )
    sft_weighting: str = setting(
        "uniform",
        "sft: masked tokens weigh alike (uniform), or 1 / t where each is masked with probability t (elbo), as LLaDA "
        "trains.",
        ("uniform", "elbo"),
    )


@dataclass(frozen=True)
class Estimator:
    """How an estimator draws, and the properties that its callers ask about.

    Attributes:
        function: what draws, ``module:function``.
        options: the fields of `EstimatorOptions` that it reads.
        objectives: the objectives it belongs to.
        pairs_views: with the option ``complementary`` it lays out two views per generator.
        default_views: K where none is given.
        is_random: whether averaging several views means anything.
        independent_reference: the reference's noise is drawn apart from the policy's.
        needs_steps: it reads a recorded decoding.
        every_step: it has as many views as a block has steps, and of a block that has fewer steps lays out as many.
        autoregressive: it belongs to models of block size 1 that predict the next token, and lays out no noisy view.
        block_starts: where it may read a block's first token; where ``"noisy"`` is missing, that would be biased.
    """

    function: str
    options: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ("preference",)
    pairs_views: bool = False
    default_views: int = 1
    is_random: bool = True
    independent_reference: bool = False
    needs_steps: bool = False
    every_step: bool = False
    autoregressive: bool = False
    block_starts: tuple[str, ...] = ("clean", "noisy")

    @property
    def is_of_the_decoding(self) -> bool:
        """Whether ``L`` is the log-likelihood that the decoder itself recorded, up to rounding."""
        return self.every_step or self.autoregressive

    @property
    def draw(self) -> Callable:
        """``NoiseRequest -> Noise`` of `diffusion.estimators`."""
        return function_named(self.function)


ESTIMATORS: dict[str, Estimator] = {
    "dtrpo": Estimator(
        "megatron_dtrpo.diffusion.estimators:dtrpo", options=("steps_per_block",), block_starts=("clean",)
    ),
    "elbo": Estimator(
        "megatron_dtrpo.diffusion.estimators:elbo",
        objectives=("preference", "policy_gradient"),
        independent_reference=True,
    ),
    "vrpo": Estimator(
        "megatron_dtrpo.diffusion.estimators:vrpo", objectives=("preference", "policy_gradient"), default_views=8
    ),
    "mean_field": Estimator("megatron_dtrpo.diffusion.estimators:mean_field", is_random=False),
    "trajectory": Estimator(
        "megatron_dtrpo.diffusion.estimators:trajectory",
        objectives=("preference", "policy_gradient"),
        needs_steps=True,
        block_starts=("clean",),
    ),
    "exact_trajectory": Estimator(
        "megatron_dtrpo.diffusion.estimators:exact_trajectory",
        objectives=("preference", "policy_gradient"),
        is_random=False,
        needs_steps=True,
        every_step=True,
        block_starts=("clean",),
    ),
    "sft": Estimator(
        "megatron_dtrpo.diffusion.estimators:sft",
        options=("complementary", "min_timestep", "sft_weighting"),
        objectives=("sft",),
        pairs_views=True,
    ),
    "exact": Estimator(
        "megatron_dtrpo.diffusion.estimators:exact",
        objectives=("preference", "sft", "policy_gradient"),
        is_random=False,
        autoregressive=True,
        block_starts=("clean",),
    ),
}


def total_views(name: str, base_views: int, options: EstimatorOptions) -> int:
    """K, the number of noisy views an estimator lays out for ``base_views`` generators."""
    if ESTIMATORS[name].autoregressive:
        return 0
    return 2 * base_views if ESTIMATORS[name].pairs_views and options.complementary else base_views
