"""The command that shows what can be chosen: ``list``."""

from __future__ import annotations

import click

from ..eval.config.catalogue import CATALOGUES, as_json, as_text
from .exits import write_out


@click.command("list")
@click.argument("what", type=click.Choice(list(CATALOGUES)), required=False)
@click.option("--json", "json", is_flag=True, help="As JSON.")
def list_(what: str | None, json: bool) -> None:
    """List what can be chosen.

    \b
        distillsec list attacks
        distillsec list presets
    """
    kinds = [what] if what else list(CATALOGUES)
    texts = [as_json(kinds)] if json else map(as_text, kinds)
    write_out("\n".join(texts))
