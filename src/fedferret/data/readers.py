"""Files of rows by format: JSON lines, JSON, CSV, TSV, Parquet, Arrow, and folders that ``datasets`` has saved.

Rows equal what ``json.loads`` gives of each line. ``datasets``' builder of JSON fills keys that other rows have with
null and refuses types that change, that of CSV makes numbers and NaN of texts, and both write a copy of the data to
disk. So the standard library parses text row by row, and pyarrow, on which those builders stand, reads the rest and
decompresses. Nothing is written to disk.
"""

from __future__ import annotations

import csv
import io
import json
import re
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError
from fedferret.data.rows import ArrowRows, Lines, Part, parsed, row_of

_BOM = b"\xef\xbb\xbf"
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # begins UTF-16 and UTF-32
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_DELIMITERS = (";", "\t", "|")  # of a .csv file with no comma in its header
_SEPARATOR = re.compile(r"(?i:sep)=(.)\r?\n")  # Excel's first line, which names the delimiter
_LINE, _QUOTED = re.compile(r"[^\r\n]+"), re.compile(r'"[^"]*"')
_OTHERS = {  # what a file begins with that is not of the format its name says
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself: fetch that with `git lfs pull`",
    b"\x1f\x8b": "is compressed by gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed by Zstandard: let its name end in .zst",
    b"PK\x03\x04": "is a zip archive, as Excel's .xlsx files are: unpack it, or save the table as CSV",
    b"PAR1": "is a Parquet file: let its name end in .parquet",
    b"ARROW1": "is an Arrow file: let its name end in .arrow",
    b"<!DOCTYPE": "is a web page and not the file itself: fetch it again",
    b"<html": "is a web page and not the file itself: fetch it again",
}
_SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_FIELD = 2**31 - 1  # characters of a field in CSV, the most that the standard library takes everywhere


def readable(path: Path) -> bool:
    """Whether the suffixes of a file's name are of a format that can be read."""
    return _format(path) in _READERS


def formats() -> str:
    """The suffixes that can be read, for errors."""
    return f"{', '.join(_READERS)}, each also with {' or '.join(_COMPRESSED)}"


def read(path: Path) -> Part | None:
    """The rows of a file, or of a folder that ``datasets`` has saved.

    Args:
        path: of a file with a known suffix, or of such a folder.

    Returns:
        The rows, not yet parsed where they are lines; None where there are none.

    Raises:
        UserError: the content is not of the format that the suffix says, or cannot be read.
    """
    if path.is_dir():
        part: Part = ArrowRows(str(path), _distinct(_saved(path), path))
        return part if len(part) else None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f'"{path}" cannot be read: {error.strerror or error}') from None
    if path.suffix.lower() in _COMPRESSED:
        content = _decompressed(content, path)
    _refuse_others(content, path)
    part = _READERS[_format(path)](content, path)
    return part if len(part) else None


def _refuse_others(content: bytes, path: Path) -> None:
    """Raise UserError for a file of another kind than its name says, with what is to be done."""
    for begin, what in _OTHERS.items():
        ours = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}.get(begin) == _format(path)
        if content.startswith(begin) and not ours:
            raise UserError(f'"{path}" {what}')


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _decompressed(content: bytes, path: Path) -> bytes:
    import pyarrow

    try:
        stream = pyarrow.input_stream(pyarrow.BufferReader(content), compression=_COMPRESSED[path.suffix.lower()])
        return bytes(stream.read())
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f'"{path}" cannot be decompressed: {_first_line(error)}') from None


def _text(content: bytes, path: Path) -> bytes:
    """UTF-8 without byte-order marks before lines. Raises UserError for text in 16 or 32 bits."""
    if content.startswith(_WIDE) or 0 < content[:4].count(0) < 4:  # of a character's bytes some are zero
        raise UserError(f'"{path}" is not UTF-8 text but UTF-16 or UTF-32: save it as UTF-8')
    while content.startswith(_BOM):
        content = content.removeprefix(_BOM)
    return content.replace(b"\n" + _BOM, b"\n")  # of files that were joined


def _decoded(content: bytes, path: Path) -> str:
    try:
        return _text(content, path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f'"{path}" is not UTF-8 text (byte {error.start}): save it as UTF-8') from None


def _json_lines(content: bytes, path: Path) -> Part:
    content = _text(content, path)
    if b"\n" not in content:
        content = content.replace(b"\r", b"\n")  # an old line end; within JSON it can only be white space
    starts, start = array("q"), 0
    while start < len(content):
        end = content.find(b"\n", start) + 1 or len(content)
        if content[start : min(start + 1, end)] not in b" \t\r\n" or content[start:end].strip():
            starts.append(start)
        start = end
    if starts and content[starts[0]] == ord("["):
        raise UserError(f'"{path}" holds a JSON array and not one object per line: name it .json')
    return Lines(str(path), content, starts)


