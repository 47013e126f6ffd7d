"""A report as one self-contained page of HTML."""

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

from ..figures.style import as_png
from ..figures.sweep_chart import draw_chart
from ..results.version import installed_version
from ..run.progress import Reporter
from .charts import axis_charts, chart_text
from .compare import Comparison
from .heat_maps import HeatMap, heat_maps, shades
from .model import Experiment, PicturedRun
from .pictures import EmbeddedPicture, Picture, fit, pictures_of
from .tables import ReportTable, change_table, defended_table, overview_table, summary_table

PAGE_CAP: Final = 5_000_000
"""The most bytes of a page, pictures included."""

MOST_RUNS: Final = 100  # with more, each point has two thumbnails
_LEAST_OF_POINT: Final = 12_000  # bytes below which a point's pictures are unreadable
_SPARE: Final = 50_000
_TEMPLATES: Final = Path(__file__).with_name("templates")
_COMMANDS: Final = {"sweep": "ablate", "suite": "benchmark"}

_EmbeddedChart = tuple[EmbeddedPicture, str]  # with the note beside it


@final
@dataclass(frozen=True, kw_only=True)
class _PointPictures:
    """The pictures of a point's run. folder: from the experiment's name on."""

    title: str
    folder: str
    pictures: Sequence[EmbeddedPicture]


@final
@dataclass(frozen=True, kw_only=True)
class _PageSection:
    """What the template shows of one experiment.

    points_left_out: how many have no pictures. config_text: the configuration as YAML; rerun: the
    command that runs it again.
    """

    experiment: Experiment
    number: int
    summary: ReportTable
    charts: Sequence[_EmbeddedChart]
    defenses: ReportTable | None
    heat_maps: Sequence[HeatMap]
    points: Sequence[_PointPictures]
    points_left_out: int
    comparison: Comparison | None
    changes: ReportTable | None
    environment: Mapping[str, str]
    config_text: str
    rerun: str


