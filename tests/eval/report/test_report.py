"""The report's page and tables, for complete, incomplete and damaged folders."""

from __future__ import annotations

import base64
import csv
import html
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from PIL import Image

from distillsec.distill.files.artifact import save_set
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch, DistilledSet, Recipe
from distillsec.eval.figures.twin_picture import twin_picture
from distillsec.eval.report.export import latex
from distillsec.eval.report.load import load_experiment
from distillsec.eval.report.page import PAGE_CAP
from distillsec.eval.report.pictures import Picture, fit
from distillsec.eval.results.ablation import Ablation, ablation_markdown
from distillsec.eval.results.metrics import collect
from distillsec.eval.results.record import read_record

Make = Callable[..., Path]
Cli = Callable[..., Result]
HOSTILE = "<script>alert(1)</script>"
UNBOUNDED = "unbounded trigger: no camera or file can carry it"


class Page(HTMLParser):
    """A page's elements in their order, as (tag, attributes), and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def reported(cli: Cli, *words: object) -> Page:
    out = Path(str(words[0])).parent / "report.html"
    done = cli("report", *words, "-o", out, "--quiet")
    assert done.exit_code == 0, done.stderr
    assert str(out) in done.stdout
    return Page(out)


# The page -----------------------------------------------------------------------------------------


def test_a_sweeps_page_is_complete_and_self_contained(cli: Cli, small_sweep: Path) -> None:
    page = reported(cli, small_sweep)
    assert len(page.html.encode()) < PAGE_CAP
    for part in ("Figures", "Charts", "Pictures", "Reproduction"):
        assert part in page.text
    assert "distillsec ablate sweep.yaml --out runs/s" in page.text
    assert "over distillation seeds" in page.text
    pictures = page.all("img")
    assert len(pictures) == 2 + 3 * 4  # ASR and CTA; of each point the first seed's four
    for picture in pictures:
        source = str(picture["src"])
        assert source.startswith("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.size == (int(str(picture["width"])), int(str(picture["height"])))
    texts = [str(picture["alt"]) for picture in pictures]
    assert "ASR against trigger_size: 0.12 at 1, 0.45 at 2, 0.85 at 3; control 0.01" in texts[0]
    assert any("left the set, in the middle its clean twin" in text for text in texts)
    assert any("target class cat" in text for text in texts)
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page.html)
    assert all(where.startswith(("data:", "#")) for where in addresses)
    assert "http://" not in page.html and "https://" not in page.html
    assert f"{small_sweep.name}/cells/0-0" in page.text and str(small_sweep.parent) not in page.html


def test_the_page_is_accessible(cli: Cli, small_sweep: Path) -> None:
    page = reported(cli, small_sweep)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.all(landmark)) == 1
    names = [attributes.get("id") for _, attributes in page.elements if attributes.get("id")]
    assert len(names) == len(set(names))
    links = [str(link["href"])[1:] for link in page.all("a")]
    assert links[0] == "content" and set(links) <= set(names)
    labelled = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert set(labelled) <= set(names)
    assert all(picture["alt"] for picture in page.all("img"))
    heads = [head for head in page.all("th") if head.get("scope") == "col"]
    assert heads and all(head["aria-sort"] == "none" for head in heads)
    assert len(page.all("button")) == len(heads)
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html")[0]["lang"] == "en"
    assert "prefers-color-scheme: dark" in page.html and "@media print" in page.html


def test_the_policy_allows_only_the_pages_own_style_and_script(cli: Cli, small_sweep: Path) -> None:
    page = reported(cli, small_sweep)
    policy = next(
        str(meta["content"])
        for meta in page.all("meta")
        if "content-security-policy" in str(meta.get("http-equiv")).lower()
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules.pop("img-src") == "data:"
    assert all(re.fullmatch(r"'sha256-[\w+/=]+'", rule) for rule in rules.values())
    assert rules.keys() == {"style-src", "script-src"}
    assert not any("style" in a or any(k.startswith("on") for k in a) for _, a in page.elements)


def test_names_are_escaped(cli: Cli, make_run: Make, make_sweep: Make, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", target=HOSTILE, labels=[HOSTILE], error=HOSTILE, command=HOSTILE)
    for folder in (run, run / "control"):
        labels = torch.arange(2)
        batch = Batch(images=torch.rand(2, 1, 8, 8, generator=torch.Generator()), labels=labels)
        recipe = Recipe(preprocessing=Preprocessing((0.5,), (0.25,)))
        found = DistilledSet(batch=batch, classes=(HOSTILE, "$dog$"), recipe=recipe)
        save_set(folder / "distilled.safetensors", found)
    point = (("name", HOSTILE),)
    failures = [{"place": HOSTILE, "reason": "</pre>" + HOSTILE}]
    sweep = make_sweep(tmp_path / "b", {point: {0: 0.5}}, failures=failures, axes=["name"])
    page = reported(cli, run, sweep)
    assert len(page.all("script")) == 1
    assert HOSTILE not in page.html and HOSTILE in page.text


def test_labels_stand_beside_the_figures(cli: Cli, make_sweep: Make, tmp_path: Path) -> None:
    points = {(("trigger_size", size),): {0: 0.5, 1: 0.6} for size in (1, 2)}
    page = reported(cli, make_sweep(tmp_path / "s", points, labels=[UNBOUNDED]))
    tags = [a for a in page.all("span") if a.get("title") == UNBOUNDED]
    assert len(tags) == 2  # one in each row
    assert f"Some points: {UNBOUNDED}" in page.text


def test_several_folders_have_an_overview(
    cli: Cli, make_run: Make, small_sweep: Path, tmp_path: Path
) -> None:
    page = reported(cli, small_sweep, make_run(tmp_path / "one"), make_run(tmp_path / "two"))
    assert "On this page" in page.text
    assert {"#experiment-1", "#experiment-2", "#experiment-3"} <= {
        link["href"] for link in page.all("a")
    }
    assert "over the victims of this one distilled set" in page.text


def test_a_clean_run_and_one_that_failed(cli: Cli, make_run: Make, tmp_path: Path) -> None:
    clean = make_run(tmp_path / "clean", asr=None)
    failed = make_run(tmp_path / "failed", status="error", error="loss is nan", metrics={})
    page = reported(cli, clean, failed)
    assert "loss is nan" in page.text and "The distilled images, a row for each class" in page.html


# What is missing or bad ---------------------------------------------------------------------------


def test_a_note_replaces_each_missing_picture(cli: Cli, make_run: Make, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "trigger.png").unlink()
    (run / "curves.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    (run / "control" / "distilled.safetensors").write_bytes(b"broken")
    page = reported(cli, run)
    assert "trigger.png: no such file" in page.text
    assert "curves.png: no picture" in page.text
    assert "not drawn" in page.text and "safetensors" in page.text
    assert len(page.all("img")) == 1


def test_sweeps_and_seeds_without_a_finished_run(cli: Cli, make_run: Make, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text(json.dumps({"sweep": {"description": "a new sweep"}}))
    page = reported(cli, sweep)
    assert "No run has finished yet" in page.text and "a new sweep" in page.text
    assert "running, last active 20" in page.text
    seeds = tmp_path / "seeds"
    make_run(seeds / "seed-3", status="running", metrics={})
    assert "there is no summary yet" in reported(cli, seeds).text


def test_a_run_that_was_killed_says_when_it_was_last_active(
    cli: Cli, make_run: Make, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", status="running", metrics={})
    log = run / "control" / "progress.jsonl"
    log.parent.mkdir(exist_ok=True)
    log.write_text("{}\n")
    for path in run.rglob("*"):
        os.utime(path, (0, 0))
    os.utime(log, (1e9, 1e9))
    page = reported(cli, run)
    assert "running, last active 2001-09-09 01:46 UTC" in page.text
    assert "can continue with --resume" in page.text
    table = cli("report", run, "--format", "md").stdout
    assert "Status: running, last active 2001-09-09 01:46 UTC." in table


def test_a_collected_record_is_read_without_its_further_parts(cli: Cli) -> None:
    """benchmarks/collect.py adds each seed's figures to a record."""
    record = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "digits-naive.json"
    assert "by_seed" in json.loads(record.read_text())
    table = cli("report", record, "--format", "md")
    assert table.exit_code == 0, table.stderr
    assert "seeds: digits · dc · IPC 10 · convnet · naive" in table.stdout


