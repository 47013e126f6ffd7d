"""Victims: fresh networks trained on a distilled set by its recipe, then tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import nn

from ...attacks import TestCase
from ...distill.networks.makers import NetworkMaker
from ...distill.randomness import Streams
from ...distill.training import fit
from ...distill.types import Batch, DistilledSet, RequestError
from ..results.metrics import Scores, rates
from .folder import RunFolder
from .progress import Reporter


def train_victim(
    distilled: DistilledSet, network: NetworkMaker, streams: Streams, number: int
) -> nn.Module:
    """Victim ``number``, trained on ``distilled``.

    Its initial weights and training order depend on the seed and the number only, so the victims
    of a set and of its clean twin are pairs.
    """
    fresh = network(streams.integer("victim", number, 0))
    generator = streams.generator("victim", number, 1)
    return fit(fresh, distilled.batch, distilled.recipe, generator, network.engine)


VictimTrainer = Callable[[DistilledSet, NetworkMaker, Streams, int], nn.Module]


@final
class Panel:
    """Measures sets with ``count`` victims each.

    folder: keeps finished scores, for a resumed run. train: returns a trained victim.
    """

    def __init__(
        self,
        folder: RunFolder,
        test: Batch,
        streams: Streams,
        count: int,
        reporter: Reporter,
        train: VictimTrainer = train_victim,
    ) -> None:
        self._folder, self._test, self._streams = folder, test, streams
        self._count, self._reporter, self._train = count, reporter, train

    def measure(
        self,
        name: str,
        distilled: DistilledSet,
        network: NetworkMaker,
        case: TestCase | None,
        show: Callable[[nn.Module], None] | None = None,
    ) -> list[Scores]:
        """Each victim's scores on ``distilled``. ``show`` is called with the first victim.

        Errors: ``RequestError`` where the folder keeps scores that were measured without the case.
        """
        known = self._folder.scores()
        labels = [f"{name}/{number}" for number in range(self._count)]
        kept = [known[label] for label in labels if label in known]
        if any(("attack_success_rate" in scores) != (case is not None) for scores in kept):
            raise RequestError(f"{self._folder.path} keeps scores of victims of another run")
        done = sum(label in known for label in labels)
        with self._reporter.phase(f"victims: {name}", self._count, done) as phase:
            for number, label in enumerate(labels):
                if label in known:
                    continue
                victim = self._train(distilled, network, self._streams, number)
                if number == 0 and show is not None:
                    show(victim)
                known[label] = dict(rates(victim, self._test, case, network.engine))
                self._folder.keep_score(label, known[label])
                phase.reach(number + 1)
        return [known[label] for label in labels]
