"""The record of a run as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .formatting import duration
from .record import Metrics, Record
from .subject import subject, victims_text
from .survival_table import survival_lines

_ROWS = (
    ("CTA", "clean_test_accuracy", "clean test accuracy"),
    ("CTA, clean twin", "control_clean_test_accuracy", "the same, trained on the clean twin"),
    ("ASR", "attack_success_rate", "triggered non-target images sent to the target"),
    ("ASR, control", "control_attack_success_rate", "the same trigger on the clean twin's victims"),
    ("backdoor gain", "backdoor_gain", "ASR − control, paired by victim"),
    ("ASR, published", "attack_success_rate_published", "on the images of the attack's paper"),
    ("ASR, all images", "attack_success_rate_all", "the paper's variant: floor about 1 / classes"),
    ("false triggers", "false_trigger_rate", "clean non-target images sent to the target"),
    ("false, clean twin", "control_false_trigger_rate", "the same, trained on the clean twin"),
)
_FILES = (
    "survival.md",
    "survival.png",
    "distilled.png",
    "trigger.png",
    "triggered.png",
    "curves.png",
)


def run_table(record: Record, folder: Path) -> str:
    """The metrics of a run with intervals, its times and labels, and the paths of its files."""
    lines = ["", f"{record.kind}: {subject(record)}"]
    if record.kind == "evaluate":
        lines.append(f"  victims: {victims_text(record.config)}")
    lines += [f"  ! {label}" for label in record.labels]
    lines += ["", *_metrics(record.metrics, record.conditional_on_set)]
    for name, metrics in record.metrics_by_network.items():
        lines += ["", f"victims: {name}", *_metrics(metrics, record.conditional_on_set)]
    lines += [*survival_lines(record), "", *_details(record)]
    files = [folder / name for name in _FILES if (folder / name).exists()]
    lines += [f"  {path}" for path in (folder / "record.json", *files)]
    return "\n".join(lines)


def _metrics(metrics: Metrics, conditional: bool) -> list[str]:
    unit = "victims of this one set" if conditional else "distillation seeds"
    lines = [f"  {'':17}{'mean':>7}  {'95 % interval':^15}   over {unit}"]
    for title, name, meaning in _ROWS:
        summary = metrics.get(name)
        if summary is None or summary.mean is None:
            continue
        low, high = summary.ci95 or (None, None)
        interval = "" if low is None or high is None else f"[{low:6.3f}, {high:6.3f}]"
        lines.append(f"  {title:<17}{summary.mean:7.3f}  {interval:15}   {meaning}")
    return lines


def _details(record: Record) -> list[str]:
    """Times, the trigger, the counters of the attack, and how visible the attack is."""
    names = {"distil_seconds": "distillation", "control_seconds": "clean twin"}
    names |= {"archetypes_seconds": "archetypes", "attack_seconds": "attack"}
    names["victims_seconds"] = "victims"
    times = [
        f"{title} {duration(record.timings[name])}"
        for name, title in names.items()
        if name in record.timings
    ]
    lines = [f"  time: {', '.join(times)}"]
    if record.trigger:
        trigger = record.trigger
        values, target = f"{trigger['min']:.2f} to {trigger['max']:.2f}", trigger["target_class"]
        if trigger["target"] is not None:
            target = f"{trigger['target']} ({target})"
        if "source" in trigger:
            target += f", from class {trigger['source']} ({trigger.get('source_class')})"
        lines.append(
            f"  trigger: {trigger['kind']}, values {values} on a 0–1 scale, target {target}"
        )
    if record.attack_counters:
        counters = [f"{k.replace('_', ' ')} {v}" for k, v in record.attack_counters.items()]
        lines.append(f"  attack: {', '.join(counters)}")
    return lines + _visibility(record)


def _visibility(record: Record) -> list[str]:
    """How far triggered images are from clean ones, and the set from its clean twin."""
    lines, trigger, measured = [], record.trigger or {}, record.distilled
    if trigger.get("ssim") is not None:
        ratio = "–" if trigger.get("psnr") is None else f"{trigger['psnr']:.1f}"
        lines.append(f"  triggered images: PSNR {ratio} dB, SSIM {trigger['ssim']:.3f}")
    if measured.get("linf_from_twin") is None:
        return lines
    from_twin = {norm: measured.get(f"{norm}_from_twin") for norm in ("linf", "l2", "rms")}
    lines.append(f"  set from its clean twin: {_distance(from_twin)}")
    reference = measured.get("reference_distance")
    text = "not measured: --seeds N or --reference-run FOLDER"
    if reference is not None:
        pairs = reference["pairs"]
        text = f"{_distance(reference)}, {'one pair' if pairs == 1 else f'mean of {pairs} pairs'}"
    return [*lines, f"  two clean sets of other seeds: {text}"]


def _distance(found: Mapping[str, float | None]) -> str:
    titles = {"linf": "L∞ {}", "l2": "L2 {} an image", "rms": "RMS {}"}
    known = {name: value for name in titles if (value := found.get(name)) is not None}
    return ", ".join(titles[name].format(f"{value:.3f}") for name, value in known.items())
