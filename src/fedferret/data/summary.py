"""Examples, categories and tokens per client: a table for the terminal and a plot for the report."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError
from fedferret.core.files import build_atomically
from fedferret.core.text import shortened
from fedferret.data.examples import Example, FederatedData
from fedferret.data.stored import categories_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

SHOWN_CATEGORIES = 8  # as colours; more are the rows of a heat map
MOST_CELLS = 1000  # of a heat map: 40 kB of SVG for every hundred
NAMED_CLIENTS = 40  # the names of more do not fit below a heat map
MOST_STEPS = 2000  # drawn as lines, 100 bytes each; more are pixels


@dataclass(frozen=True)
class Group:
    """All clients together, or one held-out set."""

    name: str
    clients: int | None  # None for a held-out set
    examples: int
    spread: tuple[int, float, int] | None  # examples per client: least, median, most
    response_tokens: int | None  # None where no tokenizer was given
    categories: tuple[tuple[str, int], ...]  # the most frequent, with their numbers of examples

    def cells(self) -> list[str]:
        """The fields as texts, in order; empty for None."""
        numbers = [self.clients, self.examples, *(self.spread or (None,) * 3), self.response_tokens]
        categories = ", ".join(f"{shortened(name)} {count:,}" for name, count in self.categories)
        return [shortened(self.name), *("" if number is None else f"{number:,}" for number in numbers), categories]


@dataclass(frozen=True)
class Summary:
    """Counts of a data set; prints as a table with rich."""

    source: str
    groups: tuple[Group, ...]  # the clients, then the held-out sets in order
    notice: str | None

    def __rich__(self) -> Table:
        from rich.table import Table

        columns = ["", "clients", "examples", "least", "median", "most", "response tokens", "top categories"]
        rows = [group.cells() for group in self.groups]
        filled = [index for index in range(len(columns)) if any(row[index] for row in rows)]
        table = Table(title=f"Data: {shortened(self.source)}", caption=self.notice)
        for index in filled:
            table.add_column(columns[index], justify="right" if 0 < index < len(columns) - 1 else "left")
        for row in rows:
            table.add_row(*(row[index] for index in filled))
        return table


def summarise(data: FederatedData, tokenizer: PreTrainedTokenizerBase | None = None) -> Summary:
    """Count clients, examples, categories and tokens.

    Args:
        data: of the run.
        tokenizer: counts the tokens of the responses; None: they are not counted.
    """
    sizes = [len(examples) for examples in data.clients.values()]
    groups = [_group("clients", [*data.clients.values()], sizes, tokenizer)]
    groups += [_group(name, [examples], None, tokenizer) for name, examples in data.held_out.items()]
    if data.kept:
        groups.append(_group("held out at clients", [*data.kept.values()], None, tokenizer))
    return Summary(data.source, tuple(groups), data.notice)


def _group(
    name: str,
    parts: Sequence[Sequence[Example]],
    sizes: Sequence[int] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Group:
    tokens = None
    if tokenizer is not None:
        texts = [example.response for examples in parts for example in examples]
        tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) if texts else 0
    return Group(
        name=name,
        clients=None if sizes is None else len(sizes),
        examples=sum(map(len, parts)),
        spread=(min(sizes), median(sizes), max(sizes)) if sizes else None,
        response_tokens=tokens,
        categories=tuple(sum(map(_categories, parts), Counter()).most_common(3)),
    )


def _categories(examples: Sequence[Example]) -> Counter[str]:
    return Counter(categories_of(examples))


def plot_partition(data: FederatedData, path: Path) -> None:
    """Plot who holds what.

    With more than 8 categories: a heat map of category and client, with the clients' sizes above it. Else, and where a
    heat map would have too many cells: the size of each client, largest first, coloured by category.

    Args:
        data: of the run.
        path: of the picture; the suffix gives the format, .svg or .png.
    Raises:
        UserError: for another suffix.
    """
    if path.suffix not in (".svg", ".png"):
        raise UserError(f'cannot plot to "{path}": give a name that ends in .svg or .png')
    import matplotlib
    from matplotlib.figure import Figure

    held = {client: _categories(examples) for client, examples in data.clients.items()}
    categories = sorted(set().union(*held.values()))
    # a fixed salt and no date: equal data gives an equal file; no name from the data is read as mathematics
    with matplotlib.rc_context({"svg.hashsalt": "fedferret", "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has the font
        figure = Figure(figsize=(8, 4), layout="constrained")
        if len(categories) > SHOWN_CATEGORIES and len(categories) * len(held) <= MOST_CELLS:
            _draw_heat_map(figure, data, held, categories)
        else:
            _draw_bands(figure, data)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        build_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], metadata=metadata))


def _draw_heat_map(
    figure: Figure, data: FederatedData, held: Mapping[str, Counter[str]], categories: Sequence[str]
) -> None:
    import numpy as np
    from matplotlib.colors import PowerNorm

    figure.set_size_inches(8, 1.8 + max(2.0, 0.19 * len(categories)))
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(2.0, 0.19 * len(categories))])
    edges = range(len(held) + 1)
    above.stairs([len(examples) for examples in data.clients.values()], edges, fill=True)
    above.set(ylabel="examples", title=f"Who holds what: {shortened(data.source)}")
    counts = np.ma.masked_equal([[client[name] for client in held.values()] for name in categories], 0)
    # the square root of a count: a client's few examples of a class are seen beside hundreds of another's
    cells = axes.pcolormesh(
        edges,
        range(len(categories) + 1),
        counts,
        cmap="Blues",
        norm=PowerNorm(0.5, vmin=0),
        edgecolor="0.9",
        linewidth=0.3,
    )
    axes.invert_yaxis()
    axes.set_yticks(
        [row + 0.5 for row in range(len(categories))], [shortened(name, 40) for name in categories], fontsize="small"
    )
    if len(held) <= NAMED_CLIENTS:
        axes.set_xticks([column + 0.5 for column in range(len(held))], [shortened(name, 20) for name in held])
        axes.tick_params("x", rotation=90, labelsize="small")
    axes.set(xlabel=f"{len(held):,} clients")
    figure.colorbar(cells, ax=axes, label="examples")


def _draw_bands(figure: Figure, data: FederatedData) -> None:
    from matplotlib.ticker import MaxNLocator

    held = [(_categories(examples), len(examples)) for examples in data.clients.values()]
    held.sort(key=lambda pair: (-pair[1], str(pair[0].most_common(1))))
    overall: Counter[str] = sum((counts for counts, _ in held), Counter())
    shown = [name for name, _ in overall.most_common(SHOWN_CATEGORIES)]
    bands = [(name, [counts[name] for counts, _ in held]) for name in shown]
    rest = [size - sum(counts[name] for name in shown) for counts, size in held]
    if any(rest) or not bands:
        bands.append(("others" if bands else "", rest))

    axes = figure.add_subplot()
    edges, many = range(len(held) + 1), len(held) > MOST_STEPS
    floor = [0] * len(held)
    for number, (name, counts) in enumerate(bands):
        top = [low + count for low, count in zip(floor, counts, strict=True)]
        label = shortened(name, 40)
        axes.stairs(top, edges, baseline=floor, fill=True, color=f"C{number}", label=label, rasterized=many)
        floor = top
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel=f"{len(held):,} clients, largest first",
        ylabel="examples",
        title=f"Examples per client: {shortened(data.source)}",
    )
    axes.margins(x=0)
    if len(bands) > 1:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
