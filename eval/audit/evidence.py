"""Evidence of a backdoor beside the inversion: the victims' last layers, and the set's rows.

Each function gives one number for each class, larger for a class that is more likely a target. A
number means nothing alone: classes differ. It is compared with the same class's of clean sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...defenses.base import DefenderView
from ...defenses.common.by_class import fewest_held_out, median, smallest_class
from ...defenses.sets.scan import Scan, ScanOptions

_SCAN_ROWS, _SCAN_HELD_OUT = 3, 2


def last_layer(networks: Sequence[nn.Module], classes: int) -> Tensor | None:
    """How far each class's weights in the last layer are from the mean class's, ``(K,)``.

    The logarithm of the distance less the median class's, averaged over the networks: a target's
    weights carry its class and the trigger. ``None`` where a network's last layer is not linear.
    The idea that the final layer alone shows a backdoor is that of DFBScanner (2605.18907), whose
    code we could not find; its statistic is another.
    """
    found = []
    for network in networks:
        layers = [part for part in network.modules() if isinstance(part, nn.Linear)]
        if not layers or layers[-1].out_features != classes:
            return None
        weights = layers[-1].weight.detach().double()
        distances = (weights - weights.mean(dim=0)).norm(dim=1).clamp(min=1e-12).log()
        found.append(distances - median(distances))
    return torch.stack(found).mean(dim=0).cpu()


def row_statistics(views: Sequence[DefenderView]) -> Tensor | None:
    """SCAn's test of the set's rows against held-out images, ``(K,)``.

    For each victim the test names at most one class, with an anomaly index; a class's number is the
    mean over the victims of ``log(1 + index)``, 0 where it was not named. ``None`` where the test
    lacks rows (3 a class) or held-out images (2 a class).
    """
    view = views[0]
    enough = smallest_class(view) >= _SCAN_ROWS and fewest_held_out(view) >= _SCAN_HELD_OUT
    if not enough:
        return None
    scan, found = Scan(ScanOptions()), torch.zeros(view.classes, dtype=torch.float64)
    for each in views:
        scores = scan.score_set(each)
        if scores.suspect is not None and scores.statistic > 0:
            found[scores.suspect] += torch.tensor(scores.statistic).log1p().item() / len(views)
    return found