def test_no_twin_outside_of_the_folder_is_drawn(cli: Cli, make_run: Make, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", control={"folder": "../other", "key": "", "reused": True})
    assert "the clean twin lies outside of this folder" in reported(cli, run).text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "no such folder"),
        ("notes.txt", "hello", "no run, sweep or suite"),
        ("record.json", "{", "truncated or not JSON"),
        ("record.json", '{"schema_version": 7}', "no record of schema 1"),
        ("record.json", '{"schema_version": 1, "kind": "attack"}', "is damaged: config"),
        ("table.json", "[]", "is no table"),
        ("table.json", '{"kind": "ablation", "schema_version": 9}', "no table of schema 1"),
        ("table.json", '{"kind": "benchmark", "schema_version": 1}', "is damaged: status"),
    ],
)
def test_a_bad_folder_is_one_line(
    cli: Cli, name: str | None, content: str, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    if name:
        folder.mkdir()
        (folder / name).write_text(content)
    done = cli("report", folder, "-o", tmp_path / "report.html")
    assert done.exit_code == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1 and str(folder) in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_a_bad_output_is_refused_before_the_work(cli: Cli, make_run: Make, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for out, message in {
        tmp_path / "absent" / "r.html": "there is no folder",
        tmp_path: "it is a folder",
        run / "record.json": "would overwrite a run's own file",
        run / "distilled.safetensors": "would overwrite a run's own file",
    }.items():
        done = cli("report", run, "-o", out)
        assert done.exit_code == 2 and message in done.stderr
    assert read_record(run / "record.json").status == "done"
    (tmp_path / "old.html").write_text("old")
    assert cli("report", run, "-o", tmp_path / "old.html", "--quiet").exit_code == 0
    assert (tmp_path / "old.html").read_text().startswith("<!DOCTYPE html>")


def test_a_table_reads_nothing_outside_its_folder(
    make_run: Make, make_sweep: Make, tmp_path: Path
) -> None:
    make_run(tmp_path / "secret")
    sweep = make_sweep(tmp_path / "sweep", {(("size", 1),): {0: 0.5}})
    table = json.loads((sweep / "table.json").read_text())
    table["rows"][0]["folders"] = ["../secret"]
    (sweep / "table.json").write_text(json.dumps(table))
    (run,) = load_experiment(sweep).pictured
    assert run.record is None and "secret" not in str(run.folder)


# Charts and pictures ------------------------------------------------------------------------------


def test_axes_that_leave_the_base_one_at_a_time_take_two_columns(
    cli: Cli, make_sweep: Make, tmp_path: Path
) -> None:
    points: Any = {(("trigger_size", 2),): {0: 0.3}, (("backend", "dm"),): {0: 0.5}}
    out = make_sweep(tmp_path / "each", points, files=False, each=True)
    table = cli("report", out, "--format", "md").stdout
    written = ablation_markdown(Ablation.model_validate_json((out / "table.json").read_text()))
    for text in (table, written):
        assert "| axis | value | CTA" in text
        assert "| trigger_size | 2 | 0.9" in text and "| backend | dm | 0.9" in text
    both = {(("trigger_size", 2), ("ipc", 1)): {0: 0.3}}  # a grid's points leave it along two
    assert (
        "| trigger_size | ipc |"
        in cli("report", make_sweep(tmp_path / "grid", both, files=False), "--format", "md").stdout
    )


def test_the_set_its_twin_and_the_difference_are_in_the_pixels(tmp_path: Path) -> None:
    recipe = Recipe(preprocessing=Preprocessing((0.5,) * 3, (0.25,) * 3))

    def flat(*colours: tuple[float, float, float]) -> DistilledSet:
        images = torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, 3, 8, 8)
        batch = Batch(images=images.contiguous(), labels=torch.tensor([0, 1]))
        return DistilledSet(batch=batch, classes=("cat", "dog"), recipe=recipe)

    attacked, twin = flat((1, 0, 0), (0, 1, 0)), flat((0.2, 0, 0), (0, 1, 0))
    largest = twin_picture(tmp_path / "twin.png", attacked, twin, title="a set")
    assert largest == pytest.approx(0.8)
    with Image.open(tmp_path / "twin.png") as picture:
        found = picture.convert("RGB").getcolors(1 << 20)
    counts = {colour: number for number, colour in found or ()}
    tile = 72 * 72
    assert counts[(255, 0, 0)] == 2 * tile  # the set's, and the largest difference
    assert counts[(51, 0, 0)] == tile
    assert counts[(0, 255, 0)] == 2 * tile
    assert counts[(0, 0, 0)] >= tile  # no difference
    with pytest.raises(ValueError, match="images are"):
        other = Batch(images=torch.zeros(2, 1, 8, 8), labels=torch.tensor([0, 1]))
        twin_picture(
            tmp_path / "no.png",
            attacked,
            DistilledSet(batch=other, classes=("cat", "dog"), recipe=recipe),
            title="",
        )


def test_the_largest_pictures_are_reduced_until_all_fit() -> None:
    def noise(width: int, height: int) -> Picture:
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(0, 256, (height, width), generator=generator, dtype=torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values.numpy()).save(buffer, "PNG")
        return Picture(title="noise", alt="noise", png=buffer.getvalue())

    small, large = noise(160, 60), noise(900, 700)
    whole = fit([small, large, small], 10_000_000)
    assert [each.width for each in whole] == [160, 900, 160]
    tight = fit([small, large, small], 90_000)
    assert [tight[0].width, tight[2].width] == [160, 160] and 140 <= tight[1].width < 400
    assert sum(len(each.url) for each in tight) <= 90_000
    none = fit([small, large, small], 3_000)
    assert all(not each.url and "no room" in each.problem for each in none)


def test_more_than_a_hundred_runs_have_thumbnails(
    cli: Cli, make_sweep: Make, tmp_path: Path
) -> None:
    points = {(("trigger_size", size),): {0: 0.1, 1: 0.2, 2: 0.3} for size in range(34)}
    sweep = make_sweep(tmp_path / "sweep", points, files=False)
    page = reported(cli, sweep)
    assert "There are more than 100 runs on this page" in page.text
    notes = [a for a in page.all("div") if a.get("class") == "missing"]
    assert len(notes) == 34 * 2  # of two pictures each, not of four


# Tables alone -------------------------------------------------------------------------------------


def test_wide_csv_has_a_column_for_every_part_of_a_figure(cli: Cli, small_sweep: Path) -> None:
    done = cli("report", small_sweep, "--format", "csv", "--wide")
    assert done.exit_code == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["swept.trigger_size"] for row in rows] == ["1", "2", "3"]
    table = json.loads((small_sweep / "table.json").read_text())
    for row, wanted in zip(rows, table["rows"], strict=True):
        for name, summary in wanted["metrics"].items():
            low, high = summary["ci95"]
            parts = {"mean": summary["mean"], "std": summary["std"], "ci_low": low, "ci_high": high}
            assert {part: float(row[f"{name}_{part}"]) for part in parts} == parts
            assert row[f"{name}_n"] == "3"
        assert (row["seeds"], row["conditional_on_set"]) == ("0 1 2", "False")


