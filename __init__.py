"""distillsec: security evaluation of distilled datasets.

A run from a notebook::

    import distillsec

    record = distillsec.run_attack(preset="digits-naive", trigger_size=4, out="runs/notebook")
    print(record.mean("attack_success_rate"), record.mean("control_attack_success_rate"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillsec.attacks import ATTACKS, Attack
    from distillsec.defenses import DEFENSES, DefenderView, Defense
    from distillsec.distill.backends import BACKENDS
    from distillsec.distill.core.hooks import Hook, Moment
    from distillsec.distill.data.datasets import DATASETS
    from distillsec.distill.files.artifact import load_set, load_trigger
    from distillsec.distill.networks.architectures import NETWORKS
    from distillsec.distill.networks.makers import network
    from distillsec.distill.types import Batch, DistilledSet, Recipe, RequestError, RunError
    from distillsec.eval.bench.defend import defend
    from distillsec.eval.config.layers import gather
    from distillsec.eval.config.schema import Config, configure
    from distillsec.eval.notebook.defending import run_defend
    from distillsec.eval.notebook.runs import run_attack, run_distill, run_evaluate
    from distillsec.eval.notebook.sweeps import read_sweep, run_ablate
    from distillsec.eval.results.record import Record, read_record
    from distillsec.eval.results.version import __version__
    from distillsec.eval.run.cell import run_cell
    from distillsec.eval.run.evaluate import evaluate
    from distillsec.eval.run.progress import Iteration
    from distillsec.eval.run.reading import ReadingOptions
    from distillsec.eval.run.seeds import run_seeds
else:
    # Imported when first used, because torch is slow to import. Hidden from type checkers, which
    # would take any name for granted.
    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        return found


_MODULE_OF = {
    name: module
    for module, names in {
        "attacks": ("ATTACKS", "Attack"),
        "defenses": ("DEFENSES", "DefenderView", "Defense"),
        "distill.backends": ("BACKENDS",),
        "distill.core.hooks": ("Hook", "Moment"),
        "distill.data.datasets": ("DATASETS",),
        "distill.files.artifact": ("load_set", "load_trigger"),
        "distill.networks.architectures": ("NETWORKS",),
        "distill.networks.makers": ("network",),
        "distill.types": ("Batch", "DistilledSet", "Recipe", "RequestError", "RunError"),
        "eval.bench.defend": ("defend",),
        "eval.config.layers": ("gather",),
        "eval.config.schema": ("Config", "configure"),
        "eval.notebook.defending": ("run_defend",),
        "eval.notebook.runs": ("run_attack", "run_distill", "run_evaluate"),
        "eval.notebook.sweeps": ("read_sweep", "run_ablate"),
        "eval.results.record": ("Record", "read_record"),
        "eval.results.version": ("__version__",),
        "eval.run.cell": ("run_cell",),
        "eval.run.evaluate": ("evaluate",),
        "eval.run.progress": ("Iteration",),
        "eval.run.reading": ("ReadingOptions",),
        "eval.run.seeds": ("run_seeds",),
    }.items()
    for name in names
}

__all__ = [
    "ATTACKS",
    "BACKENDS",
    "DATASETS",
    "DEFENSES",
    "NETWORKS",
    "Attack",
    "Batch",
    "Config",
    "DefenderView",
    "Defense",
    "DistilledSet",
    "Hook",
    "Iteration",
    "Moment",
    "ReadingOptions",
    "Recipe",
    "Record",
    "RequestError",
    "RunError",
    "__version__",
    "configure",
    "defend",
    "evaluate",
    "gather",
    "load_set",
    "load_trigger",
    "network",
    "read_record",
    "read_sweep",
    "run_ablate",
    "run_attack",
    "run_cell",
    "run_defend",
    "run_distill",
    "run_evaluate",
    "run_seeds",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
