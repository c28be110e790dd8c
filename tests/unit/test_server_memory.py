"""A server that evaluates nothing needs no more memory for a larger model: its weights wait in a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import torch
from fedferret.algorithms.ferret_messages import SharedReply
from fedferret.bases.blocks import decode_norms
from fedferret.bases.quantise import pack_vector
from fedferret.config import from_tables
from fedferret.core.keys import Key
from fedferret.core.exchanges import ClientUpdate, Reply
from fedferret.engines.transport import Received, Response
from fedferret.experiment import Experiment
from fedferret.wire import codec

def anonymous():  # bytes that are this process's own, unlike pages of files that the system takes back at will
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

class Sites:
    workers = ()
    def exchange(self, messages, deadline):
        for name in messages:
            request = codec.decode(messages[name])
            projector = experiment.recipe.algorithm.projector(state.public)
            counts = projector.counts(decode_norms(state.public.norms))
            coordinates = pack_vector(torch.full((sum(counts),), 1e-3), 1, Key.of(1))
            reply = codec.encode(ClientUpdate(SharedReply(coordinates, state.public.norms.clone()), 1, {}))
            yield Received(name, codec.encode(Response(
                request.run, request.epoch, request.round, request.ticket, name, "done", request.version,
                request.fingerprint, 1, reply, "", b"", request.sequence,
            )))
    def close(self): pass

data = {"source": "sites", "sites": ["ward-1", "ward-2"]}
recipe = from_tables({"seed": 1, "rounds": 3, "model": {"name": sys.argv[1]}, "data": data, "clients": {"per_round": 2},
                      "algorithm": {"name": "ferret", "preset": "one-bit", "coordinates": 1024}})
experiment = Experiment.load(recipe, Path(sys.argv[2]), lambda line: None, Sites())
state = experiment.initial_state()
most = 0
for record in experiment.run_rounds(state, experiment.engine(state)):
    assert len(record.metrics) == 2, record.failures
    most = max(most, anonymous())
print(most, sum(weight.numel() * 4 for weight in experiment.model.parameters()))
"""


def model_folder(folder: Path, width: int, layers: int) -> Path:
    import torch
    from transformers import LlamaForCausalLM

    from fedferret.models.tiny import tiny_config, tiny_tokenizer

    config = tiny_config()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = width, 3 * width, layers
    config.head_dim = width // config.num_attention_heads
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_servers_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    def peak(name: str, width: int, layers: int) -> tuple[int, int]:
        model = model_folder(tmp_path / name, width, layers)
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / f"run of {name}")],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ran.returncode == 0, ran.stderr
        most, size = map(int, ran.stdout.split())
        return most, size

    (small, of_small), (large, of_large) = peak("small", 64, 2), peak("large", 640, 6)
    more, bytes_of_weights = large - small, of_large - of_small
    print(f"{bytes_of_weights / 1e6:.0f} MB of weights more: {more / 1e6:.0f} MB of memory more")
    assert bytes_of_weights > 100e6 and more < 0.1 * bytes_of_weights
