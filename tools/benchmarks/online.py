"""Times training on groups of answers beside TraceRL's layout, and decoding them beside plain transformers, in one run.

Training: the gradient of one group, by one packed pass over all recorded steps (exact_trajectory), by one over sampled
ones (trajectory), and by a row of prompt, clean and noisy answer for each step of the slowest block. Loss and gradient
of all three are compared first, under a rollout policy of other weights. Rollouts: the same decoder, one prompt at a
time and in a batch; greedy answers are compared first, and tokens then drawn at temperature 1. Contenders take turns;
medians, spread and ratios are printed, at the default size beside their goals.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, new_file, parse_flags
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import initialize
from tools.benchmarks.peers.machine import describe_machine, peak_resident_bytes
from tools.benchmarks.peers.sizes import SIZES

EXAMPLES = """
  python -m tools.benchmarks.online --data gsm8k_sft.jsonl --models sdar     # 135M parameters, blocks of 4
  python -m tools.benchmarks.online --size tiny                              # generated sums
"""
MODELS = ("sdar", "fast_dllm_v2")
PARTS = ("training", "rollout")
CLOCKS = ("seconds", "processor_seconds")
PEER = "tracerl_layout"
TITLES = {
    "exact_trajectory": "ours, exact trajectory, one packed pass",
    "trajectory": "ours, sampled steps, one packed pass",
    PEER: "TraceRL's layout, plain transformers",
    "peer_alone": "plain transformers, one prompt at a time",
    "rollout_alone": "ours, one prompt at a time",
    "rollout_batch": "ours, in a batch",
}
# fp32 sums over some thousand tokens, of a loss near 0.1: and over 30 layers, relative to the gradient's length.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3


def build_parser() -> Parser:
    parser = command_parser("python -m tools.benchmarks.online", __doc__, EXAMPLES)
    parser.add_argument("--data", metavar="FILE", help="Rows of prompt and completion or chosen. Default: sums.")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="Hugging Face tokenizer. Default: a BPE trained on the data's own texts."
    )
    parser.add_argument("--size", choices=SIZES, default="135m", help="Model. Default: %(default)s.")
    parser.add_argument("--layers", type=int, help="Fewer than the model has, for time; no goals then.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="Default: both.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Default: both.")
    parser.add_argument("--answers", type=int, default=8, help="To a prompt. Default: %(default)s.")
    parser.add_argument("--answer-tokens", type=int, default=128, help="On average. Default: %(default)s.")
    parser.add_argument(
        "--sure",
        type=float,
        default=0.3,
        help="The decoder's probability to be surer of a masked token than its threshold: sets the tokens of a step. "
        "Default: %(default)s.",
    )
    parser.add_argument("--num-views", type=int, default=1, help="Sampled steps of a block. Default: %(default)s.")
    parser.add_argument("--checked-answers", type=int, default=2, help="Compared first. Default: %(default)s.")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="The peer's rows at once. Default: 8.")
    parser.add_argument("--seq-length", type=int, default=8192, help="Ours at once, in tokens. Default: 8192.")
    parser.add_argument("--prompts", type=int, default=16, help="Decoded in a batch. Default: %(default)s.")
    parser.add_argument("--prompts-alone", type=int, default=2, help="Of them one at a time. Default: %(default)s.")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="Decoded of each. Default: %(default)s.")
    parser.add_argument("--repetitions", type=int, default=3, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Chooses the prompts. Default: %(default)s.")
    parser.add_argument("--no-memory", action="store_true", help="Do not measure peak memory (a process each).")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="Write the numbers.")
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)  # one contender's own process
    return parser


def _benchmark(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    _check(arguments)
    from megatron_dtrpo.config.settings import ParallelSettings

    initialize.start(ParallelSettings(), seed=0)
    try:
        data = _data(arguments)
        if arguments.peak_memory_of:
            run = Training(arguments, arguments.models[0], data).contenders()[arguments.peak_memory_of].run
            print(peak_resident_bytes(run))
            return
        record = {name: _measure(arguments, argv, name, data) for name in arguments.models}
    finally:
        initialize.stop()
    if arguments.output:
        from megatron_dtrpo.files import write_atomically

        settings = {k: v for k, v in vars(arguments).items() if k != "peak_memory_of"}
        known = {"settings": settings, "machine": describe_machine(), "threads": torch.get_num_threads()}
        write_atomically(Path(arguments.output), json.dumps(known | {"models": record}, indent=2) + "\n")


def _check(arguments: argparse.Namespace) -> None:
    counts = ("answers", "answer_tokens", "num_views", "checked_answers", "micro_batch_size", "seq_length", "prompts")
    for name in (*counts, "prompts_alone", "max_new_tokens", "repetitions"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.layers is not None and arguments.layers < 1:
        raise UserError("--layers must be at least 1")
    if not 0 <= arguments.sure < 1:
        raise UserError("--sure must be at least 0 and below 1")
    for few, many in (("checked_answers", "answers"), ("prompts_alone", "prompts")):
        if getattr(arguments, few) > getattr(arguments, many):
            raise UserError(f"--{few.replace('_', '-')} must be at most --{many}")
    if torch.cuda.is_available():
        raise UserError("the peers run on a CPU: set CUDA_VISIBLE_DEVICES=")


class Data(NamedTuple):
    """Rows of texts, the ``chosen`` ones' numbers, a text's token ids, and the id of the end token."""

    rows: list[dict]
    chosen: list[int]
    encode: Callable[[str], list[int]]
    end: int


def _data(arguments: argparse.Namespace) -> Data:
    from tools.benchmarks.peers import answers, pairs

    vocabulary = SIZES[arguments.size]["vocab_size"] - 1  # the last id is [MASK]
    if arguments.data:
        rows = answers.answer_rows(Path(arguments.data))
    else:
        rows = [answers.chat_row(row["prompt"], row["chosen"]) for row in pairs.arithmetic_rows(1000)]
    if len(rows) < arguments.prompts:
        raise UserError(
            f"{arguments.data or 'generated sums'}: {len(rows)} rows, --prompts asks for {arguments.prompts}"
        )
    tokenizer = pairs.open_tokenizer(arguments.tokenizer, rows, vocabulary)
    chosen = random.Random(arguments.seed).sample(range(len(rows)), arguments.prompts)

    def encode(text: str) -> list[int]:
        return [token % vocabulary for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    return Data(rows, chosen, encode, tokenizer.eos_token_id % vocabulary)


class Contender(NamedTuple):
    """``run`` does ``work`` groups or tokens; ``tokens`` went through the policy in it."""

    run: Callable[[], object]
    work: int
    tokens: Callable[[], int | None] = lambda: None


def _shape(arguments: argparse.Namespace) -> dict:
    own = {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
    return SIZES[arguments.size] | own


class Training:
    """One group of answers, and who computes its gradient."""

    def __init__(self, arguments: argparse.Namespace, name: str, data: Data):
        from tools.benchmarks.peers.answers import KINDS, make_group
        from tools.benchmarks.peers.weights import Learner

        self.arguments, self.kind, self.shape = arguments, KINDS[name], _shape(arguments)
        self.mask_id = self.shape["vocab_size"] - 1
        self.make_group = partial(make_group, data.rows, encode=data.encode, end=data.end, kind=self.kind)
        self.chosen = data.chosen
        self.learner = Learner(self.shape, lr=0.0, family=self.kind.family)

    def group(self, index: int, answers: int, sure: float):
        return self.make_group(index, answers=answers, length=self.arguments.answer_tokens, sure=sure)

    @cached_property
    def ours(self):
        from tools.benchmarks.peers.ours_online import OursOnline

        seq_length = self.arguments.seq_length
        return OursOnline(self.learner, self.shape, self.kind, mask_id=self.mask_id, seq_length=seq_length)

    @cached_property
    def peer(self):
        from tools.benchmarks.peers.ours_online import CLIP
        from tools.benchmarks.peers.tracerl_layout import TraceRlLayout

        size = self.arguments.micro_batch_size
        return TraceRlLayout(self.learner.policy, self.kind, mask_id=self.mask_id, clip=CLIP, micro_batch_size=size)

    def views(self, estimator: str) -> int:
        return self.arguments.num_views if estimator == "trajectory" else 1

    def contenders(self) -> dict[str, Contender]:
        group = self.group(self.chosen[0], self.arguments.answers, self.arguments.sure)

        def ours(estimator: str) -> Contender:
            run = lambda: self.ours.step(group, estimator, self.views(estimator))  # noqa: E731
            return Contender(run, 1, lambda: self.ours.tokens)

        def peer() -> None:
            self.learner.policy.zero_grad()
            self.peer.step(group)

        found = {name: ours(name) for name in ("exact_trajectory", "trajectory")}
        return found | {PEER: Contender(peer, 1, lambda: self.peer.tokens)}

    def check(self, estimator: str) -> tuple[float, float]:
        """How far the peer's loss is from ours, and its gradient, relative to its length. Raises UserError."""
        from tools.benchmarks.peers.qwen2_weights import megatron_from_qwen2

        group, views = (
            self.group(self.chosen[0], self.arguments.checked_answers, self.arguments.sure),
            self.views(estimator),
        )
        other = self.learner.reference
        loss, found = self.ours.step(group, estimator, views, other), self.ours.gradients()
        policy = self.learner.policy
        policy.zero_grad()
        expected = self.peer.step(group, other, self.ours.weights(group, estimator, views))
        gradients = {name: p.grad for name, p in policy.named_parameters()}
        config = policy.config
        theirs = megatron_from_qwen2(gradients, config.num_attention_heads, config.num_key_value_heads, tied=True)
        policy.zero_grad()
        off = sum((found[name] - theirs[name]).square().sum() for name in found) ** 0.5
        length = sum(gradient.square().sum() for gradient in theirs.values()) ** 0.5
        gradient = float(off / length)
        if not (abs(loss - expected) < LOSS_TOLERANCE and gradient < GRADIENT_TOLERANCE):
            raise UserError(
                f"{estimator} and {PEER} compute different things: losses {loss:.6f} and {expected:.6f}, "
                f"gradients {gradient:.1e} of their length apart"
            )
        return abs(loss - expected), gradient

    def counted(self) -> list[dict]:
        """Tokens through the policy of the chosen prompts' groups, by how sure the decoder is."""
        from tools.benchmarks.peers.ours_online import packed_tokens
        from tools.benchmarks.peers.weights import settings_of

        settings = replace(settings_of(self.shape, self.kind.family), block_size=self.kind.block_size)
        rows = []
        for sure in (0.0, 0.2, 0.4, 0.6):
            groups = [self.group(index, self.arguments.answers, sure) for index in self.chosen]
            answers = [one for group in groups for one in group.completions]
            written = sum(len(one.tokens) for one in answers)
            theirs = sum(self.peer.tokens_of(group) for group in groups)
            ours = {
                name: sum(packed_tokens(settings, self.kind, group, name, self.views(name)) for group in groups)
                for name in ("exact_trajectory", "trajectory")
            }
            steps = sum(one.passes for one in answers)
            rows.append({"sure": sure, "tokens_per_step": written / steps, PEER: theirs / len(groups)})
            rows[-1] |= {name: tokens / len(groups) for name, tokens in ours.items()}
        return rows


