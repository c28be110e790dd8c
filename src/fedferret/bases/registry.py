"""The bases by name."""

from __future__ import annotations

from fedferret.bases.basis import Basis
from fedferret.bases.sign_buckets import SignBuckets
from fedferret.bases.truncated_normal import TruncatedNormal
from fedferret.core.errors import UserError, nearest

_BASES: dict[str, type[Basis]] = {kind.name: kind for kind in (SignBuckets, TruncatedNormal)}


def basis(name: str) -> Basis:
    """Find a basis by name.

    Args:
        name: "sign-buckets" or "truncated-normal".

    Returns:
        The basis, with default settings.

    Raises:
        UserError: for any other name; the message suggests the nearest.
    """
    if name not in _BASES:
        raise UserError(f'there is no basis "{name}": {nearest(name, _BASES)}')
    return _BASES[name]()
