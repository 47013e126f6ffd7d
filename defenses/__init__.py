"""The registry of defenses: a new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from .activation_clustering import ActivationClustering
from .autoencoder import Autoencoder
from .base import DefenderView, Defense
from .beatrix import Beatrix
from .blurring import GaussianBlur, SetBlur
from .ibd_psc import IbdPsc
from .jpeg import Jpeg
from .partition_ensemble import PartitionEnsemble
from .randomized_smoothing import RandomizedSmoothing
from .scale_up import ScaleUp
from .scan import Scan
from .sentinet import Sentinet
from .set_pixels import PixelClip, Quantise
from .shrinkpad import ShrinkPad
from .spectral_signatures import SpectralSignatures
from .spectre import Spectre
from .strip import Strip
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
    "partition-ensemble": PartitionEnsemble,
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
}

__all__ = ["DEFENSES", "DefenderView", "Defense"]
