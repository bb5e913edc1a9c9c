"""Trains: preference pairs (dTRPO and its relatives), supervised fine-tuning, or policy gradient on its own answers.
With --rounds the pairs are the policy's own right and wrong answers to prompts, made anew in every round.

Settings stand in a YAML file, in flags, or in both: flags win. Runs alone or under torchrun. SIGTERM and SIGUSR1 save a
checkpoint and end the run with status 0; the same command goes on from there.
"""

from __future__ import annotations

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.cli.settings import parse_settings
from megatron_dtrpo.config.command_line import Parser
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.parser import settings_parser
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import environment, stop

EXAMPLES = """
  megatron-dtrpo train --config run.yaml --data-path pairs.jsonl --save runs/one --lr 5e-7
  torchrun --nproc-per-node 8 -m megatron_dtrpo train --config run.yaml --estimator vrpo --num-views 4
  megatron-dtrpo train --config run.yaml --load SFT --data-path problems.jsonl --rewards numeric --rounds 3 --save DIR
  megatron-dtrpo train --config run.yaml --dry-run --world-size 64
"""


def build_parser() -> Parser:
    parser = settings_parser("megatron-dtrpo train", __doc__, EXAMPLES)
    _add_dry_run(parser)
    return parser


def _add_dry_run(parser: Parser) -> None:
    group = parser.add_argument_group("dry run", "Looks at a run instead of starting it.")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Check the settings, build the model of every pipeline stage without memory, print parameters and the "
        "memory plan; needs no GPU, no data and no checkpoint.",
    )
    group.add_argument(
        "--world-size",
        type=int,
        metavar="INT",
        help="Processes of the run that is looked at. Default: as many as are here, or as the layout needs at least.",
    )
    group.add_argument("--gpu-memory", type=float, metavar="GIB", help="Memory of one GPU. Default: 80.")


def main(argv: list[str] | None = None) -> int:
    """Trains; returns the exit status. SIGTERM and SIGUSR1 save and end it with 0, from here on."""
    with stop.listening():
        return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    environment.set_defaults()  # before anything imports torch
    own, config, given = parse_settings(build_parser(), argv)

    from megatron_dtrpo.runtime import initialize

    if own.dry_run and initialize.rank() != 0:
        return  # one process looks and speaks for all
    initialize.enable_device()
    if own.dry_run:
        from megatron_dtrpo.training.dry_run import dry_run

        dry_run(config, given, own.world_size, own.gpu_memory)
        return
    if own.world_size is not None or own.gpu_memory is not None:
        raise UserError("--world-size and --gpu-memory go with --dry-run: the launcher starts the processes of a run")
    if config.rounds.rounds is not None:
        from megatron_dtrpo.evaluation.periodic import answer_evaluation
        from megatron_dtrpo.online.rounds import run_rounds

        run_rounds(config, given, answer_evaluation)
        return
    from megatron_dtrpo.training.run_folder import run_folder
    from megatron_dtrpo.training.setup import prepare

    tokenizer, data_parallel_size = prepare(config, given)
    with initialize.process_groups(config.parallel, config.optimizer.seed), run_folder(config.run.save):
        from megatron_dtrpo.evaluation.periodic import periodic_evaluation
        from megatron_dtrpo.runtime import objects

        objects.stop_together()
        evaluation = periodic_evaluation(config, tokenizer, data_parallel_size)
        trainer = OBJECTIVES[config.objective.objective].trainer
        trainer(config, tokenizer, data_parallel_size, evaluation).run()
