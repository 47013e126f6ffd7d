"""The options of attacks through the training of students."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..distill.backends.unroll import GradientName
from ..distill.networks.variants import VariantName
from .base import AttackOptions, PatchOptions


class StudentOptions(PatchOptions, AttackOptions):
    """Options of attacks through the training of students."""

    newer: ClassVar[tuple[str, ...]] = (*AttackOptions.newer, "student_networks")

    clean_weight: float = Field(
        1.0, ge=0, description="weight of clean images within the attacker's loss"
    )
    unroll_warmup: int = Field(
        100, ge=0, description="at most so many steps, a random number, before those unrolled"
    )
    unroll_steps: int = Field(10, ge=1, description="steps of a student that are unrolled")
    unroll_lr: float | None = Field(
        None,
        gt=0,
        description="rate of these steps, plain SGD (default: the recipe's / (1 - momentum))",
    )
    unroll_batch: int | None = Field(
        None, ge=1, description="synthetic images of a step (default: the recipe's)"
    )
    students: int = Field(1, ge=1, description="students, each from fresh weights, per update")
    student_networks: tuple[VariantName, ...] = Field(
        ("own",),
        min_length=1,
        description="architectures of the students, in turn: own, batch-norm, wide (twice as "
        "wide), mlp",
    )
    images_per_update: int = Field(
        256, ge=2, description="real images on which a student is tested: with and without trigger"
    )
    trigger: Literal["fixed", "optimised"] = Field(
        "optimised", description="fixed: a white patch; optimised: the patch is learned too"
    )
    trigger_lr: float = Field(0.05, gt=0, description="Adam's rate for the patch, pixel units")
    rows: Literal["target", "all"] = Field(
        "target", description="which synthetic images the attack may change: the target's, or all"
    )
    linf: float | None = Field(
        None,
        gt=0,
        description="largest change of a pixel against the images at the attack's start "
        "(default: no bound)",
    )
    l2: float | None = Field(
        None, gt=0, description="largest L2 norm of an image's change (default: no bound)"
    )
    unroll_gradient: GradientName = Field(
        "recompute", description="exact: by automatic differentiation; recompute: in less memory"
    )
