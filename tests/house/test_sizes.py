"""Small rooms: no file, function, signature or protocol too big to hold in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from tests.house.reading import Module

MOST_LINES_IN_A_FILE = 500
MOST_LINES_IN_A_FUNCTION = 60
MOST_PARAMETERS = 6
MOST_METHODS_IN_A_PROTOCOL = 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(module: Module) -> Iterator[Function]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_parameters(function: Function) -> int:
    """Without the instance or class that a method gets."""
    entries = function.args
    named = [a.arg for a in (*entries.posonlyargs, *entries.args, *entries.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"]))


def is_command(function: Function) -> bool:
    """Whether its parameters are a command's flags, which are documented and checked as such."""
    calls = [d.func for d in function.decorator_list if isinstance(d, ast.Call)]
    return any(isinstance(call, ast.Attribute) and call.attr == "command" for call in calls)


def test_no_file_is_too_long(modules: Sequence[Module]) -> None:
    assert not {str(m.path): m.num_lines for m in modules if m.num_lines > MOST_LINES_IN_A_FILE}


def test_no_function_is_too_long(modules: Sequence[Module]) -> None:
    lengths = {
        f"{module.path}:{f.lineno} {f.name}": (f.end_lineno or f.lineno) - f.lineno + 1
        for module in modules
        for f in functions(module)
    }
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES_IN_A_FUNCTION}


def test_no_function_takes_too_much(modules: Sequence[Module]) -> None:
    counts = {
        f"{module.path}:{f.lineno} {f.name}": num_parameters(f)
        for module in modules
        for f in functions(module)
        if module.path.parts[0] != "tests" and not is_command(f)
    }
    assert not {name: count for name, count in counts.items() if count > MOST_PARAMETERS}


def test_protocols_are_small(package_modules: Sequence[Module]) -> None:
    found = {}
    for module in package_modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).partition("[")[0] == "Protocol" for base in node.bases
            ):
                found[f"{module.path} {node.name}"] = sum(isinstance(part, Function) for part in node.body)
    assert found, "the package has protocols"
    assert not {name: count for name, count in found.items() if count > MOST_METHODS_IN_A_PROTOCOL}
