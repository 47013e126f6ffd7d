"""Warnings about input: one line each, on stderr unless the program configures its log."""

from __future__ import annotations

import logging
from functools import cache

_LOG = logging.getLogger("distillsec")


@cache
def warn(text: str) -> None:
    """Write ``text`` as one printable line to the log ``distillsec``, once in each process.

    A log, because a program that uses the package decides where its lines go; without any
    configuration they go to stderr.
    """
    _LOG.warning("distillsec: warning: %s", _printable(" ".join(text.split())))


def _printable(text: str) -> str:
    """Text with escapes for what could move a terminal's cursor: it may hold names of files."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
