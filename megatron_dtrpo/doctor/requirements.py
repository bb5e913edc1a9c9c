"""The requirements of a configuration, as plain values.

Settings are checked with the trainer's own rules, where those can be imported: they need PyYAML. Where they cannot, the
machine is examined all the same and the report says why.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dtrpo.config.lora import target_names
from megatron_dtrpo.families.parameters import adapter_parameters, model_parameters

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import Config

GIB = 2**30


@dataclass
class Requirements:
    """Without a configuration: a run of one process in fp32 that nobody has described yet."""

    configured: bool = False
    mistake: str | None = None  # what the trainer would refuse the configuration with
    unread: str | None = None  # why the configuration could not be read here
    processes: int = 1  # of the whole run
    local: int = 1  # of those, on this machine
    layout: tuple[int, int, int] = (1, 1, 1)  # tensor, pipeline, context
    bf16: bool = False
    fp8_recipe: str | None = None  # None: no FP8
    transformer_impl: str | None = None
    model_class: str = "gpt"
    offloads: bool = False  # optimizer state, to the host
    attention_backend: str = "auto"
    fuses_gradients: bool = False  # asked for, not merely where it can be had
    distributed_optimizer: bool = False
    tokenizer: str | None = None  # HuggingFaceTokenizer, ...
    paths: tuple[tuple[str, str, bool], ...] = ()  # (setting, path that must exist, whether it does)
    data_format: str | None = None  # suffix of data_path
    tensorboard: bool = False
    wandb: bool = False
    save: str | None = None
    save_free: int | None = None  # bytes; None: no folder above it can be asked
    save_writable: bool = True
    checkpoint: int | None = None  # bytes of one checkpoint, estimated

    @property
    def least_processes(self) -> int:
        tensor, pipeline, context = self.layout
        return tensor * pipeline * context


def read_requirements(config: Config, configured: bool, nproc: int | None, gpus: int) -> Requirements:
    """The requirements of a run of which ``nproc`` processes are here. ``configured``: settings were given."""
    requirements = with_processes(_of(config, configured), nproc, gpus)
    if configured:
        requirements.mistake = _mistake(config, requirements.processes)
        requirements.checkpoint = _checkpoint_bytes(config.model, config.lora)
    return requirements


def _of(config: Config, configured: bool) -> Requirements:
    parallel, data, run = config.parallel, config.data, config.run
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    requirements = Requirements(
        configured=configured,
        layout=sizes,
        bf16=parallel.bf16,
        fp8_recipe=parallel.fp8_recipe if parallel.fp8_format else None,
        transformer_impl=parallel.transformer_impl,
        model_class=parallel.model_class,
        offloads=parallel.optimizer_cpu_offload,
        attention_backend=parallel.attention_backend,
        fuses_gradients=bool(parallel.gradient_accumulation_fusion),
        distributed_optimizer=parallel.use_distributed_optimizer,
        tokenizer=data.tokenizer_type,
        paths=_paths(config),
        data_format=Path(data.data_path).suffix if data.data_path else None,
        tensorboard=run.tensorboard and configured,
        wandb=run.wandb_project is not None,
        save=run.save,
    )
    if run.save:
        requirements.save_free, requirements.save_writable = _room(Path(run.save))
    return requirements


def _paths(config) -> tuple[tuple[str, str, bool], ...]:
    """Every file and folder that must be there before the run."""
    from megatron_dtrpo.checkpoint.folder import MODEL_CONFIG

    data, run = config.data, config.run
    wanted = {
        "data_path": data.data_path,
        "eval_data_path": config.evaluation.eval_data_path,
        "tokenizer_model": data.tokenizer_model,
        "load": run.load,
        f"load (its {MODEL_CONFIG})": run.load and os.path.join(run.load, MODEL_CONFIG),
        "load_adapter": run.load_adapter,
        "reference": run.reference,
        f"reference (its {MODEL_CONFIG})": run.reference and os.path.join(run.reference, MODEL_CONFIG),
        "reference_cache": run.reference_cache,
    }
    return tuple((name, path, Path(path).exists()) for name, path in wanted.items() if path)


def _room(folder: Path) -> tuple[int | None, bool]:
    """Free bytes where ``folder`` is or will be made, and whether it can be written there."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
    except OSError:
        return None, False


def with_processes(requirements: Requirements, nproc: int | None, gpus: int) -> Requirements:
    """As torchrun's environment says, else --nproc, else one for each GPU, else the fewest that the layout takes."""
    number = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    world, local = (int(text) if text.isdigit() else None for text in number.values())
    requirements.local = nproc or local or gpus or requirements.least_processes
    requirements.processes = world or requirements.local
    requirements.local = min(requirements.local, requirements.processes)
    return requirements


def _mistake(config, processes: int) -> str | None:
    """The first mistake by the trainer's own rules; architecture and vocabulary may come from ``load``."""
    from megatron_dtrpo.checkpoint.folder import MODEL_CONFIG
    from megatron_dtrpo.config.rules import validate, validate_data, validate_training
    from megatron_dtrpo.config.yaml_file import read_yaml
    from megatron_dtrpo.errors import UserError

    try:
        saved = Path(config.run.load or "") / MODEL_CONFIG
        if config.run.load and saved.is_file():
            for key, value in read_yaml(saved).items():
                setattr(config.model, key, value)
        elif config.run.load:
            return None  # the line about paths says so
        data_parallel = validate(config, processes)
        validate_data(config)
        validate_training(config, data_parallel)
    except UserError as error:
        return str(error)
    return None


def _checkpoint_bytes(model, lora) -> int | None:
    """Weights, fp32 main weights and Adam's two moments: 16 bytes a parameter, of the adapters where there are any."""
    if not all((model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads)):
        return None
    heads = model.num_attention_heads  # after a mistake, defaults may not have been filled in
    whole = dataclasses.replace(
        model,
        num_query_groups=model.num_query_groups or heads,
        kv_channels=model.kv_channels or model.hidden_size // heads,
    )
    if lora.lora_rank and lora.lora_target_modules:
        layers = target_names(whole.num_layers, lora.lora_target_modules)
        return 16 * adapter_parameters(whole, lora.lora_rank, layers, tp=1)
    return 16 * model_parameters(whole)
