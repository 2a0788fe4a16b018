"""docs/reliability.md and the fault tests name each other: no row without a test, no test without a row."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    line
    for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf8").splitlines()
    if line.startswith("| ") and not line.startswith("| Fault")
]
TREE = ast.parse((ROOT / "tests" / "test_faults.py").read_text(encoding="utf8"))


def functions():
    return {
        node.name for node in TREE.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def ids_of(name):
    """The words in a test's decorators and in the constants that they name."""
    (function,) = (node for node in TREE.body if isinstance(node, ast.FunctionDef) and node.name == name)
    used = {
        n.id for decorator in function.decorator_list for n in ast.walk(decorator) if isinstance(n, ast.Name)
    }
    constants = [
        node
        for node in TREE.body
        if isinstance(node, ast.Assign | ast.AugAssign)
        and (node.targets[0] if isinstance(node, ast.Assign) else node.target).id in used
    ]
    return {n.value for c in constants for n in ast.walk(c) if isinstance(n, ast.Constant)}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_a_test_that_exists(row):
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 4
    assert all(cells)
    name, _, case = re.fullmatch(r"`(test_\w+)(\[(\w+)\])?`", cells[3]).groups()
    assert name in functions()
    assert case is None or case in ids_of(name)


def test_every_fault_has_a_row():
    assert len(ROWS) >= 16
    named = set(re.findall(r"`(test_\w+)", "\n".join(ROWS)))
    assert named == functions()
