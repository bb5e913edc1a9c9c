"""Who takes part in tools/benchmarks/training.py: how each is built, checked against ours, and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.diffusion.estimators import Noise, noise_generator
from megatron_dtrpo.diffusion.layout import Blocks, PackedSequence, lay_out
from megatron_dtrpo.errors import UserError
from tools.benchmarks.peers.fast_dllm_layout import FastDllmLayout, every_step
from tools.benchmarks.peers.machine import peak_resident_bytes
from tools.benchmarks.peers.ours import Document, Ours, autoregressive, full_attention, noising, sample_of
from tools.benchmarks.peers.packed_layout import PackedLayout
from tools.benchmarks.peers.padded_views import PaddedViews
from tools.benchmarks.peers.pairs import Pair
from tools.benchmarks.peers.trl_dpo import TrlDpo
from tools.benchmarks.peers.weights import Learner, multiply_as_ours

BETA = 0.1
TOLERANCE = 1e-4  # of a loss near 1: fp32 sums over some thousand weighted tokens
FULL_VIEWS = 2  # samples of VRPO under full attention, where each repeats the prompt


class Step(NamedTuple):
    """One preference step: ``run`` takes it and returns the loss; ``tokens`` went through the policy in it."""

    run: Callable[[], float]
    pairs: int
    tokens: Callable[[], int]


class World:
    """What the contenders of one family share: weights, pairs and noise. Built when first asked for."""

    def __init__(self, arguments, shape: dict, data, family: str = "qwen2"):
        self.arguments, self.shape, self.family = arguments, shape, family
        self.pairs, self.tokenizer = data
        self.threads = torch.get_num_threads()
        self.mask_id = shape["vocab_size"] - 1

    @property
    def slow_pairs(self) -> list[Pair]:
        return self.pairs[: self.arguments.slow_pairs]

    @cached_property
    def learner(self) -> Learner:
        learner = Learner(self.shape, lr=0.0, family=self.family)
        if self.arguments.same_products:
            for model in (learner.policy, learner.reference):
                multiply_as_ours(model)
        return learner

    @cached_property
    def ours(self) -> Ours:
        return Ours(
            self.learner,
            self.shape,
            self.full if self.family == "llada" else self.document,
            beta=BETA,
            micro_batch_size=self.arguments.micro_batch_size,
            seq_length=2**30,
        )

    def noising(self, estimator: str, views: int) -> Noising:
        return noising(
            estimator,
            views,
            block_size=self.arguments.block_size,
            mask_id=self.mask_id,
            steps_per_block=self.arguments.steps_per_block,
        )

    def document(self, pair: Pair) -> PackedSequence:
        """dTRPO's noise, packed."""
        return self.noising("dtrpo", 1).document(sample_of(pair), pair.prompt, pair.responses)

    def causal(self, pair: Pair) -> PackedSequence:
        """No noise, packed."""
        return autoregressive(self.mask_id).document(sample_of(pair), pair.prompt, pair.responses)

    def full(self, pair: Pair) -> PackedSequence:
        """VRPO's noise under full attention, packed."""
        return full_attention(FULL_VIEWS, self.mask_id).document(sample_of(pair), pair.prompt, pair.responses)

    def draw_full(self, pair: Pair) -> list[Noise]:
        """The same noise, to be padded."""
        wholes = [[Blocks(len(pair.prompt), len(r), len(pair.prompt) + len(r))] for r in pair.responses]
        noising = full_attention(FULL_VIEWS, self.mask_id)
        return [noising.noise(sample_of(pair), b + 1, whole) for b, whole in enumerate(wholes)]

    def packed(self, pair: Pair, noise: Sequence[Noise]) -> PackedSequence:
        """Any noise, packed."""
        masked, weight = zip(*noise, strict=True)
        return lay_out(
            pair.prompt,
            pair.responses,
            masked,
            weight,
            block_size=self.arguments.block_size,
            mask_id=self.mask_id,
            block_start="noisy",
        )

    def blocks(self, pair: Pair) -> list[Blocks]:
        return [Blocks(len(pair.prompt), len(r), self.arguments.block_size) for r in pair.responses]

    def draw(self, estimator: str, views: int = 1) -> Callable[[Pair], list[Noise]]:
        noising = self.noising(estimator, views)
        return lambda pair: [noising.noise(sample_of(pair), b + 1, [k]) for b, k in enumerate(self.blocks(pair))]

    def every_step(self, pair: Pair) -> list[Noise]:
        generators = (noise_generator(0, 0, pair.index, branch, 1) for branch in (1, 2))
        return [
            every_step(blocks.maskable("noisy"), generator, self.arguments.steps_per_block)
            for blocks, generator in zip(self.blocks(pair), generators, strict=True)
        ]

    def layout(self, noise: Callable[[Pair], Sequence[Noise]]) -> FastDllmLayout:
        return FastDllmLayout(
            self.learner,
            noise,
            block_size=self.arguments.block_size,
            mask_id=self.mask_id,
            beta=BETA,
            micro_batch_size=self.arguments.micro_batch_size,
        )

    def mean_lengths(self) -> tuple[float, float]:
        prompts = sum(len(p.prompt) for p in self.pairs) / len(self.pairs)
        return prompts, sum(len(r) for p in self.pairs for r in p.responses) / (2 * len(self.pairs))


