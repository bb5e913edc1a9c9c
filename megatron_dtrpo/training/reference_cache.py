"""The reference policy's scores of a whole run, computed before it, so that the run keeps no reference in memory.

    DIR/scores.npy    float64 [epochs, examples, 2]: L of chosen and rejected; NaN where the run does not come
    DIR/meta.json     what the scores depend on, and what they cover

Noise is a function of (seed, epoch, example, response, view), so a pair's score in an epoch is one number, whatever
step it falls into. Under the layout and packing that it was computed with it is the live reference's, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.fp8 import reference_format
from megatron_dtrpo.config.settings import FIELDS, Config
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.sampler import SampleOrder
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import partial_name, publish_folder, write_json
from megatron_dtrpo.runtime.transfer import to_device

FORMAT_VERSION = 2  # 1: scores in which the rows that pad the vocabulary had a share
SCORES, META = "scores.npy", "meta.json"

_FINGERPRINTS = {"data": "the data", "tokenizer": "the tokenizer", "weights": "the reference checkpoint's weights"}


def score_inputs(config: Config, tokenizer: Tokenizer) -> dict:
    """The inputs of reference scores, as far as settings tell: everything but the ``data`` and the ``weights``."""
    objective = config.objective
    options = ("estimator", "num_views", *ESTIMATORS[objective.estimator].options, "block_start")
    model = dataclasses.asdict(config.model)
    del model["family"]  # names in an export
    return {
        "tokenizer": tokenizer.fingerprint(),
        **{name: getattr(objective, name) for name in options},
        "seed": config.optimizer.seed,
        "bf16": config.parallel.bf16,
        "fp8": reference_format(config.parallel),
        **model,
    }


class ReferenceCache:
    """Precomputed scores, opened for reading."""

    def __init__(self, directory: str | Path):
        """Raises UserError where ``directory`` is not a finished cache."""
        self.directory = Path(directory)
        try:
            meta = json.loads((self.directory / META).read_text(encoding="utf-8"))
            self._scores = np.load(self.directory / SCORES, mmap_mode="r")
            self._inputs, version, shape = meta["facts"], meta["format_version"], meta["shape"]
        except OSError as error:
            missing = Path(error.filename or self.directory).name
            raise self._refusal(f"{missing} cannot be read: it is not a folder of reference scores") from None
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):  # numpy's own words for bad files
            raise self._refusal("the reference scores are damaged") from None
        if not isinstance(self._inputs, dict) or not isinstance(self._scores, np.ndarray):
            raise self._refusal("the reference scores are damaged")
        if version != FORMAT_VERSION:
            raise self._refusal(f"its format is {version}, this program reads {FORMAT_VERSION}")
        if list(self._scores.shape) != shape:
            raise self._refusal("the reference scores are damaged")

    def _refusal(self, reason: str) -> UserError:
        return UserError(
            f"reference_cache {self.directory}: {reason}; run megatron-dtrpo reference with this run's settings"
        )

    def require(self, inputs: dict) -> None:
        """Raises UserError naming the first of ``inputs`` that is another one here."""
        for key, mine in inputs.items():
            theirs = self._inputs.get(key, FIELDS[key].default if key in FIELDS else None)  # a setting may be newer
            if theirs == mine:
                continue
            if key in _FINGERPRINTS:
                raise self._refusal(f"made for another fingerprint of {_FINGERPRINTS[key]}")
            raise self._refusal(f"made for {key} {theirs}, not {mine}")

    def require_steps(self, order: SampleOrder, consumed: int, total: int, batch: int) -> None:
        """Raises UserError unless every sample that a run takes from ``consumed`` up to ``total`` has its scores."""
        for start in range(consumed, total, batch):
            if np.isnan(self._look_up(order.take(start, batch))).any():
                raise self._refusal(
                    f"lacks pairs of step {start // batch + 1} of {total // batch}: it covers fewer steps or epochs, "
                    "or pairs of a smaller seq_length"
                )

    def _look_up(self, samples: Sequence[Sample]) -> np.ndarray:
        """float64 ``[samples, 2]``; NaN where nothing was computed."""
        found = np.full((len(samples), 2), np.nan)
        known = np.array([s.epoch < len(self._scores) for s in samples])
        places = [(s.epoch, s.index) for s, k in zip(samples, known, strict=True) if k]
        if places:
            epochs, indices = zip(*places, strict=True)
            found[known] = self._scores[list(epochs), list(indices)]
        return found

    def scores(self, samples: Sequence[Sample], device: torch.device) -> Tensor:
        """``L`` of the samples' responses under the reference: float64 ``[2 * samples]``, chosen before rejected."""
        return to_device(torch.from_numpy(self._look_up(samples).reshape(-1)), device)


class CacheWriter:
    """Writes a cache; nothing has its name before it is complete. One process only."""

    def __init__(self, directory: str | Path, inputs: dict, epochs: int, examples: int):
        self._final = Path(directory)
        self._partial = partial_name(self._final)
        shutil.rmtree(self._partial, ignore_errors=True)  # of an attempt that was killed
        self._partial.mkdir(parents=True)
        self._inputs, self._shape = inputs, (epochs, examples, 2)
        self._scores = np.lib.format.open_memmap(self._partial / SCORES, mode="w+", dtype=np.float64, shape=self._shape)
        self._scores[:] = np.nan

    def add(self, scores: dict[Sample, tuple[float, float]]) -> None:
        for sample, pair in scores.items():
            self._scores[sample.epoch, sample.index] = pair

    def finish(self) -> None:
        self._scores.flush()
        meta = {"format_version": FORMAT_VERSION, "shape": list(self._shape), "facts": self._inputs}
        write_json(self._partial / META, meta)
        publish_folder(self._partial, self._final)

    def discard(self) -> None:
        """Removes what is unfinished."""
        shutil.rmtree(self._partial, ignore_errors=True)
