"""A defense of your own: inputs on which the victim is very confident are suspicious.

    cd examples
    distillsec attack --preset digits-naive --out runs/attacked
    distillsec defend runs/attacked --defense own_defense:Confidence

A defense is a subclass of one of seven families, which differ in the method that they want; this
one scores inputs. It sees the distilled set, a victim and held-out images, and nothing else.
"""

from pydantic import Field
from torch import Tensor

from distillsec.defenses.base import DefenderView, DefenseOptions, InputScorer


class ConfidenceOptions(DefenseOptions):
    limit: float = Field(0.999, gt=0, lt=1, description="confidence above which it is rejected")


class Confidence(InputScorer):
    """The victim's confidence in its answer, since backdoors are learned very well."""

    name = "confidence"
    Options = ConfidenceOptions
    needs = "nothing but the model"

    def __init__(self, options: DefenseOptions) -> None:
        assert isinstance(options, ConfidenceOptions)
        self.options = options
        self._limit = options.limit

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return view.logits(images).softmax(dim=1).max(dim=1).values

    def threshold(self, view: DefenderView) -> float:
        return self._limit
