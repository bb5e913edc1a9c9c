"""Who takes part in tools/benchmarks/training.py: how each is built, checked against ours, and measured."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.diffusion.estimators import Noise, noise_generator
from megatron_dtrpo.diffusion.layout import Blocks, PackedSequence, lay_out
from megatron_dtrpo.errors import UserError
from tools.benchmarks.peers.fast_dllm_layout import FastDllmLayout, every_step
from tools.benchmarks.peers.ours import Ours, noising, sample_of
from tools.benchmarks.peers.packed_layout import PackedLayout
from tools.benchmarks.peers.pairs import Pair
from tools.benchmarks.peers.trl_dpo import TrlDpo
from tools.benchmarks.peers.weights import Learner, multiply_as_ours

BETA = 0.1
TOLERANCE = 1e-4  # of a loss near 1: fp32 sums over some thousand weighted tokens


class Step(NamedTuple):
    """One preference step: ``run`` takes it and returns the loss; ``tokens`` went through the policy in it."""

    run: Callable[[], float]
    pairs: int
    tokens: Callable[[], int]


class World:
    """What the contenders share: weights, pairs and noise. Built when first asked for."""

    def __init__(self, arguments, shape: dict, data):
        self.arguments, self.shape = arguments, shape
        self.pairs, self.tokenizer = data
        self.threads = torch.get_num_threads()
        self.mask_id = shape["vocab_size"] - 1

    @property
    def slow_pairs(self) -> list[Pair]:
        return self.pairs[: self.arguments.slow_pairs]

    @cached_property
    def learner(self) -> Learner:
        learner = Learner(self.shape, lr=0.0)
        if self.arguments.same_products:
            for model in (learner.policy, learner.reference):
                multiply_as_ours(model)
        return learner

    @cached_property
    def ours(self) -> Ours:
        return Ours(
            self.learner,
            self.shape,
            self.document,
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


def _ours(slow: bool = False):
    def step(world: World) -> Step:
        pairs = world.slow_pairs if slow else world.pairs

        def run() -> float:
            world.ours.forget_cache()
            return world.ours.step(pairs)

        return Step(run, len(pairs), lambda: world.ours.tokens)

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
    """``expected``: the loss that its step must give, by our code on the same noise. ``against``: which of ours ran
    the same pairs and is compared with it."""

    name: str
    title: str
    build: Callable[[World], Step]
    expected: Callable[[World], float]
    against: str | None = "ours"
    requires: str | None = None

    def available(self) -> bool:
        return self.requires is None or find_spec(self.requires) is not None


def _expected(draw: Callable[[World], Callable[[Pair], Sequence[Noise]]], slow: bool = False):
    def loss(world: World) -> float:
        noise, pairs = draw(world), world.slow_pairs if slow else world.pairs
        return world.ours.loss([world.packed(pair, noise(pair)) for pair in pairs])

    return loss


_dtrpo = _expected(lambda world: world.draw("dtrpo"))
CONTENDERS = {
    c.name: c
    for c in (
        Contender("ours", "ours, live reference", _ours(), _dtrpo, against=None),
        Contender("ours_cached", "ours, cached reference", _ours_cached, _dtrpo, against=None),
        Contender(
            "packed_sketch",
            "the packed layout in plain transformers, one pair at a time",
            _peer(lambda world: PackedLayout(world.learner, world.document, beta=BETA)),
            _dtrpo,
        ),
        Contender(
            "fast_dllm_layout",
            "Fast-dLLM v2's layout, dTRPO",
            _peer(lambda world: world.layout(world.draw("dtrpo"))),
            _dtrpo,
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
            requires="trl",
        ),
        Contender(
            "ours_few",
            "ours, live reference, on the pairs below",
            _ours(slow=True),
            _expected(lambda world: world.draw("dtrpo"), slow=True),
            against=None,
        ),
        Contender(
            "vrpo_8",
            "VRPO, 8 samples, Fast-dLLM v2's layout",
            _peer(lambda world: world.layout(world.draw("vrpo", 8)), slow=True),
            _expected(lambda world: world.draw("vrpo", 8), slow=True),
            against="ours_few",
        ),
        Contender(
            "exact_trajectory",
            "exact trajectory, a pass per step, Fast-dLLM v2's layout",
            _peer(lambda world: world.layout(world.every_step), slow=True),
            _expected(lambda world: world.every_step, slow=True),
            against="ours_few",
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
        world.ours  # noqa: B018
        world.__dict__.pop("learner")  # the weights came from there; nobody trains it
    if name == "ours_cached":
        world.ours.drop_reference()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step.run()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
