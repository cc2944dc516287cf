"""What docs/performance.md shows of the training benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.peers import ARMS, PACKAGES
from benchmarks.results import Machine, Result
from benchmarks.tables import markdown

KINDS = {"topk": "TopK", "batchtopk": "BatchTopK"}
LIBRARIES = {name: name for name in ("sailguard", "dictionary_learning", "sparsify")} | {"sae_lens": "sae-lens"}


def training_tables(result: Result) -> str:
    """The parts that were measured, in order."""
    detail = result.detail
    parts = [_where(result)]
    if "speed" in detail:
        parts += ["### Speed (tokens a second; median, quartiles)", _speed(detail["speed"])]
    if "quality" in detail:
        parts += _quality(detail["quality"], detail["data"])
    if "harvest" in detail:
        parts += [f"### Harvest ({detail['harvest']['tokens']:,} tokens)", _harvest(detail["harvest"])]
    if detail.get("cuda"):
        parts += _cuda(detail["cuda"], result.machine)
    if "plan" in detail:
        parts += ["### A plan for a larger model", *_plan(detail["plan"])]
    return "\n\n".join(parts)


def arm_title(arm: str) -> str:
    """Library and kind of an arm, such as `sae-lens TopK (sparse activations)`."""
    library, factory, family = ARMS[arm]
    return f"{LIBRARIES[library]} {KINDS[family]}" + (" (sparse activations)" if factory == "create_sparse" else "")


def _where(result: Result) -> str:
    machine, versions = result.machine, result.versions
    peers = ", ".join(f"{package} {versions[package]}" for package in PACKAGES.values() if package in versions)
    return (
        f"{result.date}, {machine.cores} cores ({machine.cpu}), {machine.memory_gb:g} GB, torch threads: "
        f"{result.detail['threads']}, torch {versions['torch']}{'; ' + peers if peers else ''}."
    )


def _speed(speed: Mapping[str, Any]) -> str:
    rows = []
    for name, values in speed["tokens_per_s"].items():
        library, _, family = ARMS[name]
        ratio = speed["ratios"].get(f"{family}_vs_{library}")
        own = ratio if ratio is not None and ratio["arm"] == name else None
        rows.append([arm_title(name), _thousands(values), None if own is None else _ratio(own)])
    return markdown(["", "tokens/s", "ours over it"], rows)


def _quality(quality: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    setting = quality["setting"]
    tokens = setting["steps"] * setting["batch_tokens"]
    rows = []
    for name, by_lr in quality["arms"].items():
        for lr, found in by_lr.items():
            own = found["threshold_fvu"]
            rows.append(
                [
                    arm_title(name),
                    lr,
                    f"{found['fvu']:.4f}",
                    f"{found['l0']:.1f}",
                    None if own is None else f"{own:.4f} at {found['threshold_l0']:.1f}",
                    f"{100 * found['unused']:.1f} %",
                    _thousands(found["tokens_per_s"]),
                ]
            )
    heading = ["", "learning rate", "FVU", "L0", "FVU with its own threshold", "unused features", "tokens/s"]
    compared = [
        [
            KINDS[family],
            f"{about['fvu']:.4f}",
            f"{about['best_fvu']:.4f} ({arm_title(about['best'])})",
            f"{about['value']:.4f}",
        ]
        for family, about in quality["ratios"].items()
    ]
    return [
        f"### Quality after {tokens:,} tokens",
        f"{data['train_rows']:,} rows were read, as often as needed, and {data['held_out_rows']:,} others held out.",
        markdown(heading, rows),
        markdown(["", "our FVU", "best peer's", "ours over it"], compared),
    ]


def _harvest(harvest: Mapping[str, Any]) -> str:
    titles = {
        "harvest": "our harvest, text to shards",
        "bare_truncated": "the layers up to the hook point alone, nothing kept",
        "full": "all layers",
        "full_with_head": "all layers and the logits",
    }
    rows = [
        [
            title,
            _thousands(harvest["tokens_per_s"][name]),
            _ratio(ratio) if (ratio := harvest["ratios"].get(name)) else None,
        ]
        for name, title in titles.items()
    ]
    return markdown(["", "tokens/s", "our harvest over it"], rows)


def _cuda(cuda: Mapping[str, Any], machine: Machine) -> list[str]:
    shape = cuda["shape"]
    rows: list[list[str | None]] = []
    for precision in ("float32", "bfloat16"):
        found = cuda[precision]
        for name, values in found["tokens_per_s"].items():
            floor = found["floor_tokens_per_s"]["floor"]
            rows.append([arm_title(name), precision, _thousands(values), f"{100 * values['median'] / floor:.0f} %"])
        by = found["floor_tokens_per_s"]
        rows.append(["memory allows", precision, f"{by['memory']:,.0f}", None])
        rows.append(["arithmetic allows", precision, f"{by['arithmetic']:,.0f}", None])
    title = (
        f"### On {machine.gpu}: d_in {shape['d_in']:,}, d_sae {shape['d_sae']:,}, k {shape['k']}, "
        f"batch {shape['batch_tokens']:,}"
    )
    return [title, markdown(["", "products in", "tokens/s", "of what the device allows"], rows)]


def _plan(plan: Mapping[str, Any]) -> list[str]:
    job, size, measured = plan["job"], plan["bytes"], plan["measured"]
    sae, blocks = job["sae"], ", ".join(map(str, job["hook_layers"]))
    what = (
        f"{len(job['hook_layers'])} SAEs of {sae['d_sae']:,} features (k {sae['k']}) on a model of "
        f"{job['model']['layers']} layers of width {job['model']['d_model']:,}, blocks {blocks}, "
        f"{job['tokens']:.0e} tokens in texts of {job['context']:,}: {plan['operations']['harvest']:.2g} operations to "
        f"harvest, {plan['operations']['train']:.2g} to train; a cache of {size['cache'] / 1e12:.1f} TB "
        f"({plan['disk_hours_each_way']:.1f} h to write and as long to read at 2 GB/s, assumed), "
        f"{size['model_weights'] / 1e9:.1f} GB of weights, {size['sae_state'] / 1e9:.1f} GB for all SAEs with "
        "gradients and moments."
    )
    rows: list[list[str | None]] = [
        [
            "this CPU: measured rate, carried over by operations",
            *(f"{plan['cpu_hours'][stage]:,.0f}" for stage in ("harvest", "train", "total")),
        ]
    ]
    for name, device in plan["devices"].items():
        for key, title in (
            ("floor_hours", "published peaks: a floor"),
            ("assumed_hours", f"{plan['utilisation']:.0%} of the peaks: an assumption"),
        ):
            hours = device[key]
            rows.append([f"one {name}, {title}", *(f"{hours[s]:.1f}" for s in ("harvest", "train", "total"))])
    if plan["gpu_train_hours_measured"] is not None:
        rows.append(["the accelerator above, measured", None, f"{plan['gpu_train_hours_measured']:.1f}", None])
    rates = (
        f"Measured here: {measured['harvest_tokens_per_s']:,.0f} tokens/s of harvest on the embedded model "
        f"({measured['harvest_operations_per_s'] / 1e9:.0f} G operations/s) and "
        f"{measured['train_tokens_per_s']:,.0f} tokens/s of TopK training "
        f"({measured['train_operations_per_s'] / 1e9:.0f} G operations/s)."
    )
    return [what, markdown(["hours (GPU-hours on one device)", "harvest", "five SAEs", "in all"], rows), rates]


def _thousands(values: Mapping[str, Any]) -> str:
    low, high = values["quartiles"]
    return f"{values['median']:,.0f} ({low:,.0f} to {high:,.0f})"


def _ratio(values: Mapping[str, Any]) -> str:
    low, high = values["quartiles"]
    return f"{values['median']:.2f} ({low:.2f} to {high:.2f})"
