"""From log-probabilities of targets to a step's loss, against sums over tokens written out here.

Every token of every response is another one, so that a target says which token of which response it is; and a token's
log-probability is a function of itself, whatever view it is read from.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_dtrpo.config.losses import LOSSES
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.rules import fill_objective_defaults
from megatron_dtrpo.config.settings import Config, ObjectiveSettings
from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
from megatron_dtrpo.diffusion.layout import concatenate
from megatron_dtrpo.objectives.objective import Outcome, preference_objective
from megatron_dtrpo.objectives.targets import Targets
from tests.conftest import REPOSITORY

B, MASK = 4, 9999
SHAPES = [(3, (9, 2)), (8, (4, 13)), (5, (1, 6))]  # prompt, chosen and rejected tokens


def log_prob(token: torch.Tensor) -> torch.Tensor:
    return -0.1 - (token % 17).double() / 5


def reference_log_prob(token: torch.Tensor) -> torch.Tensor:
    return -0.3 - (token % 13).double() / 7


def response(example: int, branch: int) -> torch.Tensor:
    """Tokens of the ``branch``-th response (from 0) of an example."""
    first = 1000 * (example + 1) + 500 * branch
    return torch.arange(first, first + SHAPES[example][1][branch])


def settings(**changes) -> Config:
    config = Config()
    config.model.block_size, config.optimizer.seed = B, 3
    for key, value in changes.items():
        setattr(config.objective, key, value)
    fill_objective_defaults(config.objective, config.model)
    return config


def micro_batch(config: Config, epoch: int = 0) -> MicroBatch:
    noising = Noising.from_config(config, MASK)
    branches = (0, 1) if config.objective.objective == "preference" else (0,)
    documents, lengths = [], []
    for example, (prompt, _) in enumerate(SHAPES):
        responses = [response(example, branch) for branch in branches]
        documents.append(noising.document(Sample(epoch, example), torch.arange(prompt), responses))
        lengths += [len(r) for r in responses]
    return MicroBatch(concatenate(documents), [Sample(epoch, e) for e in range(len(SHAPES))], torch.tensor(lengths))


def outcome_of(config: Config, batch: MicroBatch) -> Outcome:
    s = batch.sequence

    def targets(of) -> Targets:
        return Targets(
            of(s.target_token), s.target_weight, s.target_response, s.target_block, s.target_step, batch.response_length
        )

    objective = OBJECTIVES[config.objective.objective](config.objective)
    reference = targets(reference_log_prob).likelihoods() if objective.reads_reference else None
    return objective.evaluate(targets(log_prob), reference)


def metrics_of(config: Config, outcome: Outcome) -> dict[str, float]:
    """As the trainer reports them: sums over the global batch, divided by its count."""
    names = OBJECTIVES[config.objective.objective](config.objective).metric_names
    return dict(zip(names, (outcome.metrics / outcome.count).tolist(), strict=True))


# Fine-tuning


@pytest.mark.parametrize("block_start", ["clean", "noisy"])
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_sft_is_the_mean_over_all_tokens(num_views, block_start):
    """Not over examples, views or blocks: with complementary views exactly."""
    config = settings(objective="sft", num_views=num_views, block_start=block_start)
    outcome = outcome_of(config, micro_batch(config))
    tokens = torch.cat([response(example, 0) for example in range(3)])
    expected = -log_prob(tokens).mean().item()
    assert outcome.count.item() == len(tokens) and outcome.count.dtype == torch.int  # megatron-core adds integers
    assert outcome.loss.item() / outcome.count.item() == pytest.approx(expected, rel=1e-12)
    assert metrics_of(config, outcome) == {"loss": pytest.approx(expected, rel=1e-12)}
    for example, loss in enumerate(outcome.per_example.tolist()):
        assert loss == pytest.approx(-log_prob(response(example, 0)).sum().item(), rel=1e-12)


@pytest.mark.parametrize("complementary", [True, False])
@pytest.mark.parametrize("min_timestep", [0.0, 0.5])
@pytest.mark.parametrize("block_start", ["clean", "noisy"])
@pytest.mark.parametrize("num_views", [1, 2])
def test_every_token_weighs_one_on_average(num_views, block_start, min_timestep, complementary):
    config = settings(
        objective="sft",
        num_views=num_views,
        block_start=block_start,
        min_timestep=min_timestep,
        complementary=complementary,
    )
    draws = 400
    total = torch.zeros(2000 + 1000 * len(SHAPES), dtype=torch.float64)
    square = total.clone()
    for epoch in range(draws):
        sequence = micro_batch(config, epoch).sequence
        weight = torch.zeros_like(total).index_add(0, sequence.target_token, sequence.target_weight)
        total += weight
        square += weight**2
    tokens = torch.cat([response(example, 0) for example in range(3)])
    mean = total[tokens] / draws
    error = ((square[tokens] / draws - mean**2).clamp(min=0) / draws).sqrt()
    assert ((mean - 1).abs() <= 5 * error + 1e-12).all(), mean
    assert total.sum() == pytest.approx(total[tokens].sum())


@pytest.mark.parametrize("min_timestep, seen", [(1.0, 1.0), (0.9, 0.95), (0.0, 0.5)])
def test_the_least_timestep_reaches_the_noise(min_timestep, seen):
    config = settings(objective="sft", complementary=False, min_timestep=min_timestep)
    sequences = [micro_batch(config, epoch).sequence for epoch in range(200)]
    masked = sum(int((s.target_token > 0).sum()) for s in sequences) / (200 * sum(r for _, (r, _) in SHAPES))
    assert masked == pytest.approx(seen, abs=0.04 if min_timestep < 1 else 0)


# Preferences


def likelihood(of, example: int, branch: int) -> float:
    return of(response(example, branch)).sum().item()


@pytest.mark.parametrize("num_views", [1, 3])
def test_preference_metrics_written_out(num_views):
    """mean_field reads every token once: ``L`` is the plain sum over the response's tokens."""
    config = settings(
        estimator="mean_field", beta=0.3, loss_type=["sigmoid", "sft"], loss_weights=[2.0, 0.7], num_views=num_views
    )
    outcome = outcome_of(config, micro_batch(config))
    assert outcome.count.item() == 3 and outcome.count.dtype == torch.int
    got, expected = metrics_of(config, outcome), {}
    rows = []
    for example, (_, (chosen_tokens, _)) in enumerate(SHAPES):
        chosen, rejected = (likelihood(log_prob, example, branch) for branch in (0, 1))
        gains = [
            likelihood(log_prob, example, branch) - likelihood(reference_log_prob, example, branch) for branch in (0, 1)
        ]
        margin = gains[0] - gains[1]
        sigmoid = math.log(1 + math.exp(-0.3 * margin))
        sft = -chosen / chosen_tokens
        rows.append(
            {
                "loss": 2.0 * sigmoid + 0.7 * sft,
                "rewards/chosen": 0.3 * gains[0],
                "rewards/rejected": 0.3 * gains[1],
                "rewards/accuracies": float(margin > 0),
                "rewards/margins": 0.3 * margin,
                "logps/chosen": chosen,
                "logps/rejected": rejected,
                "loss/sigmoid": sigmoid,
                "loss/sft": sft,
            }
        )
    expected = {name: sum(row[name] for row in rows) / 3 for name in rows[0]}
    assert list(got) == list(expected)
    assert got == pytest.approx(expected, rel=1e-12)
    assert 0 < expected["rewards/accuracies"] < 1  # the cases are of both kinds
    assert outcome.per_example.tolist() == pytest.approx([row["loss"] for row in rows], rel=1e-12)
    assert outcome.loss.item() == pytest.approx(sum(row["loss"] for row in rows), rel=1e-12)


