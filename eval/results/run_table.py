"""The record of a run as a summary: what it made, what was measured, what it drew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .blocks import Block, TextCell, TextTable, Tone, asr_tone, plain
from .formatting import duration, interval, minus
from .record import Metrics, Record
from .subject import objects_text, subject, victims_text
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
# What a run makes, for others to use; and what it draws.
_PRODUCTS = {
    "distilled.safetensors": "the set, with its recipe; nothing of an attack",
    "trigger.safetensors": "the trigger",
}
_FILES = (
    "survival.md",
    "survival.png",
    "distilled.png",
    "trigger.png",
    "triggered.png",
    "curves.png",
)


def run_table(record: Record, folder: Path) -> str:
    """The summary of a run as text."""
    return plain(run_blocks(record, folder))


def run_blocks(record: Record, folder: Path) -> list[Block]:
    """What a run made, its metrics with intervals, its times and labels, and its other files."""
    blocks: list[Block] = ["", TextCell(f"{record.kind}: {subject(record)}", "title")]
    blocks += _products(record, folder)
    if record.kind == "evaluate":
        blocks.append(f"  victims: {victims_text(record.config)}")
    blocks += [f"  {objects_text(record)}"] if record.objects else []
    blocks += [TextCell(f"  ! {label}", "warning") for label in record.labels]
    blocks += ["", _metrics(record.metrics, record.conditional_on_set)]
    for name, metrics in record.metrics_by_network.items():
        blocks += ["", f"victims: {name}", _metrics(metrics, record.conditional_on_set)]
    blocks += [*survival_lines(record), "", *_details(record)]
    files = [folder / name for name in _FILES if (folder / name).exists()]
    return [*blocks, *(f"  {path}" for path in (folder / "record.json", *files))]


def _products(record: Record, folder: Path) -> list[str]:
    """The files that a run makes for others; of several seeds one line for all."""
    if record.kind == "seeds" and record.seeds:
        first, last = record.seeds[0], record.seeds[-1]
        return [f"  {folder}/seed-{first} to seed-{last}: distilled.safetensors in each"]
    there = [(folder / name, text) for name, text in _PRODUCTS.items() if (folder / name).exists()]
    return [f"  {path}  ({text})" for path, text in there]


def _metrics(metrics: Metrics, conditional: bool) -> TextTable:
    unit = "victims of this one set" if conditional else "distillation seeds"
    rows = []
    for title, name, meaning in _ROWS:
        summary = metrics.get(name)
        if summary is None or summary.mean is None:
            continue
        mean = minus(f"{summary.mean:.3f}")
        rows.append(
            (
                TextCell(title),
                TextCell(mean, _tone(name, summary.mean)),
                TextCell(interval(summary.ci95, 3)),
                TextCell(meaning),
            )
        )
    heads = ("", "mean", "95 % interval", f"over {unit}")
    return TextTable(heads, tuple(rows), right=frozenset({1}))


def _tone(name: str, mean: float) -> Tone:
    if name.startswith("control_"):
        return "chance"
    attacks = ("attack_success_rate", "attack_success_rate_published", "backdoor_gain")
    return asr_tone(mean) if name in attacks else ""


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
