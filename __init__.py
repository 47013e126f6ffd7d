"""distillsec: security evaluation of distilled datasets.

A run from a notebook::

    import distillsec

    config = distillsec.configure(**distillsec.gather(preset="digits-naive"), seed=1)
    record = distillsec.run_cell(config, "runs/notebook")
    print(record.mean("attack_success_rate"), record.mean("control_attack_success_rate"))
"""

from distillsec.attacks import ATTACKS, Attack
from distillsec.defenses import DEFENSES, DefenderView, Defense
from distillsec.distill.backends import BACKENDS
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.files.artifact import load_set, load_trigger
from distillsec.distill.types import Batch, DistilledSet, Recipe, RequestError, RunError
from distillsec.eval.bench.defend import defend
from distillsec.eval.config.layers import gather
from distillsec.eval.config.schema import Config, configure
from distillsec.eval.results.record import Record, read_record
from distillsec.eval.run.cell import run_cell
from distillsec.eval.run.evaluate import evaluate
from distillsec.eval.run.seeds import run_seeds

__all__ = [
    "ATTACKS",
    "BACKENDS",
    "DEFENSES",
    "Attack",
    "Batch",
    "Config",
    "DefenderView",
    "Defense",
    "DistilledSet",
    "Hook",
    "Moment",
    "Recipe",
    "Record",
    "RequestError",
    "RunError",
    "configure",
    "defend",
    "evaluate",
    "gather",
    "load_set",
    "load_trigger",
    "read_record",
    "run_cell",
    "run_seeds",
]