class Decoders:
    """The same prompts through plain transformers and through ours."""

    def __init__(self, arguments: argparse.Namespace, name: str, data: Data):
        from megatron_dtrpo.inference.decoder import BlockDecoder, Vocabulary
        from tools.benchmarks.peers.answers import KINDS
        from tools.benchmarks.peers.weights import random_pair

        self.arguments, self.kind, shape = arguments, KINDS[name], _shape(arguments)
        self.peer, model = random_pair(shape, family=self.kind.family)
        size, self.prompts = shape["vocab_size"], [data.encode(data.rows[index]["prompt"]) for index in data.chosen]
        self.mask_id, self.end_id = size - 1, size  # an end token that no logit stands for: all answers are as long
        vocabulary = Vocabulary(size, self.mask_id, frozenset([self.end_id]))
        self.ours = BlockDecoder(model, vocabulary, self.kind.block_size, 32768, shift=self.kind.shift)
        self.rule = {"threshold": 0.9, "max_new_tokens": arguments.max_new_tokens}
        self.rule["small_block_size"] = self.kind.small_block_size

    def alone(self, temperature: float) -> list[list[int]]:
        from tools.benchmarks.peers import transformers_decoder

        known = {"block_size": self.kind.block_size, "mask_id": self.mask_id, "end_id": self.end_id}
        known |= {"shift": self.kind.shift, "temperature": temperature}
        few = self.prompts[: self.arguments.prompts_alone]
        return [transformers_decoder.decode(self.peer, prompt, **self.rule, **known) for prompt in few]

    def decode(self, count: int, batch_size: int, temperature: float) -> list[list[int]]:
        from megatron_dtrpo.config.decoding import DecodingOptions

        options = DecodingOptions(**self.rule, temperature=temperature, top_p=1.0)
        return [one.tokens for one in self.ours.decode(self.prompts[:count], options, batch_size=batch_size)]

    def check(self) -> int:
        """How many of the greedy answers, alone and in a batch, are the peer's."""
        expected, few = self.alone(0.0), self.arguments.prompts_alone
        found = self.decode(few, 1, 0.0) + self.decode(few, few, 0.0)
        return sum(a == b for a, b in zip(found, expected * 2, strict=True))

    def contenders(self) -> dict[str, Contender]:
        few, many = self.arguments.prompts_alone, self.arguments.prompts
        length = self.arguments.max_new_tokens
        return {
            "peer_alone": Contender(lambda: self.alone(1.0), few * length),
            "rollout_alone": Contender(lambda: self.decode(few, 1, 1.0), few * length),
            "rollout_batch": Contender(lambda: self.decode(many, many, 1.0), many * length),
        }


