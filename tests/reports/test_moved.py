"""What real workers sent, beside what the routing of the trained models predicts."""

import json

import pytest
import yaml

from reports.analysis import analyse
from reports.claims import measured
from reports.claims.studies import from_record
from reports.moved import moved
from reports.store import load
from research.routing_trace import RoutingTrace
from sweeps import schema

WORKERS, WEIGHT = 8, "model.moe.balance.communication"


def on_workers(write_store, root, sent=lambda run: 5e5):
    """A store of M = 3 with the communication loss, without it, and of M = 1, as runs on eight workers leave it."""
    cell = {"model.moe.device_limit": 3, "model.moe.num_experts_per_tok": 4, WEIGHT: 0.02}
    variants = {"baseline": cell, "communication=0": {**cell, WEIGHT: 0.0}, "device_limit=1": {**cell, "model.moe.device_limit": 1}}
    write_store(root, variants=variants, seeds=(0, 1))
    study = yaml.safe_load((root / schema.STUDY_FILE).read_text())
    (root / schema.STUDY_FILE).write_text(yaml.safe_dump({**study, "resources": {"workers_per_trial": WORKERS}}))
    for folder in (root / schema.RUNS_DIRECTORY).iterdir():
        summary = json.loads((folder / schema.SUMMARY_FILE).read_text())
        uneven = 0.9 if folder.name.startswith("001") else 0.2
        more = {schema.PARALLEL_BYTES: sent(folder), schema.PARALLEL_SECONDS: 0.004, schema.RECEIVED_VIOLATION: uneven + 0.01 * int(folder.name[-1])}
        summary["metrics"] |= more
        (folder / schema.SUMMARY_FILE).write_text(json.dumps(summary))
    return root


def by_hand(folder):
    """Every token, every layer: a row to each other worker that has an expert of it, four times a step."""
    config, trace = json.loads((folder / schema.CONFIG_FILE).read_text()), RoutingTrace.load(folder / schema.ROUTING_FILE)
    _, tokens, _ = trace.expert_ids[-1].shape
    rows = 0
    for layer in trace.expert_ids[-1]:
        for token, chosen in enumerate(layer):
            rows += len({int(expert) // 4 for expert in chosen} - {token // (tokens // WORKERS)})
    in_step = config["training"]["batch_size"] * config["data"]["sequence_length"]
    return rows / tokens * in_step * config["model"]["hidden_size"] * 4 * 4


def test_measured_bytes_stand_beside_those_of_the_routing(write_store, tmp_path):
    table = moved(analyse(load(on_workers(write_store, tmp_path / "study", by_hand))))
    rows = {row[1][0]: row for row in table.rows if row[0] != "communication=0"}
    for row in table.rows:
        assert row[4][1] == pytest.approx(1.0, rel=1e-12)
    assert rows["1"][2][1] < rows["3"][2][1], "M bounds what is sent"
    assert rows["3"][6][1] == pytest.approx(2 * 2 * 3e-4 * 1e6), "two layers, forward and backward"
    assert {row[7][0][:5] for row in table.rows} == {"0.205", "0.905"}


def test_a_study_on_single_workers_has_no_such_table(write_store, tmp_path):
    assert moved(analyse(load(write_store(tmp_path / "study", seeds=(0, 1))))) is None


def test_the_claim_reads_what_was_received_with_the_loss_and_without(write_store, tmp_path):
    study = from_record(load(on_workers(write_store, tmp_path / "study")))
    (found,) = measured.measure(measured.RULES["balance-communication-received"], [study])
    assert found.effect.mean == pytest.approx(-0.7)
    assert found.reference == pytest.approx(0.905)