def test_the_length_of_a_response_is_its_own():
    """Of the chosen for the anchor, of each response for losses per token; lengths differ in every pair."""
    config = settings(estimator="mean_field", loss_type=["simpo"], simpo_gamma=0.2, beta=1.5)
    outcome = outcome_of(config, micro_batch(config))
    for example, (_, lengths) in enumerate(SHAPES):
        means = [likelihood(log_prob, example, branch) / lengths[branch] for branch in (0, 1)]
        expected = math.log(1 + math.exp(-(1.5 * (means[0] - means[1]) - 0.2)))
        assert outcome.per_example[example].item() == pytest.approx(expected, rel=1e-12)
    config = settings(estimator="mean_field", length_normalization=True, beta=1.5)
    outcome = outcome_of(config, micro_batch(config))
    for example, (_, lengths) in enumerate(SHAPES):
        gains = [
            (likelihood(log_prob, example, branch) - likelihood(reference_log_prob, example, branch)) / lengths[branch]
            for branch in (0, 1)
        ]
        expected = math.log(1 + math.exp(-1.5 * (gains[0] - gains[1])))
        assert outcome.per_example[example].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "loss_type, reads", [(["sigmoid"], True), (["sft"], False), (["simpo", "sft"], False), (["sft", "hinge"], True)]
)
def test_a_reference_is_kept_where_a_loss_reads_it(loss_type, reads):
    config = settings(loss_type=loss_type)
    assert config.objective.has_reference is reads
    assert OBJECTIVES["preference"](config.objective).reads_reference is reads
    fine_tuning = replace(config.objective, objective="sft")
    assert OBJECTIVES["sft"](fine_tuning).reads_reference is fine_tuning.has_reference is False


