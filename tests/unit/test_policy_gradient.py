"""The policy gradient of rollouts in one packed forward against TraceRL's definition: one forward of plain
transformers for every decoding step, in float64, loss and gradient."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch

from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.config.settings import ModelSettings, ObjectiveSettings
from megatron_dtrpo.data.batches import Decoded, Noising
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.diffusion import estimators
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.diffusion.layout import concatenate
from megatron_dtrpo.objectives.policy_gradient import Rollout, clipped_ratios, policy_gradient_objective, shares
from megatron_dtrpo.objectives.targets import Targets
from tests.support import oracles
from tests.support.same_weights import with_weights_of
from tools.benchmarks.peers.qwen2_weights import megatron_from_qwen2

VOCAB, MASK, END = 61, 60, 59
SIZES = dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2)
SIZES |= dict(rotary_base=10000.0, vocab_size=VOCAB, make_vocab_size_divisible_by=1)
# name -> (peer, architecture, prediction shift)
FAMILIES = {
    "qwen2": (oracles.qwen2, dict(kv_channels=8), 1),
    "sdar": (oracles.qwen3, dict(family="sdar", kv_channels=12, add_qkv_bias=False, qk_layernorm=True), 0),
}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9], [7]]
GROUP = 3


class Words:
    vocab_size, mask_id, eos_id = VOCAB, MASK, END


class Response(NamedTuple):
    prompt: list[int]
    completion: object
    advantage: float
    group: int


class Rolled(NamedTuple):
    """Transformers' models and ours of the same weights: policy, rollout policy, reference."""

    peers: list
    ours: list
    responses: list[Response]
    shift: int
    block: int


