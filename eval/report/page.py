"""A report as one page of HTML that needs nothing beside itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..results.record import metadata_version
from ..run.progress import Reporter
from .cells import Table, change_table, defense_table, over, overview_table, summary_table
from .charts import axis_charts
from .compare import Comparison
from .heat import Heat, heat_maps, shades
from .model import Shown, Source
from .pictures import Fitted, Picture, fit, pictures_of
from .tables import remarks

PAGE_CAP: Final = 5_000_000
"""The most bytes of a page, pictures included."""

MOST_CELLS: Final = 100  # beyond, only two thumbnails of a point
_LEAST_OF_POINT: Final = 12_000  # bytes below which a point's pictures show nothing
_SPARE: Final = 50_000
_TEMPLATES: Final = Path(__file__).with_name("templates")
_AGAIN: Final = {"sweep": "ablate", "suite": "benchmark"}


@final
@dataclass(frozen=True, kw_only=True)
class _Point:
    title: str
    place: str
    pictures: Sequence[Fitted]


@final
@dataclass(frozen=True, kw_only=True)
class _Section:
    """What the template shows of one source."""

    source: Source
    number: int
    over: str
    summary: Table
    charts: Sequence[tuple[str, Fitted, str]]
    defenses: Table | None
    heats: Sequence[Heat]
    points: Sequence[_Point]
    left_out: int
    changes: Table | None
    comparison: Comparison | None
    remarks: Sequence[str]
    environment: Mapping[str, str]
    file: str
    again: str


def page(
    sources: Sequence[Source],
    comparisons: Sequence[Comparison] = (),
    *,
    command: str = "",
    reporter: Reporter | None = None,
) -> str:
    """The page of all ``sources``, at most 5 MB.

    comparisons: each source's against the baseline, if there is one. command: what makes the page
    again. A picture that can't be shown stands as a note; of very many points the last have none.
    """
    reporter = reporter or Reporter(quiet=True)
    charts = [axis_charts(source) for source in sources]
    bare = _render(sources, comparisons, command, [], [], 0)
    room = max(0, PAGE_CAP - _SPARE - len(bare.encode()))
    drawn = [
        Picture(title=f"{chart.title} against {chart.axis}", text=chart.text, png=chart.png)
        for each in charts
        for chart in each
    ]
    fitted = fit(drawn, room // 2)
    room -= sum(len(each.url) + len(each.text) * 2 + 400 for each in fitted)
    labelled = [
        [
            (f"{chart.title} against {chart.axis}", fitted.pop(0), _beside(chart.note, source))
            for chart in each
        ]
        for each, source in zip(charts, sources, strict=True)
    ]
    points, left_out = _points(sources, room, reporter)
    return _render(sources, comparisons, command, labelled, points, left_out)


def _beside(note: str, source: Source) -> str:
    told = [f"Some points: {label}." for label in source.labels]
    return " ".join([*([note] if note else []), *told])


def _points(
    sources: Sequence[Source], room: int, reporter: Reporter
) -> tuple[list[list[_Point]], int]:
    """The pictures of every source's points, as large as the room allows; how many had none."""
    few = sum(source.cells for source in sources) > MOST_CELLS
    every = [(number, shown) for number, source in enumerate(sources) for shown in source.shown]
    kept = every[: room // _LEAST_OF_POINT]
    raw: list[tuple[int, Shown, list[Picture]]] = []
    with reporter.phase("drawing", max(1, len(kept))) as phase:
        for count, (number, shown) in enumerate(kept):
            share = room // len(kept)
            raw.append((number, shown, pictures_of(shown, share=share, few=few)))
            phase.reach(count + 1)
    flat = [picture for _, _, pictures in raw for picture in pictures]
    room -= sum(len(p.text) * 2 + len(p.title) + len(p.trouble) * 2 + 400 for p in flat)
    fitted = iter(fit(flat, max(0, room)))
    found: list[list[_Point]] = [[] for _ in sources]
    for number, shown, pictures in raw:
        point = _Point(
            title=shown.title,
            place=sources[number].told(shown.folder),
            pictures=[next(fitted) for _ in pictures],
        )
        found[number].append(point)
    return found, len(every) - len(kept)


def _render(
    sources: Sequence[Source],
    comparisons: Sequence[Comparison],
    command: str,
    charts: Sequence[Sequence[tuple[str, Fitted, str]]],
    points: Sequence[Sequence[_Point]],
    left_out: int,
) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,  # names come from files: of the name's ending .j2 Jinja makes nothing
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = environment.get_template("report.css.j2").render(shades=shades())
    script = environment.get_template("report.js.j2").render()
    against = {id(each.source): each for each in comparisons}
    sections = [
        _section(
            source,
            number,
            charts[number] if charts else [],
            points[number] if points else [],
            against.get(id(source)),
        )
        for number, source in enumerate(sources)
    ]
    return environment.get_template("report.html.j2").render(
        # What is written between the tags of a style or a script is not escaped; both are ours.
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        sections=sections,
        overview=overview_table(sources) if len(sources) > 1 else None,
        baseline=comparisons[0].baseline if comparisons else None,
        few=sum(source.cells for source in sources) > MOST_CELLS,
        left_out=left_out,
        command=command,
        version=metadata_version(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _section(
    source: Source,
    number: int,
    charts: Sequence[tuple[str, Fitted, str]],
    points: Sequence[_Point],
    comparison: Comparison | None,
) -> _Section:
    return _Section(
        source=source,
        number=number + 1,
        over=over(source),
        summary=summary_table(source),
        charts=charts,
        defenses=defense_table(source) if source.defended else None,
        heats=heat_maps(source),
        points=points,
        left_out=len(source.shown) - len(points),
        changes=change_table(comparison) if comparison and comparison.changes else None,
        comparison=comparison,
        remarks=remarks(comparison) if comparison else (),
        environment=_environment(source.environment),
        file=_dump(source.config),
        again=_again(source),
    )


def _environment(found: Mapping[str, Any]) -> dict[str, str]:
    """Versions, commit and machine, for people."""
    commit = found.get("commit")
    told = {"distillsec": str(found.get("distillsec", "unknown"))}
    told["commit"] = "not run from a checkout" if commit is None else str(commit)
    if found.get("dirty"):
        told["commit"] += ", with changes that were not committed"
    versions = found.get("versions")
    named = {**versions} if isinstance(versions, dict) else {}
    told |= {"python": str(found.get("python", "unknown")), **named}
    for key in ("platform", "device_name", "threads", "started"):
        if found.get(key) is not None:
            told[key.replace("_", " ")] = str(found[key])
    return told


def _dump(config: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return text if config else ""


def _again(source: Source) -> str:
    """The command that takes the resolved configuration; empty where that isn't all there is."""
    if source.shape in _AGAIN:
        return f"distillsec {_AGAIN[source.shape]} {source.shape}.yaml --out runs/again"
    if source.kind not in ("attack", "distill", "seeds"):
        return ""
    verb = "attack" if source.config.get("attack") else "distill"
    seeds = f" --seeds {source.cells}" if source.kind == "seeds" else ""
    return f"distillsec {verb} --config config.yaml{seeds} --out runs/again"


def _hash(text: str) -> str:
    """As the page's own policy names what may run in it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
