"""The folder of a run: one run's alone while it trains, and complete in itself."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist
import yaml

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint.adapter import AdapterRecord
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import SharedError, UserError
from megatron_dtrpo.files import write_atomically
from megatron_dtrpo.runtime import objects
from megatron_dtrpo.training import resume


@contextmanager
def run_folder(folder: str) -> Iterator[None]:
    """Inside, the run folder is this run's alone: rank zero holds it. Raises SharedError if another run has it."""
    with ExitStack() as stack:
        refused = None
        if dist.get_rank() == 0:
            try:
                if not stack.enter_context(checkpoint_folder.hold_folder(Path(folder))):
                    print(f"note: {folder}: its file system has no locks: start no second run in it", flush=True)
            except UserError as error:
                refused = str(error)
        for reason in objects.gather(refused):
            if reason is not None:
                raise SharedError(reason)
        yield


def write_run_folder(config: Config, tokenizer: Tokenizer, base: str | None = None) -> list[str]:
    """Makes the run folder self-contained; rank 0 only. Returns what changed since the run's last start. ``base``: of a
    run that trains adapters, the fingerprint of the weights that they belong to."""
    folder = Path(config.run.save)
    record = folder / checkpoint_folder.RUN_CONFIG
    changes = resume.changes_since(config, resume.read_record(record)) if record.exists() else []
    checkpoint_folder.save_model_config(folder, config.model)
    if not (folder / checkpoint_folder.TOKENIZER).exists():
        tokenizer.save(folder / checkpoint_folder.TOKENIZER)
    if config.run.load is not None:
        source, kept = Path(config.run.load) / checkpoint_folder.HUGGINGFACE, folder / checkpoint_folder.HUGGINGFACE
        if source.is_dir() and not kept.exists():
            shutil.copytree(source, kept)
    if base is not None:
        own = dataclasses.asdict(config.lora)
        fp8_format = config.parallel.fp8_format
        where = str(Path(config.run.load).resolve())
        AdapterRecord(**own, base=where, base_fingerprint=base, fp8_format=fp8_format).write(folder)
    write_atomically(record, yaml.safe_dump(config.to_flat(), sort_keys=False))
    return changes
