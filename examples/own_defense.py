"""A defense of your own: inputs on which the victim is very confident are suspicious.

    cd examples
    distillsec attack --preset digits-naive --out runs/attacked
    distillsec defend runs/attacked --defense own_defense:Confidence

A defense is a subclass of one of seven families, each with one method; this one scores inputs. It
sees only the distilled set, a victim and held-out images.
"""

from pydantic import Field
from torch import Tensor

from distillsec.ext import DefenderView, DefenseOptions, InputScorer


class ConfidenceOptions(DefenseOptions):
    limit: float = Field(0.999, gt=0, lt=1, description="confidence above which it is rejected")


class Confidence(InputScorer):
    """The victim's confidence in its answer, since backdoors are learned very well."""

    name = "confidence"
    Options = ConfidenceOptions
    options: ConfidenceOptions  # for the type checker
    needs = "only the model"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return view.logits(images).softmax(dim=1).max(dim=1).values

    def threshold(self, view: DefenderView) -> float:
        return self.options.limit
