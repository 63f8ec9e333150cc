"""The page of `make bench`: targets beside what was measured."""

from typing import Any

from tests.bench.parallel_page import parallel
from tests.bench.sims_page import sims
from tests.bench.training import DEPTHS

TRAINING = {"transformers grouped_mm": 1.8, "transformers eager": 4.0}
DECODING = {(1, 1024): 5, (1, 4096): 20, (1, 16384): 40, (1, 32768): 60, (8, 1024): 15, (8, 4096): 35}


def render(found: dict[str, Any], stem: str = "") -> str:
    """Markdown of what `tests.bench` found; parts that were not measured are not there.  Figures are called `stem`-PART.png."""
    lines = [f"# One CPU core, {found['date']}", "", f"    {found['command']}", ""]
    lines += [f"* {key.replace('_', ' ')}: {value}" for key, value in found["machine"].items()]
    lines += [f"* one pinned thread on core {found['core']}" + _core(found), ""]
    if "peak_gflops" in found:
        lines += [
            "Both sides in float32 with the same weights, fused AdamW, denormals flushed and the same allocator settings, interleaved in one process;"
        ]
    lines += ["medians of wall time. On a shared machine the ratios hold to some per cent, the seconds do not.", ""]
    for part, form in (("training", _training), ("moe", _moe), ("decoding", _decoding), ("workers", _workers), ("sweeps", _sweeps), ("sims", sims)):
        if part in found:
            lines += form(found)
    if "parallel" in found:
        lines += parallel(found, f"{stem}-parallel.png")
    return "\n".join(lines)


def _core(found: dict[str, Any]) -> str:
    if "peak_gflops" not in found:
        return ""
    return f": {found['peak_gflops']:.0f} GF/s (a product of 1,024), {found['read_bytes_per_second'] / 1e9:.1f} GB/s read"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows), ""]


def _against(value: float, target: float) -> str:
    return f"{value:.2f} ({'' if value >= target else '**'}target {target:g}{'' if value >= target else '**'})"


def _training(found: dict[str, Any]) -> list[str]:
    lines = [
        "## A training step",
        "",
        "Forward, backward, balance losses (computed, weighted 0), clipping, AdamW. The *ceiling* is the time of a step's matrix products alone, each",
        "shape repeated in the cache. The target is set by the products at the model's shapes, as the paper's equations have them: every projection on",
        "its own, keys and values expanded. The step may take others that say the same: where the latent is narrow, W^UK and W^UV are multiplied into the",
        "projections around them, which leaves fewer multiplications to be done and a lower ceiling, *of its own products*. The published",
        "multiplications over the core's peak are the *useful share*.",
        "",
    ]
    rows = []
    for step in found["training"]:
        times = [
            # The target against eager is one at 64 experts; of 160 it is shown without.
            f"{step['times'][name]:.2f}" if name.endswith("eager") and step["model"] not in DEPTHS else _against(step["times"][name], target)
            for name, target in TRAINING.items()
        ]
        useful = f"{step['share_of_peak']:.2f}" if "share_of_peak" in step else ""  # pages of before took the peak at another minute
        rows.append(
            (_shape(step), f"{step['tokens_per_second']['moelab']:,.0f}", *times, _against(step["share_of_published_ceiling"], 0.7), f"{step['share_of_ceiling']:.2f}", useful,
             f"{step['first_losses_apart']:.0e}")
        )  # fmt: skip
    lines += _table(
        (
            "model",
            "tokens/s",
            "times grouped_mm",
            "times eager",
            "share of ceiling",
            "of its own products'",
            "useful share of peak",
            "first ten losses apart (relative)",
        ),
        rows,
    )
    lines += _places(found["training"])
    lines += [
        "A step of nothing but its own products at their ceiling would be "
        + "; ".join(" and ".join(f"{step['times'][name] / step['share_of_ceiling']:.2f}" for name in TRAINING) for step in found["training"])
        + " times as fast as grouped_mm and eager: what no step with these products exceeds.",
        "",
    ]
    if all("peak_seconds" in step for step in found["training"]):
        parts = (f"{step['peak_seconds'] / step['seconds']['moelab']:.2f}" for step in found["training"])
        lines += ["A step that did its own products at the core's peak and nothing else would take " + ", ".join(parts) + " of the time.", ""]
    lines += [
        "### Where the time goes",
        "",
        "Own time of each operation; the kernels' own contain their products.",
        "",
    ]
    names = list(dict.fromkeys(name for step in found["training"] for name in step["rest"]))[:14]
    heads = tuple(map(_shape, found["training"]))
    cells = [(name, *(f"{100 * s['rest'][name]:.1f} %" if name in s["rest"] else "" for s in found["training"])) for name in names]
    return [*lines, *_table(("operation", *heads), cells)]