def test_csv_has_no_formulas_and_has_the_comparison(
    cli: Cli, make_run: Make, tmp_path: Path
) -> None:
    run, base = make_run(tmp_path / "=1+1", labels=["=cmd()"]), make_run(tmp_path / "base")
    done = cli("report", run, "--format", "csv", "--wide", "--baseline", base)
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    assert (row["source"], row["labels"]) == ("'=1+1", "'=cmd()")
    assert row["attack_success_rate_verdict"] == "too few seeds"
    assert float(row["attack_success_rate_difference"]) == 0.0


@pytest.mark.parametrize("label", ["=1+1", " \n@SUM(A1)", "\t-1", "＝1", "+1"])
def test_csv_marks_what_a_spreadsheet_would_run(
    cli: Cli, make_sweep: Make, tmp_path: Path, label: str
) -> None:
    sweep = make_sweep(tmp_path / "s", {(("a", f"x;{label}"),): {0: 0.5}}, labels=[label])
    text = cli("report", sweep, "--format", "csv", "--wide").stdout
    assert len(text.splitlines()) == 2
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["labels"] == f"'{label.strip()}"
    assert f'"{" ".join(f"x;{label}".split())}"' in text  # quoted as a whole


def test_csv_heads_are_no_formulas(cli: Cli, make_run: Make, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics=collect([{"=cmd()": 0.5}], None))
    text = cli("report", run, "--format", "csv", "--wide").stdout
    assert {head[:6] for head in next(csv.reader(io.StringIO(text))) if "cmd" in head} == {"'=cmd("}


