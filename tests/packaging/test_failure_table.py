"""`tests/FAILURES.md` names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "tests" / "FAILURES.md").read_text()
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def functions_of(path: str) -> frozenset[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, kinds))


def test_every_failure_has_one_row_in_order_with_a_test():
    rows = re.findall(r"^\| (F\d+) \|(.*)\|$", TABLE, re.MULTILINE)
    assert [name for name, _ in rows] == [f"F{number}" for number in range(1, 36)]
    assert not [name for name, row in rows if not NODE.search(row)]


def test_every_named_test_exists():
    named = NODE.findall(TABLE)
    assert len(named) == TABLE.count("`tests/")
    missing = [
        f"{path}::{name}" for path, name in named if not (ROOT / path).is_file() or name not in functions_of(path)
    ]
    assert not missing
