"""The data sets: a new one is an entry here.

Published sets come through torchvision, which checks MD5 sums before it unpickles anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

from .folder import load_folder
from .npz import load_npz
from .published import (
    DIGIT_NAMES,
    GTSRB_FILES,
    IDX_FILES,
    STL10_NAMES,
    load_digits,
    published,
    read_arrays,
    read_cifar,
    read_gtsrb,
    read_mnist,
)
from .raw import DataRequest, RawSet


@final
@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """What is known of a data set before it is loaded.

    image_shape: (C, H, W) after loading; classes: their number; ``None``: the files decide.
    mean, std: the literature's normalisation; ``None``: measured on the training images.
    """

    description: str
    load: Callable[[DataRequest], RawSet]
    image_shape: tuple[int, int, int] | None = None
    classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flips: bool = True


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(
        description="scikit-learn's handwritten digits; built in, needs no download",
        load=load_digits,
        image_shape=(1, 8, 8),
        classes=10,
        flips=False,
    ),
    "mnist": DatasetEntry(
        description="handwritten digits (LeCun et al., 1998)",
        load=published(
            "MNIST",
            *IDX_FILES,
            read=read_mnist,
            home="MNIST/raw",
            suffixes=("", ".gz"),
            split_key="train",
        ),
        image_shape=(1, 28, 28),
        classes=10,
        mean=(0.1307,),
        std=(0.3081,),
        flips=False,
    ),
    "fashion-mnist": DatasetEntry(
        description="photographs of clothes (Xiao et al., 2017)",
        load=published(
            "FashionMNIST",
            *IDX_FILES,
            read=read_mnist,
            home="FashionMNIST/raw",
            suffixes=("", ".gz"),
            split_key="train",
            hint=", or run: apt-get install dataset-fashion-mnist",
        ),
        image_shape=(1, 28, 28),
        classes=10,
        mean=(0.2861,),
        std=(0.3530,),
    ),
    "cifar10": DatasetEntry(
        description="small photographs of animals and vehicles (Krizhevsky, 2009)",
        load=published("CIFAR10", "cifar-10-batches-py", read=read_cifar, split_key="train"),
        image_shape=(3, 32, 32),
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "cifar100": DatasetEntry(
        description="small photographs, fine labels (Krizhevsky, 2009)",
        load=published("CIFAR100", "cifar-100-python", read=read_cifar, split_key="train"),
        image_shape=(3, 32, 32),
        classes=100,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "svhn": DatasetEntry(
        description="house numbers, cropped digits (Netzer et al., 2011)",
        load=published(
            "SVHN", "train_32x32.mat", "test_32x32.mat", read=partial(read_arrays, DIGIT_NAMES)
        ),
        image_shape=(3, 32, 32),
        classes=10,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        flips=False,
    ),
    "stl10": DatasetEntry(
        description="photographs, 5,000 for training, resized from 96x96 (Coates et al., 2011)",
        load=published("STL10", "stl10_binary", read=partial(read_arrays, STL10_NAMES)),
        image_shape=(3, 32, 32),
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "gtsrb": DatasetEntry(
        description="German traffic signs, resized (Stallkamp et al., 2012)",
        load=published("GTSRB", *(f"gtsrb/{name}" for name in GTSRB_FILES), read=read_gtsrb),
        image_shape=(3, 32, 32),
        classes=43,
        mean=(0.3403, 0.3121, 0.3214),
        std=(0.2724, 0.2608, 0.2669),
        flips=False,
    ),
    "folder:PATH": DatasetEntry(
        description="image files, one folder a class, with or without train/ and test/",
        load=load_folder,
    ),
    "npz:PATH": DatasetEntry(
        description="a numpy file with x_train, y_train, x_test, y_test, or x and y",
        load=load_npz,
    ),
}