def test_csv_has_a_row_for_each_metric(cli: Cli, small_sweep: Path) -> None:
    done = cli("report", small_sweep, "--format", "csv")
    assert done.exit_code == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    table = json.loads((small_sweep / "table.json").read_text())
    wanted = [(row, name) for row in table["rows"] for name in row["metrics"]]
    assert len(rows) == len(wanted)
    for found, (row, name) in zip(rows, wanted, strict=True):
        summary = row["metrics"][name]
        assert found["metric"] == name.removeprefix("control_")
        assert (found["on"] == "clean twin") == name.startswith("control_")
        assert found["swept.trigger_size"] == str(row["values"]["trigger_size"])
        about = [found[key] for key in ("dataset", "backend", "attack", "ipc", "victims", "seeds")]
        assert about == ["digits", "dc", "naive", "2", "2", "0 1 2"]
        figures = [float(found[key]) for key in ("mean", "std", "ci_low", "ci_high", "n")]
        assert figures == [summary["mean"], summary["std"], *summary["ci95"], 3]


def test_csv_has_the_comparison_beside_its_metric(cli: Cli, make_run: Make, tmp_path: Path) -> None:
    run, base = make_run(tmp_path / "run", asr=0.5), make_run(tmp_path / "base", asr=0.25)
    done = cli("report", run, "--format", "csv", "--baseline", base)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    (row,) = [
        row for row in rows if (row["metric"], row["on"]) == ("attack_success_rate", "attacked set")
    ]
    figures = [float(row[key]) for key in ("mean", "before", "difference")]
    assert figures == pytest.approx([0.5, 0.25, 0.25]) and row["verdict"] == "too few seeds"


