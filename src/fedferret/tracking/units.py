"""Bytes, seconds, counts, losses and ratios as text. Decimal units: 1 KB is 1,000 bytes."""

from __future__ import annotations

import math


def as_bytes(count: float) -> str:
    """A number of bytes.

    Args:
        count: in bytes.

    Returns:
        Text for a person, with a unit where there is one.

    >>> as_bytes(501), as_bytes(8192), as_bytes(538_060_032), as_bytes(999_999)
    ('501 B', '8.19 KB', '538 MB', '1.00 MB')
    """
    return _scaled(count, ("B", "KB", "MB", "GB", "TB", "PB"))


def as_count(count: float) -> str:
    """A count.

    Args:
        count: a number of anything.

    Returns:
        Text for a person, with a unit where there is one.

    >>> as_count(90), as_count(134_515_008)
    ('90', '134.5 million')
    """
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count:,.0f}"


def as_duration(seconds: float) -> str:
    """A duration in seconds.

    Args:
        seconds: at least 0.

    Returns:
        Text for a person, with a unit where there is one.

    >>> as_duration(0.25), as_duration(42.4), as_duration(252), as_duration(7500)
    ('0.25 s', '42 s', '4 min 12 s', '2 h 5 min')
    """
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def as_loss(loss: float) -> str:
    """A loss, "none" for NaN.

    Args:
        loss: in nats per token.

    Returns:
        Text for a person, with a unit where there is one.

    >>> as_loss(3.07821), as_loss(float("nan"))
    ('3.078', 'none')
    """
    return "none" if math.isnan(loss) else f"{loss:.3f}"


def as_ratio(ratio: float) -> str:
    """A ratio with two significant digits.

    Args:
        ratio: above 0.

    Returns:
        Text for a person, with a unit where there is one.

    >>> as_ratio(1.04), as_ratio(65.3), as_ratio(1_073_972)
    ('1.0', '65', '1,100,000')
    """
    if ratio < 10:
        return f"{ratio:.1f}"
    digits = max(0, math.floor(math.log10(ratio)) - 1)
    return f"{round(ratio, -digits):,.0f}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    if value < 999.5:
        return f"{value:.0f} {units[0]}"
    for unit in units[1:]:
        value /= 1000
        if value < 999.5 or unit == units[-1]:
            break
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"
