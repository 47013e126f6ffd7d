"""Make the calibration of audits that the package ships: clean sets of the digits.

    python benchmarks/audit_calibration.py FOLDER

Distils the recipes below into FOLDER and examines each set, with 200 clean images and with none.
What is done already is not done again: the same command continues what was stopped. The results go
to ``eval/audit/calibrations``.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

PRESETS = ("digits-dm", "digits-dc", "digits-mtt")
SEEDS = range(100, 108)
CLEAN = (200, 0)
SHIPPED = Path(__file__).resolve().parents[1] / "eval" / "audit" / "calibrations"


def run(*words: str) -> None:
    subprocess.run(["distillsec", *words], check=True)


def distil(preset: str, seed: int, folder: Path) -> Path:
    """The folder of the clean set of ``preset`` and ``seed``."""
    place = folder / f"{preset}-{seed}"
    resume = ["--resume"] if place.exists() else []
    chosen = ["--preset", preset, "--seed", str(seed), "--victims", "1", "--device", "cpu"]
    run("distill", *chosen, "--out", str(place), *resume)
    return place


def main(folder: Path) -> None:
    places = [str(distil(preset, seed, folder)) for seed in SEEDS for preset in PRESETS]
    note = shlex.join(["python", "benchmarks/audit_calibration.py", "FOLDER"])
    SHIPPED.mkdir(exist_ok=True)
    for clean in CLEAN:
        out = str(SHIPPED / f"digits-{clean}.json")
        chosen = ["--holdout", str(clean), "--device", "cpu", "--threads", "1", "--seed", "0"]
        run("audit", *places, "--calibrate", out, "--calibration-note", note, *chosen)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
