"""What sae-lens, sparsify and dictionary_learning make of our files, and we of theirs: the same numbers, or it fails.

    python -m benchmarks.interop

Install the peers first: `pip install --no-deps -r benchmarks/requirements-peers.txt`, besides the project itself.
Written: every architecture that sae-lens knows, with random weights, and what each of our own architectures exports
after a few steps of training; sae-lens loads the folder. Read: what each library's own class and own saving function
write. A case's figure is the largest absolute difference between the two sides' activations or outputs (which are of
the order of 1 to 30) over 512 seeded rows; above 1e-5, or if the two disagree about which features fire, it fails.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Figure, write_result
from feature_bank.errors import SailguardError
from feature_bank.formats import load_sae
from feature_bank.formats.saelens import save_saelens
from feature_bank.sae import SAE

D_IN, D_SAE, D_OUT, K, ROWS = 64, 512, 48, 16, 512
TOLERANCE = 1e-5
HOOK, MLP_IN, MLP_OUT = "blocks.2.hook_resid_post", "blocks.2.hook_mlp_in", "blocks.2.hook_mlp_out"
PACKAGES = ("sae-lens", "eai-sparsify", "dictionary-learning", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Sides:
    """One SAE as two libraries run it on the same rows."""

    acts: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]

    @property
    def difference(self) -> float:
        """The largest absolute difference in activations or outputs; infinite if other features fire."""
        if not torch.equal(self.acts[0] > 0, self.acts[1] > 0):
            return float("inf")
        return max(float((ours - theirs).abs().max()) for ours, theirs in (self.acts, self.out))


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Seeded normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def rows() -> Tensor:
    """Inputs with a mean that is not zero and a few directions that are larger than the rest."""
    return normal(ROWS, D_IN, seed=1) * torch.linspace(0.3, 2.0, D_IN) + normal(D_IN, seed=2)


def randomise(module: torch.nn.Module) -> None:
    """Fill a peer's parameters with seeded values, so that no zero hides a mistake; encoder rows of length 1."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(module.named_parameters())):
            matrix = parameter.dim() == 2
            values = normal(*parameter.shape, seed=10 + seed, scale=D_IN**-0.5 if matrix else 0.3)
            parameter.copy_(values.abs() if "threshold" in name else values)


# Ours, read by sae-lens.


def random_sae(kind: str) -> SAE:
    transcodes = "transcoder" in kind
    d_out = D_OUT if transcodes else D_IN
    jumps = "jumprelu" in kind
    return SAE(
        W_enc=normal(D_IN, D_SAE, seed=3, scale=D_IN**-0.5),
        W_dec=normal(D_SAE, d_out, seed=4, scale=D_IN**-0.5),
        b_enc=normal(D_SAE, seed=5, scale=0.3),
        b_dec=normal(d_out, seed=6, scale=0.3),
        threshold=normal(D_SAE, seed=7, scale=0.5).abs() if jumps else torch.zeros(D_SAE),
        hook_name=MLP_IN if transcodes else HOOK,
        hook_name_out=MLP_OUT if transcodes else None,
        apply_b_dec_to_input=not transcodes,
        k=K if "topk" in kind else None,
        W_skip=normal(D_IN, d_out, seed=8, scale=D_IN**-0.5) if "skip" in kind else None,
    )