def _ours(slow: bool = False, document: Callable[[World, Pair], PackedSequence] | None = None):
    """``document`` lays out a pair otherwise than `World.ours` does."""

    def step(world: World) -> Step:
        pairs, ours = world.slow_pairs if slow else world.pairs, world.ours
        laid_out: Document | None = partial(document, world) if document else None

        def run() -> float:
            ours.forget_cache()
            return ours.step(pairs, laid_out)

        return Step(run, len(pairs), lambda: ours.tokens)

    return step


def _ours_cached(world: World) -> Step:
    ours = world.ours
    ours.cache_reference(world.pairs)
    scores = dict(ours.cached)

    def run() -> float:
        ours.cached = scores
        return ours.step(world.pairs)

    return Step(run, len(world.pairs), lambda: ours.tokens)


def _peer(build, slow: bool = False):
    """``build(world)`` makes an object with ``step(pairs)`` and ``tokens``."""

    def step(world: World) -> Step:
        peer, pairs = build(world), world.slow_pairs if slow else world.pairs
        return Step(lambda: peer.step(pairs), len(pairs), lambda: peer.tokens)

    return step


def _causal_loss(world: World) -> float:
    """Our preference loss on log-likelihoods of plain causal forward passes."""
    gains = []
    for pair in world.pairs:
        for response in pair.responses:
            tokens = torch.cat([pair.prompt, response])[None]
            both = []
            for model in (world.learner.policy, world.learner.reference):
                with torch.no_grad():
                    log_probs = torch.log_softmax(model(input_ids=tokens).logits[0].double(), -1)
                start = len(pair.prompt)
                both.append(log_probs[start - 1 : -1].gather(1, response[:, None]).sum())
            gains.append(both[0] - both[1])
    chosen, rejected = torch.stack(gains).view(-1, 2).unbind(1)
    return float(-F.logsigmoid(BETA * (chosen - rejected)).mean())


class Contender(NamedTuple):
    """``expected``: the loss that its step must give, by our code on the same noise or, of what has none, by plain
    transformers. ``against``: by the names of its comparisons those of ours that ran the same pairs. ``family``: of its
    weights."""

    name: str
    title: str
    build: Callable[[World], Step]
    expected: Callable[[World], float]
    against: Mapping[str, str] = {}
    requires: str | None = None
    family: str = "qwen2"

    def available(self) -> bool:
        return self.requires is None or find_spec(self.requires) is not None


def _expected(draw: Callable[[World], Callable[[Pair], Sequence[Noise]]], slow: bool = False):
    def loss(world: World) -> float:
        noise, pairs = draw(world), world.slow_pairs if slow else world.pairs
        return world.ours.loss([world.packed(pair, noise(pair)) for pair in pairs])

    return loss


