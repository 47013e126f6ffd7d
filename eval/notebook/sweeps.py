"""``ablate`` from Python, and the table of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...distill.files.safe import read_json
from ...distill.plugins import objects_by_name
from ...distill.types import RequestError
from ..grid.ablate import ablate
from ..grid.choose_executor import choose_executor
from ..grid.sweep import read_sweep as sweep_from_file
from ..grid.sweep import sweep_from
from ..results.ablation import ABLATION_VERSION, Ablation
from ..results.record_parts import table_from
from ..run.progress import Reporter
from .naming import ObjectNames
from .runs import Folder, folder_for

_TABLE = "table.json"
_PLAIN = (str, int, float, bool, type(None))


def run_ablate(
    sweep: Folder | Mapping[str, Any],
    *,
    seeds: int | None = None,
    out: Folder | None = None,
    resume: bool = False,
    limit: int | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    gpus: float | None = None,
    memory: float | None = None,
    retries: int = 1,
    data_dir: Folder | None = None,
    quiet: bool = False,
    **base: Any,
) -> Ablation:
    """Run a sweep, each cell once; as ``distillsec ablate``.

    sweep: a YAML file, or its content as a mapping: ``{"base": {"preset": "digits-naive"}, "grid":
    {"trigger_size": [2, 3]}}``. base: keys of its base, which win. Where a sweep takes the name of
    an attack, a backend, a network or a defense, a mapping may hold the class. seeds, out, resume,
    limit, retries: as for ``ablate``. jobs, ray, gpus, memory: as for ``choose_executor``; with
    objects all cells run one after the other in this process.
    Returns the table, which is also in ``out``. Errors: ``RequestError`` before any work; the table
    gives the reasons of failed cells.
    """
    names = ObjectNames()
    first = names.keys(base)
    content = _with_names(sweep, "sweep", names) if isinstance(sweep, Mapping) else None
    if names.objects and ((jobs or 1) > 1 or ray is not None):
        raise RequestError(
            f"{', '.join(names.objects)}: objects stay in this process: leave out jobs and ray, or "
            "put the class into a file and name it as module:Class"
        )
    with objects_by_name(names.objects):
        if content is None:
            assert not isinstance(sweep, Mapping)
            found, title = sweep_from_file(Path(sweep), base=first, seeds=seeds), Path(sweep).stem
        else:
            found, title = sweep_from(content, "sweep", base=first, seeds=seeds), "sweep"
        run = found.config(found.points()[0], found.first_seed).run
        jobs = 1 if names.objects else jobs
        return ablate(
            found,
            folder_for(out, f"ablate-{title}"),
            choose_executor(run, jobs=jobs, ray=ray, gpus=gpus, memory=memory),
            data_dir=None if data_dir is None else Path(data_dir),
            resume=resume,
            retries=retries,
            limit=limit,
            reporter=Reporter(quiet=quiet),
        )


def _with_names(value: Any, key: str, names: ObjectNames) -> Any:
    """A part of a sweep with names in place of classes. key: the one that it stands under."""
    if isinstance(value, Mapping):
        return {inner: _with_names(each, str(inner), names) for inner, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_names(each, key, names) for each in value]
    if isinstance(value, _PLAIN):
        return value
    if key == "defenses":
        return names.defense(value)
    found = names.keys({key: value})
    if len(found) > 1 or not isinstance(found[key], _PLAIN):
        raise RequestError(f"sweep: {key} {value!r:.60}: give the class; its options are keys")
    return found[key]


def read_sweep(folder: Folder) -> Ablation:
    """The table of a sweep in its folder, or in a file: its rows so far.

    Errors: ``RequestError`` naming the file where it is missing, damaged or of another schema.
    """
    path = Path(folder)
    file = path / _TABLE if path.is_dir() else path
    return table_from(Ablation, ABLATION_VERSION, file, read_json(file))
