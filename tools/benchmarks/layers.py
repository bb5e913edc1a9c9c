"""Times forward and backward passes of a few layers on one GPU, per number format, and says how far each is from fp32.

Layers, attention, packing and head are the trainer's. Every repetition runs another packed sequence of one length: what
is compiled after the warm-up is counted and should be nothing. The oracle is megatron-core's own layers in fp32 under
SDPA. A model FLOP is one that the mask and the targets ask for; padding and recomputation count as nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, parse_flags
from megatron_dtrpo.config.fp8 import RECIPES
from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import initialize
from megatron_dtrpo.runtime.compiler import compilations
from megatron_dtrpo.runtime.precision import check_machine

SIZES = {
    "7b": dict(
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=152064,
        rotary_base=1e6,
    ),
    "tiny": dict(
        hidden_size=64, ffn_hidden_size=160, num_attention_heads=4, num_query_groups=2, kv_channels=16, vocab_size=512
    ),
}
FORMATS = {
    "fp32": ParallelSettings(
        transformer_impl="local", attention_backend="sdpa", apply_rope_fusion=False, gradient_accumulation_fusion=False
    ),
    # Gradients are read from the parameters; only the trainer has the fp32 gradients that others are added into.
    "bf16": ParallelSettings(bf16=True, gradient_accumulation_fusion=False),
    **{
        recipe: ParallelSettings(
            bf16=True,
            transformer_impl="transformer_engine",
            fp8_format="hybrid",
            fp8_recipe=recipe,
            gradient_accumulation_fusion=False,
        )
        for recipe in RECIPES
    },
}
PROMPT, RESPONSE = 300, 500  # tokens of a pair, about


class Measured(NamedTuple):
    log_probs: torch.Tensor
    gradients: dict[str, torch.Tensor]
    seconds: list[float]
    compiled: int
    peak_bytes: int | None


EXAMPLES = """
  python -m tools.benchmarks.layers                              # 4 layers of the 7B shape, 8k and 16k packed tokens
  python -m tools.benchmarks.layers --size tiny --tokens 512     # anywhere, to see that it runs
"""


def build_parser() -> Parser:
    parser = command_parser("python -m tools.benchmarks.layers", __doc__, EXAMPLES)
    parser.add_argument("--size", choices=SIZES, default="7b", help="Shape of a layer. Default: %(default)s.")
    parser.add_argument("--layers", type=int, default=4, help="Default: %(default)s.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384], help="Packed. Default: 8192 16384.")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=list(FORMATS)[1:],
        default=["bf16"],
        help="bf16, or FP8 by recipe. Default: bf16.",
    )
    parser.add_argument("--repetitions", type=int, default=10, help="Default: %(default)s.")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="Of the GPU in bf16. Default: an H100's 989.")
    parser.add_argument("--output", metavar="FILE.json", help="Write the numbers.")
    return parser


def _benchmark(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    if min(arguments.layers, arguments.repetitions) < 1 or any(
        tokens % 128 or tokens < 128 for tokens in arguments.tokens
    ):
        raise UserError("--layers and --repetitions must be at least 1, --tokens multiples of 128")
    for name in arguments.formats:
        check_machine(FORMATS[name])
    initialize.start(ParallelSettings(), seed=0)
    try:
        model = ModelSettings(num_layers=arguments.layers, **SIZES[arguments.size])
        rows = [row for tokens in arguments.tokens for row in _at_length(arguments, model, tokens)]
    finally:
        initialize.stop()
    _report(arguments, rows)


def _at_length(arguments: argparse.Namespace, model: ModelSettings, tokens: int) -> list[dict]:
    sequences = [packed(model, tokens, seed) for seed in range(4)]
    oracle = _measure(model, FORMATS["fp32"], sequences[:1], repetitions=0)
    rows = []
    for name in arguments.formats:
        found = _measure(model, FORMATS[name], sequences, arguments.repetitions)
        seconds = statistics.median(found.seconds)
        tera = statistics.mean(_model_flops(model, sequence) for sequence in sequences) / 1e12
        rows.append(
            {
                "tokens": tokens,
                "format": name,
                "seconds": seconds,
                "spread": (max(found.seconds) - min(found.seconds)) / seconds,
                "model_flop_utilisation": tera / seconds / arguments.peak_tflops,
                "peak_memory_bytes": found.peak_bytes,
                "compiled_after_warm_up": found.compiled,
                "log_prob_error": _relative({"": found.log_probs}, {"": oracle.log_probs}),
                "gradient_error": _relative(found.gradients, oracle.gradients),
            }
        )
        del found
    return rows


def packed(model: ModelSettings, tokens: int, seed: int):
    """Pairs of random tokens under dTRPO's noise, as many as fit, padded to ``tokens``."""
    from megatron_dtrpo.config.estimators import EstimatorOptions
    from megatron_dtrpo.data.batches import Noising
    from megatron_dtrpo.data.micro_batch import Sample
    from megatron_dtrpo.diffusion.layout import concatenate, pad_to

    generator = torch.Generator().manual_seed(seed)
    noising = Noising("dtrpo", EstimatorOptions(), 1, "clean", model.block_size, model.vocab_size - 1, seed)

    def text(length: int) -> torch.Tensor:
        length = max(1, int(length * (0.5 + torch.rand((), generator=generator))))
        return torch.randint(model.vocab_size - 1, (length,), generator=generator)

    documents, room, scale = [], tokens, min(1.0, tokens / 4096)
    while True:
        pair = text(int(PROMPT * scale)), [text(int(RESPONSE * scale)) for _ in range(2)]
        document = noising.document(Sample(epoch=0, index=len(documents)), *pair)
        if len(document) > room:
            return pad_to(concatenate(documents), tokens, pad_id=0)
        documents.append(document)
        room -= len(document)


