"""Rated sentences, from the source package ``vaderSentiment`` 0.5: a client is an article or a review.

Hutto, Gilbert. "VADER: A Parsimonious Rule-Based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.

Of the package's 23,703 rated texts those with an owner are read: 5,190 sentences of 498 opinion articles of the New
York Times, and 3,708 of 300 customer reviews at Amazon. A rating is the mean of about 20 people's, from -4 to 4. Below
-0.5 a sentence is negative, above 0.5 positive, else neutral. ``metadata["rating"]`` keeps the mean.

A tenth of the owners, drawn by the key, is the held-out set "test", whole. The other owners are the clients, of about
ten sentences each, or ``owners_per_client`` of them together are one client. With ``client = "partition"`` their
sentences are partitioned by label instead.
"""

from __future__ import annotations

import io
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, Literal

from fedferret.core.errors import UserError
from fedferret.data.examples import Example, FederatedData, check_at_least
from fedferret.data.labelled import Labelled, labelled_text
from fedferret.data.package_files import PackageFiles, content_of
from fedferret.data.partition import named_clients

if TYPE_CHECKING:
    from zipfile import ZipFile

    from fedferret.core.keys import Key

NOTICE = (
    "VADER's rated sentences, (c) 2014 C. J. Hutto, MIT licence; the sentences are their authors': do not publish rows."
)

_TEST_OWNERS = 0.1
_OWNERS = {"nytEditorialSnippets_GroundTruth.txt": "article", "amazonReviewSnippets_GroundTruth.txt": "review"}


def _tables(package: ZipFile) -> dict[str, bytes]:
    (path,) = (path for path in package.namelist() if path.endswith("/hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(fileobj=io.BytesIO(content_of(package, path))) as archive:
        files = {name: archive.extractfile(f"hutto_ICWSM_2014/{name}") for name in _OWNERS}
        return {name: file.read() for name, file in files.items() if file is not None}


FILES = PackageFiles(
    source="ratings",
    requirement="vaderSentiment==0.5",
    sha256={
        "nytEditorialSnippets_GroundTruth.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        "amazonReviewSnippets_GroundTruth.txt": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    },
    extract=_tables,
    sdist_sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)


@dataclass(frozen=True, kw_only=True)
class Ratings(Labelled):
    """Settings of the source "ratings"."""

    classes: ClassVar[tuple[str, ...]] = ("negative", "neutral", "positive")

    client: Literal["owner", "partition"] = "owner"
    owners_per_client: int = 1  # owners drawn by the key who are one client together

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("owners_per_client", self.owners_per_client, 1)

    def load(self, key: Key) -> FederatedData:
        """Read the sentences, draw the owners of the test set and make the others clients.

        Raises:
            UserError: the package cannot be read, or the partition is impossible.
        """
        owners: dict[str, list[Example]] = defaultdict(list)
        for name, content in FILES.read(self.path).items():
            for row in _rows(_OWNERS[name], content):
                owners[row.metadata["owner"]].append(row)
        names = sorted(owners)
        unseen = set(key.fold("test owners").sample(names, round(_TEST_OWNERS * len(names))))
        test = [row for owner in sorted(unseen) for row in owners[owner]]
        training = self.limited([row for owner in names if owner not in unseen for row in owners[owner]], key)
        if self.client == "partition":
            return self.federate(training, test, key, "ratings", NOTICE)
        clients: dict[str, tuple[Example, ...]] = {}
        for row in training:
            clients[row.metadata["owner"]] = (*clients.get(row.metadata["owner"], ()), row)
        return self.federated(self._grouped(clients, key), test, key, "ratings", NOTICE)

    def _grouped(self, owners: dict[str, tuple[Example, ...]], key: Key) -> dict[str, tuple[Example, ...]]:
        """The clients: the owners, or groups of ``owners_per_client`` owners (one group may be smaller)."""
        if self.owners_per_client == 1:
            return owners
        if self.owners_per_client > len(owners):
            raise UserError(
                f"data.owners_per_client is {self.owners_per_client} but there are {len(owners)} owners: ask for fewer"
            )
        names = list(owners)
        order = key.fold("groups").permutation(len(names))
        size = self.owners_per_client
        groups = [sorted(order[start : start + size]) for start in range(0, len(order), size)]
        grouped = named_clients(list(owners.values()), groups)
        return {client: tuple(chain.from_iterable(held)) for client, held in grouped.items()}


def _rows(kind: str, table: bytes) -> Iterator[Example]:
    """A line has an id such as 12_3, owner and sentence, then the mean rating, then the sentence."""
    for line in table.decode().splitlines():
        identity, mean, sentence = line.split("\t")
        rating = float(mean)
        label = "negative" if rating < -0.5 else "positive" if rating > 0.5 else "neutral"
        owner = f"{kind}-{identity.partition('_')[0]:0>3}"
        yield labelled_text(sentence, label, {"rating": rating, "owner": owner})
