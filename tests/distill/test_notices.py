"""Warnings about input: one printable line, once."""

from __future__ import annotations

import logging
import sys

import pytest

from distillsec.distill.notices import warn


def test_a_warning_is_one_printable_line_and_is_given_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        warn("left out:\n a\x1b[2J.txt")
    assert caplog.messages == ["distillsec: warning: left out: a\\x1b[2J.txt"]


def test_without_a_configured_log_it_goes_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    warn("to stderr")
    sys.stderr.flush()
    assert capsys.readouterr() == ("", "distillsec: warning: to stderr\n")
