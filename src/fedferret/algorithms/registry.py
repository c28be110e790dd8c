"""The methods by name; importing this module imports no library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedferret.core.registry import described, imported

if TYPE_CHECKING:
    from fedferret.core.algorithm import Algorithm

_METHODS: dict[str, tuple[str, str, str]] = {
    "ferret": ("ferret", "Ferret", "all weights, first-order steps, kilobytes: updates on shared random directions"),
    "ferret-published": (
        "ferret_published",
        "FerretPublished",
        "Ferret with the choices of the published code, for comparison",
    ),
    "fedavg": ("fedavg", "FedAvg", "all weights, first-order steps, gigabytes: the mean of the clients' updates"),
    "fedprox": ("fedprox", "FedProx", "FedAvg with clients pulled towards the global weights"),
    "fedptr": ("fedptr", "FedPTR", "FedAvg with clients pulled towards where the global weights seem to be going"),
    "scaffold": ("scaffold", "Scaffold", "FedAvg with controls that take out what pulls clients apart"),
    "fednova": ("fednova", "FedNova", "FedAvg of updates divided by their length, for unequal numbers of steps"),
    "fedpm": ("fedpm", "FedPM", "random weights, a bit each: the mean of the clients' masks says which to keep"),
    "fedavg-top-k": ("fedavg_top_k", "FedAvgTopK", "FedAvg of each client's largest values; the rest waits"),
    "sparse-loco": ("sparse_loco", "SparseLoCo", "FedAvg of each chunk's largest values in 2 bits; the rest fades"),
    "fedavg-8bit": ("fedavg_8bit", "FedAvg8Bit", "FedAvg in 8 bits a weight, both ways"),
    "fetch-sgd": (
        "fetch_sgd",
        "FetchSGD",
        "sketches of the clients' updates; the server applies the heaviest of their sum",
    ),
    "fedkseed": ("fedkseed", "FedKSeed", "all weights, forward passes, kilobytes: steps along shared directions"),
    "fedkseed-pro": ("fedkseed", "FedKSeedPro", "FedKSeed that prefers directions along which the loss changes most"),
    "hiso": (
        "hiso",
        "HiSo",
        "all weights, forward passes, scalars: directions stretched by a Hessian that nobody sends",
    ),
    "fedzo": ("fedzo", "FedZO", "FedAvg of clients that train by forward passes alone, with forward differences"),
    "fedmezo": ("fedmezo", "FedMeZO", "FedAvg of clients that train by forward passes alone, with central differences"),
    "fedit": ("fedit", "FedIT", "LoRA, first-order steps, megabytes: the mean of the clients' factors"),
    "fedit-sgd": ("fedit", "FedITSGD", "FedIT with plain gradient steps"),
    "ffa-lora": ("ffa_lora", "FFALoRA", "FedIT with the factors A frozen: half the bytes, and the mean is exact"),
    "fedsa-lora": ("fedsa_lora", "FedSALoRA", "LoRA with the factors A averaged, and B each client's own"),
    "fedex-lora": ("fedex_lora", "FedExLoRA", "LoRA with the mean of the clients' models, exactly: more bytes down"),
    "fibecfed": ("fibecfed", "FibecFed", "FedIT of the most sensitive layers, of some rows, on easy examples first"),
    "fed-sb": (
        "fed_sb",
        "FedSB",
        "LoRA with both factors frozen, hundreds of bytes: the mean of r x r matrices between",
    ),
    "uni-lora": ("uni_lora", "UniLoRA", "LoRA of which all values are read from one vector, kilobytes: its mean"),
    "ssf": ("ssf", "SSF", "scales and shifts of features, first-order steps, hundreds of kilobytes: the clients' mean"),
    "slora": ("slora", "SLoRA", "a hundredth of the weights, then LoRA from the factors of what they learned"),
    "sa-fedlora": ("sa_fedlora", "SAFedLoRA", "all weights for a start, then LoRA of a falling rank"),
    "fedptuning": ("fedptuning", "FedPTuning", "a prompt's encoder, first-order steps: the mean of the clients'"),
    "fedptuning-v2": (
        "fedptuning_v2",
        "FedPTuningV2",
        "keys and values that every attention layer reads first: the mean of the clients'",
    ),
    "fedprompt": ("fedprompt", "FedPrompt", "a prompt, first-order steps, tens of kilobytes: the mean of the clients'"),
    "fedlog": ("fedlog", "FedLog", "private bodies; sums of features by class up, the most probable head down"),
    "fedpft": ("fedpft", "FedPFT", "a classifier's head, in one round: from mixtures of each class's frozen features"),
    "fedpft-then": ("fedpft_then", "FedPFTThen", "a classifier's head from one round of FedPFT, then another method"),
    "spafl": ("spafl", "SpaFL", "each client's own sparse model; thresholds alone travel, kilobytes: their mean"),
    "spafl-gates": (
        "spafl_gates",
        "SpaFLGates",
        "gates of neurons and heads of a frozen model, tens of kilobytes: the mean of the clients' thresholds",
    ),
    "fedpeptao": ("fedpeptao", "FedPepTAO", "prefixes of chosen layers, and a server with momentum and controls"),
    "fedper": ("split_model", "FedPer", "a classifier's body averaged, and the head each client's own"),
    "fedrep": ("split_model", "FedRep", "FedPer with the head trained first, and then the body"),
    "lg-fedavg": ("split_model", "LGFedAvg", "a classifier's head averaged, and the body each client's own"),
    "fedavg-ft": ("fedavg_ft", "FedAvgFT", "FedAvg, scored at each client after steps on the client's own examples"),
    "local-only": ("local_only", "LocalOnly", "all weights, zero bytes: every client trains alone, for comparison"),
}


def catalogue() -> dict[str, str]:
    """List the methods; none is imported.

    Returns:
        One line on each method, by its name in recipes.
    """
    return described(_METHODS)


def method(name: str) -> type[Algorithm[Any, Any, Any, Any, Any]]:
    """Import a method.

    Args:
        name: in recipes.

    Returns:
        The method's class; its fields are the settings.

    Raises:
        UserError: no method has this name.
    """
    found: type[Algorithm[Any, Any, Any, Any, Any]] = imported("method", "fedferret.algorithms", _METHODS, name)
    return found
