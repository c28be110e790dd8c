"""The data sources by name; importing this module imports no library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedferret.core.registry import described, imported

if TYPE_CHECKING:
    from fedferret.data.examples import Source

_SOURCES: dict[str, tuple[str, str, str]] = {
    "bbc-news": (
        "bbc_news",
        "BBCNews",
        "2,127 distinct articles of BBC News in 5 classes; clients by Dirichlet shares",
    ),
    "bigbench-ni": (
        "bigbench",
        "BigBenchNI",
        "Natural Instructions v1 in BIG-bench's package, 61 tasks; client = task",
    ),
    "chitchat": ("chitchat", "Chitchat", "messages of real people in 4,018 conversations; client = person"),
    "code-alpaca": ("code_alpaca", "CodeAlpaca", "instructions for code; client = programming language"),
    "digits": ("digits", "Digits", "1,797 handwritten digits of 8 x 8 pixels; clients by Dirichlet shares"),
    "dolly": ("dolly", "Dolly", "Dolly-15K: instructions in 8 categories, one held out; clients by Dirichlet shares"),
    "files": (
        "files",
        "Files",
        "local files (JSON lines, JSON, CSV, Parquet, Arrow) with named columns or chat messages",
    ),
    "gsm8k": ("gsm8k", "GSM8K", "grade-school mathematics, the official test set held out; IID clients"),
    "hub": ("hub", "Hub", "a Hugging Face hub data set by name, with the same column settings as files"),
    "mnist": ("mnist", "MNIST", "5,000 handwritten digits of 28 x 28 pixels; clients by Dirichlet shares"),
    "natural-instructions": (
        "natural_instructions",
        "NaturalInstructions",
        "a clone of Natural Instructions v2.8; client = training task, 119 test tasks held out",
    ),
    "newsgroups": (
        "newsgroups",
        "Newsgroups",
        "20 Newsgroups: 18,821 messages in 20 classes with the official test set; clients by Dirichlet shares",
    ),
    "ratings": ("ratings", "Ratings", "rated sentences in 3 classes; client = newspaper article or customer review"),
    "reasoning-gym": ("reasoning", "ReasoningGym", "generated reasoning tasks with exact scorers; client = task"),
    "sites": ("sites", "Sites", "a list of sites that keep their own files: a run across organisations"),
}


def catalogue() -> dict[str, str]:
    """What can stand in a recipe as ``data.source``.

    Returns:
        A one-line description of every source by name.
    """
    return described(_SOURCES)


def source(name: str) -> type[Source]:
    """Import a data source.

    Args:
        name: a key of ``catalogue()``.

    Returns:
        The source's class, a frozen dataclass with the source's settings as fields.

    Raises:
        UserError: for an unknown name.
    """
    found: type[Source] = imported("data source", "fedferret.data", _SOURCES, name)
    return found
