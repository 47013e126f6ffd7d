"""The clean images that a defender holds: how many a defense wants, and what it does without."""

from __future__ import annotations

from ...distill.types import Batch
from ..base import DefenderView


def images_needed(view: DefenderView, least: int = 1) -> str | None:
    """The objection of a defense that wants ``least`` held-out images."""
    found = len(view.holdout)
    if found >= least:
        return None
    if not found:
        return "needs held-out images, there are none"
    return f"needs {least} held-out images, there are {found}"


def images_wanted(view: DefenderView, enough: int, what: str) -> str | None:
    """The caution of a defense that does ``what`` with held-out images, and wants ``enough``."""
    found = len(view.holdout)
    return None if found >= enough else f"{what} {found} held-out images, {enough} were wanted"


def known_images(view: DefenderView) -> Batch:
    """The held-out images, or the received rows where there are none.

    A receiver always has those; they may be what the backdoor is in.
    """
    return view.holdout if len(view.holdout) else view.distilled.batch.replace(labels=view.labels)


def rows_in_their_place(view: DefenderView, enough: int = 100) -> str | None:
    """The caution of a defense that works on ``known_images``."""
    found = len(view.holdout)
    if not found:
        return "no held-out images: it works on the received rows, which may be poisoned"
    return None if found >= enough else f"it works on {found} held-out images"