@pytest.fixture(scope="module", params=itertools.product(FAMILIES, (4, 8)), ids=lambda case: f"{case[0]}-B{case[1]}")
def rolled(request, alone) -> Rolled:
    """Sampled groups, with early ends, tokens that were thrown away, two equal responses and one of one token."""
    from megatron_dtrpo.inference.decoder import make_decoder

    family, block = request.param
    build, shape, shift = FAMILIES[family]
    peers = [build(seed=3), build(seed=3), build(seed=5)]
    with torch.no_grad():
        for peer in peers:
            peer.lm_head.weight.mul_(2.0)
            peer.lm_head.weight[END].mul_(1.3)
        for number, parameter in enumerate(peers[1].parameters()):  # a policy a few steps earlier
            parameter.mul_(1 + 0.01 * math.sin(number))
    settings = ModelSettings(**SIZES, **shape, block_size=block)
    ours = [with_weights_of(peer, settings) for peer in peers]
    options = DecodingOptions(max_new_tokens=13, threshold=0.2, small_block_size=block, temperature=1.0, top_p=1.0)
    asked = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    keys = [(number, sample) for number in range(len(PROMPTS)) for sample in range(GROUP)]
    decoder = make_decoder(ours[0], settings, Words, end_ids=range(50, 59))
    for seed in range(100):
        found = decoder.decode(asked, options, batch_size=9, seed=seed, keys=keys)
        if any(one.discarded for one in found) and len({one.ended for one in found}) == 2:
            break
    else:
        pytest.fail("no seed throws tokens away")
    found[1], found[8] = found[0], one_token(found[8])
    advantages = torch.randn(len(found), generator=torch.Generator().manual_seed(2)).tolist()
    responses = [Response(*one, n // GROUP) for n, one in enumerate(zip(asked, found, advantages, strict=True))]
    return Rolled(peers, ours, responses, shift, block)


def one_token(completion):
    """Its first token, as if the limit had been one."""
    step = min(completion.steps)
    first = completion.steps.index(step)
    return completion._replace(
        tokens=completion.tokens[first : first + 1],
        steps=[0],
        confidence=completion.confidence[first : first + 1],
        blocks=completion.blocks[:1],
        discarded=[],
    )


def steps_of(response: Response) -> list[tuple[dict[int, int], dict[int, int]]]:
    """The tokens shown to each decoding step and those that it wrote, by position."""
    prompt, one = response.prompt, response.completion
    kept = enumerate(zip(one.tokens, one.steps, strict=True), len(prompt))
    written = [(position, token, step, math.inf) for position, (token, step) in kept]
    written += [(len(prompt) + d.place, d.token, d.step, d.until) for d in one.discarded]
    found = []
    for now in sorted({step for _, _, step, _ in written}):
        shown = dict(enumerate(prompt)) | {p: t for p, t, step, until in written if step < now <= until}
        new = {p: t for p, t, step, _ in written if step == now}
        found.append((shown, new))
    return found


def by_forwards(peer, response: Response, rolled: Rolled) -> list[torch.Tensor]:
    """The log-probabilities ``[n]`` of what each step wrote, a forward pass a step."""
    found = []
    for shown, new in steps_of(response):
        begin = min(new) // rolled.block * rolled.block
        # With shift 1 a block's first token is read from the pass that finished the block before.
        length = begin if rolled.shift and begin in new else begin + rolled.block
        tokens = torch.tensor([shown.get(p, MASK) for p in range(length)])
        logits = oracles.qwen2_logits(peer, tokens, torch.arange(length), oracles.block_causal(length, rolled.block))
        log_probs = torch.log_softmax(logits, -1)
        found.append(torch.stack([log_probs[p - rolled.shift, token] for p, token in sorted(new.items())]))
    return found


def tracerl_loss(rolled: Rolled, settings: ObjectiveSettings) -> torch.Tensor:
    """The definition: a sum over responses and decoding steps, each by a forward of its own."""
    low, high, total, lengths, ratios = 1 - settings.clip_low, 1 + settings.clip_high, [], [], {}
    for response in rolled.responses:
        policy = by_forwards(rolled.peers[0], response, rolled)
        with torch.no_grad():
            old, reference = (by_forwards(peer, response, rolled) for peer in rolled.peers[1:])
        gains = [p - o for p, o in zip(policy, old, strict=True)]
        length = len(response.completion.tokens)
        units = {
            "token": torch.cat(gains),
            "step": torch.stack([gain.sum() for gain in gains]),
            "sequence": torch.cat(gains).sum()[None] / (length if settings.length_normalization else 1),
        }[settings.ratio]
        ratio, advantage = units.exp(), response.advantage
        clipped = ratio.clamp(low, high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        if settings.clip == "always":  # StableDRL: a weight of the gradient of log p
            gain = clipped.detach() * advantage * (units - units.detach()).exp()
        counted = length if settings.length_normalization else 1
        ratios.setdefault(response.group, []).append((clipped.detach(), counted))
        loss, others = -gain.sum() * counted, 0.0
        if settings.kl_coefficient:
            log_p, log_q = torch.cat(policy), torch.cat(reference)
            if settings.kl_estimator == "k1":  # the penalty (log p - log q) of a reward: times the gradient of log p
                kl = (log_p - log_q).detach() * (log_p - log_p.detach()).exp()
            else:
                kl = (log_q - log_p).exp() - (log_q - log_p) - 1
            others = settings.kl_coefficient * kl.sum()
        if settings.likelihood_coefficient and advantage > 0:
            others = others - settings.likelihood_coefficient * torch.cat(policy).sum()
        total.append((loss, others))
        lengths.append(length)
    means = {
        group: sum(c.sum() * n for c, n in found) / sum(len(c) * n for c, n in found) for group, found in ratios.items()
    }
    total = [
        loss / (means[response.group] if settings.self_normalize else 1) + others
        for (loss, others), response in zip(total, rolled.responses, strict=True)
    ]
    if settings.mean == "token":
        return sum(total) / sum(lengths)
    if settings.mean == "response":
        return sum(loss / length for loss, length in zip(total, lengths, strict=True)) / len(total)
    groups: dict[int, list[int]] = {}
    for number, response in enumerate(rolled.responses):
        groups.setdefault(response.group, []).append(number)
    return sum(sum(total[n] for n in g) / sum(lengths[n] for n in g) for g in groups.values()) / len(groups)


def packed(rolled: Rolled, estimator: str = "exact_trajectory", cut: int = GROUP):
    """The groups in one packed sequence, ``cut`` responses of a prompt to a document."""
    start = "clean" if rolled.shift else None
    noising = Noising(estimator, EstimatorOptions(), 1, start, rolled.block, MASK, seed=1, shift=rolled.shift)
    documents = []
    for first in range(0, len(rolled.responses), GROUP):
        group = rolled.responses[first : first + GROUP]
        for part in (group[at : at + cut] for at in range(0, GROUP, cut)):
            decoded = [
                Decoded(
                    torch.tensor(r.completion.steps),
                    torch.tensor([d[:4] for d in r.completion.discarded], dtype=torch.long).view(-1, 4),
                )
                for r in part
            ]
            tokens = [torch.tensor(r.completion.tokens) for r in part]
            documents.append(noising.document(Sample(0, first), torch.tensor(part[0].prompt), tokens, decoded))
    return concatenate(documents)


def targets_of(rolled: Rolled, model, sequence) -> Targets:
    from megatron_dtrpo.model.attention import attention_width, plan_attention

    attention = plan_attention(sequence.coordinates(), sequence.block_size, "sdpa", attention_width(model.config))
    log_probs = model(sequence.tokens, sequence.position, attention, sequence.target_row, sequence.target_token)
    view = sequence.view[sequence.target_row]
    return Targets(
        log_probs,
        sequence.target_weight,
        sequence.target_response,
        sequence.target_block,
        sequence.target_step,
        torch.tensor([len(r.completion.tokens) for r in rolled.responses]),
        view,
        int(sequence.target_step.max()) + 1,
        int(view.max()) + 1,
    )


def recorded(rolled: Rolled, steps: int) -> torch.Tensor:
    """The log-confidence of what every step wrote, ``[R, steps]``."""
    table = torch.zeros(len(rolled.responses), steps, dtype=torch.float64)
    for row, response in zip(table, rolled.responses, strict=True):
        one = response.completion
        thrown = [(token.step, token.confidence) for token in one.discarded]
        for step, confidence in [*zip(one.steps, one.confidence, strict=True), *thrown]:
            row[step] += math.log(confidence)
    return table


def evaluate(rolled: Rolled, settings: ObjectiveSettings, sequence, record: bool = False):
    """The objective on the packed groups: its outcome."""
    targets = targets_of(rolled, rolled.ours[0], sequence)
    with torch.no_grad():
        others = [targets_of(rolled, model, sequence).log_prob for model in rolled.ours[1:]]
    advantage = torch.tensor([r.advantage for r in rolled.responses], dtype=torch.float64)
    group = torch.tensor([r.group for r in rolled.responses])
    share, count = shares(targets.length, group, settings.mean)
    known = (recorded(rolled, targets.steps), None, None) if record else (None, *others)
    rollout = Rollout(advantage, share, count, (advantage > 0).double(), group, *known)
    if settings.self_normalize:
        sums = torch.zeros(int(group.max()) + 1, 2, dtype=torch.float64)
        sums.index_add_(0, group, clipped_ratios(settings, targets, rollout).detach())
        rollout = rollout._replace(mean_ratio=(sums[:, 0] / sums[:, 1])[group])
    return policy_gradient_objective(settings).evaluate(targets, rollout)


CHOICES = {
    "token": {},
    "token, kl": {"kl_coefficient": 0.3, "mean": "response"},
    "token, k1": {"kl_coefficient": 0.3, "kl_estimator": "k1", "clip": "always", "clip_low": 0.02, "clip_high": 0.05},
    "step": {"ratio": "step", "mean": "group", "clip_low": 0.01, "clip_high": 0.03},
    "step, always": {"ratio": "step", "clip": "always", "clip_low": 0.01, "likelihood_coefficient": 0.2},
    "token, weights": {"clip": "always", "clip_low": 0.02, "clip_high": 0.05, "self_normalize": True},
    "sequence, weights": {"ratio": "sequence", "clip": "always", "clip_low": 0.01, "clip_high": 0.1, "mean": "group"},
    "sequence": {"ratio": "sequence", "mean": "response", "clip_high": 0.4},
    "sequence, per token": {"ratio": "sequence", "length_normalization": True, "clip_low": 0.001},
}
CHOICES["sequence, weights"] |= {"self_normalize": True, "kl_coefficient": 0.3}


@pytest.mark.parametrize("choice", CHOICES)
def test_one_packed_forward_is_a_forward_for_every_step(rolled, choice):
    from megatron_dtrpo.model.initialization import global_parameter_names

    settings = ObjectiveSettings(objective="policy_gradient", **CHOICES[choice])
    expected = tracerl_loss(rolled, settings)
    gradients = torch.autograd.grad(expected, list(rolled.peers[0].parameters()), allow_unused=True)
    named = zip(dict(rolled.peers[0].named_parameters()), gradients, strict=True)
    theirs = megatron_from_qwen2(dict(named), 4, 2, tied=False)
    for cut in (GROUP, 1):
        outcome = evaluate(rolled, settings, packed(rolled, cut=cut))
        loss = outcome.loss / outcome.count
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        ours = global_parameter_names(rolled.ours[0])
        for name, gradient in zip(ours, torch.autograd.grad(loss, list(ours.values())), strict=True):
            torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-9, msg=name)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-3


def test_groups_weigh_alike_also_where_answers_have_no_reward():
    lengths, group = torch.tensor([3, 5, 2, 6, 1]), torch.tensor([0, 0, 0, 1, 1])
    loss = torch.tensor([1.0, -2.0, 4.0, 3.0, 7.0], dtype=torch.float64)
    for mean, expected in (("group", (3 / 10 + 10 / 7) / 2), ("token", 13 / 17)):
        share, count = shares(lengths, group, mean)
        assert (share * loss).sum() / count.sum() == pytest.approx(expected)


def test_the_trainer_computes_what_the_decoder_recorded(rolled):
    """All but the response that was cut by hand, whose token was written beside others."""
    settings = ObjectiveSettings(objective="policy_gradient")
    whole = rolled._replace(responses=[r for number, r in enumerate(rolled.responses) if number != 8])
    outcome = evaluate(whole, settings, packed(whole), record=True)
    names = policy_gradient_objective(settings).metric_names
    metrics = dict(zip(names, (outcome.metrics / outcome.count).tolist(), strict=True))
    assert outcome.largest.item() < 1e-9 and metrics["rollout/logp_gap"] < 1e-9
    assert metrics["ratio"] == 1 and metrics["clip/fraction"] == 0
    written = sum(len(r.completion.tokens) for r in whole.responses)
    likelihood = sum(r.completion.log_likelihood() for r in whole.responses)
    assert metrics["entropy"] == pytest.approx(-likelihood / written)
    first = whole.responses[0]
    surer = first.completion._replace(confidence=[min(1.1 * c, 1) for c in first.completion.confidence])
    other = whole._replace(responses=[first._replace(completion=surer), *whole.responses[1:]])
    assert evaluate(other, settings, packed(other), record=True).largest.item() > 0.01


@pytest.mark.parametrize("ratio", ["token", "step"])
def test_the_sampled_estimator_is_unbiased(rolled, ratio, monkeypatch):
    """Enumerated: the mean over every choice of a step in every block is the sum over all steps; the gain, the
    divergence and, where policy and rollout policy are one, the gradient of the exact log-likelihood."""
    each = [rolled._replace(responses=[response]) for response in rolled.responses]
    alone = max((one for one in each if choices_of(one) < 40), key=choices_of)
    settings = ObjectiveSettings(objective="policy_gradient", ratio=ratio)
    settings.kl_coefficient = 0.3
    parameters = list(rolled.ours[0].parameters())

    def loss_and_gradient(sequence):
        loss = evaluate(alone, settings, sequence).loss
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    exact = loss_and_gradient(packed(alone))
    choices = itertools.product(*(range(max(count, 1)) for count in steps_of_blocks(alone)))
    found = []
    for choice in choices:
        monkeypatch.setattr(estimators, "_random_timestep", lambda steps, generator: torch.tensor(choice))  # noqa: B023
        found.append(loss_and_gradient(packed(alone, "trajectory")))
    assert len(found) > 5
    for parts, expected in zip(zip(*found, strict=True), exact, strict=True):
        torch.testing.assert_close(sum(parts) / len(parts), expected, rtol=0, atol=1e-9)


def choices_of(rolled: Rolled) -> int:
    return math.prod(max(count, 1) for count in steps_of_blocks(rolled))


def steps_of_blocks(rolled: Rolled) -> list[int]:
    """How many decoding steps wrote each block of the only response, without first tokens that are read elsewhere."""
    (response,) = rolled.responses
    start, blocks = len(response.prompt) // rolled.block, {}
    for _, new in steps_of(response):
        first = rolled.shift and min(new) % rolled.block == 0 and min(new) >= len(response.prompt)
        blocks.setdefault(min(new) // rolled.block, []).append(not first)
    return [sum(blocks[number]) for number in range(start, max(blocks) + 1)]


def written_in_pairs(end: int = END) -> list[Completion]:
    """Every answer of at most four of a few tokens to a prompt of five, written from left to right, two tokens a step
    until a block is full."""
    found = []
    for length in range(1, 5):
        for head in itertools.product((1, 2, 3), repeat=length - 1):
            for last in (end,) if length < 4 else (1, 2, 3, end):
                tokens, steps = [*head, last], [0, 0, 1, 2][:length]
                found.append(Completion(tokens, steps, [1.0] * length, [0] * length, 0, last == end, []))
    return found


@pytest.mark.parametrize("rolled", [("qwen2", 4), ("sdar", 8)], indirect=True, ids=["qwen2-B4", "sdar-B8"])
def test_the_expected_gradient_is_that_of_the_expected_reward(rolled, monkeypatch):
    """Enumerated, over all answers that are rewarded and all steps that may be sampled."""
    from megatron_dtrpo.inference.decoder import make_decoder
    from megatron_dtrpo.model.initialization import global_parameter_names

    prompt, settings = PROMPTS[0], ObjectiveSettings(objective="policy_gradient", mean="group")
    answers = [Response(prompt, one, 0.0, 0) for one in written_in_pairs()]
    log_p = [torch.cat(by_forwards(rolled.peers[0], one, rolled)).sum() for one in answers]
    rewards = torch.randn(len(answers), generator=torch.Generator().manual_seed(5)).tolist()
    expected = sum(p.exp() * reward for p, reward in zip(log_p, rewards, strict=True))
    gradients = torch.autograd.grad(-expected, list(rolled.peers[0].parameters()), allow_unused=True)
    named = zip(dict(rolled.peers[0].named_parameters()), gradients, strict=True)
    theirs = megatron_from_qwen2(dict(named), 4, 2, tied=False)
    # An answer counts as often as it is drawn.
    drawn = [one._replace(advantage=p.exp().item() * r) for one, p, r in zip(answers, log_p, rewards, strict=True)]
    alone = rolled._replace(responses=drawn)
    ours = global_parameter_names(rolled.ours[0])

    def gradients_of(estimator: str):
        targets = targets_of(alone, rolled.ours[0], packed(alone, estimator))
        advantage = torch.tensor([one.advantage for one in drawn], dtype=torch.float64)
        one, group = torch.ones_like(advantage), torch.zeros(len(drawn), dtype=torch.long)
        loss = policy_gradient_objective(settings).evaluate(targets, Rollout(advantage, one, one, one, group)).loss
        return torch.autograd.grad(loss, list(ours.values()))

    exact, sampled = gradients_of("exact_trajectory"), []
    for choice in (0, 1):  # no block of theirs has more steps
        monkeypatch.setattr(estimators, "_random_timestep", lambda steps, _: (steps - 1).clamp(0, choice))  # noqa: B023
        sampled.append(gradients_of("trajectory"))
    for name, one, first, second in zip(ours, exact, *sampled, strict=True):
        torch.testing.assert_close(one, theirs[name], rtol=0, atol=1e-9, msg=name)
        torch.testing.assert_close((first + second) / 2, theirs[name], rtol=0, atol=1e-9, msg=name)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-3

    options = DecodingOptions(4, "leftmost", rolled.block // 2, small_block_size=rolled.block, temperature=1, top_p=1.0)
    decoder = make_decoder(rolled.ours[0], ModelSettings(**SIZES, block_size=rolled.block), Words, end_ids=range(4, 59))
    decoder.shift = rolled.shift
    for found in decoder.decode([prompt] * 8, options, batch_size=8, keys=[(0, n) for n in range(8)]):
        log_likelihood = torch.cat(by_forwards(rolled.peers[0], Response(prompt, found, 0.0, 0), rolled)).sum().item()
        assert found.steps == [0, 0, 1, 2][: len(found.steps)]
        assert found.log_likelihood() == pytest.approx(log_likelihood, abs=1e-9)


@pytest.mark.parametrize("rolled", [("qwen2", 4)], indirect=True, ids=["qwen2-B4"])
@pytest.mark.parametrize("estimate", ["k1", "k3"])
def test_the_expected_gradient_of_the_reference_term(rolled, estimate):
    """Over all tokens that an answer of one token may be: k1's is that of KL(policy | reference), k3's that of
    KL(reference | policy)."""
    settings = ObjectiveSettings(objective="policy_gradient", kl_coefficient=1.0, kl_estimator=estimate)
    answers = [Response(PROMPTS[0], Completion([t], [0], [1.0], [0], 1, False, []), 0.0, 0) for t in range(VOCAB)]
    alone = rolled._replace(responses=answers)
    own, _, reference = (targets_of(alone, model, packed(alone)) for model in rolled.ours)
    policy, log_q = own.log_prob, reference.log_prob.detach()
    assert policy.exp().sum().item() == pytest.approx(1)
    from_, to = (policy, log_q) if estimate == "k1" else (log_q, policy)
    parameters = list(rolled.ours[0].parameters())
    expected = torch.autograd.grad((from_.exp() * (from_ - to)).sum(), parameters, retain_graph=True)
    nothing, drawn = torch.zeros(VOCAB, dtype=torch.float64), policy.detach().exp()
    rollout = Rollout(nothing, drawn, drawn, nothing, torch.zeros(VOCAB, dtype=torch.long), reference=log_q)
    found = torch.autograd.grad(policy_gradient_objective(settings).evaluate(own, rollout).loss, parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert max(one.abs().max() for one in expected) > 1e-4
