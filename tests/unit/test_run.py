"""The end of a run by Ctrl-C, and the lines that a resumed one keeps."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_dtrpo.training.metric_log import drop_later_lines
from megatron_dtrpo.training.run import Run


class Interrupted(Run):
    """A run of which nothing but its end is made."""

    def __init__(self, save, said: list[str]):
        self.iteration, self.config = 7, SimpleNamespace(run=SimpleNamespace(save=save))
        self.log = SimpleNamespace(say=said.append, close=lambda: said.append("closed"))

    def _train(self):
        raise KeyboardInterrupt


def test_ctrl_c_saves_nothing_and_says_so(tmp_path):
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        Interrupted(tmp_path, said).run()
    assert said == ["interrupted after iteration 7: no checkpoint was written yet; SIGTERM saves first", "closed"]


def test_a_resumed_run_keeps_lines_whatever_their_text(tmp_path):
    """Some characters end a line for Python, and none for JSON."""
    texts = ["a\u2028b", "a\x85b", "a\u2029b\nc", "later"]
    lines = [json.dumps({"iteration": n, "text": text}, ensure_ascii=False) for n, text in enumerate(texts)]
    file = tmp_path / "rollouts.jsonl"
    file.write_text("\n".join(lines) + '\n{"iteration": 1, "te', encoding="utf-8")
    drop_later_lines(file, 2)
    assert file.read_text(encoding="utf-8").split("\n") == [*lines[:3], ""]
