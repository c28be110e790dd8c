"""The rows of the contract: every registered method in several settings, three unlike ones, and one of two stages."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from contract.staged_methods import TwoStages
from contract.unlike_methods import UNLIKE
from fedferret.algorithms.fed_sb import FedSB
from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedavg_8bit import FedAvg8Bit
from fedferret.algorithms.fedavg_ft import FedAvgFT
from fedferret.algorithms.fedavg_top_k import FedAvgTopK
from fedferret.algorithms.fedex_lora import FedExLoRA
from fedferret.algorithms.fedit import FedIT, FedITSGD
from fedferret.algorithms.fedkseed import FedKSeed, FedKSeedPro
from fedferret.algorithms.fedlog import FedLog
from fedferret.algorithms.fedmezo import FedMeZO
from fedferret.algorithms.fednova import FedNova
from fedferret.algorithms.fedpeptao import FedPepTAO
from fedferret.algorithms.fedpft import FedPFT
from fedferret.algorithms.fedpft_then import FedPFTThen
from fedferret.algorithms.fedpm import FedPM
from fedferret.algorithms.fedprompt import FedPrompt
from fedferret.algorithms.fedprox import FedProx
from fedferret.algorithms.fedptr import FedPTR
from fedferret.algorithms.fedptuning import FedPTuning
from fedferret.algorithms.fedptuning_v2 import FedPTuningV2
from fedferret.algorithms.fedsa_lora import FedSALoRA
from fedferret.algorithms.fedzo import FedZO
from fedferret.algorithms.ferret import Ferret
from fedferret.algorithms.ferret_published import FerretPublished
from fedferret.algorithms.fetch_sgd import FetchSGD
from fedferret.algorithms.ffa_lora import FFALoRA
from fedferret.algorithms.fibecfed import FibecFed
from fedferret.algorithms.hiso import HiSo
from fedferret.algorithms.local_only import LocalOnly
from fedferret.algorithms.sa_fedlora import SAFedLoRA
from fedferret.algorithms.scaffold import Scaffold
from fedferret.algorithms.server_optimizer import ServerOptimizer
from fedferret.algorithms.slora import SLoRA
from fedferret.algorithms.spafl import SpaFL
from fedferret.algorithms.spafl_gates import SpaFLGates
from fedferret.algorithms.sparse_loco import SparseLoCo
from fedferret.algorithms.split_model import FedPer, FedRep, LGFedAvg
from fedferret.algorithms.ssf import SSF
from fedferret.algorithms.uni_lora import UniLoRA
from fedferret.config import build_algorithm
from fedferret.local.first_order import FirstOrder
from fedferret.local.zeroth_order import ZerothOrder
from toys import ONE_BIT, TRAINING, AnyAlgorithm, Simulation, simulate

ROUNDS = 4
SENDS_NOTHING = "local-only"  # has no payload that could be wrong, and moves no public weight

_ferret = replace(ONE_BIT, coordinates=60, bits=8, server_learning_rate=0.5)
_forward_only = ZerothOrder(learning_rate=0.005, perturbation=1e-3, steps=8, batch_size=4)
_adam = FirstOrder(optimizer="adamw", learning_rate=0.05, steps=3, clip=None)
_quick = replace(TRAINING, learning_rate=0.3)
_prefixes = replace(_adam, learning_rate=0.15, steps=2)


def _preset(name: str, **settings: object) -> AnyAlgorithm:
    training = {"learning_rate": 0.02, "steps": 3, "batch_size": 4, "accumulate": 1, "clip": 1.0}
    return build_algorithm("ferret", {"preset": name, "training": training, **settings})


METHODS: dict[str, AnyAlgorithm] = {
    "fedavg": FedAvg(training=TRAINING),
    "fedavg-adamw-damped": FedAvg(
        server_learning_rate=0.7,
        weighting="equal",
        training=FirstOrder(optimizer="adamw", learning_rate=0.01, epochs=1, accumulate=2, clip=None),
    ),
    "fedavg-no-gradient-buffer": FedAvg(training=FirstOrder(learning_rate=0.05, steps=3, clip=None)),
    "fedavg-server-momentum": FedAvg(server_optimizer=ServerOptimizer(name="momentum"), training=TRAINING),
    "fedprox": FedProx(mu=0.1, training=replace(TRAINING, schedule="cosine", warmup=0.25)),
    "fedptr": FedPTR(mu=0.3, examples_per_class=1, matching_steps=1, training=_quick),
    "fedptr-server": FedPTR(where="server", examples_per_class=1, matching_steps=1, inner_steps=2, training=_quick),
    "scaffold": Scaffold(training=TRAINING),
    "fednova": FedNova(training=FirstOrder(learning_rate=0.1, epochs=1, batch_size=4)),
    "fedpm": FedPM(reset_every=2, training=replace(_adam, learning_rate=0.5)),
    "fedavg-top-k": FedAvgTopK(fraction=0.1, training=TRAINING),
    "fedavg-top-k-forgetful": FedAvgTopK(fraction=0.4, bits=32, error_feedback=False, training=TRAINING),
    "fedavg-top-k-signs": FedAvgTopK(values=40, bits=1, residual_decay=0.9, training=TRAINING),
    "sparse-loco": SparseLoCo(values_per_chunk=3, chunk_size=16, training=TRAINING),
    "fedavg-8bit": FedAvg8Bit(training=TRAINING),
    "fedavg-2-bits": FedAvg8Bit(bits=2, entry_bits=4, server_learning_rate=0.7, training=TRAINING),
    "fetch-sgd": FetchSGD(num_rows=3, num_columns=40, kept=10, training=TRAINING),
    "fetch-sgd-plain": FetchSGD(
        num_rows=1, num_columns=60, kept=60, bits=32, momentum=0.0, masking=False, error="zero", training=TRAINING
    ),
    "ferret": _ferret,
    "ferret-32-bits": replace(_ferret, bits=32, entry_bits=32),
    "ferret-few-norms": replace(_ferret, keys="per-client", norms_every=2),
    "ferret-first-norms": replace(_ferret, norms_every=0),
    "ferret-16-bits": replace(_ferret, bits=16, entry_bits=16),
    "ferret-4-bits": replace(_ferret, bits=4, allocation="norm", schedule="linear"),
    "ferret-2-bits": replace(_ferret, bits=2, entry_bits=4, allocation="uniform", schedule="cosine"),
    "ferret-1-bit": replace(_ferret, bits=1),
    "ferret-half-a-bit": replace(_ferret, coordinates=5, bits=1, group_size=8, allocation="norm-squared"),
    "ferret-a-sixteenth": Ferret(coordinates=40, server_learning_rate=0.2, training=TRAINING),
    "ferret-shrunk": replace(_ferret, scale="shrunk", server_learning_rate=1.0),
    "ferret-momentum": replace(_ferret, server_momentum=0.5, server_learning_rate=0.3),
    "ferret-error-feedback": replace(_ferret, error_feedback=True, scale="shrunk"),
    "ferret-per-client": replace(_ferret, keys="per-client"),
    "ferret-per-client-momentum-feedback": replace(
        _ferret, keys="per-client", server_momentum=0.5, error_feedback=True, scale="shrunk", server_learning_rate=0.5
    ),
    "ferret-columns": replace(_ferret, basis="truncated-normal", scale="shrunk"),
    "ferret-over-lora": Ferret(
        over={"name": "fedit", "rank": 2, "alpha": 4, "modules": ["0", "2"]},
        coordinates=8,
        group_size=8,
        server_learning_rate=0.5,
        training=_adam,
    ),
    "ferret-paper": _preset("paper", coordinates=60, server_learning_rate=0.5),
    "ferret-published": FerretPublished(
        coordinates=12, server_learning_rate=0.5, training=replace(TRAINING, learning_rate=0.02, steps=3)
    ),
    "fedkseed": FedKSeed(pool_size=256, training=_forward_only),
    "fedkseed-few-directions": FedKSeed(
        pool_size=24, weighting="equal", training=replace(_forward_only, schedule="linear")
    ),
    "fedkseed-many-directions": FedKSeed(pool_size=33_000, training=_forward_only),
    "fedkseed-pro": FedKSeedPro(pool_size=256, training=_forward_only),
    "fedkseed-pro-few-directions": FedKSeedPro(pool_size=24, training=_forward_only),
    "hiso": HiSo(directions=2, training=replace(_forward_only, steps=4, learning_rate=0.02, difference="forward")),
    "fedzo": FedZO(training=replace(_forward_only, difference="forward")),
    "fedmezo": FedMeZO(training=replace(_forward_only, weight_decay=0.1)),
    "fedit": FedIT(rank=2, alpha=4, modules=("0", "2"), training=_adam),
    "fedit-dora-dense": FedIT(
        rank=2, alpha=4, modules=("0",), rslora=True, dora=True, modules_to_save=("2",), training=_adam
    ),
    "fedit-sgd": FedITSGD(rank=2, alpha=4, modules=r"[02]", training=TRAINING),
    "ffa-lora": FFALoRA(rank=2, alpha=8, modules=("0", "2"), training=_adam),
    "fedsa-lora": FedSALoRA(rank=2, alpha=4, modules=("0", "2"), training=_adam),
    "fedex-lora": FedExLoRA(rank=2, alpha=4, modules=("0", "2"), training=_adam),
    "fibecfed": FibecFed(rank=2, alpha=4, modules=("0", "2"), refresh=1, training=_adam),
    "fed-sb": FedSB(rank=2, first_step=0.1, modules=("0",), training=_adam),
    "fed-sb-random-1-bit": FedSB(
        rank=3, initialisation="random", bits=1, entry_bits=4, server_learning_rate=0.8, modules=("0",), training=_adam
    ),
    "uni-lora": UniLoRA(rank=2, values=30, bound=0.3, modules=("0", "2"), training=_adam),
    "uni-lora-2-bits": UniLoRA(
        rank=2, values=20, bits=2, entry_bits=8, bound=0.5, modules=("0", "2"), server_learning_rate=0.9, training=_adam
    ),
    "ssf": SSF(training=_adam),
    "ssf-pushed-private-norms": SSF(
        initial="normal", shift="pushed", private_norms=True, training=replace(_adam, steps=2)
    ),
    "slora": SLoRA(
        sparse_rounds=2, density=0.3, rank=2, alpha=4, modules=("0",), sparse_training=_adam, training=_adam
    ),
    "sa-fedlora": SAFedLoRA(
        full_rounds=1,
        heating_rounds=1,
        annealing_rounds=1,
        max_rank=3,
        min_rank=1,
        alpha=4,
        modules=("0",),
        full_training=TRAINING,
        training=_adam,
    ),
    "spafl": SpaFL(alpha=0.02, modules=("0",), training=TRAINING),
    "spafl-gates": SpaFLGates(alpha=1e-3, training=replace(_adam, learning_rate=0.4, steps=2)),
    "fedptuning": FedPTuning(virtual_tokens=3, encoder_width=4, training=replace(_adam, steps=2)),
    "fedptuning-v2": FedPTuningV2(virtual_tokens=3, training=replace(_adam, learning_rate=0.3, steps=2)),
    "fedprompt": FedPrompt(virtual_tokens=3, training=replace(_adam, learning_rate=0.3, steps=2)),
    "fedpeptao": FedPepTAO(layers=0.6, virtual_tokens=3, server_rate=0.2, training=_prefixes),
    "fedpeptao-spectrum": FedPepTAO(
        personal=False,
        virtual_tokens=3,
        warm_up_rounds=1,
        lanczos_steps=4,
        server_rate=0.2,
        server_formula="paper-code",
        training=replace(_prefixes, learning_rate=0.1, steps=3),
    ),
    "fedlog": FedLog(training=_adam),
    "fedlog-random-head": FedLog(features=4, normalise="none", clamp=0.5, start="random", training=_adam),
    "fedpft": FedPFT(components=2, max_samples=60, head=replace(_adam, steps=5)),
    "fedpft-full": FedPFT(covariance="full", normalise="layer-norm", min_examples=1, head=replace(_adam, steps=5)),
    "fedpft-then": FedPFTThen(
        then={"name": "fedavg", "training": {"learning_rate": 0.1, "steps": 2, "batch_size": 4}},
        start=FedPFT(max_samples=60, head=replace(_adam, steps=5)),
    ),
    "fedper": FedPer(training=TRAINING),
    "fedrep": FedRep(head_times=2, training=TRAINING),
    "lg-fedavg": LGFedAvg(training=TRAINING),
    "fedavg-ft": FedAvgFT(fine_tuning=3, training=TRAINING),
    "local-only": LocalOnly(training=TRAINING),
    **{method.name: method for method in UNLIKE},
    "two-stages": TwoStages(
        first_rounds=2,
        first=FedAvg(training=replace(TRAINING, schedule="linear")),
        second=replace(_ferret, error_feedback=True, schedule="linear", scale="shrunk"),
    ),
}


def rounds_of(algorithm: AnyAlgorithm) -> int:
    """How many rounds the tests run of it."""
    return algorithm.max_rounds or ROUNDS


@cache
def reference(name: str) -> Simulation:
    """The plain run of a row, made once. Look, do not touch."""
    return simulate(METHODS[name], rounds_of(METHODS[name]))
