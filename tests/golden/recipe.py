"""What the golden runs do, for `make`, which records it, and tests/end_to_end/test_golden.py, which repeats it.

Only commands, their files and one class of the program are named here, so that a refactoring changes a line at most.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.sampler import epoch_order
from tests.support.launch import ForkServer, flags, read_metrics

GOLDEN = Path(__file__).parent
ROWS = {"sft": "sft.jsonl", "preference": "pairs.jsonl"}
COMMITTED = {"sft": 2, "preference": 3}  # the iteration of each run that is kept
SCORES, RECORD, INITIAL = "scores.jsonl", "record.json", "initial.safetensors"
CACHE = "reference_scores"
PLACEHOLDER = "GOLDEN"  # stands for the folder in committed text files
# A command's name -> what the fork server runs.
COMMANDS = {
    "train": ["train"],
    "score": ["score"],
    "reference": ["reference"],
    "export": ["convert", "export"],
}


class Commands:
    """Runs commands in ``folder``, which holds the rows, and reads what they leave."""

    def __init__(self, server: ForkServer, folder: Path):
        self.server, self.folder = server, folder

    def run(self, name: str, settings: dict) -> str:
        """The command's output; it must end well."""
        verb, *words = COMMANDS[name]
        log = self.folder / "log"
        statuses, output = self.server.run({}, log, verb=verb, arguments=[*words, *flags(settings)])
        assert statuses == [0], output
        return output

    def settings(self, kind: str) -> dict:
        """Of the run ``kind``, sft or preference: its settings file, its rows and where it starts from."""
        settings = {"config": GOLDEN / f"{kind}.yaml", "data_path": self.folder / ROWS[kind]}
        return settings | ({"load": self.folder / "sft"} if kind == "preference" else {})

    def train(self, kind: str, save: str, **others) -> list[dict]:
        """The metrics of every step in the run folder ``save``."""
        self.run("train", {**self.settings(kind), **others, "save": self.folder / save})
        return read_metrics(self.folder / save)

    def reference(self, output: str) -> dict:
        """Precomputes the reference's scores of the preference run; returns what they depend on."""
        self.run("reference", {**self.settings("preference"), "output": self.folder / output})
        return json.loads((self.folder / output / "meta.json").read_text())["facts"]

    def score(self, checkpoint: str) -> list[dict]:
        files = {"checkpoint": self.folder / checkpoint, "data": self.folder / ROWS["preference"]}
        self.run("score", {**files, "output": self.folder / SCORES})
        text = (self.folder / SCORES).read_text().replace(str(self.folder), PLACEHOLDER)
        return [json.loads(line) for line in text.splitlines()]

    def export(self, checkpoint: str, output: str, iteration: int) -> Path:
        """The Hugging Face folder of ``checkpoint``."""
        paths = {"megatron_path": self.folder / checkpoint, "hf_path": self.folder / output}
        self.run("export", {**paths, "iteration": iteration})
        return self.folder / output


def copy_text(source: Path, target: Path, old: str, new: str) -> None:
    """Copies a folder; ``old`` is ``new`` in its YAML and JSON files."""
    shutil.copytree(source, target)
    for path in [*target.rglob("*.yaml"), *target.rglob("*.json")]:
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def store_name(rows: Path, kind: str, version: int, tokenizer: str) -> str:
    """The name of the token store of ``rows``: today's rule, written down a second time."""
    status = rows.stat()
    parts = [version, [(str(rows.absolute()), status.st_size, status.st_mtime_ns)], kind, tokenizer, False, "last"]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def noise() -> dict[str, str]:
    """Estimator, or order of an epoch -> a hash of what (seed, epoch, example, branch, view) draw: the packed documents
    of two responses, prompt of 13 tokens, with their targets and weights."""
    prompt, responses = torch.arange(13), [torch.arange(20, 57), torch.arange(60, 71)]
    found = {f"order of epoch {epoch}": str(epoch_order(20, 1234, epoch).tolist()) for epoch in (0, 1)}
    for estimator, start in (("dtrpo", "clean"), ("elbo", "clean"), ("vrpo", "noisy"), ("sft", "noisy")):
        noising = Noising(estimator, EstimatorOptions(), 3, start, block_size=8, mask_id=99, seed=1234)
        digest = hashlib.sha256()
        for builder in (noising, noising.for_reference()):
            for sample in (Sample(0, 0), Sample(0, 7), Sample(2, 7)):
                document = builder.document(sample, prompt, responses)
                for values in (document.tokens, document.view, document.target_row, document.target_token):
                    digest.update(values.to(torch.int64).numpy().tobytes())
                weights = document.target_weight.double() * 1e6  # as integers: a last bit is not noise
                digest.update(weights.round().to(torch.int64).numpy().tobytes())
        found[estimator] = digest.hexdigest()
    return found


def tensor_hashes(weights: dict) -> dict[str, str]:
    """Name of a tensor -> its type, shape and a hash of its bytes."""
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"
        for name, tensor in sorted(weights.items())
    }
