"""Train the zoo of shadow networks for MNTD, and keep it in a file."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from ...defenses.common.shadows import ShadowOptions, Zoo, describe_zoo, load_zoo, train_zoo
from ...distill.types import Batch, RequestError
from ..config.schema import Config
from ..run.lock import locked_file
from ..run.progress import Reporter
from ..run.setup import Setup, prepare

_PAIRS_PER_WRITE = 16
"""The file is written after as many pairs of shadows."""


def make_zoo(
    config: Config,
    out: Path,
    options: ShadowOptions,
    *,
    images: int,
    data_dir: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Zoo:
    """Train ``options.pairs`` pairs of shadows of the victims' architecture and keep them in
    ``out``.

    images: the number of clean training images that they train on. The file exists after the first
    pairs; ``resume`` continues it, with the same or a larger number of pairs.
    Errors: ``RequestError`` for a file that exists (without ``resume``), that holds shadows of
    other options, or that another process is writing.
    """
    reporter = reporter or Reporter()
    if out.exists() and not resume:
        raise RequestError(f"{out} exists: choose another --out, or continue with --resume")
    setup = prepare(config, data_dir, bars=reporter.bars)
    clean = _images(setup, images)
    _check_writable(out)
    with locked_file(out):
        return _grow(out, setup, clean, options, reporter)


def _grow(out: Path, setup: Setup, clean: Batch, options: ShadowOptions, reporter: Reporter) -> Zoo:
    """Train the pairs that the file ``out`` lacks."""
    network = setup.primary_network
    zoo = load_zoo(out, network) if out.exists() else None
    if zoo is not None:
        _check_same(zoo, describe_zoo(network, clean, options), out)
    total = 2 * options.pairs
    with reporter.phase("shadows", total, len(zoo) if zoo else 0) as phase:
        while zoo is None or len(zoo) < total:
            pairs = min(options.pairs, (len(zoo) // 2 if zoo else 0) + _PAIRS_PER_WRITE)
            zoo = train_zoo(
                network,
                clean,
                setup.recipe,
                options.model_copy(update={"pairs": pairs}),
                lambda number: setup.streams.generator("defense", 4, number),
                unfinished=zoo,
                progress=lambda done, _: phase.reach(done),
            )
            zoo.save(out)
    return zoo


def _check_writable(out: Path) -> None:
    """Make the folder of ``out``, and refuse one in which no file can be made."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix="."):
            pass
    except OSError as error:
        raise RequestError(f"cannot write {out}: {error.strerror}") from error


def _images(setup: Setup, count: int) -> Batch:
    """Clean training images: defenses are measured on the test images."""
    train = setup.data.train
    if not 10 <= count <= len(train):
        raise RequestError(f"--images {count}: expected 10 to {len(train)} (the training images)")
    order = torch.randperm(len(train), generator=setup.streams.generator("defense", 3))
    return replace(train.rows(order[:count].to(train.labels.device)), index=None)


def _check_same(zoo: Zoo, wanted: dict[str, object], out: Path) -> None:
    """Refuse a zoo of other options, or with more pairs than wanted."""
    for key, value in wanted.items():
        found = zoo.description.get(key)
        if key == "pairs":
            if len(zoo) > 2 * int(str(value)):
                raise RequestError(f"{out} holds {len(zoo) // 2} pairs already, more than {value}")
        elif found != value:
            raise RequestError(f"{out} was made with {key} {found}, not {value}")