def _measure(arguments: argparse.Namespace, argv: list[str], name: str, data: Data) -> dict:
    """The numbers of one kind of model, printed and returned."""
    from tools.benchmarks.peers.answers import KINDS

    print(f"\n## {KINDS[name].title}\n")
    record = {}
    for part in arguments.parts:
        record[part] = _MEASURES[part](arguments, argv, name, data)
        sys.stdout.flush()
    return record


def _measure_training(arguments: argparse.Namespace, argv: list[str], name: str, data: Data) -> dict:
    memory = (
        {} if arguments.no_memory else {c: _memory_of(argv, name, c) for c in ("exact_trajectory", "trajectory", PEER)}
    )
    training = Training(arguments, name, data)
    differences = {estimator: training.check(estimator) for estimator in ("exact_trajectory", "trajectory")}
    for estimator, (loss, gradient) in differences.items():
        print(f"{estimator}: loss and gradient are the peer's, to {loss:.0e} and {gradient:.0e}", file=sys.stderr)
    contenders = training.contenders()
    rows = _time(contenders, arguments.repetitions)
    group = training.group(training.chosen[0], arguments.answers, arguments.sure)
    tokens, passes = (sum(map(f, group.completions)) for f in (lambda one: len(one.tokens), lambda one: one.passes))
    print(
        f"{arguments.size}, {training.shape['num_hidden_layers']} layers, fp32, {torch.get_num_threads()} threads: "
        f"a prompt of {len(group.prompt.ids)} tokens and {arguments.answers} answers of "
        f"{tokens / arguments.answers:.0f}, {tokens / passes:.2f} tokens a step; sampled: {arguments.num_views} of a "
        "block's steps\n"
    )
    print(
        "| | tokens through the model | seconds a group | spread | peak memory | ours is faster by | by the processor |"
    )
    print("|---|---|---|---|---|---|---|")
    ratios, by_processor = (_ratios(rows, contenders, PEER, clock) for clock in CLOCKS)
    goals = _goals(arguments, ratios)
    for one, row in rows.items():
        row["peak_memory_bytes"] = memory.get(one)
        gib = f"{memory[one] / 2**30:.2f} GiB" if one in memory else ""
        print(
            f"| {TITLES[one]} | {row['tokens']} | {row['median']:.2f} | {row['spread']:.0%} | {gib} | "
            f"{_with_goal(one, ratios, goals)} | {_with_goal(one, by_processor, {})} |"
        )
    counted = training.counted()
    print(f"\nCounted tokens of {arguments.prompts} groups, by the tokens of a step:\n")
    print(
        "| tokens a step | TraceRL's layout | ours, exact | ratio | ours, sampled | ratio |\n|---|---|---|---|---|---|"
    )
    for row in counted:
        exact, sampled = row["exact_trajectory"], row["trajectory"]
        print(
            f"| {row['tokens_per_step']:.2f} | {row[PEER]:.0f} | {exact:.0f} | {row[PEER] / exact:.2f} | "
            f"{sampled:.0f} | {row[PEER] / sampled:.2f} |"
        )
    profiles = _profiles(goals, contenders)
    return {
        "contenders": rows,
        "differences": differences,
        "ratios": ratios,
        "ratios_by_processor": by_processor,
        "goals": {one: verdict._asdict() for one, verdict in goals.items()},
        "counted": counted,
        "profile": profiles,
    }