def _json_array(content: bytes, path: Path) -> Part:
    text = _decoded(content, path)
    del content
    kept, starts = bytearray(), array("q")
    decoder, position = json.JSONDecoder(), _after_space(text, 0)
    if position == len(text):
        return Lines(str(path), kept, starts)
    if text[position] != "[":
        _refuse_object(text, path)
    position = _after_space(text, position + 1)
    mark = "" if text.startswith("]", position) else ","
    while mark == ",":
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            raise _fault(text, path) from None
        row_of(value, f"{path}, row {len(starts) + 1}")
        starts.append(len(kept))
        kept += text[position:end].encode()
        position = _after_space(text, end)
        mark = text[position : position + 1]
        position = _after_space(text, position + 1) if mark == "," else position
    if not text.startswith("]", position) or _after_space(text, position + 1) < len(text):
        raise _fault(text, path)
    return Lines(str(path), kept, starts)


def _after_space(text: str, position: int) -> int:
    """The next position that is no white space of JSON's."""
    space = _SPACE.match(text, position)
    return space.end() if space else position


def _fault(text: str, path: Path) -> UserError:
    """What is wrong with a text that is not JSON."""
    try:
        parsed(text, f'"{path}"')
    except UserError as error:
        return error
    return UserError(f'"{path}" is not JSON')


def _refuse_object(text: str, path: Path) -> None:
    """Raise the UserError of a JSON file that is not an array, with the remedy where it is one object per line."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines):
        raise UserError(
            f'"{path}" holds one object per line and not one JSON array: rename it, its name ends in .jsonl'
        )
    parsed(text, f'"{path}"')  # says what is wrong with it, if it is not JSON
    raise UserError(f'"{path}" is not a JSON array of rows: give a .jsonl file for one object per line')


def _csv(content: bytes, path: Path, delimiter: str | None = None) -> Part:
    text = _decoded(content, path)
    del content
    if delimiter is None:
        if named := _SEPARATOR.match(text):
            delimiter, text = named[1], text[named.end() :]
        else:
            first = _LINE.search(text)
            head = _QUOTED.sub("", first[0]) if first else ""
            delimiter = "," if "," in head else next((each for each in _DELIMITERS if each in head), ",")
    kept, starts = bytearray(), array("q")
    name = str(path) if delimiter == "," or path.suffix == ".tsv" else f'{path} (delimiter "{delimiter}")'
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            header = next((row for row in reader if row), [])
            twice = [column for number, column in enumerate(header) if column in header[:number]]
            if twice:
                raise UserError(f'"{path}" has two columns "{twice[0]:.40}": give each its own name')
            for row in reader:
                if len(row) != len(header) and row:
                    raise UserError(
                        f'"{path}", line {reader.line_num}: not as many fields as the header has '
                        f'({len(row)} and {len(header)}, separated by "{delimiter}")'
                    )
                if row == header and len(row) > 1:
                    raise UserError(
                        f'"{path}", line {reader.line_num} is the header again, as of files that were joined: remove it'
                    )
                if row:
                    starts.append(len(kept))
                    kept += json.dumps(row, ensure_ascii=False).encode()
        except csv.Error as error:
            raise UserError(f'"{path}", line {reader.line_num} is not CSV: {error}') from None
    return Lines(name, kept, starts, header)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Texts above the standard library's 131,072 characters are read; the limit of the process stays what it was."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _tsv(content: bytes, path: Path) -> Part:
    return _csv(content, path, "\t")


def _parquet(content: bytes, path: Path) -> Part:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f'"{path}" is not a Parquet file: {_first_line(error)}') from None
    return ArrowRows(str(path), _distinct(table, path))


def _arrow(content: bytes, path: Path) -> Part:
    import pyarrow

    source = pyarrow.BufferReader(content)
    try:
        opened = pyarrow.ipc.open_file if content.startswith(b"ARROW1") else pyarrow.ipc.open_stream
        table = opened(source).read_all()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f'"{path}" is not an Arrow file: {_first_line(error)}') from None
    return ArrowRows(str(path), _distinct(table, path))


def _saved(path: Path) -> Any:
    """The Arrow table of a folder that ``save_to_disk`` wrote."""
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            return saved.with_format("arrow")[:]
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f'"{path}" is not a folder of save_to_disk that can be read: {_first_line(error)}') from None
    names = ", ".join(f'"{path / name}"' for name in saved)
    raise UserError(f'"{path}" holds several splits: give the folder of one ({names})')


def _distinct(table: Any, path: Path) -> Any:
    """The table. Raises UserError where two columns have one name."""
    names: list[str] = table.column_names
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise UserError(f'"{path}" has two columns "{twice[0]:.40}": give each its own name')
    return table


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


_READERS: dict[str, Callable[[bytes, Path], Part]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
