"""Which room may import which (docs: the arrows point one way), and which imports may stand inside functions."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY

PACKAGE = "megatron_dtrpo"
ROOT = REPOSITORY / PACKAGE

# From the ground up: a room imports rooms of the floors below it, and its own.
FLOORS = (
    ("errors", "rounding", "seeds", "files"),
    ("families",),
    ("config", "runtime.environment", "runtime.stop"),
    ("diffusion", "objectives", "cpu"),
    ("runtime", "checkpoint.folder"),
    ("model", "data", "planning", "doctor"),
    ("checkpoint", "inference"),
    ("conversion", "training"),
    ("evaluation", "online", "serving"),
    ("cli",),
    ("__main__",),
)
# Rooms of one floor that know each other, in this direction only.
BESIDE = {("data", "model"), ("planning", "model"), ("checkpoint", "conversion"), ("online", "evaluation")}
PURE = ("config", "families", "diffusion", "objectives")
LIGHT = {*sys.stdlib_module_names, "yaml", PACKAGE}  # what config and families import

# Imports inside functions: (file, module) and why it is not at the top.
OPTIONAL, NEWER, SLOW, DOCTOR, STARTUP = (
    "an optional dependency",
    "it imports what only newer versions of megatron-core have",
    "slow to import, and most runs do without",
    "doctor runs where what it looks for may be missing",
    "a command prints its help and its mistakes before torch is there",
)
INSIDE = {
    ("conversion/tokenizer_export.py", "tokenizers"): OPTIONAL,
    ("data/tokenizer.py", "jinja2"): OPTIONAL,
    ("data/token_store.py", "tqdm"): SLOW,
    ("doctor/machine.py", "resource"): DOCTOR,
    ("doctor/machine.py", "torch"): DOCTOR,
    ("doctor/requirements.py", PACKAGE): DOCTOR,
    ("evaluation/formulas.py", "math_verify"): OPTIONAL,
    ("evaluation/generation.py", "tqdm"): SLOW,
    ("model/layer_spec.py", "megatron.core.extensions"): OPTIONAL,
    ("model/provider.py", f"{PACKAGE}.model.hybrid"): NEWER,
    ("runtime/compiler.py", "torch._dynamo"): SLOW,
    ("training/metric_log.py", "torch.utils.tensorboard"): OPTIONAL,
    ("training/metric_log.py", "wandb"): OPTIONAL,
}
INSIDE_ROOMS = {"cli": STARTUP}


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(node: ast.AST) -> list[str]:
    """Full names that an import statement brings in, of modules and of what is in them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    assert not isinstance(node, ast.ImportFrom), "relative imports are not used here"
    return []


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(tree: ast.AST, inside: bool):
    """Import statements at the top of a file, or those ``inside`` functions; without those for a type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if inside:
                yield from (each for each in ast.walk(node) if isinstance(each, (ast.Import, ast.ImportFrom)))
        elif not inside and isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not is_for_types(node):
            yield from statements(node, inside)


@functools.cache
def arrows(inside: bool = False) -> dict[str, frozenset[str]]:
    """Module -> modules of this package that it imports."""
    known = modules()
    result = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = set()
        for node in statements(tree, inside):
            for full in imported(node):
                if full.startswith(PACKAGE + "."):
                    inner = full.removeprefix(PACKAGE + ".")
                    inner = inner if inner in known else inner.rpartition(".")[0]
                    targets |= {inner} & known.keys()
        result[name] = frozenset(targets - {name})
    return result


def floor_of(module: str) -> int:
    """A file that is named itself stands apart from its room."""
    for prefix in (module, module.split(".")[0]):
        for number, rooms in enumerate(FLOORS):
            if prefix in rooms:
                return number
    raise AssertionError(f"{module} has no floor: name its room in FLOORS")


def test_arrows_point_down():
    wrong = []
    for module, targets in arrows().items():
        for target in targets if module else ():
            here, there = module.split(".")[0], target.split(".")[0]
            if here != there and floor_of(target) >= floor_of(module) and (here, there) not in BESIDE:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle_and_a_short_longest_chain():
    @functools.cache
    def chain(module: str) -> tuple[str, ...]:
        return max(((module, *chain(target)) for target in arrows()[module]), key=len, default=(module,))

    longest = max((chain(module) for module in arrows()), key=len)  # a circle is a RecursionError
    assert len(longest) <= LONGEST, " -> ".join(longest)


LONGEST = 9


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_import_no_megatron(room):
    for name, path in modules().items():
        if name.split(".")[0] == room:
            names = {full.split(".")[0] for node in ast.walk(ast.parse(path.read_text())) for full in imported(node)}
            assert "megatron" not in names, path
            assert room not in ("config", "families") or names <= {*sys.stdlib_module_names, "yaml", PACKAGE}, (
                path,
                names,
            )


def test_imports_inside_functions_have_a_reason():
    unexplained, used = [], set()
    for path in modules().values():
        place = path.relative_to(ROOT).as_posix()
        for node in statements(ast.parse(path.read_text(encoding="utf-8")), inside=True):
            full = imported(node)[0]
            reasons = {key for key in INSIDE if key[0] == place and f"{full}.".startswith(key[1] + ".")}
            used |= reasons
            if not reasons and place.split("/")[0] not in INSIDE_ROOMS:
                unexplained.append(f"{place}:{node.lineno} imports {full} inside a function")
    assert not unexplained, "\n".join(unexplained)
    assert used == INSIDE.keys(), "no longer inside a function: take it out of the table"
