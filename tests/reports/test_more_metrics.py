"""What a report says beside the objective: caches of fewer bits, and what a variant does to the routing."""

import json

import numpy as np
import planted

from reports import caches, routing_effects
from reports.analysis import analyse
from reports.build import build
from reports.figures import draw
from reports.page import page
from reports.store import load
from sweeps import schema

COSTS = {16: 0.0, 8: 0.001, 4: 0.05}


def store(tmp_path, *, drops=0.0, widths=()):
    """Planted: `device_limit=8` drops that much more; a cache of each width costs COSTS, the same in every run."""
    root = planted.write_store(tmp_path / "planted", {"kv_lora_rank=16": 0.02}, seeds=(0, 1, 2, 3))
    random = np.random.default_rng(0)
    for path in sorted(root.glob(f"runs/*/{schema.SUMMARY_FILE}")):
        about = json.loads((path.parent / schema.RUN_FILE).read_text())
        summary = json.loads(path.read_text())
        found = summary["metrics"]
        found[schema.DROPPED_SHARE] += random.normal(0, 0.001) + (drops if about["variant"] == "device_limit=8" else 0.0)
        for bits in widths:
            found[schema.CACHE_BITS_PER_BYTE.format(bits)] = found[schema.BITS_PER_BYTE] + COSTS[bits]
            found[schema.CACHE_BYTES_PER_TOKEN.format(bits)] = found[schema.KV_BYTES_PER_TOKEN] * bits / 16
        path.write_text(json.dumps(summary))
    return root


def texts(document):
    return json.dumps(str(document.blocks))


def test_drops_that_a_variant_adds_are_found_and_no_others(tmp_path):
    analysis = analyse(load(store(tmp_path, drops=0.05)))
    found = routing_effects.effects(analysis)
    dropped = {name: effect.shown for name, effect in found[schema.DROPPED_SHARE].items()}
    assert dropped == {"kv_lora_rank=16": False, "device_limit=2": False, "device_limit=8": True}
    assert abs(found[schema.DROPPED_SHARE]["device_limit=8"].mean - 0.05) < 0.003
    assert schema.EXPERT_VIOLATION not in found  # equal in every run
    said = texts(page(analysis, *draw(analysis)))
    assert "raises dropped share by 0.0" in said
    assert "unrestricted (M = 8)** raises" in said


def test_widths_of_the_cache_stand_in_a_table_and_a_figure(tmp_path):
    root = store(tmp_path, widths=(16, 8, 4))
    analysis = analyse(load(root))
    found = caches.entries(analysis)
    assert len(found) == 4 * 3
    assert [size for _, _, size, _, _ in found] == sorted(size for _, _, size, _, _ in found)
    for variant, bits, size, _, change in found:
        assert size == variant.means[schema.KV_BYTES_PER_TOKEN].mean * bits / 16
        assert abs(change.mean - COSTS[bits]) < 1e-12
    front = [(v.name, bits) for (v, bits, *_), lost in zip(found, caches.beaten(found), strict=True) if not lost]
    # A latent of 16 at 16 bits (32 bytes, +0.02) is beaten by one of 64 at 4 bits (32 bytes) nowhere: that costs 0.05.
    assert front[0] == ("kv_lora_rank=16", 4)
    assert ("kv_lora_rank=16", 16) in front
    assert not any(name != "kv_lora_rank=16" and bits == 4 for name, bits in front)
    built = build(root, tmp_path / "out")
    assert built is not None
    assert (tmp_path / "out" / "figures" / "caches.png").stat().st_size > 5000
    assert "out of a cache of fewer bits" in (tmp_path / "out" / "report.md").read_text()


def test_without_them_nothing_is_said(tmp_path):
    analysis = analyse(load(store(tmp_path)))
    assert caches.table(analysis) is None
    assert "fewer bits" not in texts(page(analysis, *draw(analysis)))