def test_parquet_is_the_tidy_table(cli: Cli, make_sweep: Make, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    points = {(("backend", "dc"),): {0: 0.5}, (("backend", 3),): {0: 0.25}}
    sweep = make_sweep(tmp_path / "s", points)
    done = cli("report", sweep, "--format", "parquet", "-o", tmp_path / "t.parquet")
    assert done.exit_code == 0, done.stderr
    frame = pandas.read_parquet(tmp_path / "t.parquet")
    text = cli("report", sweep, "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(frame.columns) == list(rows[0]) and len(frame) == len(rows)
    assert list(frame["swept.backend"]) == [row["swept.backend"] for row in rows]
    assert list(frame["mean"]) == [float(row["mean"]) for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "parquet"), "is no text: name a file with -o"),
        (("--format", "md", "--wide"), "--wide is for --format csv, not for md"),
        (("--wide",), "--wide is for --format csv, not for html"),
    ],
)
def test_formats_that_do_not_go_together(
    words: tuple[str, ...], message: str, cli: Cli, small_sweep: Path
) -> None:
    done = cli("report", small_sweep, *words)
    assert done.exit_code == 2 and message in done.stderr


def test_parquet_without_pandas_is_one_line(
    cli: Cli, small_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = cli("report", small_sweep, "--format", "parquet", "-o", tmp_path / "t.parquet")
    assert done.exit_code == 2 and "pip install 'distillsec[pandas]'" in done.stderr


def test_markdown_from_a_record_is_text(cli: Cli, make_sweep: Make, tmp_path: Path) -> None:
    labels = ["![x](http://a.example/x.png)", "[a](https://b.example)", "www.c.example"]
    sweep = make_sweep(tmp_path / "s", {(("a", "<img src=x>"),): {0: 0.5}}, labels=labels)
    text = cli("report", sweep, "--format", "md").stdout
    for live in ("](", "http:", "https:", "www.", "<img"):
        assert not re.search(rf"(?<!\\){re.escape(live)}", text), live


def test_markdown_and_latex(cli: Cli, make_sweep: Make, tmp_path: Path) -> None:
    point = (("a_b", "x|y & 5 % of $"),)
    sweep = make_sweep(tmp_path / "s", {point: {0: 0.5, 1: 0.7, 3: 0.6}}, labels=[UNBOUNDED])
    text = cli("report", sweep, "--format", "md").stdout
    (line,) = [line for line in text.splitlines() if line.startswith("| x")]
    assert (
        len(re.split(r"(?<!\\)\|", line))
        == len(text.split("| a_b")[1].split("\n")[0].split("|")) + 1
    )
    assert "0.600 [0.352, 0.848]" in line and UNBOUNDED in line and "| 3 |" in line
    out = tmp_path / "t.tex"
    assert cli("report", sweep, "--format", "latex", "-o", out).exit_code == 0
    written = out.read_text()
    assert r"x|y \& 5 \% of \$" in written and r"a\_b" in written
    for rule in ("toprule", "midrule", "bottomrule"):
        assert rf"\{rule}" in written
    rows = [line for line in written.splitlines() if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    assert latex("−1 ∞ {~^\\}") == (
        r"$-$1 $\infty$ \{\textasciitilde{}\textasciicircum{}\textbackslash{}\}"
    )


# One real run -------------------------------------------------------------------------------------


def test_the_page_of_a_real_run(cli: Cli, finished: Path, tmp_path: Path) -> None:
    done = cli("report", finished, "-o", tmp_path / "report.html", "--quiet")
    assert done.exit_code == 0, done.stderr
    page = Page(tmp_path / "report.html")
    record = read_record(finished / "record.json")
    assert f"{record.mean('attack_success_rate'):.3f}" in page.text
    assert record.command in page.text
    assert len(page.all("img")) == 4 and "not drawn" not in page.text


def test_the_saved_configuration_gives_the_same_run(
    cli: Cli, finished: Path, tmp_path: Path
) -> None:
    """What the page shows as config.yaml resolves to the same run."""
    cli("report", finished, "-o", tmp_path / "report.html", "--quiet")
    page = (tmp_path / "report.html").read_text()
    (file,) = re.findall(r'aria-label="The file">(.*?)</pre>', page, re.DOTALL)
    (tmp_path / "config.yaml").write_text(html.unescape(file))
    done = cli("attack", "--config", tmp_path / "config.yaml", "--print-config")
    assert done.exit_code == 0, done.stderr
    assert yaml.safe_load(done.stdout) == read_record(finished / "record.json").config
