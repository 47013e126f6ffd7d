"""Run a sweep: every cell once, with its clean twin, its experts and its defenses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from ...distill.files.safe import read_json, write_json, write_text
from ..results.record import Failure
from ..run.progress import Reporter, duration
from .ablation_table import Ablation, as_markdown, summarise_sweep
from .executors import Executor
from .jobs import Defending, Distillation, Piece
from .ledger import Ledger, entered
from .scheduler import carry_out
from .sweep import Sweep, cell_of, plan

_SWEEP = "sweep.json"


def ablate(
    sweep: Sweep,
    out: Path,
    executor: Executor,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    retries: int = 1,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Ablation:
    """Run ``sweep`` in the folder ``out`` and return its table, which also lies there.

    Cells go by the hash of their configuration: with ``resume`` those that are there are not run
    again, even where the sweep has changed around them. limit: run no more pieces than that now.
    A cell that fails is tried again, then is in the table with its reason.
    Errors: ``RequestError`` for a folder that holds something else.
    """

    def refresh(failures: Sequence[Failure]) -> None:
        found = summarise_sweep(sweep, out, failures)
        write_json(out / "table.json", found.model_dump(mode="json"))
        write_text(out / "table.md", as_markdown(found))

    with entered(out, _SWEEP, "sweep", resume=resume):
        write_json(out / _SWEEP, {"sweep": sweep.model_dump(mode="json")})
        pieces = plan(sweep)
        if limit is not None:
            pieces = _first(pieces, out, limit)
        carry_out(
            pieces,
            out,
            executor,
            title="ablation",
            refresh=refresh,
            data_dir=data_dir,
            retries=retries,
            reporter=reporter or Reporter(),
        )
    return Ablation.model_validate(read_json(out / "table.json"))


def _first(pieces: Sequence[Piece], out: Path, limit: int) -> list[Piece]:
    """What is done already, and the first ``limit`` of the others: those go after none left out."""
    found, left = [], limit
    for piece in pieces:
        done = piece.done(out)
        if done or left > 0:
            found.append(piece)
            left -= not done
    return found


@final
@dataclass(frozen=True)
class Outlook:
    """What a sweep would do, and how long it may take.

    cells: points × seeds, each configuration once. twins: clean runs besides. defended: records of
    the bench. done: pieces that are finished. seconds: of one worker for what is left, from the
    cells that were measured; ``None`` where none was.
    """

    points: int
    seeds: int
    cells: int
    twins: int
    defended: int
    done: int
    left: int
    seconds: float | None

    def lines(self, room: int) -> list[str]:
        """For people; ``room``: workers."""
        told = [
            f"{self.points} points × {self.seeds} seeds: {self.cells} cells, "
            f"{self.twins} clean twins, {self.defended} records of defenses",
            f"{self.done} of {self.done + self.left} are done",
        ]
        if not self.left:
            return told
        if self.seconds is None:
            return [*told, "no cell was measured yet: --limit 2 runs two, for an estimate"]
        workers = f"{room} worker" + "s" * (room > 1)
        return [*told, f"about {duration(self.seconds / room)} are left on {workers}"]


def outlook(sweep: Sweep, out: Path | None) -> Outlook:
    """What running ``sweep`` in ``out`` would do; writes nothing."""
    pieces, points = plan(sweep), sweep.points()
    wanted = {cell_of(sweep.config(p, s)) for p in points for s in sweep.seed_range()}
    distilled = [piece for piece in pieces if isinstance(piece, Distillation)]
    done = [piece for piece in pieces if out is not None and piece.done(out)]
    left = [piece for piece in pieces if piece not in done]
    return Outlook(
        points=len(points),
        seeds=sweep.seeds,
        cells=len(wanted),
        twins=sum(piece.place not in wanted for piece in distilled),
        defended=sum(isinstance(piece, Defending) for piece in pieces),
        done=len(done),
        left=len(left),
        seconds=None if out is None else _estimate(pieces, left, Ledger(out).seconds()),
    )


def _estimate(
    pieces: Sequence[Piece], left: Sequence[Piece], measured: dict[str, float]
) -> float | None:
    """Seconds for ``left``: as other seeds of the same point took, else as its kind on average."""
    by_point: dict[str, list[float]] = {}
    by_kind: dict[str, list[float]] = {}
    for piece in pieces:
        if piece.place in measured:
            by_point.setdefault(_but_the_seed(piece), []).append(measured[piece.place])
            by_kind.setdefault(_kind(piece), []).append(measured[piece.place])
    every = [seconds for known in by_kind.values() for seconds in known]
    if not every:
        return None
    total = 0.0
    for piece in left:
        known = by_point.get(_but_the_seed(piece)) or by_kind.get(_kind(piece)) or every
        total += sum(known) / len(known)
    return total


def _kind(piece: Piece) -> str:
    return f"{type(piece).__name__} {'attacked' if piece.config.attack else 'clean'}"


def _but_the_seed(piece: Piece) -> str:
    run = piece.config.run.model_copy(update={"seed": 0})
    return f"{type(piece).__name__} {piece.config.model_copy(update={'run': run}).key()}"
