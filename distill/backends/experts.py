"""Experts: networks trained on the real data, whose weights after every epoch are kept in a buffer.

A buffer is a folder. ``manifest.json`` says what its experts depend on, and the digest of each
finished file, which is checked before the file is used; older buffers have none.
``experts-NNN.safetensors`` hold the weights ``(experts, epochs + 1, P)``, read through a memory
map, and the hooks' state after their training; ``partial.safetensors`` is the checkpoint of an
unfinished training. The experts of one file train in lockstep, epoch by epoch, so that a trigger
that moves with them moves with all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from .. import weights as flat
from ..core.hooks import announce, listeners
from ..core.resume import (
    hook_tensors,
    optimiser_tensors,
    restore_hooks,
    restore_optimiser,
)
from ..core.run import Run
from ..engine import Engine
from ..files.prefixes import add_prefix, select_prefix
from ..files.safe import (
    fault,
    file_digest,
    read_json,
    read_shape,
    read_slice,
    read_tensors,
    write_json,
    write_tensors,
)
from ..notices import warn
from ..preprocessing import digest
from ..randomness import Streams
from ..trainer import training
from ..training import drop_epoch, sgd, train_on
from ..types import Batch, Recipe, RequestError, RunError

FORMAT_VERSION = 1
_SECONDS_BETWEEN_CHECKPOINTS = 1.0
# Writing may take this share of the time, however large the experts are.
_WRITING_SHARE = 0.05


@final
@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """Which experts: how many, how long and how they train, from which seed, how many a file.

    rows: training rows in an epoch, drawn afresh for each; ``None`` for all of them.
    """

    experts: int
    epochs: int
    rows: int | None
    recipe: Recipe
    decay: bool
    seed: int
    per_file: int


@final
class Buffer:
    """The finished experts of one round in ``folder``."""

    def __init__(self, folder: Path, plan: ExpertPlan) -> None:
        self._folder, self._plan = folder, plan

    def weights(self, expert: int, epoch: int) -> Tensor:
        """``float32 (P,)``, on the CPU: the weights of ``expert`` after ``epoch`` epochs."""
        file, place = divmod(expert, self._plan.per_file)
        path = _shard(self._folder, file)
        found = read_slice(path, "weights", place, epoch)
        if not bool(found.isfinite().all()):
            raise fault(path, f"the weights of expert {expert} are not finite")
        return found


def open_buffer(run: Run, plan: ExpertPlan, round_: int, *, fresh: bool) -> Buffer:
    """The experts of ``round_``: read from the task's scratch folder, or trained there now.

    fresh: whether the round begins here. Then the hooks take the state that they have after the
    training; else a resumed run is in the middle of the round, and the hooks stay as they are.
    Errors: ``RequestError`` where the folder holds other experts or damaged files, or where experts
    are missing that an earlier state of the trigger is needed for; ``RunError`` where an expert
    diverges.
    """
    if run.task.scratch is None:
        raise RequestError("experts are kept in a folder, and this task has no scratch folder")
    return _ExpertTraining(run, plan, round_, run.task.scratch / f"round-{round_}").open(fresh)


@final
class _ExpertTraining:
    """The training of one round's experts in one folder."""

    def __init__(self, run: Run, plan: ExpertPlan, round_: int, folder: Path) -> None:
        self._run, self._plan, self._round, self._folder = run, plan, round_, folder
        self._streams = Streams(plan.seed)
        self._manifest = folder / "manifest.json"
        self._partial = folder / "partial.safetensors"
        self._digests: dict[str, str] = {}
        self._saved_at, self._saving = time.monotonic(), 0.0

    def open(self, fresh: bool) -> Buffer:
        """The finished buffer; ``fresh`` as for ``open_buffer``."""
        before = self._start_digest()
        manifest = {"format_version": FORMAT_VERSION, "identity": self._identity()}
        finished = self._check(manifest, before if fresh else None)
        if not finished:
            if not fresh and hook_tensors(self._run.hooks):
                raise RequestError(
                    f"{self._folder}: the experts of this round are missing, and the attack's "
                    "state changed after they were trained: start a new run"
                )
            self._train({**manifest, "hooks_before": before})
        if fresh:
            self._restore_hooks(_shard(self._folder, self._files - 1))
        return Buffer(self._folder, self._plan)

    def _start_digest(self) -> str:
        """The state that hooks which change during the training start from, and all they may read.

        They may read the synthetic images too, to train students. Empty without such hooks.
        """
        run = self._run
        if not listeners(run.hooks, "on_network"):
            return ""
        read = digest(run.synthetic.leaf, *hook_tensors(run.hooks).values())
        return f"{read}, {run.position.progress}, {run.synthetic.recipe.describe()}"

    # The folder ----------------------------------------------------------------------------------

    @property
    def _files(self) -> int:
        return -(-self._plan.experts // self._plan.per_file)

    def _identity(self) -> dict[str, Any]:
        """All that the experts depend on but the hooks, as JSON values."""
        run, plan = self._run, self._plan
        first = run.task.network(self._streams.integer("expert", self._round, 0))
        return {
            **run.task.identity,
            **{f"expert_{key}": value for key, value in plan.recipe.describe().items()},
            "experts": plan.experts,
            "expert_epochs_trained": plan.epochs,
            "expert_rows": plan.rows,
            "expert_decay": plan.decay,
            "expert_seed": plan.seed,
            "experts_per_file": plan.per_file,
            "round": self._round,
            "data": digest(run.real.batch.images, run.real.batch.labels),
            "first_weights": digest(flat.laid_out(first)),
        }

    def _check(self, wanted: dict[str, Any], before: str | None) -> bool:
        """Whether the folder holds finished experts; refuses other experts."""
        if not self._manifest.exists():
            if any(self._folder.glob("*.safetensors")):
                raise RequestError(
                    f"{self._folder} holds experts without the manifest.json that describes them: "
                    "choose another folder"
                )
            return False
        known = read_json(self._manifest)
        if not isinstance(known, dict) or known.get("format_version") != FORMAT_VERSION:
            raise fault(self._manifest, f"is not an experts' manifest of format {FORMAT_VERSION}")
        ours, theirs = wanted["identity"], known.get("identity")
        if ours != theirs:
            raise RequestError(
                f"{self._folder} holds other experts: {_differences(theirs, ours)}; "
                "choose another folder"
            )
        if before is not None and known.get("hooks_before") != before:
            raise RequestError(
                f"{self._folder} holds experts trained from another state of the attack"
            )
        self._digests = _known_digests(self._manifest, known)
        if not known.get("finished"):
            return False
        for file in range(self._files):
            self._check_shard(file)
        if len(self._digests) < self._files:
            warn(
                f"{self._folder} holds experts without digests, made by an older version: whether "
                "they are as they were trained cannot be checked"
            )
        return True

    def _check_shard(self, file: int) -> None:
        """Refuse a file of experts that is damaged, changed, or of another shape."""
        path = _shard(self._folder, file)
        found, wanted = read_shape(path, "weights"), (torch.float32, self._shape(file))
        if found != wanted:
            raise fault(path, f"its weights are {found[0]} {found[1]}, expected {wanted[1]}")
        wanted_digest = self._digests.get(path.name)
        if wanted_digest is not None and file_digest(path) != wanted_digest:
            raise fault(
                path,
                "is not the file that was trained: its digest is not the one in manifest.json",
            )

    def _shape(self, file: int) -> tuple[int, int, int]:
        """(experts, epochs + 1, weights) of ``file``."""
        plan, weights = self._plan, flat.count(self._run.task.network(0))
        count = min(plan.per_file, plan.experts - file * plan.per_file)
        return count, plan.epochs + 1, weights

    # Training ------------------------------------------------------------------------------------

    def _train(self, manifest: dict[str, Any]) -> None:
        """Train the experts of all files that are missing."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot use {self._folder}: {error.strerror}") from error
        for file in range(self._files):
            write_json(self._manifest, {**manifest, "finished": False, "digests": self._digests})
            path = _shard(self._folder, file)
            if path.exists():
                self._check_shard(file)
                self._restore_hooks(path)
            else:
                self._train_file(file)
            self._digests.setdefault(path.name, file_digest(path))
        self._partial.unlink(missing_ok=True)
        write_json(self._manifest, {**manifest, "finished": True, "digests": self._digests})

    def _train_file(self, file: int) -> None:
        """Train the experts of one file in lockstep, from the checkpoint if there is one."""
        plan, first = self._plan, file * self._plan.per_file
        experts = range(first, min(first + plan.per_file, plan.experts))
        engine = self._run.task.engine
        group = _ExpertGroup([self._untrained(expert) for expert in experts], plan, engine)
        for epoch in range(self._resume(file, group), plan.epochs):
            for place, expert in enumerate(experts):
                self._run.position.enter_expert(self._round, expert, epoch)
                generator = self._streams.generator("expert", self._round, expert, epoch)
                batches = self._run.real.batches(plan.recipe.batch_size, generator, plan.rows)
                group.train(place, epoch, batches, generator)
                self._run.checks.read()
                if epoch + 1 < plan.epochs:
                    network = group.networks[place]
                    announce(self._run.hooks, self._run.moments.at("on_network", network))
                done = first * plan.epochs + epoch * len(experts) + place + 1
                self._run.observer.on_expert(done, plan.experts * plan.epochs)
            self._save(file, epoch + 1, group)
        hooks = hook_tensors(self._run.hooks)
        write_tensors(_shard(self._folder, file), {"weights": group.path, **hooks}, {"file": file})

    def _untrained(self, expert: int) -> nn.Module:
        network = self._run.task.network(self._streams.integer("expert", self._round, expert))
        return network.train()

    def _restore_hooks(self, path: Path) -> None:
        tensors, _ = read_tensors(path, only="hook.")
        restore_hooks(self._run.hooks, tensors)

    def _resume(self, file: int, group: _ExpertGroup) -> int:
        """Restore the checkpoint of ``file``, if there is one; returns the epochs behind it."""
        if not self._partial.exists():
            return 0
        tensors, info = read_tensors(self._partial, device=self._run.task.real.images.device)
        if info.get("file") != file:  # the checkpoint is older than the end of the file before
            return 0
        epochs = info.get("epochs")
        if type(epochs) is not int or not 0 <= epochs <= self._plan.epochs:
            raise fault(self._partial, f"is of {epochs!r:.60} epochs, expected a number")
        try:
            group.restore(tensors)
        except Exception as error:  # of any tensor's shape, type or name
            text = str(error) or type(error).__name__
            raise fault(
                self._partial, f"is no checkpoint of these experts ({text:.150})"
            ) from error
        restore_hooks(self._run.hooks, tensors)
        return epochs

    def _save(self, file: int, epochs: int, group: _ExpertGroup) -> None:
        """Write a checkpoint, unless the last one is recent."""
        began = time.monotonic()
        pause = max(_SECONDS_BETWEEN_CHECKPOINTS, self._saving / _WRITING_SHARE)
        if began - self._saved_at < pause:
            return
        tensors = {**group.state(), **hook_tensors(self._run.hooks)}
        write_tensors(self._partial, tensors, {"file": file, "epochs": epochs})
        self._saved_at = time.monotonic()
        self._saving = self._saved_at - began


@final
class _ExpertGroup:
    """Experts that train in lockstep: networks, optimisers, and the path ``(k, epochs + 1, P)``."""

    def __init__(self, networks: list[nn.Module], plan: ExpertPlan, engine: Engine) -> None:
        self.networks, self._plan, self._engine = networks, plan, engine
        self._optimisers = [sgd(network, plan.recipe) for network in networks]
        shape = (len(networks), plan.epochs + 1, flat.count(networks[0]))
        self.path = torch.zeros(shape)
        for place, network in enumerate(networks):
            self.path[place, 0] = flat.laid_out(network)

    def train(
        self, place: int, epoch: int, batches: Iterator[Batch], generator: torch.Generator
    ) -> None:
        """One epoch of the expert at ``place``."""
        plan, network, optimiser = self._plan, self.networks[place], self._optimisers[place]
        dropped = plan.decay and epoch > drop_epoch(plan.epochs)
        for part in optimiser.param_groups:
            part["lr"] = plan.recipe.lr * (0.1 if dropped else 1.0)
        with training(network, optimiser, self._engine) as trainer:
            train_on(trainer, batches, plan.recipe, generator)
        weights = flat.laid_out(network)
        if not bool(weights.isfinite().all()):
            raise RunError(f"an expert diverged in epoch {epoch + 1}: lower expert_lr")
        self.path[place, epoch + 1] = weights

    def state(self) -> dict[str, Tensor]:
        """All that a resumed training needs, as tensors."""
        found = {"path": self.path}
        for place, network in enumerate(self.networks):
            found |= add_prefix(f"network.{place}", network.state_dict())
            optimiser = optimiser_tensors(self._optimisers[place])
            found |= add_prefix(f"optimiser.{place}", optimiser)
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``state`` gave. Errors: many, where ``tensors`` are of other experts."""
        path = tensors["path"].cpu()
        if (path.dtype, path.shape) != (self.path.dtype, self.path.shape):
            raise ValueError(f"path is {path.dtype} {tuple(path.shape)}")
        self.path = path
        for place, network in enumerate(self.networks):
            network.load_state_dict(select_prefix(f"network.{place}", tensors))
            kept = select_prefix(f"optimiser.{place}", tensors)
            restore_optimiser(self._optimisers[place], kept)


def _shard(folder: Path, file: int) -> Path:
    return folder / f"experts-{file:03d}.safetensors"


def _known_digests(manifest: Path, known: dict[str, Any]) -> dict[str, str]:
    """The digests of finished files by their names."""
    found = known.get("digests", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise fault(manifest, "its digests are no mapping of names to digests")
    return found


def _differences(theirs: Any, ours: dict[str, Any]) -> str:
    """The first few keys that differ, with both values."""
    known = theirs if isinstance(theirs, dict) else {}
    keys = sorted(key for key in {*known, *ours} if known.get(key) != ours.get(key))
    texts = [f"{key} is {known.get(key)!r:.40}, not {ours.get(key)!r:.40}" for key in keys[:3]]
    return ", ".join(texts) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
