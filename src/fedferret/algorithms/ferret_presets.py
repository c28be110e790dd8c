"""Named sets of Ferret's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# section 5 and appendix: ten steps of four accumulated single examples
PAPER_TRAINING = {"learning_rate": 1e-4, "batch_size": 1, "accumulate": 4, "steps": 10, "clip": "none"}
_ALL_SENT = {"coordinates": 4096, "group_size": 1, "allocation": "norm-sqrt-dim", "keys": "shared"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "coordinates": 4096,  # not printed; about what the published script sends
        "basis": "truncated-normal",
        "allocation": "norm",
        "keys": "per-client",
        "bits": 32,
        "group_size": 1,
        "weighting": "equal",
        "training": PAPER_TRAINING,
    },
    # added up before it is sent on: for large cohorts: otherwise all replies come down
    "one-bit": {**_ALL_SENT, "weighting": "examples"},
    # what a guard can act on: values that add up, on directions that everybody knows
    "private": {**_ALL_SENT, "bits": 32, "entry_bits": 32, "weighting": "equal"},
}
