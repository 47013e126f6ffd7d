"""``distillsec shadows``: a zoo is made, continued and used; wrong requests are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from click.testing import Result

from distillsec.distill.files.safe import read_tensors
from distillsec.eval.results.record import read_record
from distillsec.eval.run.lock import locked_file

Cli = Callable[..., Result]
FEW = ("--images", 40, "--shadow-epochs", 1, "--quiet")


def test_a_zoo_is_made_continued_and_used_by_mntd(finished: Path, cli: Cli, tmp_path: Path) -> None:
    zoo = tmp_path / "new" / "zoo.safetensors"
    done = cli("shadows", finished, "--pairs", 3, *FEW, "--out", zoo)
    assert done.exit_code == 0, done.stderr
    assert "6 shadows" in done.stdout and str(zoo) in done.stdout
    whole = tmp_path / "whole.safetensors"
    cli("shadows", finished, "--pairs", 4, *FEW, "--out", whole)
    again = cli("shadows", finished, "--pairs", 4, *FEW, "--out", zoo, "--resume")
    assert again.exit_code == 0, again.stderr
    grown, info = read_tensors(zoo)
    straight, expected = read_tensors(whole)
    assert info["zoo"] == expected["zoo"] and info["zoo"]["pairs"] == 4
    assert grown.keys() == straight.keys()
    assert all(torch.equal(value, straight[name]) for name, value in grown.items())
    words = ("--defense", "mntd", "--option", f"mntd.zoo={zoo}", "--option", "mntd.epochs=2")
    used = cli("defend", finished, *words, "--quiet", "--out", tmp_path / "out")
    assert used.exit_code == 0, used.stderr
    outcome = read_record(tmp_path / "out" / "record.json").defenses["mntd"]
    assert outcome.status == "done" and "model_statistic" in outcome.metrics
    assert "target_suspected" not in outcome.metrics  # it names no class


def test_a_wrong_request_is_one_line_and_changes_nothing(
    finished: Path, cli: Cli, tmp_path: Path
) -> None:
    zoo = tmp_path / "zoo.safetensors"
    cli("shadows", finished, "--pairs", 2, *FEW, "--out", zoo)
    before = zoo.read_bytes()
    for words, fault in (
        (("--pairs", 2, *FEW), "exists"),
        (("--pairs", 2, "--images", 41, "--quiet", "--resume"), "was made with images 40, not 41"),
        (("--pairs", 2, *FEW, "--resume", "--set", "width=9"), "expected"),
        (("--pairs", 1, *FEW, "--resume"), "pairs"),
        (("--pairs", 2, "--images", 5, "--resume"), "expected 10 to"),
    ):
        done = cli("shadows", finished, *words, "--out", zoo)
        assert done.exit_code == 2, words
        assert fault in done.stderr and done.stderr.count("\n") == 1
        assert zoo.read_bytes() == before
    with locked_file(zoo):
        second = cli("shadows", finished, "--pairs", 3, *FEW, "--resume", "--out", zoo)
    assert second.exit_code == 2 and f"another process is using {zoo}" in second.stderr
    assert zoo.read_bytes() == before
    missing = cli("defend", finished, "--defense", "mntd", "--option", "mntd.zoo=nowhere")
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert "mntd: nowhere: no such file" in missing.stderr
    unwritable = cli("shadows", finished, "--pairs", 2, *FEW, "--out", "/proc/zoo")
    assert unwritable.exit_code == 2 and "cannot write /proc/zoo" in unwritable.stderr


def test_shadows_have_the_network_that_a_sets_file_names(
    finished: Path, cli: Cli, tmp_path: Path
) -> None:
    file, zoo = finished / "distilled.safetensors", tmp_path / "zoo.safetensors"
    done = cli("shadows", file, "--dataset", "digits", "--pairs", 2, *FEW, "--out", zoo)
    assert done.exit_code == 0, done.stderr
    options = ("--defense", "mntd", "--option", f"mntd.zoo={zoo}", "--option", "mntd.epochs=2")
    used = cli("defend", finished, *options, "--quiet", "--out", tmp_path / "out")
    assert used.exit_code == 0, used.stderr
