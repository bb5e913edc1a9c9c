"""Serves a checkpoint over HTTP: OpenAI's endpoints, and a page at / that shows tokens as they are unmasked.

/v1/completions and /v1/chat/completions decode many requests at once; one joins at the next pass. A stream has a chunk
for each finished block. The same seed gives the same text as `generate` writes, whatever else is being served. RUN is a
checkpoint or run folder, or an exported Hugging Face folder. Runs under torchrun too: tensor, pipeline and data
parallel. Needs: pip install "megatron-dtrpo[serve]". docs/serving.md has the requests and their limits.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from megatron_dtrpo.cli.decoding_flags import add_adapter_flag, add_decoding_flags, decoding_options
from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser
from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.config.parser import add_settings, parse_command
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_of
from megatron_dtrpo.runtime.environment import leave_a_core, rank

EXAMPLES = """
  megatron-dtrpo serve --checkpoint RUN --port 8000
  megatron-dtrpo serve --checkpoint RUN --compare BASE
  torchrun --nproc-per-node 8 -m megatron_dtrpo serve --checkpoint RUN --tensor-model-parallel-size 2
"""
KEY = "MEGATRON_DTRPO_API_KEY"
POSITIONS = 8192
HERE = ("127.0.0.1", "localhost", "::1")


def build_parser() -> Parser:
    parser = command_parser("megatron-dtrpo serve", __doc__, EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="Checkpoint, run or Hugging Face folder.")
    add_adapter_flag(parser)
    parser.add_argument("--compare", metavar="DIR", help="A second one, to be seen beside it on the page.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: %(default)s, this machine.")
    parser.add_argument(
        "--port", type=int, default=8000, help="Port to listen on; 0: a free one. Default: %(default)s."
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"What clients must send. Default: ${KEY}, else nothing.")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="Responses decoded at once by each data-parallel process. Default: %(default)s.",
    )
    parser.add_argument(
        "--inference-max-seq-length",
        type=int,
        metavar="N",
        help="Tokens of a prompt and its response together; memory for them is kept for every response. Default: the "
        f"model's max_position_embeddings, at most {POSITIONS}.",
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        metavar="N",
        help="Responses that may wait; above that requests are refused with status 429. Default: %(default)s.",
    )
    parser.add_argument(
        "--max-request-bytes", type=int, default=2**20, metavar="N", help="Longest request. Default: %(default)s."
    )
    parser.add_argument(
        "--stop-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="A token that ends a response, beside the tokenizer's end token; may be repeated.",
    )
    add_decoding_flags(parser)
    add_settings(parser, ["parallel"])
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (
        ("batch_size", 1),
        ("max_waiting", 0),
        ("max_request_bytes", 1),
        ("inference_max_seq_length", 2),
        ("port", 0),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least {least}")
    if arguments.api_key == "":
        raise UserError("--api-key is empty: give a key, or leave it out")
    if arguments.port > 65535:
        raise UserError(f"--port {arguments.port}: it must be at most 65535")
    for flag in ("checkpoint", "compare"):
        folder = getattr(arguments, flag)
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"--{flag} {folder}: no such folder")


def main(argv: list[str] | None = None) -> int:
    return run_command(_serve, argv)


def _serve(argv: list[str]) -> int | None:
    arguments, config, _ = parse_command(build_parser(), argv)
    _check(arguments)
    leave_a_core()  # to the process that talks to clients
    try:
        from megatron_dtrpo.serving.front import front, listen
        from megatron_dtrpo.serving.server import talk
    except ImportError as error:
        raise UserError(f'megatron-dtrpo serve: {error}: pip install "megatron-dtrpo[serve]"') from None
    from megatron_dtrpo.evaluation.session import locate_checkpoint
    from megatron_dtrpo.serving.app import create_app
    from megatron_dtrpo.serving.scheduler import Scheduler
    from megatron_dtrpo.serving.worker import Worker

    folders = [folder for folder in (arguments.checkpoint, arguments.compare) if folder]
    key = arguments.api_key or os.environ.get(KEY)
    if key and not key.isascii():
        raise UserError("the API key has characters that a header cannot carry: give one of ASCII alone")
    with ExitStack() as stack:
        where = listen(arguments.host, arguments.port) if rank() == 0 else None
        configs = [copy.deepcopy(config) for _ in folders]
        adapters = [arguments.load_adapter, None][: len(folders)]
        sources = [
            stack.enter_context(locate_checkpoint(folder, each, adapter=adapter))
            for folder, each, adapter in zip(folders, configs, adapters, strict=True)
        ]
        names = _names([arguments.load_adapter or arguments.checkpoint, *folders[1:]])
        models = [_served(arguments, *each) for each in zip(names, range(len(names)), sources, strict=True)]
        if where is not None:
            places = arguments.batch_size * sources[0].replicas
            app = functools.partial(create_app, models, key, arguments.max_request_bytes)
            limits = {"places": places, "waiting": arguments.max_waiting}
            clients = stack.enter_context(front(functools.partial(talk, **limits, make_app=app), where))
        engines = [stack.enter_context(sources[0].open()), *(source.load() for source in sources[1:])]
        worker = Worker(
            engines, [model.defaults for model in models], arguments.batch_size, [model.positions for model in models]
        )
        if where is None:
            _follow(worker)
            return None
        where.listen()  # who connects from here on waits for the server
        _announce(arguments, models, where.getsockname()[1], key)
        where.close()  # here; the clients' process has it
        wrong = clients.run(Scheduler(worker, len(models), arguments.batch_size, clients))
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
    return 1 if wrong else None


def _follow(worker) -> None:
    """On the processes that talk to nobody: a request to stop reaches them through rank zero."""
    from megatron_dtrpo.runtime import stop

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C meets the whole process group
    with stop.listening():
        worker.follow()


def _served(arguments: argparse.Namespace, name: str, number: int, source):
    from megatron_dtrpo.evaluation.session import token_ids
    from megatron_dtrpo.serving.service import Served

    model = source.config.model
    choose = functools.partial(_choose, arguments, model.block_size, family_of(model).rule)
    most = model.max_position_embeddings
    length = arguments.inference_max_seq_length or min(most, POSITIONS)
    if length > most:
        raise UserError(f"--inference-max-seq-length {length}: the model's max_position_embeddings are {most}")
    return Served(
        name,
        number,
        source.tokenizer,
        length,
        choose(arguments.max_new_tokens, arguments.temperature, arguments.top_p),
        choose,
        frozenset(token_ids(source.tokenizer, arguments.stop_token)),
        int(time.time()),
    )


def _choose(
    arguments: argparse.Namespace, block_size: int, rule: str, max_new_tokens: int, temperature: float, top_p: float
) -> DecodingOptions:
    asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    return decoding_options(argparse.Namespace(**{**vars(arguments), **asked}), block_size, rule)


def _names(folders: list[str]) -> list[str]:
    """Of the models, for clients: their folders' own names, with the one above where these agree."""
    paths = [Path(folder).resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]).lstrip("/") or "model" for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"--compare {folders[1]}: it is --checkpoint itself; give another checkpoint")


def _announce(arguments: argparse.Namespace, models, port: int, key: str | None) -> None:
    if key is None and arguments.host not in HERE:
        print(f"warning: --host {arguments.host}: whoever reaches it may use it; give --api-key", file=sys.stderr)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    names = " and ".join(model.name for model in models)
    print(f"serving {names} at http://{host}:{port} (Ctrl-C stops)", flush=True)
