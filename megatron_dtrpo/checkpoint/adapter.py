"""What stands beside an adapter's checkpoint: which adapter it is, and of which weights. Imports no torch.

DIR/adapter.yaml      rank, scale and layers of the adapter; the folder and the fingerprint of the weights it belongs to
DIR/iter_0000010/     its weights and no others; of a run also optimizer, scheduler and progress
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_dtrpo.config.lora import LoraSettings
from megatron_dtrpo.config.yaml_file import read_yaml
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import write_atomically

ADAPTER = "adapter.yaml"


@dataclass
class AdapterRecord(LoraSettings):
    """The settings of an adapter, and what it belongs to: ``base``, the folder where the weights were, and
    ``base_fingerprint``, of `checkpoint.fingerprint.base_fingerprint`. ``fp8_format``: in which it was trained."""

    base: str | None = None
    base_fingerprint: str | None = None
    fp8_format: str | None = None

    @classmethod
    def read(cls, folder: str | Path) -> AdapterRecord:
        """Raises UserError where ``folder`` holds no adapter."""
        path = Path(folder) / ADAPTER
        if not path.is_file():
            foreign = (Path(folder) / "adapter_config.json").is_file()
            advice = ": a PEFT folder: turn it into one with megatron-dtrpo convert import --base BASE" * foreign
            raise UserError(f"{folder}: not an adapter of this project: {ADAPTER} is missing{advice}")
        own: dict = {}

        def without_own(found: dict) -> dict:
            own.update({key: found[key] for key in ("base", "base_fingerprint") if isinstance(found.get(key), str)})
            return {key: value for key, value in found.items() if key not in ("base", "base_fingerprint")}

        values = read_yaml(path, update=without_own) | own
        known = [f.name for f in dataclasses.fields(cls)]
        needed = ("lora_rank", "lora_target_modules", "base_fingerprint")
        if not all(values.get(key) for key in needed) or not values.keys() <= set(known):
            raise UserError(f"{path}: damaged: a setting is missing; bring a copy back from where it was made")
        return cls(**values)

    def write(self, folder: str | Path) -> None:
        write_atomically(Path(folder) / ADAPTER, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))

    def settings(self) -> LoraSettings:
        return LoraSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LoraSettings)})

    def require_base(self, folder: str | Path, fingerprint: str, weights: str | Path | None) -> None:
        """Raises UserError unless the adapter in ``folder`` belongs to weights of this ``fingerprint``, which are those
        of ``weights``."""
        if self.base_fingerprint != fingerprint:
            raise UserError(
                f"{folder}: an adapter of other weights than those in {weights}: it belongs to those that were in "
                f"{self.base} (fingerprint {self.base_fingerprint[:12]}, not {fingerprint[:12]}): give these"
            )


def is_adapter_folder(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER).is_file()


def base_and_adapter(folder: str | Path, adapter: str | Path | None) -> tuple[Path, Path | None]:
    """The folders of the weights and of the adapter that a command was given: ``folder`` may be an adapter's itself,
    which says where its weights are. Raises UserError where it does not say so, or they are gone."""
    folder = Path(folder)
    if not is_adapter_folder(folder):
        return folder, None if adapter is None else Path(adapter)
    if adapter is not None:
        base = AdapterRecord.read(folder).base or "the weights that it belongs to"
        raise UserError(f"{folder}: holds an adapter and no other weights: give {base} in its place")
    base = AdapterRecord.read(folder).base
    if base is None or not Path(base).is_dir():
        raise UserError(
            f"{folder}: holds an adapter, and {base or 'the folder of its weights'} is not there: give the folder of "
            f"its weights, and --load-adapter {folder}"
        )
    return Path(base), folder
