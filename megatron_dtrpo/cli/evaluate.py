"""Runs benchmarks of the lm-evaluation-harness on a checkpoint.

RUN is a checkpoint or run folder, or an exported Hugging Face folder. Tasks are the harness's, by name or pattern, and
your own: --include-path. Prints the harness's table; --output has everything else. Under torchrun the processes share
the model and the requests, and the first one fetches the data and reports. Needs: pip install "megatron-dtrpo[eval]".

--max-new-tokens, --temperature and --top-p replace what the tasks say. Where a task asks for log-likelihoods they are
estimated: vrpo, the default, is the evidence lower bound with levels stratified over --num-views. With block size 1
they are exact.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import sys
from functools import partial
from pathlib import Path

from megatron_dtrpo.cli.decoding_flags import add_adapter_flag, add_decoding_flags, decoding_options
from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.parser import add_settings, parse_command
from megatron_dtrpo.config.rules import AUTOREGRESSIVE
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.errors import UserError, one_line
from megatron_dtrpo.families.registry import family_of, is_autoregressive

EXAMPLES = """
  megatron-dtrpo evaluate --checkpoint RUN --tasks gsm8k --output gsm8k.json
  torchrun --nproc-per-node 8 -m megatron_dtrpo evaluate --checkpoint RUN --tasks ifeval --apply-chat-template
