"""docs/status.md: every line is whole, and what it names is there."""

from __future__ import annotations

import re

from tests.conftest import REPOSITORY


def test_every_line_of_the_matrix_says_what_was_read_what_was_run_and_where():
    text = (REPOSITORY / "docs" / "status.md").read_text(encoding="utf-8")
    table = [line for line in text.split("## Features")[1].splitlines() if line.startswith("|")]
    assert table[0] == "| what | read | run | where |" and len(table) > 20
    for line in table[2:]:
        what, _, run, where = (cell.strip() for cell in line.strip("|").split("|"))
        assert what and run and where, line
    named = re.findall(r"`((?:tests|tools)/[^`]*\.py)", text)
    assert len(named) > 30
    assert [path for path in named if not (REPOSITORY / path.split()[0]).is_file()] == []
    assert "(docs/status.md)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
