"""The page in a browser: no errors, sortable tables, nothing wider than a phone."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)

Make = Callable[..., Path]
Cli = Callable[..., Result]
PHONE = 360


def browse(page: Path, *, width: int = 1200) -> tuple[str, list[str]]:
    """The document after its scripts have run, and the browser's console messages."""
    assert BROWSER is not None
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update")
    done = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            *quiet,
            f"--user-data-dir={page.parent / 'profile'}",
            "--enable-logging=stderr",
            f"--window-size={width},900",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def with_script(page: Path, script: str, *, allowed: bool = True) -> Path:
    """A copy of the page that also runs ``script``, whose hash is added to the policy."""
    text = page.read_text("utf-8")
    if allowed:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    copy = page.with_name("copy.html")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    return copy


def evaluate(page: Path, script: str, width: int = 1200) -> Any:
    """The value of ``answer`` after ``script`` ran without messages in a frame of this width.

    A frame, because the smallest browser window is wider than a phone.
    """
    copy = with_script(page, f"let answer; {script}; parent.postMessage(answer, '*')")
    frame = page.with_name("frame.html")
    frame.write_text(
        "<body><script>onmessage = (e) => document.body.dataset.answer = JSON.stringify(e.data)"
        f"</script><iframe src='{copy.name}' width='{width}' height='740' frameborder='0'></iframe>"
    )
    dom, console = browse(frame, width=max(1300, width))
    assert not console
    (found,) = re.findall(r'data-answer="([^"]*)"', dom)
    return json.loads(html.unescape(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture
def page(folder: Path, cli: Cli, make_run: Make, make_sweep: Make) -> Path:
    """A sweep against another, with a run of long names; made once for all tests here."""
    out = folder / "report.html"
    if out.exists():
        return out
    rates = {9: (0.1, 0.2, 0.3), 10: (0.9, 0.8, 0.7), 2: (0.5, 0.45, 0.55)}

    def points(more: float) -> dict[Any, dict[int, float]]:
        return {
            (("trigger_size", size), ("a_long_name_of_an_axis_that_is_swept", "x" * 60)): {
                seed: rate + more for seed, rate in enumerate(each)
            }
            for size, each in rates.items()
        } | {(("trigger_size", 7),): {}}

    sweep = make_sweep(folder / "sweep", points(0.0), labels=["unbounded trigger: " + "y" * 90])
    base = make_sweep(folder / "base", points(0.05), files=False)
    done = cli("report", sweep, "--baseline", base, "-o", out, "--quiet")
    assert done.exit_code == 0, done.stderr
    return out


def test_the_console_is_silent_and_shows_errors(page: Path) -> None:
    dom, console = browse(page)
    assert console == []
    assert "Security of distilled datasets" in dom
    _, console = browse(with_script(page, "throw new Error('planted')"))
    assert any("planted" in line for line in console)
    _, console = browse(with_script(page, "document.title = 'ran'", allowed=False))
    assert any("Content Security Policy" in line for line in console)


SORT = """
const table = document.querySelector("#summary-table-1").closest("table");
const heads = [...table.tHead.rows[0].cells];
const column = (name) => heads.findIndex((head) => head.textContent.trim() === name);
const shown = (name) => [...table.tBodies[0].rows].map(
  (row) => row.cells[column(name)].firstChild.data.trim());
const press = (name) => {
  heads[column(name)].querySelector("button").click();
  return [shown("trigger_size"), heads.map((head) => head.getAttribute("aria-sort"))
    .filter((each) => each !== "none"), document.getElementById("status").textContent];
};
answer = [shown("trigger_size"), press("ASR"), press("ASR"), press("trigger_size")];
"""


def test_tables_sort_and_announce_it(page: Path) -> None:
    before, descending, ascending, sizes = evaluate(page, SORT)
    assert before == ["9", "10", "2", "7"]
    # Figures start with the largest; a row without a figure stays at the end.
    assert descending == [["10", "2", "9", "7"], ["descending"], "Sorted by ASR, descending."]
    assert ascending == [["9", "2", "10", "7"], ["ascending"], "Sorted by ASR, ascending."]
    assert sizes[0] == ["2", "7", "9", "10"]  # as numbers, not as text


WIDTH = """
const wide = (element) => element.getBoundingClientRect().right > innerWidth + 1;
const boxed = (element) => element.parentElement.closest(".scroll, .spoken, .skip");
answer = [
  innerWidth,
  document.documentElement.scrollWidth,
  [...document.querySelectorAll("body *")].filter((each) => wide(each) && !boxed(each))
    .map((each) => each.outerHTML.slice(0, 90)),
  [...document.querySelectorAll(".scroll")].some((box) => box.scrollWidth > box.clientWidth),
];
"""


def test_nothing_is_wider_than_a_phone(page: Path) -> None:
    width, document, beyond, scrolls = evaluate(page, WIDTH, width=PHONE)
    assert width == PHONE
    assert beyond == [] and document <= width
    assert scrolls  # the tables, in boxes of their own
