"""Pages and README agree with the files: paths, functions, links, the tree of files, the drawing of the layout."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from megatron_dtrpo.cli.main import VERBS
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.losses import LOSSES
from megatron_dtrpo.config.settings import ObjectiveSettings
from megatron_dtrpo.objectives.objective import preference_objective
from tests.conftest import REPOSITORY
from tools import draw_layout

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("**/*.md"))]
ROOTS = [REPOSITORY, REPOSITORY / "megatron_dtrpo", REPOSITORY / "tests", REPOSITORY / "docs"]
# Files of a reader's own, of recipes and of other projects.
NOT_OURS = {
    "pretrain_gpt.py",
    "half.py",
    "cube.py",
    "pebble.py",
    "families/pebble.py",
    "dense.py",
    "until_enough.py",
    "lcb_runner/lm_styles.py",
    "gen_answer.py",
    "gen_api_answer.py",
    "gen_judgment.py",
    "show_result.py",
    "__init__.py",
}
ROOMS = ("megatron_dtrpo", "tools", "examples")


def files_on_disk(*rooms: str) -> set[str]:
    """Paths of all files, but what Python and git ignore and `__init__.py`."""
    found = (path for room in rooms for path in (REPOSITORY / room).rglob("*") if path.is_file())
    return {
        str(path.relative_to(REPOSITORY))
        for path in found
        if path.name != "__init__.py" and path.suffix != ".pyc" and ".egg-info" not in str(path)
    }


def tree(text: str) -> list[tuple[str, str]]:
    """(path, description) of every line of a page's tree of files; a folder ends with ``/``."""
    (block,) = re.findall(r"^```\n(megatron_dtrpo/\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    found, above = [], []
    for line in filter(None, block.splitlines()):
        name, _, words = line.strip().partition("  ")
        above = above[: (len(line) - len(line.lstrip())) // 2] + [name]
        found.append(("".join(above), words.strip()))
    return found


def test_the_tree_names_every_file_and_no_other():
    entries = tree((REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8"))
    paths = [path for path, _ in entries]
    assert len(paths) == len(set(paths))
    assert [path for path, words in entries if not words and path not in ("megatron_dtrpo/", "examples/")] == []
    named, there = {path for path in paths if not path.endswith("/")}, files_on_disk(*ROOMS)
    assert there - named == set(), "docs/architecture.md: give each of these a line in the tree"
    assert named - there == set(), "docs/architecture.md: these are gone, take them out of the tree"


def test_what_the_tree_leaves_out_is_a_sentence():
    for room in ROOMS:
        for path in (REPOSITORY / room).rglob("__init__.py"):
            (*statement,) = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(statement) <= 1 and all(isinstance(s, ast.Expr) for s in statement), path


@cache
def existing() -> tuple[set[str], set[str]]:
    """Every path below every root that a page may start from, and every file's name."""
    paths = files_on_disk("megatron_dtrpo", "tools", "examples", "tests", "docs", "requirements", ".github")
    paths |= {"setup.py", "pyproject.toml", "Dockerfile", "LICENSE", "README.md", "CONTRIBUTING.md"}
    below = {
        str((REPOSITORY / path).relative_to(root))
        for path in paths
        for root in ROOTS
        if (REPOSITORY / path).is_relative_to(root)
    }
    return below, {Path(path).name for path in paths}


def paths_in(text: str) -> set[str]:
    """What looks like a path or name of a file of code."""
    return set(re.findall(r"(?<![\w/.$-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|sbatch))\b", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    below, names = existing()
    mentioned = paths_in(page.read_text(encoding="utf-8"))
    missing = {path for path in mentioned - NOT_OURS if path not in (below if "/" in path else names)}
    assert {path for path in missing if Path(path).name not in NOT_OURS} == set()


@cache
def defined(path: Path) -> set[str]:
    """Names that a module defines: functions, classes, their methods, constants."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", text):
        (file,) = {root / path for root in ROOTS if (root / path).is_file()}
        assert name in defined(file), f"{page.name}: {path} has no {name}"
    for dotted in set(re.findall(r"\b(?:megatron_dtrpo|tools)(?:\.\w+)+", text)):
        words = dotted.split(".")
        module = next(
            (n for n in range(len(words), 0, -1) if (REPOSITORY / "/".join(words[:n])).with_suffix(".py").is_file()), 0
        )
        is_package = (REPOSITORY / "/".join(words)).is_dir()
        path = "/".join(words) + ".py"
        assert module or is_package or words[-1].isupper() or Path(path).name in NOT_OURS, f"{page.name}: {dotted}"
        if module and module < len(words):
            file = (REPOSITORY / "/".join(words[:module])).with_suffix(".py")
            assert ".".join(words[module:]) in defined(file), f"{page.name}: {dotted}"


def test_the_pages_name_functions():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(re.findall(r"`([\w/]+\.py):([\w.]+)`", text)) > 40


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_pages_that_the_code_names_exist():
    for path in sorted(files_on_disk("megatron_dtrpo", "tools", "examples", "tests")):
        file = REPOSITORY / path
        if file.suffix in (".py", ".sh", ".yaml", ".sbatch", ".html", ".js"):
            for name in re.findall(r"docs/[\w/]+\.(?:md|svg)", file.read_text(encoding="utf-8")):
                assert (REPOSITORY / name).is_file(), f"{path}: {name}"


def test_every_page_can_be_reached_from_the_readme():
    reached, found = set(), [REPOSITORY / "README.md"]
    while found:
        page = found.pop()
        if page not in reached:
            reached.add(page)
            links = re.findall(r"\]\(([\w/.-]+\.md)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
            found += [(page.parent / link).resolve() for link in links]
    assert [page.name for page in PAGES if page.resolve() not in {each.resolve() for each in reached}] == []


def test_the_drawing_of_the_layout_is_in_step():
    drawn = (REPOSITORY / "docs" / "layout.svg").read_text(encoding="utf-8")
    assert drawn == draw_layout.svg(), "python -m tools.draw_layout > docs/layout.svg"


def test_the_readme_is_short_and_names_every_verb_estimator_and_loss():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110
    table = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    verbs = {name for first in table for name in re.findall("`([a-z]+)`", first)} & VERBS.keys()
    assert verbs == VERBS.keys()
    for row, choices in (
        ("likelihoods, `--estimator`", ESTIMATORS.keys() - {"sft"}),
        ("losses, `--loss-type`", LOSSES),
    ):
        assert set(re.findall(r"`(\w+)`", table[row].split("|")[2])) == set(choices)


def test_every_number_that_is_logged_has_a_line():
    """The page's ``loss/NAME`` stands for each loss of several."""
    text = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    objective = preference_objective(ObjectiveSettings(estimator="dtrpo", loss_type=["sigmoid"]))
    assert set(objective.metric_names) <= named
    for module, call in (("training/trainer.py", "step"), ("evaluation/generation.py", None)):
        tree = ast.parse((REPOSITORY / "megatron_dtrpo" / module).read_text(encoding="utf-8"))
        logged = keys_given_to(tree, call) if call else {k for k in keys_of_dicts(tree) if k.startswith("completions/")}
        assert len(logged) >= 4
        assert {name if call else f"eval/{name}" for name in logged} <= named


def keys_of_dicts(tree: ast.AST) -> set[str]:
    dicts = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    return {key.value for each in dicts for key in each.keys if isinstance(key, ast.Constant)}


def keys_given_to(tree: ast.AST, method: str) -> set[str]:
    """Keys of the dictionaries that ``self.log.METHOD`` is called with."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return {
        key
        for call in calls
        if ast.unparse(call.func) == f"self.log.{method}"
        for a in call.args
        for key in keys_of_dicts(a)
    }
