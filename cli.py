"""The command line: the group of commands, and errors to exit codes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, final

import click

from .commands.completion import VARIABLE, known_command
from .commands.exits import explain, leave
from .eval.results.version import installed_version


@final
class _Program(click.Group):
    """Turns errors, click's own among them, into one line and the documented exit codes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line(ctx):
            return super().invoke(ctx)


@contextmanager
def _one_line(ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except click.exceptions.Exit:
        raise
    except click.UsageError as error:
        command = (error.ctx or ctx).command_path
        leave(ctx, 2, f"{error.format_message()} (see `{command} --help`)")
    except KeyboardInterrupt:
        leave(ctx, 1, "stopped")
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        leave(ctx, *explained)


@final
class _Deferred(click.Command):
    """A command that is imported when it is used, so that ``--help`` starts without torch; for the
    completion of its options and their values it is not imported at all.

    place: ``module:name`` below ``commands/``. short_help: the docstring's first line.
    """

    def __init__(self, name: str, place: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self.place = place

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        known = known_command(str(self.name)) if VARIABLE in os.environ else None
        return (known or self.load()).make_context(*args, **extra)

    def load(self) -> click.Command:
        """The command itself."""
        module, _, name = self.place.partition(":")
        found: click.Command = getattr(import_module(f".commands.{module}", __package__), name)
        return found


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(installed_version(), prog_name="distillsec")
def main() -> None:
    """Security evaluation of distilled datasets.

    \b
    A first example, two minutes on two cores, no data to download:
        distillsec attack --preset digits-naive
    What can be chosen:
        distillsec list presets
    """


for _command in (
    _Deferred(
        "attack", "runs:attack", "Distil under an attack, with its clean twin; measure both."
    ),
    _Deferred("distill", "runs:distill", "Distil without an attack; measure clean test accuracy."),
    _Deferred("evaluate", "runs:evaluate", "Train fresh victims on a finished set."),
    _Deferred(
        "convert",
        "convert:convert",
        "Convert a set between the formats of this and other projects.",
    ),
    _Deferred("audit", "audit:audit", "Should I train on this set that I was sent?"),
    _Deferred("defend", "defend:defend", "Measure defenses on a finished set."),
    _Deferred("shadows", "defend:shadows", "Train the shadow networks that MNTD needs."),
    _Deferred("benchmark", "grid:benchmark", "Run the suite in FILE: attacks, defenses, seeds."),
    _Deferred("ablate", "grid:ablate", "Run the sweep in FILE; each cell once, in one table."),
    _Deferred("report", "report:report", "Make one page from runs, sweeps and suites."),
    _Deferred("list", "listing:list_", "List what can be chosen."),
):
    main.add_command(_command)


def loaded_commands() -> dict[str, click.Command]:
    """Every command by name, imported."""
    return {
        name: each.load() if isinstance(each, _Deferred) else each
        for name, each in main.commands.items()
    }


if __name__ == "__main__":
    main()