def _measure_rollout(arguments: argparse.Namespace, argv: list[str], name: str, data: Data) -> dict:
    decoders = Decoders(arguments, name, data)
    same, all_of_them = decoders.check(), 2 * arguments.prompts_alone
    print(f"\nequal greedy answers: {same} of {all_of_them} (fp32 rounding may flip one)\n")
    contenders = decoders.contenders()
    rows = _time(contenders, arguments.repetitions)
    speed = {one: contenders[one].work / row["median"] for one, row in rows.items()}
    ratios, by_processor = (_ratios(rows, contenders, "peer_alone", clock) for clock in CLOCKS)
    goals = _goals(arguments, ratios)
    print("| rollouts at temperature 1 | tokens per second | spread | ours is faster by | by the processor |")
    print("|---|---|---|---|---|")
    for one, row in rows.items():
        title = TITLES[one] + (f" of {arguments.prompts}" if one == "rollout_batch" else "")
        faster = f"{_with_goal(one, ratios, goals)} | {_with_goal(one, by_processor, {})}"
        print(f"| {title} | {speed[one]:.1f} | {row['spread']:.0%} | {faster} |")
    return {
        "contenders": {one: row | {"tokens_per_second": speed[one]} for one, row in rows.items()},
        "equal_answers": [same, all_of_them],
        "ratios": ratios,
        "ratios_by_processor": by_processor,
        "goals": {one: verdict._asdict() for one, verdict in goals.items()},
        "profile": _profiles(goals, contenders),
    }


