"""Why a server generates as many tokens per second as it does."""

from research.routing_trace import RoutingTrace
from sims.constants import Constants
from sims.explain.sensitivity import Explanation, perturbed, sensitivities
from sims.quantiles import Quantiles
from sims.serving.requests import draw_requests
from sims.serving.simulate import curve, server
from sims.serving.spec import Serving
from sims.serving.steady import Saturated, elasticities, means, residents, saturated

SAMPLE = 4096


def explain_serving(spec: Serving, trace: RoutingTrace | None = None) -> Explanation:
    """Saturation in closed form: generated tokens per second, and a step's time by kind of work."""
    host = server(spec, trace)
    average = means(
        draw_requests(spec.lengths, spec.requests or SAMPLE, rate=None, seed=spec.seed), spec.block_tokens, reserve=spec.admission == "reserve"
    )
    most, limit = residents(average, host.room, host.cost, spec)
    gains = elasticities(average, host.room, host.cost, spec)
    first, second = sorted(gains, key=lambda name: -gains[name])[:2]

    def full(constants: Constants) -> Saturated:
        other = server(spec, trace, constants)
        return saturated(average, other.cost, spec, residents(average, other.room, other.cost, spec)[0])

    here, tilted = saturated(average, host.cost, spec, most), perturbed(host.constants)
    bounds = [(point.batch, point.bound_by) for point in curve(host, average, most)]
    changes = [f"from {batch:,.0f} sequences on {bound}" for i, (batch, bound) in enumerate(bounds) if i == 0 or bounds[i - 1][1] != bound]
    return Explanation(
        question="serving",
        answer=Quantiles.of(here.generated),
        unit="tokens/s",
        bottleneck=(
            f"{first[0].upper()}{first[1:]} binds: one per cent more of it generates {gains[first]:.2f} % more, of {second} {gains[second]:.2f} %; "
            f"{most:,.0f} sequences are resident, limited by {limit}."
        ),
        parts={name: float(seconds[0]) for name, seconds in here.priced.parts.items() if seconds[0] > 0},
        sensitivities=sensitivities(full(tilted).generated, tilted),
        base=float(here.generated[0]),
        switches=[
            f"What bounds most of a step over the batch: {', '.join(changes)} (a batch of {most:,.0f} fits).",
            *(f"One per cent more {name}: {gain:+.2f} % tokens per second." for name, gain in sorted(gains.items(), key=lambda item: -item[1])),
        ],
        seed=spec.seed,
    )
