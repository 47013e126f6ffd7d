"""The registry of defenses: a new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from .abl import Abl
from .activation_clustering import ActivationClustering
from .anp import Anp
from .autoencoder import Autoencoder
from .base import DefenderView, Defense
from .beatrix import Beatrix
from .blurring import GaussianBlur, SetBlur
from .brain_stimulation import Abs
from .bti_dbf import BtiDbf
from .clp import Clp
from .dp_sgd import DpSgd
from .fine_pruning import FinePruning
from .fine_tuning import FineTuning
from .ft_sam import FtSam
from .holdout_only import HoldoutOnly
from .i_bau import IBau
from .ibd_psc import IbdPsc
from .jpeg import Jpeg
from .mixing import CutMix, StrongAugmentation
from .mm_bd import MmBd
from .mntd import Mntd
from .nad import Nad
from .nc_unlearning import NcUnlearning
from .neural_cleanse import NeuralCleanse
from .partition_ensemble import PartitionEnsemble
from .randomized_smoothing import RandomizedSmoothing
from .rnp import Rnp
from .scale_up import ScaleUp
from .scan import Scan
from .sentinet import Sentinet
from .set_pixels import PixelClip, Quantise
from .shrinkpad import ShrinkPad
from .spectral_signatures import SpectralSignatures
from .spectre import Spectre
from .strip import Strip
from .tabor import Tabor
from .teco import Teco

DEFENSES: Mapping[str, type[Defense]] = {
    # of the set
    "spectral-signatures": SpectralSignatures,
    "activation-clustering": ActivationClustering,
    "spectre": Spectre,
    "scan": Scan,
    "beatrix": Beatrix,
    "quantise": Quantise,
    "blur": SetBlur,
    "pixel-clip": PixelClip,
    # of an input
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
    # of the model
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
    # of the training
    "partition-ensemble": PartitionEnsemble,
    "abl": Abl,
    "dp-sgd": DpSgd,
    "strong-augmentation": StrongAugmentation,
    "cutmix": CutMix,
    "holdout-only": HoldoutOnly,
}

__all__ = ["DEFENSES", "DefenderView", "Defense"]