def trained_saes() -> Iterator[tuple[str, SAE]]:
    """What each of our architectures exports after a few steps. The skip transcoder, which is TopK in a form that
    sae-lens lacks, goes out as the JumpReLU transcoder that stands for it."""
    from training.architectures import ARCHITECTURES

    x, target = rows(), normal(ROWS, D_OUT, seed=9)
    for name, kind in ARCHITECTURES.items():
        transcodes = "transcoder" in name
        about: dict[str, Any] = {"target_sample": target, "hook_name_out": MLP_OUT} if transcodes else {}
        fields = kind.Options.model_fields
        options = {key: value for key, value in (("k", K), ("aux_k", 32)) if key in fields}
        if "group_sizes" in fields:
            options["group_sizes"] = (D_SAE // 4, D_SAE // 4, D_SAE // 2)
        sae = kind.create(x, d_sae=D_SAE, seed=0, dead_after_tokens=10**6, options=kind.Options(**options), **about)
        optimiser = torch.optim.Adam(list(sae.parameters().values()), lr=1e-3)
        for step in range(10):
            gradients, _ = sae.gradients(x, target if transcodes else None, step / 10)
            for key, parameter in sae.parameters().items():
                parameter.grad = gradients[key]
            optimiser.step()
            sae.renormalise()
        exported = sae.export(MLP_IN if transcodes else HOOK)
        yield name, exported.with_threshold(0.5) if transcodes else exported


def written(sae: SAE, folder: Path) -> Sides:
    """Save it, let sae-lens load it, and run both."""
    import sae_lens

    save_saelens(sae, folder, model_name="tiny")
    peer, x = sae_lens.SAE.load_from_disk(folder), rows()
    return Sides(acts=(sae.encode(x), peer.encode(x)), out=(sae.reconstruct(x), peer(x)))


def written_cases() -> Iterator[tuple[str, Callable[[Path], Sides]]]:
    kinds = {
        "standard": "relu",
        "topk": "topk",
        "jumprelu": "jumprelu",
        "transcoder": "relu transcoder",
        "skip_transcoder": "relu skip transcoder",
        "jumprelu_transcoder": "jumprelu transcoder",
        "jumprelu_skip_transcoder": "jumprelu skip transcoder",
    }
    for architecture, kind in kinds.items():
        yield f"written_{architecture}", lambda folder, kind=kind: written(random_sae(kind), folder)
    for name, sae in trained_saes():
        yield f"trained_{name}", lambda folder, sae=sae: written(sae, folder)


# Theirs, read by us.


def compare(folder: Path, acts: Tensor, out: Tensor, **options: Any) -> Sides:
    sae, x = load_sae(folder, **options), rows()
    return Sides(acts=(sae.encode(x), acts), out=(sae.reconstruct(x), out))


def sae_lens_cases() -> Iterator[tuple[str, Callable[[Path], Sides]]]:
    """Every inference class, and every training class through the function that saves it for inference."""
    import sae_lens
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    def read(folder: Path, registry: dict[str, Any], architecture: str, fields: dict[str, Any]) -> Sides:
        sae_class, config_class = registry[architecture]
        transcodes = "transcoder" in architecture
        metadata = sae_lens.saes.sae.SAEMetadata(hook_name=MLP_IN if transcodes else HOOK, model_name="tiny")
        if transcodes:
            metadata.hook_name_out = MLP_OUT
            fields = {**fields, "d_out": D_OUT, "apply_b_dec_to_input": False}
        peer = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **fields))
        randomise(peer)
        if hasattr(peer, "topk_threshold"):
            peer.topk_threshold.fill_(0.4)
        x = rows()
        if registry is SAE_CLASS_REGISTRY:
            peer.save_model(folder)
        else:  # what a training run leaves, against sae-lens' own reading of it
            peer.save_inference_model(folder)
            peer = sae_lens.SAE.load_from_disk(folder)
        return compare(folder, peer.encode(x), peer(x))

    inference: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "topk": [("", {"k": K}), ("_rescaled", {"k": K, "rescale_acts_by_decoder_norm": True})],
        "jumprelu": [("", {}), ("_unsubtracted", {"apply_b_dec_to_input": False})],
    }
    for architecture in (
        "standard",
        "topk",
        "jumprelu",
        "gated",
        "transcoder",
        "skip_transcoder",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    ):
        for suffix, fields in inference.get(architecture, [("", {})]):
            yield (
                f"read_sae_lens_{architecture}{suffix}",
                lambda folder, a=architecture, f=fields: read(folder, SAE_CLASS_REGISTRY, a, f),
            )
    training = {
        "standard": {},
        "topk": {"k": K},
        "jumprelu": {},
        "gated": {},
        "batchtopk": {"k": K},
        "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [128, 256]},
    }
    for architecture, fields in training.items():
        yield (
            f"read_sae_lens_trained_{architecture}",
            lambda folder, a=architecture, f=fields: read(folder, SAE_TRAINING_CLASS_REGISTRY, a, f),
        )


def sparsify_cases() -> Iterator[tuple[str, Callable[[Path], Sides]]]:
    """A `SparseCoder` as SAE and as transcoder, with and without its skip connection."""
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # where Triton is installed, it would need a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    def read(folder: Path, **fields: Any) -> Sides:
        folder = folder / ("layers.2.mlp" if fields.get("transcode") else "layers.2")
        peer = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, **fields))
        randomise(peer)
        peer.save_to_disk(folder)
        x = rows()
        found = peer(x)
        acts = torch.zeros(ROWS, D_SAE).scatter_(1, found.latent_indices.long(), found.latent_acts)
        return compare(folder, acts, found.sae_out)

    for name, fields in {
        "topk": {},
        "topk_skip": {"skip_connection": True},
        "transcoder": {"transcode": True},
        "skip_transcoder": {"transcode": True, "skip_connection": True},
    }.items():
        yield f"read_sparsify_{name}", lambda folder, fields=fields: read(folder, **fields)


