"""The order of the files of tests, which `bash tests/run.sh` depends on for its time."""

from __future__ import annotations

from tests.conftest import LONGEST, REPOSITORY


def test_the_longest_files_are_there_and_start_first(request):
    files = {path.stem for path in (REPOSITORY / "tests").glob("*/test_*.py")}
    assert set(LONGEST) <= files and len(set(LONGEST)) == len(LONGEST)
    assert "--no-loadscope-reorder" in (REPOSITORY / "tests" / "run.sh").read_text()
    places = [LONGEST.index(item.path.stem) for item in request.session.items if item.path.stem in LONGEST]
    assert places == sorted(places)
