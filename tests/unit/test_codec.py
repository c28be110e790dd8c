"""The codec: values survive to the bit; bytes that are not a message raise WireError and nothing else."""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedferret.core.log import Record
from fedferret.core.messages import message, state, type_code
from fedferret.wire import codec
from fedferret.wire.codec import WireError

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip


@message
class Mixed:
    """A message with a field of every kind."""

    nothing: None
    parts: tuple[Any, ...]
    table: dict[str, Any]
    inner: Record


SAMPLE = Mixed(
    None,
    (True, False, 0, -1, 2**64 - 1, -(2**63), 0.1, -math.inf, "", "Grüße", b"", b"\x00\xff", (), ((1,),)),
    {"": 1, "weights": torch.arange(6.0).reshape(2, 3), "none": torch.zeros(0, 4), "scalar": torch.tensor(2.5)},
    Record(3, b"entry", "abc"),
)


def framed(body: bytes) -> bytes:
    """A body in an intact frame: only the body can be wrong."""
    head = b"fF" + bytes([codec.VERSION]) + body
    return head + struct.pack("<I", zlib.crc32(head))


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)
    return codec.encode(left) == codec.encode(right) and type(left) is type(right)


def test_values_survive_encoding() -> None:
    decoded = codec.decode(codec.encode(SAMPLE))
    assert decoded.parts == SAMPLE.parts and decoded.inner == SAMPLE.inner and decoded.nothing is None
    assert list(decoded.table) == list(SAMPLE.table)
    assert all(same(decoded.table[name], value) for name, value in SAMPLE.table.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 5), (2, 3, 4)], ids=str)
def test_tensors_of_every_type_and_shape_survive(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(torch.Size(shape).numel()) % 7).to(dtype).reshape(shape)
    encoded = codec.encode(tensor)
    assert same(codec.decode(encoded), tensor)
    assert len(encoded) == codec.size(tensor) <= tensor.numel() * dtype.itemsize + 7 + 8


def test_the_bits_of_nan_survive() -> None:
    odd = torch.tensor([0x7FC00001, -1, 0x7F800001 - 2**31], dtype=torch.int32).view(torch.float32)
    assert same(codec.decode(codec.encode(odd)), odd)
    assert math.isnan(codec.decode(codec.encode(math.nan)))


def test_tensors_that_are_not_contiguous_survive() -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    for view in (tensor.T, tensor[:, ::2], tensor[1:, 1], tensor[:1].expand(3, 6)):
        assert same(codec.decode(codec.encode(view)), view.contiguous())


def test_decoded_tensors_own_their_memory() -> None:
    encoded = codec.encode((torch.ones(4), torch.ones(4)))
    left, right = codec.decode(encoded)
    left.zero_()
    assert right.sum() == 4 and codec.decode(encoded)[0].sum() == 4


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(codec.LOWEST, codec.HIGHEST)
    | st.floats(allow_nan=False)
    | st.binary()
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(values)
def test_every_value_survives_and_has_the_length_that_size_returns(value: Any) -> None:
    encoded = codec.encode(value)
    assert codec.decode(encoded) == value
    assert codec.size(value) == len(encoded)


def test_any_flipped_bit_is_refused() -> None:
    encoded = codec.encode(SAMPLE)
    for position in range(8 * len(encoded)):
        damaged = bytearray(encoded)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(WireError):
            codec.decode(bytes(damaged))


def test_a_message_cut_anywhere_is_refused() -> None:
    encoded = codec.encode(SAMPLE)
    for length in range(len(encoded)):
        with pytest.raises(WireError):
            codec.decode(encoded[:length])
    with pytest.raises(WireError):
        codec.decode(encoded + b"\0")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=60))
def test_any_bytes_in_an_intact_frame_are_a_value_or_refused(body: bytes) -> None:
    for data in (body, framed(body)):
        try:
            assert codec.encode(codec.decode(data)) == data  # a value has one encoding
        except WireError as error:
            assert "\n" not in str(error)


def test_every_cut_body_in_an_intact_frame_is_refused() -> None:
    body = codec.encode(SAMPLE)[3:-4]
    for length in range(len(body)):
        with pytest.raises(WireError):
            codec.decode(framed(body[:length]))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(0, len(codec.encode(SAMPLE)) - 8), st.integers(0, 255))
def test_a_forged_byte_gives_another_value_or_is_refused(position: int, byte: int) -> None:
    body = bytearray(codec.encode(SAMPLE)[3:-4])
    body[position] = byte
    try:
        assert codec.encode(codec.decode(framed(bytes(body)))) == framed(bytes(body))
    except WireError as error:
        assert "\n" not in str(error) and len(str(error)) < 300


def varint(number: int) -> bytes:
    out = b""
    while number >= 0x80:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def items(count: int, item: bytes) -> bytes:
    return b"[" + varint(count) + item * count


