"""Summaries on a terminal, and as plain text."""

from __future__ import annotations

import io
import sys

import pytest

from distillsec.commands.terminal import draw, write_blocks
from distillsec.eval.results.blocks import (
    Paragraph,
    TextCell,
    TextTable,
    Tone,
    alarm_tone,
    asr_tone,
    auroc_tone,
    cta_tone,
    plain,
)

TABLE = TextTable(
    ("what", "mean", "meaning"),
    (
        (
            TextCell("ASR"),
            TextCell("0.75", "bad"),
            TextCell("triggered images that are sent to the target"),
        ),
        (TextCell("control"), TextCell("−0.1", "chance"), TextCell("the same on the twin")),
    ),
    right=frozenset({1}),
)
BLOCKS = (TextCell("a title", "title"), TABLE, "a line\x1b[2J", Paragraph("Some words. " * 20))


def drawn(width: int, colour: bool = True, **environment: str) -> str:
    rich = pytest.importorskip("rich.console")
    file = io.StringIO()
    kind = "standard" if colour else None
    console = rich.Console(
        file=file, width=width, force_terminal=True, color_system=kind, _environ=environment
    )
    draw(BLOCKS, console)
    return file.getvalue()


def test_plain_text_has_aligned_columns_and_no_colours() -> None:
    lines = plain(BLOCKS).splitlines()
    assert lines[:4] == [
        "a title",
        "  what     mean  meaning",
        "  ASR      0.75  triggered images that are sent to the target",
        "  control  −0.1  the same on the twin",
    ]
    assert all(len(line) <= 100 for line in lines) and lines[5].startswith("  Some words.")


def test_a_terminal_shows_tones_and_no_control_characters() -> None:
    text = drawn(80)
    assert "\x1b[31m0.75\x1b[0m" in text and "\x1b[90m−0.1\x1b[0m" in text
    assert "\x1b[2J" not in text and "a line\\x1b[2J" in text


def test_no_color_is_heeded() -> None:
    text = drawn(80, NO_COLOR="1")
    assert "\x1b[31m" not in text and "0.75" in text


@pytest.mark.parametrize("width", [40, 60, 120])
def test_a_table_fits_the_width_and_loses_nothing(width: int) -> None:
    lines = drawn(width, colour=False).splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    words = " ".join(lines).split()
    for word in ["triggered", "images", "that", "are", "sent", "to", "the", "target"]:
        assert word in words


def test_a_pipe_gets_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    write_blocks(BLOCKS)
    text = capsys.readouterr().out
    assert "\x1b" not in text and text.startswith("a title\n  what ")


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    write_blocks(BLOCKS)
    assert isinstance(sys.stdout, Terminal) and "\x1b[31m0.75" in sys.stdout.getvalue()


@pytest.mark.parametrize(
    ("tone", "expected"),
    [
        (asr_tone(0.1), "good"),
        (asr_tone(0.3), ""),
        (asr_tone(0.5), "bad"),
        (asr_tone(None), ""),
        (auroc_tone(0.95), "good"),
        (auroc_tone(0.55), "chance"),
        (auroc_tone(0.7), ""),
        (cta_tone(0.80, 0.90), "bad"),
        (cta_tone(0.87, 0.90), ""),
        (alarm_tone(1.0, 0.0), "good"),
        (alarm_tone(1.0, 1.0), "bad"),
        (alarm_tone(0.0, 0.0), ""),
        (alarm_tone(0.5, None), "good"),
    ],
)
def test_tones(tone: Tone, expected: Tone) -> None:
    assert tone == expected
