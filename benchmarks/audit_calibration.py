"""Make the calibrations of audits that the package ships: clean sets of the digits.

    python benchmarks/audit_calibration.py FOLDER

Distils the recipes below into FOLDER and examines each set, with 200 clean images and with none,
about 25 minutes of CPU time in all. What is done already is not done again: the same command
continues what was stopped. The results go to ``eval/audit/calibrations``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from distillsec.eval.audit.audit import AuditOptions, calibrate
from distillsec.eval.config.layers import gather
from distillsec.eval.config.schema import configure
from distillsec.eval.run.cell import run_cell

PRESETS = ("digits-dm", "digits-dc", "digits-mtt")
SEEDS = range(100, 108)
CLEAN = (200, 0)
SHIPPED = Path(__file__).resolve().parents[1] / "eval" / "audit" / "calibrations"


def distil(preset: str, seed: int, folder: Path) -> Path:
    """The folder of the clean set of ``preset`` and ``seed``."""
    place = folder / f"{preset}-{seed}"
    config = configure(**gather(preset=preset), seed=seed, victims=1, device="cpu")
    run_cell(config, place, resume=True)
    return place


def main(folder: Path) -> None:
    places = [distil(preset, seed, folder) for seed in SEEDS for preset in PRESETS]
    config = configure(dataset="digits", device="cpu", threads=1)
    SHIPPED.mkdir(exist_ok=True)
    for clean in CLEAN:
        calibrate(
            places,
            lambda _: config,
            SHIPPED / f"digits-{clean}.json",
            options=AuditOptions(clean=clean),
            made_by="python benchmarks/audit_calibration.py FOLDER",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