@pytest.mark.parametrize("name", ["label_smoothing", "simpo_gamma", "beta"])
def test_knobs_reach_the_loss(name):
    base = settings(estimator="mean_field", loss_type=["simpo"])
    other = settings(estimator="mean_field", loss_type=["simpo"], **{name: 0.25})
    one, two = (outcome_of(config, micro_batch(config)).loss.item() for config in (base, other))
    assert abs(one - two) > 1e-3


def test_every_metric_is_documented():
    documented = (REPOSITORY / "docs" / "metrics.md").read_text()
    names = {"iteration", "consumed_samples", "grad_norm", "lr", "pairs_per_second", "tokens_per_second"}
    for config in (settings(loss_type=["sigmoid", "sft"]), settings(objective="sft")):
        names |= set(OBJECTIVES[config.objective.objective](config.objective).metric_names)
    assert not [name for name in names if f"`{name}`" not in documented and not name.startswith("loss/")]
    methods = (REPOSITORY / "docs" / "method.md").read_text()
    assert not [name for name in LOSSES if f"| `{name}`" not in methods]


# What the settings say reaches the noise


@pytest.mark.parametrize(
    "changes",
    [{"steps_per_block": 1}, {"num_views": 3}, {"block_start": "noisy"}, {"estimator": "vrpo"}, {"estimator": "elbo"}],
)
def test_options_reach_the_noise(changes):
    base, other = (micro_batch(config).sequence for config in (settings(), settings(**changes)))
    assert base.target_weight.tolist() != other.target_weight.tolist()


def test_one_step_a_block_masks_it_whole():
    """``steps_per_block`` 1: every noisy block is all masked, and all of it is read with weight 1."""
    config = settings(steps_per_block=1)
    sequence = micro_batch(config).sequence
    tokens = sum(sum(lengths) for _, lengths in SHAPES)
    assert sequence.target_weight.tolist() == [1.0] * tokens
    assert (sequence.tokens == MASK).sum() >= tokens - sum(-(-(p + r) // B) for p, rs in SHAPES for r in rs)


def test_seed_and_mask_token_reach_the_noise():
    config = settings(num_views=4)
    first, again = (micro_batch(config).sequence.tokens for _ in range(2))
    assert torch.equal(first, again) and (first == MASK).any()
    config.optimizer.seed = 4
    assert not torch.equal(micro_batch(config).sequence.tokens, first)


def test_a_batch_without_the_reference_that_its_losses_read_is_an_error():
    """And not the loss of another kind, as it is where nothing reads a reference."""
    targets = Targets(*[torch.zeros(0, dtype=torch.long)] * 5, torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="this batch has no scores of one"):
        preference_objective(ObjectiveSettings()).evaluate(targets, None)
    preference_objective(ObjectiveSettings(loss_type=["simpo"])).evaluate(
        replace(targets, log_prob=torch.zeros(0), weight=torch.zeros(0)), None
    )