def page(
    experiments: Sequence[Experiment],
    comparisons: Sequence[Comparison] = (),
    *,
    command: str = "",
    reporter: Reporter | None = None,
) -> str:
    """The page of all ``experiments``, at most 5 MB.

    comparisons: each experiment's with the baseline, if there is one. command: what makes the page
    again. A picture that can't be shown becomes a note. With very many points the last have no
    pictures.
    """
    reporter = reporter or Reporter(quiet=True)
    bare = _render(experiments, comparisons, command, [], [])
    room = max(0, PAGE_CAP - _SPARE - len(bare.encode()))
    charts = _charts(experiments, room // 2)
    embedded = [picture for each in charts for picture, _ in each]
    room -= sum(len(each.url) + len(each.alt) * 2 + 400 for each in embedded)
    points = _points(experiments, room, reporter)
    return _render(experiments, comparisons, command, charts, points)


def _charts(experiments: Sequence[Experiment], room: int) -> list[list[_EmbeddedChart]]:
    """The charts of every experiment, with what must stand beside them."""
    drawn = [
        (number, chart)
        for number, experiment in enumerate(experiments)
        for chart in axis_charts(experiment)
    ]
    pictures = [
        Picture(title=chart.title, alt=chart_text(chart), png=as_png(draw_chart(chart)))
        for _, chart in drawn
    ]
    found: list[list[_EmbeddedChart]] = [[] for _ in experiments]
    for (number, chart), picture in zip(drawn, fit(pictures, room), strict=True):
        labels = (f"Some points: {label}." for label in experiments[number].labels)
        found[number].append((picture, " ".join(filter(None, (chart.note, *labels)))))
    return found


def _points(
    experiments: Sequence[Experiment], room: int, reporter: Reporter
) -> list[list[_PointPictures]]:
    """The pictures of every experiment's points, as large as the room allows."""
    few = _many_runs(experiments)
    runs = [(number, run) for number, each in enumerate(experiments) for run in each.pictured]
    runs = runs[: room // _LEAST_OF_POINT]
    drawn: list[tuple[int, PicturedRun, list[Picture]]] = []
    with reporter.phase("drawing", max(1, len(runs))) as phase:
        for count, (number, run) in enumerate(runs):
            share = room // len(runs)
            drawn.append((number, run, pictures_of(run, share=share, few=few)))
            phase.reach(count + 1)
    flat = [picture for _, _, pictures in drawn for picture in pictures]
    room -= sum(len(p.alt) * 2 + len(p.title) + len(p.problem) * 2 + 400 for p in flat)
    embedded = iter(fit(flat, max(0, room)))
    found: list[list[_PointPictures]] = [[] for _ in experiments]
    for number, run, pictures in drawn:
        point = _PointPictures(
            title=run.title,
            folder=experiments[number].relative(run.folder),
            pictures=[next(embedded) for _ in pictures],
        )
        found[number].append(point)
    return found


def _many_runs(experiments: Sequence[Experiment]) -> bool:
    return sum(experiment.runs for experiment in experiments) > MOST_RUNS


def _render(
    experiments: Sequence[Experiment],
    comparisons: Sequence[Comparison],
    command: str,
    charts: Sequence[Sequence[_EmbeddedChart]],
    points: Sequence[Sequence[_PointPictures]],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,  # names come from files; by the ending .j2 Jinja would not escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = environment.get_template("report.css.j2").render(shades=shades())
    script = environment.get_template("report.js.j2").render()
    compared = {id(each.experiment): each for each in comparisons}
    sections = [
        _section(
            experiment,
            number,
            charts[number] if charts else [],
            points[number] if points else [],
            compared.get(id(experiment)),
        )
        for number, experiment in enumerate(experiments)
    ]
    return environment.get_template("report.html.j2").render(
        # The content of a style or a script element is not escaped; both are our own.
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        sections=sections,
        overview=overview_table(experiments) if len(experiments) > 1 else None,
        baseline=comparisons[0].baseline if comparisons else None,
        many_runs=_many_runs(experiments),
        command=command,
        version=installed_version(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _section(
    experiment: Experiment,
    number: int,
    charts: Sequence[_EmbeddedChart],
    points: Sequence[_PointPictures],
    comparison: Comparison | None,
) -> _PageSection:
    return _PageSection(
        experiment=experiment,
        number=number + 1,
        summary=summary_table(experiment),
        charts=charts,
        defenses=defended_table(experiment) if experiment.defended else None,
        heat_maps=heat_maps(experiment),
        points=points,
        points_left_out=len(experiment.pictured) - len(points),
        comparison=comparison,
        changes=change_table(comparison) if comparison and comparison.changes else None,
        environment=_environment(experiment.environment),
        config_text=_yaml(experiment.config),
        rerun=_rerun(experiment),
    )


def _environment(environment: Mapping[str, Any]) -> dict[str, str]:
    """Versions, commit and machine, with their names."""
    commit = environment.get("commit")
    found = {"distillsec": str(environment.get("distillsec", "unknown"))}
    found["commit"] = "not run from a checkout" if commit is None else str(commit)
    if environment.get("dirty"):
        found["commit"] += ", with uncommitted changes"
    versions = environment.get("versions")
    found["python"] = str(environment.get("python", "unknown"))
    found |= versions if isinstance(versions, dict) else {}
    for key in ("platform", "device_name", "threads", "started"):
        if environment.get(key) is not None:
            found[key.replace("_", " ")] = str(environment[key])
    return found


def _yaml(config: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return text if config else ""


def _rerun(experiment: Experiment) -> str:
    """The command that takes the resolved configuration; empty where that is not sufficient."""
    if experiment.shape in _COMMANDS:
        return f"distillsec {_COMMANDS[experiment.shape]} {experiment.shape}.yaml --out runs/again"
    if experiment.kind not in ("attack", "distill", "seeds"):
        return ""
    command = "attack" if experiment.config.get("attack") else "distill"
    seeds = f" --seeds {experiment.runs}" if experiment.kind == "seeds" else ""
    return f"distillsec {command} --config config.yaml{seeds} --out runs/again"


def _hash(text: str) -> str:
    """The hash by which the page's content security policy allows a style or a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