def _full_loss(world: World) -> float:
    return world.ours.loss([world.full(pair) for pair in world.pairs])


_dtrpo = _expected(lambda world: world.draw("dtrpo"))
CONTENDERS = {
    c.name: c
    for c in (
        Contender("ours", "ours, live reference", _ours(), _dtrpo),
        Contender("ours_cached", "ours, cached reference", _ours_cached, _dtrpo),
        Contender(
            "ours_autoregressive", "ours, block size 1, live reference", _ours(document=World.causal), _causal_loss
        ),
        Contender(
            "packed_sketch",
            "the packed layout in plain transformers, one pair at a time",
            _peer(lambda world: PackedLayout(world.learner, world.document, beta=BETA)),
            _dtrpo,
            {"packed_sketch": "ours"},
        ),
        Contender(
            "fast_dllm_layout",
            "Fast-dLLM v2's layout, dTRPO",
            _peer(lambda world: world.layout(world.draw("dtrpo"))),
            _dtrpo,
            {"fast_dllm_layout": "ours", "fast_dllm_layout_cached": "ours_cached"},
        ),
        Contender(
            "trl_dpo",
            "autoregressive DPO, TRL",
            _peer(
                lambda world: TrlDpo(
                    world.learner, world.tokenizer, beta=BETA, micro_batch_size=world.arguments.micro_batch_size
                )
            ),
            _causal_loss,
            {"trl_dpo": "ours", "trl_dpo_autoregressive": "ours_autoregressive"},
            requires="trl",
        ),
        Contender(
            "ours_few",
            "ours, live reference, on the pairs below",
            _ours(slow=True),
            _expected(lambda world: world.draw("dtrpo"), slow=True),
        ),
        Contender(
            "vrpo_8",
            "VRPO, 8 samples, Fast-dLLM v2's layout",
            _peer(lambda world: world.layout(world.draw("vrpo", 8)), slow=True),
            _expected(lambda world: world.draw("vrpo", 8), slow=True),
            {"vrpo_8": "ours_few"},
        ),
        Contender(
            "exact_trajectory",
            "exact trajectory, a pass per step, Fast-dLLM v2's layout",
            _peer(lambda world: world.layout(world.every_step), slow=True),
            _expected(lambda world: world.every_step, slow=True),
            {"exact_trajectory": "ours_few"},
        ),
        Contender(
            "ours_full", f"ours, full attention, VRPO, {FULL_VIEWS} samples", _ours(), _full_loss, family="llada"
        ),
        Contender(
            "padded_views",
            f"VRPO, {FULL_VIEWS} samples, full attention, padded batches in plain transformers",
            _peer(
                lambda world: PaddedViews(
                    world.learner,
                    world.draw_full,
                    mask_id=world.mask_id,
                    beta=BETA,
                    micro_batch_size=world.arguments.micro_batch_size,
                )
            ),
            _full_loss,
            {"padded_views": "ours_full"},
            family="llada",
        ),
    )
}


def check(world: World, name: str, step: Step) -> float:
    """How far the loss of a contender's step is from ours on the same noise. Raises UserError where it is too far."""
    loss, expected = step.run(), CONTENDERS[name].expected(world)
    if not abs(loss - expected) < TOLERANCE:
        raise UserError(
            f"{name} computes something else: its loss is {loss:.6f}, ours on the same noise {expected:.6f}"
        )
    return abs(loss - expected)


def peak_memory(world: World, name: str) -> int:
    """Peak resident bytes of this process over two steps of one contender that is alone in it. Linux only."""
    step = CONTENDERS[name].build(world)
    if name.startswith("ours"):
        world.__dict__.pop("learner")  # the weights came from there; nobody trains it
    if name == "ours_cached":
        world.ours.drop_reference()
    return peak_resident_bytes(lambda: [step.run() for _ in range(2)])