def _model_flops(model: ModelSettings, sequence) -> float:
    """Of a forward and a backward pass: 6 a weight and token, 12 a visible pair of tokens and unit of width."""
    from megatron_dtrpo.diffusion.layout import PADDING_DOCUMENT
    from megatron_dtrpo.diffusion.sharding import work

    block = model.block_size
    real = sequence.document != PADDING_DOCUMENT
    q, k = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    weights = model.hidden_size * (2 * q + 2 * k + 3 * model.ffn_hidden_size)
    visible = int(work(sequence.coordinates(), block)[real[::block]].sum()) * block**2
    head = model.hidden_size * model.padded_vocab_size * sequence.target_row.numel()
    return 6.0 * (model.num_layers * weights * int(real.sum()) + head) + 12.0 * model.num_layers * visible * q


def _measure(model_settings: ModelSettings, parallel: ParallelSettings, sequences, repetitions: int) -> Measured:
    """Log-probabilities and gradients on the first sequence, then ``repetitions`` timed passes over all in turn."""
    from megatron_dtrpo.config.backends import choose_backend
    from megatron_dtrpo.config.fp8 import token_multiple
    from megatron_dtrpo.data.micro_batch import MicroBatch
    from megatron_dtrpo.model.attention import attention_width
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.provider import build_model
    from megatron_dtrpo.training.device_batch import DeviceBatch

    device = initialize.device()
    model = build_model(model_settings, parallel).to(device)
    initialize_weights(model, seed=1)
    backend, width = choose_backend(parallel.attention_backend, device.type), attention_width(model.config)

    def run(sequence) -> torch.Tensor:
        lengths = torch.ones(sequence.responses, dtype=torch.long)
        batch = DeviceBatch(MicroBatch(sequence, [], lengths), device, backend, width, token_multiple(parallel))
        model.zero_grad()
        part = batch.part
        log_probs = model(part.tokens, part.position, batch.attention, part.target_row, part.target_token)
        (log_probs * part.target_weight).sum().backward()
        return log_probs.detach()

    log_probs = run(sequences[0]).cpu()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    for sequence in sequences:
        run(sequence)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    compiled, seconds = compilations(), []
    for repetition in range(repetitions):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(sequences[repetition % len(sequences)])
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Measured(log_probs, gradients, seconds, compilations() - compiled, peak)


def _relative(found: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the oracle, over all tensors together."""
    if found.keys() != oracle.keys():
        raise AssertionError(f"parameters differ: {sorted(found.keys() ^ oracle.keys())}")
    difference = sum((found[n] - oracle[n]).double().square().sum() for n in oracle)
    return float((difference / sum(oracle[n].double().square().sum() for n in oracle)).sqrt())


def _report(arguments: argparse.Namespace, rows: list[dict]) -> None:
    machine = torch.cuda.get_device_name() if initialize.device().type == "cuda" else "a CPU"
    day = time.strftime("%Y-%m-%d")
    print(f"{day}, {machine}, torch {torch.__version__}: {arguments.layers} layers, {arguments.size}")
    print(
        "| packed tokens | format | forward + backward | spread | MFU | peak memory | compiled after warm-up | "
        "error of log p | of gradients |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        peak = f"{row['peak_memory_bytes'] / 2**30:.1f} GiB" if row["peak_memory_bytes"] else ""
        print(
            f"| {row['tokens']} | {row['format']} | {row['seconds'] * 1e3:.1f} ms | {row['spread']:.0%} | "
            f"{row['model_flop_utilisation']:.1%} | {peak} | {row['compiled_after_warm_up']} | "
            f"{row['log_prob_error']:.1e} | {row['gradient_error']:.1e} |"
        )
    if arguments.output:
        from megatron_dtrpo.files import write_atomically

        record = {"machine": machine, "torch": torch.__version__, "settings": vars(arguments), "rows": rows}
        write_atomically(Path(arguments.output), json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(_benchmark))
