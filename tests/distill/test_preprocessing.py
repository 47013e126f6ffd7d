"""Whitening: against kornia and the closed form, there and back, in networks and in files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kornia.enhance import ZCAWhitening
from torch import Tensor

from distillsec.distill.data.registry import ImageSet, load_dataset
from distillsec.distill.files.artifact import load_set
from distillsec.distill.files.safe import read_tensors
from distillsec.distill.networks.registry import NetworkSpec, build_network
from distillsec.distill.preprocessing import Preprocessing, Zca, digest, fit_zca
from distillsec.distill.types import Batch, RequestError
from distillsec.eval.config.schema import Config
from distillsec.eval.run.cell import run_cell
from distillsec.eval.run.progress import Reporter

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 0.1  # the trajectory-matching code's


def correlated(count: int = 300, shape: tuple[int, int, int] = (2, 4, 4)) -> Tensor:
    """Images whose pixels go together: strong directions, weak ones, and one that is constant."""
    rng = torch.Generator().manual_seed(11)
    dimensions = shape[0] * shape[1] * shape[2]
    mix = torch.randn(dimensions, dimensions, generator=rng) * torch.logspace(0.5, -2, dimensions)
    images = 0.5 + torch.randn(count, dimensions, generator=rng) @ mix.T
    images[:, 3] = 0.25
    return images.view(count, *shape)


# The matrices ------------------------------------------------------------------------------------


def test_the_whitening_is_kornias() -> None:
    images = correlated()
    zca, theirs = fit_zca(images), ZCAWhitening(eps=EPS, compute_inv=True).fit(images.flatten(1))
    wanted = theirs(images.flatten(1)).view_as(images)
    torch.testing.assert_close(zca.whiten(images), wanted, rtol=1e-5, atol=1e-5)
    back = theirs.inverse_transform(wanted.flatten(1)).view_as(images)
    torch.testing.assert_close(zca.unwhiten(wanted), back, rtol=1e-5, atol=1e-5)


# float32: the smaller eps, the larger the matrix and its rounding.
@pytest.mark.parametrize(("eps", "tolerance"), [(EPS, 1e-4), (1e-3, 1e-3)])
def test_the_whitened_covariance_is_the_closed_form(eps: float, tolerance: float) -> None:
    images = correlated()
    flat = images.flatten(1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
    values = values.clip(0)
    wanted = (vectors * (values / (values + eps))) @ vectors.T
    whitened = fit_zca(images, eps).whiten(images).flatten(1).double().numpy()
    assert np.abs(np.cov(whitened, rowvar=False) - wanted).max() < tolerance
    assert np.abs(whitened.mean(0)).max() < 1e-3
    # The strong directions are white by now, and the constant one is not blown up.
    assert values.max() > 30 and wanted.diagonal()[3] < 1e-9
    assert abs(np.linalg.eigvalsh(wanted).max() - 1) < 0.01


def test_the_matrix_is_the_symmetric_root_in_float64() -> None:
    images = correlated()
    values, vectors = np.linalg.eigh(np.cov(images.flatten(1).double().numpy(), rowvar=False))
    zca = fit_zca(images)
    for matrix, power in ((zca.matrix, -0.5), (zca.inverse, 0.5)):
        root = (vectors * (values.clip(0) + EPS) ** power) @ vectors.T
        assert np.abs(matrix.double().numpy() - root).max() < 1e-4 * np.abs(root).max()
        assert matrix.dtype == torch.float32
    torch.testing.assert_close(zca.mean, images.flatten(1).mean(0, keepdim=True))


# There and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("whitened", [False, True])
def test_preprocessing_there_and_back(whitened: bool) -> None:
    images = correlated()
    plain = Preprocessing((0.4, 0.6), (0.2, 0.5))
    zca = fit_zca(plain.normalise(images)) if whitened else None
    space = Preprocessing(plain.mean, plain.std, zca)
    mean, std = (torch.tensor(each).view(1, 2, 1, 1) for each in (space.mean, space.std))
    normalised = space.normalise(images)
    by_hand = (images - mean) / std
    if zca is not None:
        by_hand = ((by_hand.flatten(1) - zca.mean) @ zca.matrix).view_as(images)
    torch.testing.assert_close(normalised, by_hand)
    torch.testing.assert_close(space.pixels(normalised), images, rtol=1e-4, atol=1e-4)
    noise = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(space.normalise(space.pixels(noise)), noise, rtol=1e-4, atol=2e-4)
    moved = space.to("cpu")
    assert torch.equal(moved.normalise(images), normalised)


def test_equal_whitenings_are_equal_and_others_are_not() -> None:
    images = correlated()
    zca, again, other = fit_zca(images), fit_zca(images.clone()), fit_zca(images + 0.01)
    assert zca == again and hash(zca) == hash(again) and zca != other
    every = digest(zca.mean, zca.matrix, zca.inverse)
    assert zca.describe() == {"dimensions": 32, "digest": every}
    assert zca != replace(zca, inverse=zca.inverse + 1e-6)
    assert digest(zca.mean) != digest(zca.mean.view(-1))  # the shape counts
    assert digest(torch.zeros(2)) != digest(torch.zeros(2, dtype=torch.int32))


# Networks and data sets --------------------------------------------------------------------------


def network_of(zca: Zca | None, seed: int = 0) -> torch.nn.Module:
    return build_network(
        NetworkSpec(width=4, depth=1),
        image_shape=(2, 4, 4),
        classes=3,
        preprocessing=Preprocessing((0.0, 0.0), (1.0, 1.0), zca),
        seed=seed,
    )


def test_a_network_whitens_on_entry_and_its_copies_share_the_matrices() -> None:
    images = correlated(40)
    zca = fit_zca(images)
    network, plain = network_of(zca), network_of(None)
    expected = plain(zca.whiten(images))
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(network(images), plain(images), atol=1e-2)
    twin = copy.deepcopy(network)
    assert torch.equal(twin(images), network(images))
    assert copy.deepcopy(zca) is zca
    shared = [each.normalise.zca for each in (network, twin)]  # type: ignore[union-attr]
    assert shared[0] is shared[1] is zca
    largest = max(value.numel() for value in network.state_dict().values())
    assert largest < zca.matrix.numel()  # no state dict carries the matrices


def made_of(images: Tensor) -> ImageSet:
    labels = torch.arange(len(images)) % 2
    batch = Batch(images=images, labels=labels, index=torch.arange(len(images)))
    channels = images.shape[1]
    return ImageSet(
        name="made",
        train=batch,
        test=batch.rows(torch.arange(4)),
        classes=("a", "b"),
        mean=(0.5,) * channels,
        std=(0.2,) * channels,
        flips=False,
    )


def test_a_whitened_set_is_whitened_in_place_of_mean_and_std() -> None:
    data = made_of(correlated())
    assert data.preprocessing == Preprocessing((0.5, 0.5), (0.2, 0.2), None)
    whitened = data.whitened()
    space = whitened.preprocessing
    assert (space.mean, space.std) == ((0.0, 0.0), (1.0, 1.0))
    assert space.zca == fit_zca(data.train.images)
    assert whitened.to("cpu").zca == space.zca
    assert torch.equal(whitened.train.images, data.train.images)  # pixels stay pixels


def test_images_too_large_for_the_matrix_are_refused() -> None:
    with pytest.raises(
        RequestError, match=r"\(1, 65, 64\) have 4160 values, at most 4096"
    ) as refused:
        made_of(torch.zeros(4, 1, 65, 64)).whitened()
    assert "--image-size" in str(refused.value) and "\n" not in str(refused.value)


# End to end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"backend": "dm", "init": "real"}])
def test_a_whitened_run_stores_its_matrices(
    tiny: Callable[..., Config], tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = tiny(zca=True, control=False, victims=1, **changes)
    record = run_cell(config, tmp_path / "run", reporter=Reporter(quiet=True))
    path = tmp_path / "run" / "distilled.safetensors"
    data = load_dataset("digits").whitened()
    assert data.zca is not None
    tensors, _ = read_tensors(path)
    assert set(tensors) == {"images", "labels", "zca.mean", "zca.matrix", "zca.inverse"}
    for name in ("mean", "matrix", "inverse"):
        assert torch.equal(tensors[f"zca.{name}"], getattr(data.zca, name))
    found = load_set(path)
    assert found.recipe.preprocessing == data.preprocessing
    assert record.recipe["zca"] == data.zca.describe()
    assert record.recipe == found.recipe.describe()
    plain = tiny(control=False, victims=1, **changes)
    assert plain.control_key() != config.control_key()
    unwhitened = Preprocessing(data.preprocessing.mean, data.preprocessing.std)
    assert replace(found.recipe, preprocessing=unwhitened) != found.recipe
