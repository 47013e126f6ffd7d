"""Convert a set of any project into another format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ...distill.files.artifact import pixel_range
from ...distill.files.formats.writers import WRITERS, writer_for
from ...distill.types import DistilledSet, RequestError
from ..config.schema import Config
from .reading import ReadingOptions, ReadSet, read_set
from .setup import prepare
from .source import SetFiles


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """What was converted. read: what was decided about another project's set; ``None`` for a set of
    this suite. form: a key of ``WRITERS``. files: all that was written. lost: what is not in them.
    """

    source: Path
    distilled: DistilledSet
    read: ReadSet | None
    form: str
    files: tuple[Path, ...]
    lost: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """The conversion as values that JSON can hold."""
        batch, read = self.distilled.batch, self.read
        return {
            "source": str(self.source),
            "read": None
            if read is None
            else {
                "format": read.form,
                "space": read.space,
                "factor": read.factor,
                "accuracies": dict(read.accuracies),
                "evidence": {name: vars(seen) for name, seen in read.evidence.items()},
                "notes": list(read.notes),
            },
            "images": len(batch),
            "image_shape": list(self.distilled.image_shape),
            "classes": len(self.distilled.classes),
            "soft_labels": batch.labels.ndim == 2,
            "pixel_range": list(pixel_range(batch.images)),
            "format": self.form,
            "files": [str(file) for file in self.files],
            "lost": list(self.lost),
        }


def convert(
    source: Path,
    out: Path,
    *,
    form: str | None = None,
    config: Config | None = None,
    reading: ReadingOptions | None = None,
    data_dir: Path | str | None = None,
    bars: bool = False,
) -> Conversion:
    """Write the set in ``source`` to ``out``.

    source: a run folder, or a file or folder of this or another project. form: a key of
    ``WRITERS``; by default what the name ``out`` stands for. config: the data that another
    project's set was distilled from; not needed for a set of this suite.
    Errors: ``RequestError`` for an unknown format, an ``out`` that exists, no ``config`` where one
    is needed, and whatever reading and writing refuse; nothing is written then.
    """
    form = form or writer_for(out)
    if form not in WRITERS:
        raise RequestError(f"unknown format {form!r}: there are {', '.join(WRITERS)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RequestError(f"{out}: exists already")
    if not out.parent.is_dir():
        raise RequestError(f"{out.parent}: no such folder")
    found = SetFiles(source, reading)
    read = None
    if found.is_own:
        distilled = found.load_own()
    else:
        if config is None:
            raise RequestError(
                f"{source} is a set of another project: name the data it was distilled from, "
                "--dataset NAME"
            )
        read = read_set(source, prepare(config, data_dir, bars=bars), found.reading, bars=bars)
        distilled = read.distilled
    files = WRITERS[form].write(out, distilled)
    return Conversion(
        source=source,
        distilled=distilled,
        read=read,
        form=form,
        files=tuple(files),
        lost=tuple(WRITERS[form].loses(distilled)),
    )
