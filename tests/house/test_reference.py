"""The reference pages say what there is: all of it, and nothing else."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence

import click

import shoal as package
from shoal.cli.main import shoal
from tests.house.reading import ROOT, Module

EVENTS = (ROOT / "docs" / "reference" / "events.md").read_text()
PYTHON = (ROOT / "docs" / "reference" / "python.md").read_text()
CLI = (ROOT / "docs" / "reference" / "cli.md").read_text()


def noted(modules: Sequence[Module]) -> Iterator[tuple[str, frozenset[str]]]:
    """The kind and fields of every event that the package notes."""
    for node in (node for module in modules for node in ast.walk(module.tree)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "note"
            and node.args
        ):
            kind = node.args[0]
            if isinstance(kind, ast.Constant):
                yield kind.value, frozenset(keyword.arg for keyword in node.keywords if keyword.arg)


def documented() -> dict[str, frozenset[str]]:
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", EVENTS, re.MULTILINE)
    return {kind: frozenset(re.findall(r"\w+", fields)) for kind, fields in rows}


def test_every_event_is_documented_with_its_fields(package_modules: Sequence[Module]) -> None:
    assert dict(noted(package_modules)) == documented()


def test_every_decision_of_a_roll_out_is_documented(package_modules: Sequence[Module]) -> None:
    (machine,) = [module for module in package_modules if module.name == "shoal.rollout.machine"]
    text = machine.path.read_text()
    decided = set(re.findall(r'(?:Note\(|_refuse\(state, )"(\w+)"', text))
    decided |= {
        f"{stage}_{end}" for stage in ("shadow", "canary") for end in re.findall(r'f"\{.*?stage\}_(\w+)"', text)
    }
    assert len(decided) > 10 and not [kind for kind in decided if f"`{kind}`" not in EVENTS]


def test_every_name_of_the_package_is_in_the_reference() -> None:
    shown = set(re.findall(r"^::: ([\w.]+)$", PYTHON, re.MULTILINE))
    found = {name: getattr(package, name) for name in package.__all__}
    assert not [name for name, value in found.items() if not is_shown(name, value.__module__, shown)]


def is_shown(name: str, module: str, shown: set[str]) -> bool:
    """Whether a name of some module is shown, by itself or with all of that module or of its package."""
    package_of = module.rpartition(".")[0]
    return bool({module, package_of, f"{module}.{name}", f"{package_of}.{name}"} & shown)


def commands() -> Iterator[list[str]]:
    """Every command line of ``shoal`` that a page shows to be typed."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = [line for line in block.splitlines() if line.startswith("shoal ")]
            yield from (shlex.split(line, comments=True)[1:] for line in lines)


def test_every_command_that_a_page_shows_can_be_typed() -> None:
    shown = list(commands())
    assert shown
    for verb, *words in shown:
        own = words[: words.index("--")] if "--" in words else words  # the rest is another command's
        assert not [word for word in own if word.startswith("--") and word not in flags(shoal.commands[verb])], own


def flags(command: click.Command) -> set[str]:
    """A verb's options; a group's are those of the verbs within it."""
    within = command.commands.values() if isinstance(command, click.Group) else ()
    own = {flag for p in command.params if isinstance(p, click.Option) for flag in p.opts if flag[:2] == "--"}
    return own.union(*map(flags, within))


def test_every_verb_has_a_section() -> None:
    assert set(re.findall(r"^## shoal (\w+)$", CLI, re.MULTILINE)) == set(shoal.commands)


def test_every_option_is_in_the_section_of_its_verb() -> None:
    sections = dict(re.findall(r"^## shoal (\w+)$(.*?)(?=^## )", CLI, re.MULTILINE | re.DOTALL))
    for name, command in shoal.commands.items():
        options = flags(command)
        assert options == set(re.findall(r"--[a-z][a-z-]*", sections[name])) - known_elsewhere(name, options)


def known_elsewhere(name: str, options: set[str]) -> set[str]:
    """Options of other verbs that a section may speak of."""
    return set[str]().union(*(flags(c) for verb, c in shoal.commands.items() if verb != name)) - options
