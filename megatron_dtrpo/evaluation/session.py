"""A checkpoint opened for decoding and scoring, on any number of processes.

with locate_checkpoint(folder, config) as source:    # settings and tokenizer: what input can be checked against
    with source.open() as engine:                    # processes and weights
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.checkpoint.adapter import AdapterRecord, base_and_adapter
from megatron_dtrpo.config.fp8 import refuse_fp8
from megatron_dtrpo.config.rules import validate
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.conversion.hf_config import ADAPTER, CONFIG, read_config
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.conversion.tokenizer_files import vocabulary
from megatron_dtrpo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_of_config, mask_tokens
from megatron_dtrpo.runtime import initialize
from megatron_dtrpo.runtime.precision import check_machine
from megatron_dtrpo.seeds import stable_seed
from megatron_dtrpo.training.engine import Engine


@dataclass(frozen=True)
class Source:
    """A checkpoint that is known to be there, with its settings filled into ``config``."""

    folder: Path
    iteration: int
    config: Config
    tokenizer: Tokenizer
    replicas: int
    adapter: Path | None = None

    @contextmanager
    def open(self) -> Iterator[Engine]:
        """Starts the process group, builds the model and loads its weights."""
        with initialize.process_groups(self.config.parallel, self.config.optimizer.seed):
            yield self.load()

    def load(self) -> Engine:
        """Builds the model and loads its weights, where the process group is there already."""
        engine = Engine.load(self.folder, self.iteration, self.config, self.tokenizer)
        if self.adapter is not None:
            engine.add_adapters(self.adapter)
        for chunk in engine.chunks:
            chunk.eval()
        return engine


@contextmanager
def locate_checkpoint(
    folder: str | Path,
    config: Config,
    choose: Callable[[Config], None] = lambda config: None,
    adapter: str | Path | None = None,
) -> Iterator[Source]:
    """Reads what lies beside the weights.

    Args:
        folder: a checkpoint or run folder of this project, an adapter's among them, or a Hugging Face folder, which is
            converted into a temporary folder first.
        config: its parallel settings count; its model settings are filled in.
        choose: sets what depends on the model's settings, before they are checked.
        adapter: the folder of an adapter of these weights.

    Raises:
        UserError: if there is no such checkpoint, or it does not fit the number of processes.
    """
    initialize.enable_device()
    folder, adapter = base_and_adapter(folder, adapter)
    if adapter is not None:
        config.run.load, config.lora = str(folder), AdapterRecord.read(adapter).settings()
    is_huggingface = any((folder / name).is_file() for name in (CONFIG, ADAPTER))
    is_huggingface &= not (folder / iterations.TRACKER).exists()
    with _converted(folder) if is_huggingface else _as_it_is(folder) as folder:
        iteration = iterations.require_latest(folder)
        config.model = checkpoint_folder.load_model_config(folder)
        choose(config)
        config.parallel.sequence_parallel = False  # a sub-block may hold fewer tokens than there are ranks
        refuse_fp8(config.parallel, "decoding and evaluation")
        replicas = validate(config, initialize.world_size())
        check_machine(config.parallel)
        tokenizer = load_tokenizer(folder / checkpoint_folder.TOKENIZER)
        yield Source(folder, iteration, config, tokenizer, replicas, adapter)


@contextmanager
def _as_it_is(folder: Path) -> Iterator[Path]:
    yield folder


@contextmanager
def _converted(folder: Path) -> Iterator[Path]:
    """An import of a Hugging Face folder, made by the first process of this machine."""
    if initialize.world_size() != initialize.local_world_size():
        raise UserError(f"{folder}: on several nodes import it first: megatron-dtrpo convert import")
    if initialize.world_size() == 1:
        with tempfile.TemporaryDirectory() as own:
            import_checkpoint(folder, Path(own) / "checkpoint", _import_options(folder))
            yield Path(own) / "checkpoint"
        return
    # The processes do not know each other yet, but they know who started them.
    launcher = psutil.Process(os.getppid())
    number = stable_seed(str(folder.resolve()).encode())  # a command may open two folders
    name = f"megatron-dtrpo-{launcher.pid}-{int(launcher.create_time() * 1000)}-{number}"
    scratch = Path(tempfile.gettempdir()) / name
    if initialize.local_rank() == 0:
        with tempfile.TemporaryDirectory() as own:
            import_checkpoint(folder, Path(own) / "checkpoint", _import_options(folder))
            os.symlink(Path(own) / "checkpoint", scratch)
            try:
                yield scratch
            finally:
                scratch.unlink()
        return
    while not scratch.exists():  # should the first process fail, the launcher ends this one
        time.sleep(0.1)
    yield scratch


def _import_options(folder: Path) -> ImportOptions:
    """A model that was never trained to predict by blocks, and whose tokenizer has no mask token, is autoregressive."""
    config = read_config(folder)
    family = family_of_config(config, folder / CONFIG)
    by_blocks = family.block_size_key in config or not vocabulary(folder).keys().isdisjoint(mask_tokens())
    return ImportOptions(progress=False, block_size=1 if family.starting_point and not by_blocks else None)


def token_ids(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[int]:
    """Ids of single tokens by name. Raises UserError for one that the vocabulary does not have."""
    ids = []
    for token in tokens:
        found = tokenizer.token_id(token)
        if found is None:
            raise UserError(f"stop token {token!r} is not in the tokenizer's vocabulary; name one token of it")
        ids.append(found)
    return ids
