"""DeepSeek-V2's training cost, predicted from DeepSeek 67B's alone."""

import numpy as np

from research import accounting
from research.configfile import read_yaml
from research.presets import preset
from sims.cluster import load_cluster
from sims.constants import load_constants
from sims.outputs.figures import bars_figure, svg_bytes
from sims.quantiles import Quantiles
from sims.training.efficiency import DATA, gpu_hours, layout_step
from sims.training.prediction import NODES, deepseek_v2, predicted
from sims.training.result import StepResult
from sims.training.step import closed_form
from sims.validation.comparison import Comparison, Held, comparison_table, published
from sims.validation.document import Figure, Section, band, table

PLACEMENTS = {"packed": "8 devices in one node", "spread": "8 devices on 8 nodes"}
ASSUMED = {"unknown": "placement and number of GPUs as unknown as they are", **{name: f"{what}, 1,024 GPUs" for name, what in PLACEMENTS.items()}}


def predictions(held: Held = ()) -> tuple[list[Comparison], dict[str, StepResult]]:
    """67B's hours (fitted) and V2's (predicted: whatever the placement, and in both), in thousands; V2's steps by placement."""
    known = published()
    dense, sparse = known["deepseek_67b_gpu_hours"], known["deepseek_v2_gpu_hours"]
    data = read_yaml(DATA)
    spec = layout_step(data["set_up"], data["set_up"]["layouts"][0])
    cluster = load_cluster(spec.cluster)
    hours = gpu_hours(spec, closed_form(spec, cluster, load_constants(cluster, given=dict(held))).seconds) / 1e3
    rows = [
        Comparison(group="training", name="DeepSeek 67B (one of its layouts)", unit="K GPU-hours per 1e12 tokens", value=dense.value,
                   ours=Quantiles.of(hours), kind="fitted", source=dense.source)
    ]  # fmt: skip
    flops = {name: accounting.train_flops_per_token(preset(name), spec.sequence_length) for name in ("deepseek-v2", "deepseek-67b")}
    equal_mfu = dense.value * flops["deepseek-v2"] / flops["deepseek-67b"]
    rates = {assumed: predicted(held)[assumed]["tokens_per_second_per_gpu"] for assumed in ASSUMED}
    for assumed, rate in rates.items():
        rows.append(
            Comparison(
                group="training", name=f"DeepSeek-V2, {ASSUMED[assumed]}", unit="K GPU-hours per 1e12 tokens", value=sparse.value,
                ours=Quantiles.of(thousand_hours(rate)), kind="predicted", baselines={"67B's MFU": equal_mfu}, source=sparse.source,
            )
        )  # fmt: skip
    for assumed, rate in rates.items():
        rows.append(
            Comparison(
                group="training", name=f"DeepSeek-V2, {ASSUMED[assumed]}", unit="tokens/s per GPU", value=1e12 / 3600 / (1e3 * sparse.value),
                ours=Quantiles.of(rate), kind="predicted", baselines={"67B's MFU": 1e12 / 3600 / (1e3 * equal_mfu)}, source=sparse.source,
            )
        )  # fmt: skip
    for assumed, rate in rates.items():
        saving = known["training_saving"]
        rows.append(
            Comparison(
                group="training", name=f"share of GPU-hours saved, {ASSUMED[assumed]}", unit="%", value=100 * saving.value,
                ours=Quantiles.of(100 * (1 - thousand_hours(rate) / dense.value)), kind="predicted",
                baselines={"67B's MFU": 100 * (1 - equal_mfu / dense.value)}, source=saving.source,
            )
        )  # fmt: skip
    return rows, {placement: deepseek_v2(placement, constants=dict(held)) for placement in PLACEMENTS}


def thousand_hours(rate: np.ndarray) -> np.ndarray:
    """GPU-hours per 1e12 tokens, in thousands, of tokens/s per GPU."""
    return 1e9 / 3600 / rate


def training_section(rows: list[Comparison], steps: dict[str, StepResult], held: Held = ()) -> Section:
    """The costs, where the time goes, and how little the unpublished number of GPUs matters."""
    about = []
    for placement, step in steps.items():
        shares = {name: float(np.median(values / step.seconds)) for name, values in step.breakdown.items()}
        about.append(
            [PLACEMENTS[placement], band(Quantiles.of(step.seconds), digits=1), band(Quantiles.of(step.tokens_per_second_per_gpu), digits=0),
             band(Quantiles.of(100 * step.mfu)), f"{100 * shares['exposed_communication']:.1f} %", f"{100 * shares['bubble']:.1f} %",
             f"{step.memory.total / 1e9:.0f} GB"]
        )  # fmt: skip
    over = [
        [f"{nodes} x 8", *(band(Quantiles.of(thousand_hours(predicted(held)[placement]["by_nodes"][nodes]))) for placement in PLACEMENTS)]
        for nodes in NODES
    ]
    blocks = [
        "The efficiency of dense products is fitted on DeepSeek 67B's 300.6K GPU-hours alone, together with what that one number leaves open; "
        "nothing was "
        "fitted to DeepSeek-V2's cost. Its set-up is the published one: 16 pipeline stages with a zero-bubble schedule, 8-way expert parallelism, "
        "ZeRO-1, "
        "partial recomputation, shared experts computed while tokens travel, 9,216 sequences of 4K. *67B's MFU* is what a calculator says that "
        "knows FLOPs only.",
        comparison_table(rows, digits=1),
        "These are predictions in that no figure of DeepSeek-V2's enters a fit. They were not made blind: the published figure was known "
        "while the simulator was written, and the part of a product's result that nothing hides (`exposed_write`) was added when a first version "
        "had predicted more tokens per second.",
        "DeepSeek-V2's step on 1,024 GPUs in both placements, which the paper does not choose between:",
        table(["placement", "step, s", "tokens/s per GPU", "MFU, %", "exposed communication", "bubble", "memory of the fullest GPU"], about),
        "The number of GPUs is not published. Thousands of GPU-hours per trillion tokens over it:",
        table(["GPUs", *PLACEMENTS.values()], over),
    ]
    typical = {name: seconds for name, seconds in steps["packed"].typical().items() if seconds > 0}
    figure = Figure(
        name="training-step",
        caption="Where a step of DeepSeek-V2 goes (1,024 H800, 8 devices in one node); seconds, mean over GPUs.",
        alternative="Seconds of a step by category: " + "; ".join(f"{name} {seconds:.2f}" for name, seconds in typical.items()) + ".",
        svg=svg_bytes(bars_figure(typical, "DeepSeek-V2, a step on 1,024 H800", unit="s", scale=1.0)),
    )
    return Section(title="Prediction: DeepSeek-V2's training cost", blocks=blocks, figures=[figure])