"""
INSTALL = 'pip install "lm-eval>=0.4.13,<0.5"'
CONFIRM = "add --confirm-run-unsafe-code if that is all right"
SCORING = [name for name, one in ESTIMATORS.items() if "preference" in one.objectives and not one.needs_steps]


class _TasksOwn:
    """The default of a setting that tasks bring along; ``without`` is for those that do not."""

    def __init__(self, without):
        self.without = without

    def __str__(self) -> str:
        return f"the task's, else {self.without}"


TASKS_OWN = {"max_new_tokens": _TasksOwn(256), "temperature": _TasksOwn(0.0), "top_p": _TasksOwn(1.0)}
GENERATION_NAMES = {"max_new_tokens": "max_gen_toks", "temperature": "temperature", "top_p": "top_p"}


def build_parser() -> Parser:
    parser = command_parser("megatron-dtrpo evaluate", __doc__, EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="Checkpoint, run or Hugging Face folder.")
    add_adapter_flag(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="NAMES",
        help="Tasks, separated by commas; paper: those of the paper's table that the harness has.",
    )
    parser.add_argument("--include-path", metavar="DIR", help="Folder with YAML files of your own tasks.")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="Examples in the prompt. Default: the task's.")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="N",
        help="Only the first N documents of each task, or, below 1, that share of them: for trying out.",
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="Prompts are messages to the assistant; few-shot examples are earlier turns.",
    )
    parser.add_argument(
        "--no-fewshot-as-multiturn",
        dest="multiturn",
        action="store_false",
        help="With a chat template: few-shot examples inside the one message.",
    )
    parser.add_argument(
        "--system-instruction", metavar="TEXT", help="The system's message, or what prompts begin with."
    )
    parser.add_argument("--output", metavar="FILE.json", help="Results as the harness has them.")
    parser.add_argument(
        "--table",
        metavar="FILE.md",
        help="Markdown table in the paper's column order, with tokens per pass: writes this checkpoint's row. Other "
        "rows, and cells that were not measured now, stay.",
    )
    parser.add_argument("--log-samples", action="store_true", help="Results include every prompt and answer.")
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="Let code tasks (HumanEval, MBPP) run what the model wrote, on this machine.",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="Prompts decoded at once. Default: %(default)s.")
    add_decoding_flags(parser, **TASKS_OWN)
    parser.add_argument(
        "--estimator", choices=SCORING, help="Estimator of log-likelihoods. Default: vrpo, with block size 1 exact."
    )
    parser.add_argument(
        "--num-views",
        type=int,
        metavar="K",
        help="Noisy views it averages over. Default: 4, or 1 where there is no noise.",
    )
    parser.add_argument(
        "--steps-per-block",
        type=int,
        default=8,
        metavar="N",
        help="dtrpo: decoding steps of a block. Default: %(default)s.",
    )
    parser.add_argument(
        "--seq-length", type=int, default=8192, metavar="N", help="Tokens scored at once. Default: %(default)s."
    )
    parser.add_argument(
        "--check-greedy",
        action="store_true",
        help="For metrics that ask whether an answer is what greedy decoding writes: decode and compare.",
    )
    add_settings(parser, ["parallel"])
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for holds, message in (
        (arguments.batch_size >= 1, f"--batch-size {arguments.batch_size}: it must be at least 1"),
        (arguments.limit is None or arguments.limit > 0, f"--limit {arguments.limit}: it must be above 0"),
        (
            arguments.num_fewshot is None or arguments.num_fewshot >= 0,
            f"--num-fewshot {arguments.num_fewshot}: it must not be negative",
        ),
        (
            arguments.include_path is None or Path(arguments.include_path).is_dir(),
            f"--include-path {arguments.include_path}: no such folder",
        ),
        *(
            (path is None or Path(path).resolve().parent.is_dir(), f"--{flag} {path}: its folder does not exist")
            for flag, path in (("output", arguments.output), ("table", arguments.table))
        ),
        (Path(arguments.checkpoint).is_dir(), f"--checkpoint {arguments.checkpoint}: no such folder"),
    ):
        if not holds:
            raise UserError(message)


def main(argv: list[str] | None = None) -> int:
    return run_command(_evaluate, argv)


def _evaluate(argv: list[str]) -> None:
    arguments, config, _ = parse_command(build_parser(), argv)
    _check(arguments)
    if arguments.table:
        _table(arguments, {})  # before hours of decoding
    overrides = _take_overrides(arguments)
    config.data.seq_length, config.optimizer.seed = arguments.seq_length, arguments.seed

    from megatron_dtrpo.runtime import initialize

    tasks = _load_tasks(arguments) if initialize.rank() == 0 else None
    from megatron_dtrpo.data.batches import Noising
    from megatron_dtrpo.evaluation.session import locate_checkpoint

    choose = partial(_choose_estimator, arguments)
    with locate_checkpoint(arguments.checkpoint, config, choose, arguments.load_adapter) as source:
        decoding = decoding_options(arguments, config.model.block_size, family_of(config.model).rule)
        with source.open() as engine:
            from megatron_dtrpo.evaluation.harness import HarnessModel, HarnessOptions

            noising = Noising.from_config(config, source.tokenizer.mask_id)
            fits_length = arguments.small_block_size is None
            options = HarnessOptions(
                decoding, arguments.batch_size, arguments.seed, arguments.check_greedy, fits_length
            )
            model = HarnessModel(engine, noising, options)
            if not engine.is_main:
                model.rank_zero.follow()
                return
            with model.rank_zero.calling():
                results = _simple_evaluate(model, tasks, overrides, arguments)
            _report(results, model.completions, source, options, arguments)


def _choose_estimator(arguments: argparse.Namespace, config: Config) -> None:
    """The estimator of log-likelihoods, once it is known which model they are of."""
    name = arguments.estimator or (AUTOREGRESSIVE if is_autoregressive(config.model) else "vrpo")
    config.objective.estimator, config.objective.steps_per_block = name, arguments.steps_per_block
    config.objective.num_views = arguments.num_views or (4 if ESTIMATORS[name].is_random else 1)


def _take_overrides(arguments: argparse.Namespace) -> dict:
    """The flags that win over the tasks, in the harness's words; the flags not given get their last resort."""
    given = {name: getattr(arguments, name) for name in TASKS_OWN if getattr(arguments, name) is not TASKS_OWN[name]}
    for name, own in TASKS_OWN.items():
        setattr(arguments, name, given.get(name, own.without))
    overrides = {GENERATION_NAMES[name]: value for name, value in given.items()}
    if "temperature" in given:
        overrides["do_sample"] = given["temperature"] > 0
    return overrides


