"""DeepSeek-V2's generation throughput over DeepSeek 67B's, predicted with its two terms."""

from research import accounting
from research.presets import preset
from sims.serving.comparison import Comparison as Serving
from sims.serving.comparison import Ratio, generation_ratio
from sims.validation.comparison import Comparison, Held, comparison_table, published
from sims.validation.document import Section, band, signed, table


def prediction(held: Held = ()) -> tuple[list[Comparison], Serving]:
    """The ratio, both rates and the prompt rate; DeepSeek-V2 in FP8 with a 6-bit cache on a node of 8 H800."""
    found, known = generation_ratio(constants=dict(held)), published()
    at = found.at
    cached = found.ideal_cached_tokens[0] / found.ideal_cached_tokens[1]
    figures = {
        "generation_ratio": ("generated tokens/s over DeepSeek 67B's", at.ratio, {"cached tokens alone": cached}),
        "deepseek_v2_generation_bar": ("DeepSeek-V2, generated", at.ours.generated_tokens_per_second, {}),
        "deepseek_67b_generation_bar": ("DeepSeek 67B, generated", at.baseline.generated_tokens_per_second, {}),
        "deepseek_v2_prompt": ("DeepSeek-V2, prompts (published: exceeds)", at.ours.prompt_tokens_per_second, {}),
    }
    rows = [
        Comparison(group="serving", name=name, unit="x" if key == "generation_ratio" else "tokens/s", value=known[key].value, ours=ours,
                   kind="predicted", baselines=baselines, source=known[key].source)
        for key, (name, ours, baselines) in figures.items()
    ]  # fmt: skip
    return rows, found


def serving_section(rows: list[Comparison], found: Serving) -> Section:
    at, known = found.at, published()
    cache = []
    for name, bits, key in (("deepseek-v2", 6, "deepseek_v2_cache"), ("deepseek-67b", 16, "deepseek_67b_cache")):
        ours = accounting.kv_cache_bytes_per_token(preset(name), bits) / 1e3
        cache.append([name, f"{bits}", f"{known[key].value:.2f}", f"{ours:.2f}", signed(ours, known[key].value)])
    ratio, rates = comparison_table(rows[:1], digits=2), comparison_table(rows[1:], digits=0)
    blocks = [
        "Throughput is residents over the time of a step, so the ratio is term (a), how many more sequences fit, times term (b), how much faster "
        "or slower a "
        "step is. Constants are those of training; nothing was fitted to these figures. DeepSeek-V2 has FP8 weights and a cache of 6 bits, "
        "DeepSeek 67B BF16 "
        "of both and tensor parallelism over 8. Request lengths are not published: the prediction takes "
        f"prompts of {at.lengths.prompt:,.0f} and outputs of {at.lengths.output:,.0f} tokens, the table below the others.",
        ratio,
        rates,
        f"Term (a), residents: {at.residents_ratio:.2f} times as many sequences. Term (b), seconds per step of 67B over V2's: "
        f"{band(at.step_ratio, digits=3)}. "
        f"Their product: {band(at.ratio, digits=2)}, published {known['generation_ratio'].value:g}. Beside one copy of the weights and nothing "
        f"else the nodes hold "
        f"{found.ideal_cached_tokens[0] / 1e6:.1f} and {found.ideal_cached_tokens[1] / 1e6:.2f} million cached tokens.",
        "Bytes of the cache per token, kB:",
        table(["model", "bits", "published", "ours", "error"], cache),
        "### Over request lengths and readings of FP8",
        table(
            [
                "lengths (prompt, output), reading",
                "(a) residents",
                "(b) step",
                "(a) x (b)",
                "error",
                "with prompts computed there",
                "V2 tokens/s",
                "67B tokens/s",
            ],
            [_row(each, known["generation_ratio"].value) for each in found.sensitivity],
        ),
    ]
    return Section(title="Prediction: 5.76 times the generation throughput", blocks=blocks)


def _row(each: Ratio, value: float) -> list[str]:
    rates = [each.ours.generated_tokens_per_second, each.baseline.generated_tokens_per_second]
    return [
        f"{each.lengths.kind} {each.lengths.prompt:,.0f}, {each.lengths.output:,.0f}; {each.reading}", f"{each.residents_ratio:.2f}",
        band(each.step_ratio, digits=2), band(each.ratio, digits=2), signed(each.ratio.p50, value), band(each.ratio_with_prompts, digits=2),
        *(band(rate, digits=0) for rate in rates),
    ]  # fmt: skip