@pytest.mark.parametrize(
    "body",
    [
        b"T\x00\x02" + varint(0) + varint(2**63),  # no elements, but an impossible dimension
        b"T\x00\x08" + varint(0) + varint(2**62) * 7,
        b"T\x00\x01" + varint(2**60),  # more elements than there are bytes
        b"T\x00\x08" + varint(2**63) * 8,
        b"T\x00" + varint(450_000) + b"\xff\x7f" * 450_000,  # a dimension for every two bytes: took a minute
        b"T\x00\x09" + b"\x01" * 9 + bytes(4),
        b"T\x63\x00",  # no such dtype
        b"T\x09\x01\x02\x00\x02",  # a truth value of 2
        b"[" + varint(2**40),  # a list of a trillion items
        b"[\x01" * 5000 + b"n",  # a list in a list in a list
        b"{\x01\x00" * 5000 + b"n",
        b"{\x02\x02ai\x00\x02ai\x02",  # one name twice
        b"b" + b"\xff" * 50,  # a varint without an end
        b"i" + b"\xff" * 100_000,
        b"i" + varint(2**65),  # an integer of 2^64
        b"i" + varint(2**64 + 1),  # and of -2^63 - 1
        b"i\x80\x00",  # a zero of two bytes
        items(250_000, b"T\x00\x01\x00"),  # a megabyte of empty tensors, a kilobyte each
        items(250_000, b"T\x04\x00\x07"),
        items(250_000, b"u\x00"),
        b"u" + varint(2**60),  # more bytes than there are
        b"T\x04\x01\x02\x07\x07",  # two bytes in the form of another tensor
        b"e\x00\x00\x80\x3f",  # 1.0 in four bytes, which takes two
        b"d" + struct.pack("<d", 0.5),
        b"h\xc0\x7f",  # NaN in two bytes, which takes eight
        b"{\x01\x08lossn",  # a name that is known, spelt out
        b"{\x01\xffn",  # a known name of another version
        b"{\x01\x7fn",
        items(1_000_000, b"n"),
        items(400_000, b"{\x00"),
        items(100_000, b"m" + type_code("Train") + b"i\x02"),
        items(300_000, b"[\x01n"),
        b"m" + type_code("Trash"),  # no such message
        b"m" + type_code("Record") + b"nn",  # two fields instead of three
        b"nn",  # two values
    ],
    ids=lambda body: repr(body[:8]),
)
def test_hostile_bodies_are_refused(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    read, tensor = codec._Reader.value, codec._Reader.tensor
    monkeypatch.setattr(codec._Reader, "value", lambda *given: (made.append("value"), read(*given))[1])
    monkeypatch.setattr(codec._Reader, "tensor", lambda *given: (made.append("tensor"), tensor(*given))[1])
    with pytest.raises(WireError) as caught:
        codec.decode(framed(body))
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()
    # 64 bytes a value and a kilobyte a tensor: at most a megabyte and 32 times the message
    assert 64 * made.count("value") + 1024 * made.count("tensor") <= (1 << 20) + 32 * len(body) + 1088


def test_what_honest_messages_hold_is_within_the_budget() -> None:
    """A model of 2,000 small tensors, the sizes of 30,000, as many short records, 20,000 clients' versions."""
    weights = {f"layers.{number}.bias": torch.zeros(16) for number in range(2000)}
    sizes, records = tuple(range(30_000)), (b"a short record",) * 30_000
    for value in (weights, sizes, records, {f"c{number}": 1 for number in range(20_000)}):
        assert codec.size(codec.decode(codec.encode(value))) == codec.size(value)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 10**5000, torch.zeros((1,) * 9)], ids=["64", "63", "big", "9"])
def test_what_no_receiver_takes_is_not_encoded(value: Any) -> None:
    with pytest.raises(ValueError, match="cannot cross the wire"):
        codec.encode((value,))
    nested: Any = 1
    for _ in range(codec.DEPTH):
        nested = (nested,)
    assert codec.decode(codec.encode(nested)) == nested
    with pytest.raises(ValueError, match="more than 32 deep"):
        codec.encode((nested,))


def test_an_error_shows_little_of_what_a_peer_sent() -> None:
    name = ("\x1b]0;x\x07\u202e" + "Trash" * 100_000).encode()
    item = varint(len(name) << 1) + name + b"n"
    with pytest.raises(WireError, match=r"the name .* twice") as caught:
        codec.decode(framed(b"{\x02" + item + item))
    assert len(str(caught.value)) < 150 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("number", "length"),
    [
        *((0.0, 2), (-0.0, 2), (1.0, 2), (-math.inf, 2), (12.25, 2)),
        *((float(torch.tensor(0.1)), 4), (float(torch.finfo(torch.float32).max), 4), (2.0**-149, 4)),
        *((2.0**-150, 8), (0.1, 8), (1e300, 8), (math.pi, 8), (math.nan, 8)),
    ],
)
def test_a_float_takes_the_fewest_bytes_that_lose_nothing(number: float, length: int) -> None:
    encoded = codec.encode(number)
    assert len(encoded) == 7 + 1 + length == codec.size(number)
    assert struct.pack("<d", codec.decode(encoded)) == struct.pack("<d", number)


def test_the_error_names_another_version_and_another_kind_of_file() -> None:
    encoded = codec.encode(1)
    with pytest.raises(WireError, match=r"newer fedferret .wire version 9; this one reads 3.: update this side"):
        codec.decode(encoded[:2] + b"\x09" + encoded[3:])
    with pytest.raises(WireError, match="not a fedferret message"):
        codec.decode(b"PK\x03\x04 and more")


def test_a_value_of_another_type_is_not_encoded() -> None:
    for value in (object(), {1, 2}, 1j, codec):
        with pytest.raises(TypeError, match="cannot cross the wire"):
            codec.encode(value)


def test_two_message_types_with_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="two message types are called Record"):

        @state
        class Record:
            x: int


def test_the_error_for_wire_version_1_names_the_fedferret_that_reads_it() -> None:
    encoded = codec.encode(1)
    with pytest.raises(
        WireError, match=r'written by fedferret 0\.1 \(wire version 1.*pip install "fedferret==0\.1\.\*"'
    ):
        codec.decode(encoded[:2] + b"\x01" + encoded[3:])
    with pytest.raises(
        WireError, match=r"a fedferret 0\.2 in development \(wire version 2.*: the commit that wrote it"
    ):
        codec.decode(encoded[:2] + b"\x02" + encoded[3:])