_MEASURES = {"training": _measure_training, "rollout": _measure_rollout}


def _time(contenders: dict[str, Contender], repetitions: int) -> dict[str, dict]:
    """Seconds of every repetition; and of all threads together those of the processor, which other work on the machine
    disturbs less."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    tokens: dict[str, int | None] = {}
    for repetition in range(repetitions):
        for name, contender in contenders.items():
            started, used = time.perf_counter(), time.process_time()
            contender.run()
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - used)
            tokens[name] = contender.tokens()
        taken = ", ".join(
            f"{name} {each[-1]:.2f} s ({processor[name][-1]:.2f} of the processor)" for name, each in seconds.items()
        )
        print(f"round {repetition + 1} of {repetitions}: {taken}", file=sys.stderr)
    return {
        name: {
            "seconds": each,
            "processor_seconds": processor[name],
            "median": statistics.median(each),
            "spread": (max(each) - min(each)) / statistics.median(each),
            "tokens": tokens[name],
        }
        for name, each in seconds.items()
    }


def _ratios(rows: dict[str, dict], contenders: dict[str, Contender], peer: str, clock: str = "seconds") -> dict:
    """The peer's seconds for a piece of work over ours: the median over rounds, whose contenders took turns."""

    def ratio(name: str) -> float:
        work = contenders[name].work / contenders[peer].work
        rounds = zip(rows[peer][clock], rows[name][clock], strict=True)
        return statistics.median(theirs / ours for theirs, ours in rounds) * work

    return {name: ratio(name) for name in rows if name != peer}


def _goals(arguments: argparse.Namespace, ratios: dict[str, float]) -> dict:
    from tools.benchmarks.peers.goals import ONLINE, verdicts

    return {} if arguments.layers else verdicts(arguments.size, ratios, {}, ONLINE)


def _with_goal(name: str, ratios: dict[str, float], goals: dict) -> str:
    if name not in ratios:
        return ""
    return f"{ratios[name]:.2f}" + (f" ({goals[name]})" if name in goals else "")


def _profiles(goals: dict, contenders: dict[str, Contender]) -> dict[str, list]:
    """Of each of ours that misses its goal where its time goes, printed and returned."""
    from tools.benchmarks.peers.goals import where_time_goes

    found = {}
    for name in (name for name, verdict in goals.items() if not verdict.met):
        found[name] = where_time_goes(contenders[name].run)
        print(f"\n{TITLES[name]} misses its goal; shares of its time:")
        for operation, share in found[name]:
            print(f"  {share:6.1%} {operation}")
    return found


def _memory_of(argv: list[str], model: str, name: str) -> int:
    words = [*argv, "--models", model, "--parts", "training", "--peak-memory-of", name]
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmarks.online", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else ["killed, perhaps for want of memory"]
        raise UserError(f"{name} alone in a process failed: {''.join(said)}; try a smaller --seq-length")
    peak = int(done.stdout.split()[-1])
    print(f"peak memory of {name}: {peak / 2**30:.2f} GiB", file=sys.stderr)
    return peak


if __name__ == "__main__":
    sys.exit(run_command(_benchmark))
