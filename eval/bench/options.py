"""The options of a bench, and the choice of defenses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

from pydantic import Field

from ...defenses import DEFENSES, GROUPS
from ...defenses.base import Budget, Defense
from ...distill.types import RequestError
from ..config.schema import Section, build_options, find_class

QUICK_IMAGES = 500
VICTIMS: Mapping[Budget, int] = {"quick": 2, "paper": 5, "tuned": 5}
"""The default number of victims, by budget."""


@final
class BenchOptions(Section):
    """The options that hold for every defense of a bench."""

    budget: Budget = Field(
        "quick",
        description="paper: published settings; tuned: the strongest settings that keep the "
        "accuracy on held-out images; quick: less work than published",
    )
    holdout: int = Field(100, ge=0, description="clean real images that the defender holds")
    images: int | None = Field(
        None, ge=1, description=f"test images measured (quick: {QUICK_IMAGES}, others: all)"
    )

    @property
    def most_images(self) -> int | None:
        """The largest number of test images; ``None`` for all."""
        return QUICK_IMAGES if self.images is None and self.budget == "quick" else self.images


def make_defense(name: str, budget: Budget, given: Mapping[str, Any]) -> Defense:
    """A defense by name or ``package.module:Class``, with the options of the budget and one's own.

    Errors: ``RequestError`` for an unknown name, option or value.
    """
    found: type[Defense] = find_class(name, DEFENSES, Defense, "defense")
    less = found.quick if budget == "quick" else {}
    return found(build_options(found.Options, {**less, **given}, name))


def defense_names(names: Iterable[str]) -> list[str]:
    """``names`` with the names of groups (``GROUPS``) replaced by those of their defenses."""
    return list(dict.fromkeys(each for name in names for each in GROUPS.get(name, (name,))))


def choose_defenses(
    names: list[str], budget: Budget, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Defense]:
    """The defenses of ``names``, those of groups (``GROUPS``) too, each with its options.

    Errors: ``RequestError`` as for ``make_defense``, or for options of a defense not chosen.
    """
    wanted = defense_names(names)
    unused = [name for name in options if name not in wanted]
    if unused:
        raise RequestError(f"options for {', '.join(unused)}, which was not chosen: --defense NAME")
    return {name: make_defense(name, budget, options.get(name, {})) for name in wanted}
