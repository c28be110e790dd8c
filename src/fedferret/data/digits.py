"""1,797 handwritten digits of 8 x 8 pixels, from the wheel ``scikit-learn``: what its ``load_digits`` reads.

Alpaydin, Kaynak. "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.

The wheel is read and not installed. The rows are the test set of UCI's data set. Pixels count ink from 0 to 16. Here
each is scaled to 0 to 255 and rounded, so 16 is 255 and no two values become one. A fifth of the rows, drawn by the
key, is the held-out set "test".
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedferret.data.examples import Example, FederatedData
from fedferret.data.labelled import Labelled, draw_test, labelled_image
from fedferret.data.package_files import PackageFiles, members

if TYPE_CHECKING:
    from fedferret.core.keys import Key

NOTICE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI; rows of the package scikit-learn (BSD)."
)

FILES = PackageFiles(
    source="digits",
    requirement="scikit-learn==1.9.1",
    sha256={"digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"},
    extract=members("sklearn/datasets/data/digits.csv.gz"),
)


@dataclass(frozen=True, kw_only=True)
class Digits(Labelled):
    """Settings of the source "digits"."""

    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")

    def load(self, key: Key) -> FederatedData:
        """Read the images, draw the test set and partition the other images.

        Raises:
            UserError: the package cannot be read, or the partition is impossible.
        """
        lines = gzip.decompress(FILES.read(self.path)["digits.csv.gz"]).decode().split()
        training, test = draw_test([_image(line) for line in lines], key)
        return self.federate(training, test, key, "digits", NOTICE)


def _image(line: str) -> Example:
    """A line has 64 values from 0 to 16, row by row, then the digit."""
    *ink, digit = map(int, line.split(","))
    return labelled_image(bytes((255 * value + 8) // 16 for value in ink), (1, 8, 8), str(digit))
