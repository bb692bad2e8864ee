"""rules."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from distft.cli import options

if TYPE_CHECKING:
    from distft.rules import Rule


@click.command()
@click.argument("name", required=False)
@options.JSON
def rules(name: str | None, as_json: bool) -> None:
    """List the rules, or explain the rule NAME.

    Rules say what cannot be combined, which is an error, and what is unwise, which is a warning. Both end with the name
    of the rule in brackets.
    """
    from distft.errors import DistftError
    from distft.rules import RULES

    if name is None:
        found = sorted(RULES, key=lambda rule: (rule.kind, rule.name))
        if as_json:
            options.print_json({"rules": [_as_json(rule) for rule in found]})
        else:
            _list(found)
        return
    rule = next((rule for rule in RULES if rule.name == name.strip("[]").replace("_", "-")), None)
    if rule is None:
        raise DistftError(f"no such rule: {name}{_near(name, [rule.name for rule in RULES])}")
    if as_json:
        options.print_json(_as_json(rule))
    else:
        _explain(rule)


def _list(found: list[Rule]) -> None:
    """One line per rule, cut off where the terminal has no room for it."""
    room = None
    if sys.stdout.isatty():
        import shutil

        room = shutil.get_terminal_size().columns
    width = max(len(rule.name) for rule in found)
    for rule in found:
        line = f"{rule.kind:7}  {rule.name:{width}}  {rule.when}"
        click.echo(f"{line[: room - 1]}…" if room and len(line) > room else line)
    click.echo("\nerrors are refused, warnings are printed; distft rules NAME explains a rule", err=True)


def _explain(rule: Rule) -> None:
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size().columns, 100)
    click.secho(f"{rule.name} ({rule.kind})", bold=True)
    rows = {
        "why": rule.explanation,
        "applies to": rule.when + ("; for scripts too" if rule.for_scripts else ""),
        "fix": rule.fix,
        "versions": ", ".join(rule.versions) or "all that distft supports",
        "source": rule.source,
    }
    for label, text in rows.items():
        click.echo(textwrap.fill(text, width, initial_indent=f"{label:10} ", subsequent_indent=" " * 11))


def _as_json(rule: Rule) -> dict[str, Any]:
    return {
        "name": rule.name,
        "kind": rule.kind,
        "when": rule.when,
        "explanation": rule.explanation,
        "fix": rule.fix,
        "source": rule.source,
        "versions": list(rule.versions),
        "scripts": rule.for_scripts,
    }


def _near(name: str, names: list[str]) -> str:
    """The nearest names, and those that contain it."""
    import difflib

    near = difflib.get_close_matches(name, names, 3, 0.5)
    near += [other for other in names if name.strip() and name.lower() in other and other not in near]
    return f"; did you mean {', '.join(near[:5])}?" if near else "; distft rules lists them"
