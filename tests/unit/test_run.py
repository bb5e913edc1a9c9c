"""The end of a run by Ctrl-C."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

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
