"""What a prepared corpus holds, domain by domain, and how much of its held-out text it also trains on."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from research.config import DataConfig
from research.data import corpora
from research.data.batches import mixture_shares
from research.data.overlap import overlap
from research.data.prepare import PreparedData


def summary(data: PreparedData, config: DataConfig) -> dict[str, Any]:
    """Plain values, ready for JSON: of each domain its documents (None in a corpus that was prepared before they were
    counted), blocks, bytes, tokens (one end-of-text token per block among them), bytes per token, share in the mixture
    and sources."""
    shares, sources = mixture_shares(data, config), corpora.sources_of(config)
    domains: dict[str, Any] = {}
    for domain, share in zip(data.domains, shares, strict=True):
        sizes = data.manifest["domains"][domain]
        domains[domain] = {"documents": None, **sizes}
        for part in ("train", "heldout"):
            tokens = sizes[f"{part}_tokens"]
            domains[domain][f"{part}_bytes_per_token"] = sizes[f"{part}_bytes"] / tokens if tokens else None
        domains[domain] |= {"mixture_share": float(share), "sources": sources[domain]}
    return {
        "corpus": config.corpus,
        "data_id": data.data_id,
        "directory": str(data.directory),
        "vocab_size": data.vocab_size,
        "split": data.manifest["split"],
        "domains": domains,
    }


def heldout_overlap(data: PreparedData, n: int, announce: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """`overlap` of the held-out blocks of each domain with the training blocks of all, as plain values by domain."""
    heldout = {domain: list(data.blocks("heldout", domain)) for domain in data.domains}
    training = {domain: data.blocks("train", domain) for domain in data.domains}
    return {domain: asdict(found) for domain, found in overlap(heldout, training, n, announce).items()}