def dictionary_learning_cases() -> Iterator[tuple[str, Callable[[Path], Sides]]]:
    """Each trainer's dictionary and configuration, saved as its `trainSAE` does."""
    from dictionary_learning.dictionary import AutoEncoderNew

    common = {"steps": 10, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 2, "lm_name": "tiny", "device": "cpu"}
    top_k = {"k": K, "warmup_steps": 1, "decay_start": None}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "standard": ("standard.StandardTrainer", {"warmup_steps": 1, "sparsity_warmup_steps": 1}),
        "p_anneal": ("p_anneal.PAnnealTrainer", {"warmup_steps": 1, "sparsity_warmup_steps": 1, "anneal_start": 2}),
        "gated": ("gdm.GatedSAETrainer", {"warmup_steps": 1, "sparsity_warmup_steps": 1}),
        "jumprelu": ("jumprelu.JumpReluTrainer", {"warmup_steps": 1, "sparsity_warmup_steps": 1}),
        "topk": ("top_k.TopKTrainer", top_k),
        "batchtopk": ("batch_top_k.BatchTopKTrainer", top_k),
        "matryoshka_batchtopk": (
            "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
            {**top_k, "group_fractions": [0.25, 0.75]},
        ),
    }

    def save(folder: Path, peer: Any, config: dict[str, Any]) -> Sides:
        randomise(peer)
        if getattr(peer, "threshold", None) is not None and peer.threshold.dim() == 0:
            peer.threshold.fill_(0.4)
        folder.mkdir(parents=True)
        torch.save({name: tensor.cpu() for name, tensor in peer.state_dict().items()}, folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": config}))
        x = rows()
        return compare(folder, peer.encode(x), peer(x))

    def read(folder: Path, trainer: str, fields: dict[str, Any]) -> Sides:
        module, name = trainer.split(".")
        made = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)(**common, **fields)
        return save(folder, made.ae, made.config)

    for name, (trainer, fields) in kinds.items():
        yield f"read_dictionary_learning_{name}", lambda folder, t=trainer, f=fields: read(folder, t, f)
    described = {"dict_class": "AutoEncoderNew", "activation_dim": D_IN, "dict_size": D_SAE, "layer": 2}
    yield (
        "read_dictionary_learning_new",
        lambda folder: save(folder, AutoEncoderNew(D_IN, D_SAE), {**described, "lm_name": "tiny"}),
    )


def main() -> int:
    """Run every case, print and write the result; 1 if any fails."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers warn of their own deprecations
    torch.manual_seed(0)
    found: dict[str, Sides] = {}
    try:
        with tempfile.TemporaryDirectory() as work, torch.no_grad():
            for cases in (written_cases, sae_lens_cases, sparsify_cases, dictionary_learning_cases):
                for name, run in cases():
                    found[name] = run(Path(work) / name)
    except ModuleNotFoundError as e:
        raise SailguardError(f"{e}; pip install --no-deps -r benchmarks/requirements-peers.txt") from e
    for name, sides in found.items():
        verdict = "" if sides.difference <= TOLERANCE else "  FAILED"
        print(f"{name:45} {sides.difference:.2e}{verdict}")
    failed = [name for name, sides in found.items() if not sides.difference <= TOLERANCE]
    if failed:
        print(f"{len(failed)} of {len(found)} fail; nothing was written", file=sys.stderr)
        return 1
    figures = {name: Figure(value=s.difference, unit="max abs difference", n=ROWS) for name, s in found.items()}
    detail = {
        "tolerance": TOLERANCE,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "d_out": D_OUT,
        "k": K,
        "largest_activation": {name: float(sides.acts[1].max()) for name, sides in found.items()},
        "mean_active_features": {name: float((s.acts[1] > 0).sum(1).float().mean()) for name, s in found.items()},
    }
    print(f"{len(found)} agree; written to {write_result('interop', figures, detail, packages=PACKAGES).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
