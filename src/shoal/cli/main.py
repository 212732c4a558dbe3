"""The command's frame: the verbs, did-you-mean, errors as exit codes.

Exit codes: 0 done; 1 a run or request failed; 2 wrong usage; 130 stopped by Ctrl-C; 143 by SIGTERM.
"""

from __future__ import annotations

import difflib
import sys
from typing import Any

import click

from shoal.cli import containers, lab, serving, using, verbs
from shoal.errors import ShoalError


class _Verbs(click.Group):
    """A group that knows what was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"no such command: {args[0]}; {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shoal")
def shoal() -> None:
    """Distributed machine learning from data to live predictions, on workers that may die."""


for _verb in (*verbs.ALL, *using.ALL, *serving.ALL, *containers.ALL, *lab.ALL):
    shoal.add_command(_verb)


def main(argv: list[str] | None = None) -> Any:
    """Run the command; never returns."""
    try:
        code = shoal.main(argv, prog_name="shoal", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ShoalError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
