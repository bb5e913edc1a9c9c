"""Converts checkpoints between Hugging Face folders and Megatron's torch_dist format, exactly.

Weights are streamed, so a few GB of memory do for any model. Code in a checkpoint folder is never run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, parse_flags
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.errors import UserError

DTYPES = ("bf16", "fp16", "fp32")
EXAMPLES = {
    "import": "  megatron-dtrpo convert import --hf-path Fast_dLLM_v2_7B --megatron-path base",
    "export": "  megatron-dtrpo convert export --megatron-path runs/one --hf-path out --hf-reference Fast_dLLM_v2_7B",
    "roundtrip": "  megatron-dtrpo convert roundtrip --hf-path Fast_dLLM_v2_7B",
    "inspect": "  megatron-dtrpo convert inspect runs/one",
}


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _number(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an iteration")
    return int(text)


def build_parser() -> Parser:
    parser = command_parser("megatron-dtrpo convert", __doc__, "\n".join(EXAMPLES.values()))
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{import,export,roundtrip,inspect}")

    def verb(name: str, help: str) -> Parser:
        return verbs.add_parser(name, help=help, about=help, examples=EXAMPLES[name])

    to = verb("import", "Makes a Megatron checkpoint of a Hugging Face folder; train from it with --load.")
    to.add_argument(
        "--hf-path", required=True, type=Path, metavar="DIR", help="Folder with config.json, safetensors and tokenizer."
    )
    to.add_argument("--megatron-path", required=True, type=Path, metavar="DIR", help="Checkpoint to write.")
    to.add_argument("--params-dtype", choices=DTYPES, help="Convert weights to this. Default: as stored.")
    to.add_argument(
        "--add-mask-token",
        action="store_true",
        help="Reserve the mask token of the model's family in the tokenizer, "
        "behind its last token; for models that are no diffusion models yet.",
    )
    to.add_argument("--mask-token", metavar="TOKEN", help="Use this token of the tokenizer as the mask.")
    to.add_argument(
        "--eos-token",
        metavar="TOKEN",
        help="Use this token of the tokenizer as the end of an answer. Default: the tokenizer's own.",
    )
    to.add_argument(
        "--block-size",
        type=_positive,
        metavar="N",
        help="Tokens per diffusion block, where config.json has none; 1: autoregressive, for Qwen2, Qwen3 and Llama. "
        "Default: 32 for these, others need it.",
    )
    to.add_argument(
        "--make-vocab-size-divisible-by",
        type=_positive,
        metavar="N",
        default=ModelSettings.make_vocab_size_divisible_by,
        help="Pad the vocabulary to a multiple of this. Default: %(default)s.",
    )

    to.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="The Hugging Face folder is an adapter that PEFT saved, of the weights in this checkpoint.",
    )

    back = verb("export", "Makes a Hugging Face folder of a Megatron checkpoint or run.")
    back.add_argument("--megatron-path", required=True, type=Path, metavar="DIR", help="Checkpoint or run folder.")
    back.add_argument("--hf-path", required=True, type=Path, metavar="DIR", help="Folder to write.")
    back.add_argument("--iteration", type=_number, metavar="N", help="Iteration to export. Default: the latest.")
    back.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="Largest weight file. Default: 5GB.")
    back.add_argument("--dtype", choices=DTYPES, help="Convert weights to this. Default: that of the imported folder.")
    back.add_argument(
        "--hf-reference",
        type=Path,
        metavar="DIR",
        help="Copy modelling files (*.py) from this folder, and config.json where the checkpoint was not imported.",
    )
    back.add_argument(
        "--load-adapter",
        type=Path,
        metavar="DIR",
        help="Merge this adapter (LoRA) into the weights: a sum in fp32, then the weights' own dtype. --megatron-path "
        "may also be the run that trained it.",
    )
    back.add_argument("--peft", action="store_true", help="Write the adapter alone, as a folder that PEFT loads.")
    back.add_argument("--no-tokenizer", action="store_true", help="Leave the tokenizer out.")

    both = verb("roundtrip", "Imports and exports a folder in a scratch folder and compares every tensor.")
    both.add_argument("--hf-path", required=True, type=Path, metavar="DIR", help="Hugging Face folder.")
    both.add_argument("--params-dtype", choices=DTYPES, help="Convert to this on the way; differences show.")
    both.add_argument(
        "--scratch", type=Path, metavar="DIR", help="Where the scratch folder is made. Default: the system's."
    )

    for each in (to, back):
        each.add_argument("--overwrite", action="store_true", help="Replace the output folder if it is a checkpoint.")
    for each in (to, back, both):
        each.add_argument("--check-finite", action="store_true", help="Refuse weights with NaN or infinite values.")
    which = verb("inspect", "Prints what a folder holds, a checkpoint of either kind.")
    which.add_argument("folder", type=Path, metavar="DIR", help="Checkpoint, run or Hugging Face folder.")
    return parser


def _enable_tokenizers() -> None:
    """They are megatron-core's, whose import takes seconds and, without a GPU, some help."""
    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers.*")  # of keys in older config.json