def _load_tasks(arguments: argparse.Namespace) -> dict:
    """The tasks with their data and where they are from, as the harness takes them; on the first process."""
    if arguments.confirm_run_unsafe_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # asked again, by the library that runs the code
    try:
        import numpy as np
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"megatron-dtrpo evaluate needs the lm-evaluation-harness ({error}): {INSTALL}") from None
    from megatron_dtrpo.evaluation.table import TASKS

    # As the harness does before it loads tasks: GPQA's choices are shuffled there.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    is_paper = arguments.tasks.strip() == "paper"
    if is_paper and not arguments.confirm_run_unsafe_code:
        raise UserError(f"--tasks paper runs code that the model wrote: {CONFIRM}")
    asked = TASKS if is_paper else arguments.tasks
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks is empty: name a task, e.g. gsm8k")
    # The harness's own tasks are 14,000 files: they are not read where the given folder has all that is asked for.
    own = TaskManager(include_path=arguments.include_path, include_defaults=False) if arguments.include_path else None
    if own is not None and all(own.match_tasks([name]) for name in names):
        manager = own
    else:
        manager = TaskManager(include_path=arguments.include_path)
    tasks = []
    for name in names:
        found = manager.match_tasks([name])
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.4)
            raise UserError(f"--tasks {name}: the harness has no such task; near ones: {', '.join(near) or 'none'}")
        for match in found:
            others = ",".join(one for one in names if one != name) if is_paper else ""
            tasks += _load_task(manager, match, arguments.confirm_run_unsafe_code, others)
    return {"tasks": tasks, "task_manager": manager}


def _load_task(manager, name: str, confirmed: bool, others: str) -> list:
    """``others``: the tasks that could be run without this one."""
    unsafe = UserError(f"task {name} runs code that the model wrote: {CONFIRM}")
    try:
        loaded = manager.load([name])
    except Exception as error:  # data sets, the network, missing packages: whatever a task's own code meets
        if "HF_ALLOW_CODE_EVAL" in str(error) and not confirmed:
            raise unsafe from None
        advice = f"; without it: --tasks {others}" if others else ""
        raise UserError(f"task {name} cannot be loaded: {type(error).__name__}: {one_line(error)}{advice}") from None
    if not confirmed and any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
        raise unsafe
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _simple_evaluate(model, tasks: dict, overrides: dict, arguments: argparse.Namespace) -> dict:
    from lm_eval import simple_evaluate

    return simple_evaluate(
        model=model,
        **tasks,
        num_fewshot=arguments.num_fewshot,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        log_samples=arguments.log_samples,
        gen_kwargs=overrides or None,
        system_instruction=arguments.system_instruction,
        apply_chat_template=arguments.apply_chat_template,
        fewshot_as_multiturn=arguments.multiturn and arguments.apply_chat_template,
        confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
    )


def _report(results: dict, completions: list, source, options, arguments: argparse.Namespace) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    from megatron_dtrpo.evaluation.generation import efficiency
    from megatron_dtrpo.evaluation.harness import MODEL_NAME
    from megatron_dtrpo.evaluation.table import cells_of, unread
    from megatron_dtrpo.files import write_atomically

    names = ("estimator", "num_views", "steps_per_block", "block_start")
    scoring = {name: getattr(source.config.objective, name) for name in names}
    described = {"checkpoint": arguments.checkpoint, "iteration": source.iteration, "seed": options.seed}
    results["config"] |= {"model": MODEL_NAME, "model_args": described | vars(options.decoding) | scoring}
    if completions:
        results["efficiency"] = efficiency(completions)
    if arguments.output:
        path = Path(arguments.output)
        try:
            write_atomically(path, json.dumps(results, indent=2, default=handle_non_serializable) + "\n")
        except OSError as error:
            raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None
    if arguments.table:
        for line in unread(results):
            print(f"warning: --table {arguments.table}: {line}", file=sys.stderr)
        if arguments.limit is not None:
            print(
                f"warning: --table {arguments.table}: its numbers are of --limit {arguments.limit:g}", file=sys.stderr
            )
        _write_row(arguments, cells_of(results))
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    for name, value in results.get("efficiency", {}).items():
        print(f"{name:<28} {value:.3f}")


def _table(arguments: argparse.Namespace, cells: dict[str, str]) -> str:
    """The file of --table with this checkpoint's ``cells``. Raises UserError where it is another table."""
    from megatron_dtrpo.evaluation.table import with_row

    path = Path(arguments.table)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--table {path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    model = " + ".join(str(Path(folder)) for folder in (arguments.checkpoint, arguments.load_adapter) if folder)
    return with_row(text, model, cells, f"--table {path}")


def _write_row(arguments: argparse.Namespace, cells: dict[str, str]) -> None:
    from megatron_dtrpo.files import write_atomically

    try:
        write_atomically(Path(arguments.table), _table(arguments, cells))
    except OSError as error:
        raise UserError(f"--table {arguments.table}: cannot be written ({error.strerror})") from None
