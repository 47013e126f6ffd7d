"""The registry of defenses. A new one is one file and one entry here."""

from __future__ import annotations

from collections.abc import Mapping

from .base import DefenderView, Defense, Family
from .inputs.autoencoder import Autoencoder
from .inputs.gaussian_blur import GaussianBlur
from .inputs.ibd_psc import IbdPsc
from .inputs.jpeg import Jpeg
from .inputs.randomized_smoothing import RandomizedSmoothing
from .inputs.scale_up import ScaleUp
from .inputs.sentinet import Sentinet
from .inputs.shrinkpad import ShrinkPad
from .inputs.strip import Strip
from .inputs.teco import Teco
from .models.abs import Abs
from .models.anp import Anp
from .models.bti_dbf import BtiDbf
from .models.clp import Clp
from .models.fine_pruning import FinePruning
from .models.fine_tuning import FineTuning
from .models.ft_sam import FtSam
from .models.i_bau import IBau
from .models.mm_bd import MmBd
from .models.mntd import Mntd
from .models.nad import Nad
from .models.nc_unlearning import NcUnlearning
from .models.neural_cleanse import NeuralCleanse
from .models.rnp import Rnp
from .models.tabor import Tabor
from .sets.activation_clustering import ActivationClustering
from .sets.beatrix import Beatrix
from .sets.blur import SetBlur
from .sets.pixel_clip import PixelClip
from .sets.quantise import Quantise
from .sets.scan import Scan
from .sets.spectral_signatures import SpectralSignatures
from .sets.spectre import Spectre
from .training.abl import Abl
from .training.cutmix import CutMix
from .training.dp_sgd import DpSgd
from .training.holdout_only import HoldoutOnly
from .training.partition_ensemble import PartitionEnsemble
from .training.strong_augmentation import StrongAugmentation

DEFENSES: Mapping[str, type[Defense]] = {
    # sets
    "spectral-signatures": SpectralSignatures,
    "activation-clustering": ActivationClustering,
    "spectre": Spectre,
    "scan": Scan,
    "beatrix": Beatrix,
    "quantise": Quantise,
    "blur": SetBlur,
    "pixel-clip": PixelClip,
    # inputs
    "strip": Strip,
    "scale-up": ScaleUp,
    "teco": Teco,
    "sentinet": Sentinet,
    "ibd-psc": IbdPsc,
    "shrinkpad": ShrinkPad,
    "jpeg": Jpeg,
    "gaussian-blur": GaussianBlur,
    "autoencoder": Autoencoder,
    "randomized-smoothing": RandomizedSmoothing,
    # models
    "neural-cleanse": NeuralCleanse,
    "abs": Abs,
    "tabor": Tabor,
    "mm-bd": MmBd,
    "bti-dbf": BtiDbf,
    "mntd": Mntd,
    "fine-tuning": FineTuning,
    "fine-pruning": FinePruning,
    "nad": Nad,
    "anp": Anp,
    "i-bau": IBau,
    "clp": Clp,
    "rnp": Rnp,
    "ft-sam": FtSam,
    "nc-unlearning": NcUnlearning,
    # training
    "partition-ensemble": PartitionEnsemble,
    "abl": Abl,
    "dp-sgd": DpSgd,
    "strong-augmentation": StrongAugmentation,
    "cutmix": CutMix,
    "holdout-only": HoldoutOnly,
}

# What each family defends.
_DEFENDED: Mapping[Family, str] = {
    "set scores": "sets",
    "sanitised set": "sets",
    "input scores": "inputs",
    "purified input": "inputs",
    "inspection": "models",
    "repair": "models",
    "training": "training",
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "all": tuple(DEFENSES),
    **{
        group: tuple(name for name, each in DEFENSES.items() if _DEFENDED[each.family] == group)
        for group in dict.fromkeys(_DEFENDED.values())
    },
    "quick": (
        *("scan", "spectral-signatures", "spectre", "activation-clustering", "beatrix"),
        *("strip", "scale-up", "jpeg", "gaussian-blur", "shrinkpad", "randomized-smoothing"),
        "partition-ensemble",
    ),
}
"""Names that stand for several defenses: all of them, those of sets, inputs, models or trainings,
and ``quick``: each at most 4 s on ``digits-naive`` and its twin, two victims each, one core, quick
budget."""

__all__ = ["DEFENSES", "GROUPS", "DefenderView", "Defense"]