def _places(steps: list[dict[str, Any]]) -> list[str]:
    """Where a step's time lies, in five parts: its products at their ceiling, what these take longer in place, and everything else."""
    rows = []
    for step in steps:
        rest, alone = step["rest"], step["products_share"]
        torch_s = sum(share for name, share in rest.items() if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"))
        kernels = sum(
            share for name, share in rest.items() if name.startswith("_") and ("Attention" in name or "Experts" in name or "Sparse" in name)
        )
        parts = (alone["torch"], torch_s - alone["torch"], alone["kernels"], kernels - alone["kernels"], 1 - torch_s - kernels)
        rows.append((_shape(step), *(f"{100 * part:.0f} %" for part in parts)))
    head = ("model", "torch's products alone", "longer in place", "the kernels' products alone", "these kernels beside them", "all other operations")
    return [
        "What a step is made of: products at their ceiling, and what takes the rest (of two measurements: profiled and alone).",
        "",
        *_table(head, rows),
    ]


def _shape(step: dict[str, Any]) -> str:
    return f"{step['model'].removeprefix('deepseek-v2-')} {step['batch']} x {step['length']}"


def _moe(found: dict[str, Any]) -> list[str]:
    rows = []
    for case in found["moe"]:
        target = 1.3 if case["busiest_over_average"] > 2 else 1.25
        bold = "**" if case["times"] > target else ""
        skew = f"{case['busiest_over_average']:.1f}"
        rows.append(
            (case["size"], str(case["tokens_per_expert"]), skew, f"{case['times']:.2f} ({bold}target {target:g}{bold})", f"{case['products']:.2f}")
        )
    head = ("layer", "tokens per expert", "busiest over average", "times the dense FFN", "products alone")
    return ["## The whole MoE layer over a dense FFN of the same activated FLOPs", "",
            "Forward and backward, gate and shared experts included. *Products alone*: what the matrix products of the two take at the rate that",
            "the core has for each of their shapes, before a token is routed, gathered or added up.", "",
            *_table(head, rows)]  # fmt: skip


def _decoding(found: dict[str, Any]) -> list[str]:
    rows = []
    for at in found["decoding"]:
        target = DECODING[(at["batch"], at["context"])]
        rows.append(
            (at["model"].removeprefix("deepseek-v2-"), f"{at['batch']}", f"{at['context']:,}", f"{1e3 * at['seconds']['moelab']:.1f}",
             f"{1e3 * at['seconds']['transformers']:.0f}", _against(at["times"], target), f"{at['over_floor']:.2f}",
             f"{at['cache_over_closed_form']:.3f}", f"{at['logits_apart']:.0e}")
        )  # fmt: skip
    head = ("model", "batch", "context", "ms per step", "transformers' ms", "times", "over the floor", "cache over closed form", "logits apart")
    words, prefill = found["same_words"], found["prefill"]
    ours, theirs = prefill["moelab"], prefill["transformers"]
    return [
        "## Decoding over a filled cache",
        "",
        "*Floor*: activated weights and latents in bytes over the measured read bandwidth (target at 1K: 1.5).",
        "",
        *_table(head, rows),
        f"Greedy words: {words['same']} of {words['of']} steps alike.",
        "",
        f"Prefill of 4,096: {theirs['seconds'] / ours['seconds']:.2f} times as fast ({ours['seconds']:.2f} s against {theirs['seconds']:.2f} s; target 3), "
        f"with {ours['added_peak_bytes'] / theirs['added_peak_bytes']:.3f} of the added peak memory "
        f"({ours['added_peak_bytes'] / 2**20:,.0f} MiB against {theirs['added_peak_bytes'] / 2**20:,.0f} MiB; target 0.2).",
        "",
    ]


def _workers(found: dict[str, Any]) -> list[str]:
    workers = found["workers"]
    return [
        "## Two workers",
        "",
        f"Two pinned workers train {_against(workers['times'], 1.9)} times as many tokens per second as one "
        f"({workers['two']:,.0f} against {workers['one']:,.0f}; micro, 8 x 256, interleaved).",
        "",
    ]


def _sweeps(found: dict[str, Any]) -> list[str]:
    sweeps, rows = found["sweeps"], []
    for one in sweeps["overhead"]:
        target = {"10 s": 0.05, "60 s": 0.02}.get(one["case"])
        ours = one["system"] == "moelab"
        seconds = f"{one['overhead']:.2f}" + (" (target 0.5)" if ours and target is None else "")
        share = "" if one["work"] < 1 else f"{100 * one['share']:.1f} %" + (f" (target {100 * target:.0f} %)" if ours and target else "")
        parts = (f"{one[key]:.2f}" for key in ("pause", "waited", "end"))
        rows.append(
            (one["case"], one["system"], str(one["trials"]), f"{one['work'] - one['waited']:.1f}", seconds, share, *parts, f"{one['start']:.0f}")
        )
    head = ("trial", "system", "trials", "its work, s", "around it, s", "share", "pause, s", "waited, s", "end, s", "start, s")
    memory, answers = sweeps["memory"], sweeps["answers"]
    resident = ", ".join(f"{int(size) / 2**20:,.0f} MiB after {int(n):,}" for n, size in memory["resident"].items())
    status = ", ".join(f"{seconds:.2f}" for seconds in answers["status_seconds"])
    return [
        "## Around the training of a study",
        "",
        "Matrix products of a fixed number on two workers, one to a core, and a TPE search. *Work*: the seconds of a core that it had. *Around*",
        "it: the *pause* between two trials of a worker, what the work *waited* for its core, on which the driver, Ray's own processes and the system",
        "run as well, and its part of the *end* of the study, MLflow's pictures and note included, which Ray Tune has not. *Start*: up to the first trial.",
        "",
        *_table(head, rows),
        f"The driver holds {resident} trivial trials ({memory['bytes_per_trial'] / 1024:.1f} KiB per trial; Optuna alone keeps",
        f"{sweeps['memory_of_optuna']['bytes_per_trial'] / 1024:.1f} KiB of each of the same trials), and",
        f"writes a state of {memory['state_bytes'] / 1024:.0f} KiB ({memory['trials']:,} trials in {memory['seconds']:.0f} s).",
        "",
        f"With {answers['workers']} sleeping workers `status` answers in {status} s; the longest turn of the driver's loop is {answers['longest_turn']:.2f} s "
        f"(median {answers['median_turn']:.2f} s).",
        "",
    ]