def _import(arguments) -> None:
    _enable_tokenizers()
    from megatron_dtrpo.checkpoint.folder import TOKENIZER
    from megatron_dtrpo.conversion.dtypes import FLAGS
    from megatron_dtrpo.conversion.hf_config import CONFIG, assumptions, read_config
    from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
    from megatron_dtrpo.data.tokenizer import load_tokenizer

    if arguments.base is not None:
        _import_adapter(arguments)
        return
    options = ImportOptions(
        params_dtype=FLAGS.get(arguments.params_dtype),
        add_mask_token=arguments.add_mask_token,
        mask_token=arguments.mask_token,
        eos_token=arguments.eos_token,
        block_size=arguments.block_size,
        make_vocab_size_divisible_by=arguments.make_vocab_size_divisible_by,
        check_finite=arguments.check_finite,
        overwrite=arguments.overwrite,
    )
    started = time.monotonic()
    import_checkpoint(arguments.hf_path, arguments.megatron_path, options)
    notes = assumptions(read_config(arguments.hf_path), arguments.hf_path / CONFIG)
    notes += filter(None, [load_tokenizer(arguments.megatron_path / TOKENIZER).note_on_end()])
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"imported {arguments.hf_path} to {arguments.megatron_path} in {time.monotonic() - started:.1f} s")


def _import_adapter(arguments) -> None:
    from megatron_dtrpo.conversion.peft import import_peft

    given = {"params_dtype", "mask_token", "eos_token", "block_size"} & {k for k, v in vars(arguments).items() if v}
    if given:
        raise UserError(f"--{min(given).replace('_', '-')} is for importing a model, and --base for an adapter of one")
    for note in import_peft(arguments.hf_path, arguments.megatron_path, arguments.base, arguments.overwrite):
        print(f"note: {note}", file=sys.stderr)
    print(f"imported the adapter {arguments.hf_path} to {arguments.megatron_path}")


def _export(arguments) -> None:
    _enable_tokenizers()
    from megatron_dtrpo.conversion.dtypes import FLAGS
    from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint, parse_size

    options = ExportOptions(
        iteration=arguments.iteration,
        max_shard_bytes=parse_size(arguments.max_shard_size),
        dtype=FLAGS.get(arguments.dtype),
        hf_reference=arguments.hf_reference,
        check_finite=arguments.check_finite,
        overwrite=arguments.overwrite,
        tokenizer=not arguments.no_tokenizer,
        adapter=arguments.load_adapter,
        peft=arguments.peft,
    )
    started = time.monotonic()
    for note in export_checkpoint(arguments.megatron_path, arguments.hf_path, options):
        print(f"note: {note}", file=sys.stderr)
    print(f"exported {arguments.megatron_path} to {arguments.hf_path} in {time.monotonic() - started:.1f} s")


def _roundtrip(arguments) -> None:
    from megatron_dtrpo.conversion.dtypes import FLAGS
    from megatron_dtrpo.conversion.roundtrip import roundtrip
    from megatron_dtrpo.conversion.to_megatron import ImportOptions

    options = ImportOptions(params_dtype=FLAGS.get(arguments.params_dtype), check_finite=arguments.check_finite)
    rows = roundtrip(arguments.hf_path, options, arguments.scratch)
    for row in rows:
        print(row.line)
    different = [row.name for row in rows if not row.equal]
    if different:
        raise UserError(f"{len(different)} of {len(rows)} differ, first {different[0]}")
    print(f"all {len(rows)} are equal")


def _inspect(arguments) -> None:
    from megatron_dtrpo.conversion.inspection import inspect

    _enable_tokenizers()
    for name, value in inspect(arguments.folder).items():
        print(f"{name:<14}{value}")


VERBS = {"import": _import, "export": _export, "roundtrip": _roundtrip, "inspect": _inspect}


def _convert(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of every model type that it does not ship
    VERBS[arguments.verb](arguments)


def _terminate(signum, frame):
    raise SystemExit(128 + signum)


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _terminate)  # as an exception, so that the partial folder is removed
    return run_command(_convert, argv)
