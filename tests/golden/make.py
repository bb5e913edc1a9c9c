"""Makes the golden files anew: ``python -m tests.golden.make`` from the repository's root.

Do that only when numbers change on purpose; the commit says which, and why. What the files hold, later versions load,
repeat and accept: the settings beside the checkpoints are still those that commit 6aee584 wrote, so restore them with
``git checkout`` after this. A new format of token stores, which makes every
run tokenize again, is the one number to change by hand: ``store_version`` in record.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from tests.golden.recipe import (
    CACHE,
    COMMITTED,
    GOLDEN,
    INITIAL,
    PLACEHOLDER,
    RECORD,
    ROWS,
    SCORES,
    Commands,
    copy_text,
    noise,
    store_name,
    tensor_hashes,
)
from tests.support.launch import ForkServer, write_lines


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        server = ForkServer(folder / "server.log")
        try:
            make(Commands(server, folder))
        finally:
            server.close()


def make(commands: Commands) -> None:
    folder = commands.folder
    for rows in ROWS.values():
        shutil.copyfile(GOLDEN / rows, folder / rows)
    commands.train("sft", "sft")
    initial = commands.export("sft", "initial", 1) / "model.safetensors"
    _keep_one(folder / "sft", COMMITTED["sft"])
    commands.train("preference", "preference")
    _keep_one(folder / "preference", COMMITTED["preference"])
    facts = commands.reference(CACHE)
    exported = commands.export("preference", "exported", COMMITTED["preference"])
    scores = commands.score("preference")

    versions = {kind: _name_store(folder, kind, facts["tokenizer"]) for kind in ROWS}
    for name in (*ROWS, CACHE):
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        copy_text(folder / name, GOLDEN / name, str(folder), PLACEHOLDER)
    shutil.copyfile(initial, GOLDEN / INITIAL)
    write_lines(GOLDEN / SCORES, scores)
    record = {
        "tokenizer": facts["tokenizer"],
        "store_version": versions["sft"],
        "noise": noise(),
        "exported": tensor_hashes(load_file(exported / "model.safetensors")),
        "config": json.loads((exported / "config.json").read_text()),
    }
    (GOLDEN / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _keep_one(run: Path, iteration: int) -> None:
    """The run as it was after ``iteration``, but for its metrics, which are of all steps."""
    for other in run.glob("iter_*"):
        if int(other.name.removeprefix("iter_")) != iteration:
            shutil.rmtree(other)
    (run / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def _name_store(folder: Path, kind: str, tokenizer: str) -> int:
    """Gives the run's token store a name that does not depend on where and when it was made; returns its version."""
    (store,) = (folder / kind / "data_cache").iterdir()
    names = {store_name(folder / ROWS[kind], kind, version, tokenizer): version for version in range(100)}
    store.rename(store.with_name("store"))
    return names[store.name]


if __name__ == "__main__":
    main()
