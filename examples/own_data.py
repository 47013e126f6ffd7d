"""Data of your own: images from a program, written as one numpy file.

    cd examples
    python own_data.py shapes.npz
    distillsec attack --preset digits-naive --dataset npz:shapes.npz

``x`` and ``y`` are split 80/20 for you; give ``x_train``, ``y_train``, ``x_test`` and ``y_test``
for a split of your own. Image files in one folder a class need no program: ``folder:PATH``.
"""

import sys

import numpy as np
from numpy.typing import NDArray

CLASSES = ("disc", "square", "cross")
SIDE, COUNT = 16, 200


def shape(label: int, size: int, row: int, column: int) -> NDArray[np.bool_]:
    """Where a shape ``size`` pixels wide is, with its centre at ``row`` and ``column``."""
    rows, columns = np.ogrid[:SIDE, :SIDE]
    down, right = abs(rows - row), abs(columns - column)
    disc = down**2 + right**2 <= (size / 2) ** 2
    square = np.maximum(down, right) <= size / 2
    cross = square & (np.minimum(down, right) <= 1)
    found: NDArray[np.bool_] = (disc, square, cross)[label]
    return found


def main(path: str) -> None:
    """Noisy grey images of shapes at random places, ``COUNT`` of each class."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(CLASSES)), COUNT)
    images = rng.integers(0, 60, (len(labels), SIDE, SIDE), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = rng.integers(5, SIDE - 5, size=2).tolist()
        image[shape(int(label), int(rng.integers(6, 10)), row, column)] += 180
    np.savez(path, x=images, y=labels, classes=np.array(CLASSES))


if __name__ == "__main__":
    main(sys.argv[1])
