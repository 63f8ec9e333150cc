"""The contract between sweeps and reports: names, and nothing else.

A study's root directory holds

    study.yaml            the study as it was run, with everything resolved
    study.journal         Optuna's storage
    state.json            progress of the study, rewritten atomically: counts, what runs now, and the last runs that ended
    control.json          what the driver was asked while it ran: the number of workers
    data.json             DATA_KEYS: the prepared text that all runs share
    runs/<run>/           one directory per (variant, seed), <run> = "<trial>-<seed>"
        run.json          RUN_KEYS: what the run is
        config.json       the resolved research.config.RunConfig
        metrics.jsonl     one object per record: "step", "tokens" and metrics by name
        summary.json      SUMMARY_KEYS: how it ended
        attempts.json     a list of ATTEMPT_KEYS: every attempt at it, with how each ended
        routing.npz       research.routing_trace.RoutingTrace
        simulation.json   what the cluster model answered for it
        system.jsonl      samples of its process and machine: "time", "sample" and system/* by name
        checkpoint/       the last checkpoint
        checkpoints/      those before it and the best, where the configuration keeps them: step-N/, best/
    report/               the built report

The same metrics, parameters, tags and artifacts are in MLflow, under the names below.
"""

from collections.abc import Iterable
from typing import Final

SCHEMA_VERSION: Final = 1

STUDY_FILE: Final = "study.yaml"
JOURNAL_FILE: Final = "study.journal"
STATE_FILE: Final = "state.json"
DATA_FILE: Final = "data.json"
RUNS_DIRECTORY: Final = "runs"
REPORT_DIRECTORY: Final = "report"

RUN_FILE: Final = "run.json"
CONFIG_FILE: Final = "config.json"
METRICS_FILE: Final = "metrics.jsonl"
SUMMARY_FILE: Final = "summary.json"
ROUTING_FILE: Final = "routing.npz"
SIMULATION_FILE: Final = "simulation.json"
SYSTEM_FILE: Final = "system.jsonl"
ATTEMPTS_FILE: Final = "attempts.json"
CONTROL_FILE: Final = "control.json"
CHECKPOINT_DIRECTORY: Final = "checkpoint"

RUN_KEYS: Final = ("schema", "run", "study", "trial", "variant", "seed", "baseline", "parameters", "config_id", "commit")
"""`parameters` maps each searched path (`model.moe.device_limit`) to its value; `variant` is a short
readable label of them, the same for all seeds; `baseline` is true for the study's named baseline."""

RUN_EXTRA_KEYS: Final = ("role", "matched", "retune")
"""May be there too.  `role`: `replicate`, or `retune` for a short run that tries a learning rate, which is in no statistic
(its `seed` is that of the short run).  `matched`: the budget's `quantity`, `requested`, `achieved`, `difference` (relative),
`adjusted` (a path or null) and `value`.  `retune`: the chosen `learning_rate`, `edge` (it is the lowest or highest that was
tried), `chosen_by` and `tried`."""

SUMMARY_KEYS: Final = ("schema", "state", "reason", "steps", "tokens", "seconds", "attempts", "metrics", "versions", "device", "failure")
"""`state` is one of STATES, `reason` a sentence or null, `metrics` the final value of each metric, `failure` one of FAILURE_CLASSES or null."""

ATTEMPT_KEYS: Final = (
    "attempt",
    "state",
    "failure",
    "text",
    "started",
    "seconds",
    "step",
    "node",
    "pid",
    "micro_batch_size",
    "next_micro_batch_size",
    "charged",
    "forgiven",
)
"""`state` is one of STATES, or `running`, `lost` (its worker failed, and another attempt follows) or `interrupted` (its driver was
gone); `failure` one of FAILURE_CLASSES or null; `step` the last that was recorded; `micro_batch_size` null for the configuration's
own, `next_micro_batch_size` that of the attempt that follows; `charged` whether it counts against the run's tries; `forgiven` by a
later `retry`."""

DATA_KEYS: Final = ("schema", "data_id", "corpus", "vocab_size", "domains", "identity", "split")
"""`domains` maps each domain to its sizes in bytes, tokens and blocks; `identity` holds what the text depends on: the archives'
SHA-256, or that of each of the user's files; `data_id` is a hash of it and of how it was prepared."""

FINISHED: Final = "finished"
DIVERGED: Final = "diverged"
PRUNED: Final = "pruned"
FAILED: Final = "failed"
STOPPED: Final = "stopped"
STATES: Final = (FINISHED, DIVERGED, PRUNED, FAILED, STOPPED)

# Why an attempt failed.
BUG: Final = "bug"
"""The run's own error: not tried again by itself."""
OUT_OF_MEMORY: Final = "out-of-memory"
"""Of the host or of a GPU: tried again with half the micro-batch, down to one sequence."""
DIED: Final = "died"
"""The worker's process is gone: tried three times."""
NODE: Final = "node"
"""The machine is gone: tried again, not charged."""
HANG: Final = "hang"
"""The worker answered no more, or made no progress: three tries."""
DISK: Final = "disk"
"""No room for a file: three tries, after a pause."""
FAILURE_CLASSES: Final = (BUG, OUT_OF_MEMORY, DIED, NODE, HANG, DIVERGED, DISK)

# Metrics over steps (metrics.jsonl and MLflow).
LOSS: Final = "train/loss"
"""Cross-entropy in nats per token, without the balance losses."""
BALANCE_EXPERT: Final = "train/balance_expert"
BALANCE_DEVICE: Final = "train/balance_device"
BALANCE_COMMUNICATION: Final = "train/balance_communication"
"""Mean over layers of the sums in equations 23, 26 and 29 without their alphas: 1 is perfect balance."""
GRADIENT_NORM: Final = "train/gradient_norm"
LEARNING_RATE: Final = "train/learning_rate"
TOKENS_PER_SECOND: Final = "train/tokens_per_second"
DISTINCT_DEVICES: Final = "routing/distinct_devices_per_token"
EXPERT_VIOLATION: Final = "routing/expert_violation"
"""Maximal violation: (largest load - mean load) / mean load, over the experts, mean over layers."""
DEVICE_VIOLATION: Final = "routing/device_violation"
DROPPED_SHARE: Final = "routing/dropped_share"
"""Share of the (token, expert) assignments of a training batch that were dropped."""
DEAD_EXPERTS: Final = "routing/dead_experts"
"""Experts, over all layers, that no token of the last records reached (`research.training.health.DEAD_AFTER` of them)."""
BITS_PER_BYTE: Final = "validation/bits_per_byte"
"""Held-out text, all domains by bytes; per domain: `validation/bits_per_byte/<domain>`."""

# Final values (summary.json "metrics"), beside the last of each metric above.
KV_BYTES_PER_TOKEN: Final = "model/kv_cache_bytes_per_token"
TOTAL_PARAMETERS: Final = "model/total_parameters"
ACTIVATED_PARAMETERS: Final = "model/activated_parameters"
TRAIN_FLOPS_PER_TOKEN: Final = "model/train_flops_per_token"
CACHE_BITS_PER_BYTE: Final = "cache/bits_per_byte_at_{}_bits"
"""Held-out bits per byte out of a cache of so many bits per element, for each of `training.cache_bits`."""
CACHE_BYTES_PER_TOKEN: Final = "cache/bytes_per_token_at_{}_bits"
"""Of that cache as it is allocated, scales and offsets included."""


def cache_metrics(widths: Iterable[int]) -> list[str]:
    """The names of both for each width in bits."""
    return [name.format(bits) for bits in widths for name in (CACHE_BITS_PER_BYTE, CACHE_BYTES_PER_TOKEN)]


NGRAM_BITS_PER_BYTE: Final = "reference/order2_bits_per_byte"
"""Held-out bits per byte of an interpolated order-2 model (two tokens of context) of the same training tokens."""
DISPATCH_SECONDS: Final = "simulation/dispatch_seconds"
COMBINE_SECONDS: Final = "simulation/combine_seconds"
ALL_TO_ALL_SECONDS: Final = "simulation/all_to_all_seconds"
"""Dispatch and combine of one MoE layer, on the study's cluster, routed as the trained model routes."""
NVLINK_BYTES: Final = "simulation/nvlink_bytes"
INFINIBAND_BYTES: Final = "simulation/infiniband_bytes"

# Of runs on several workers (`resources.workers_per_trial`), over steps.
PARALLEL_BYTES: Final = "parallel/bytes_per_step"
"""Payload that left its worker: dispatch and combine of all layers, forward and backward, mean over the steps since the last record."""
PARALLEL_SECONDS: Final = "parallel/seconds_per_step"
"""Seconds that the average worker spent in collectives, not overlapped."""
RECEIVED_VIOLATION: Final = "parallel/received_violation"
"""(largest - mean) / mean of the dispatched tokens that the workers receive, mean over layers."""

# MLflow tags.  Experiment = the study's name; parent run = the study; child run = (variant, seed).
TAG_SCHEMA: Final = "moelab.schema"
TAG_STUDY: Final = "moelab.study"
TAG_QUESTION: Final = "moelab.question"
TAG_ROLE: Final = "moelab.role"
"""`study` for the parent run, `run` for a child, `retune` for a child that tries a learning rate."""
TAG_VARIANT: Final = "moelab.variant"
TAG_SEED: Final = "moelab.seed"
TAG_TRIAL: Final = "moelab.trial"
TAG_BASELINE: Final = "moelab.baseline"
TAG_STATE: Final = "moelab.state"
TAG_ATTEMPT: Final = "moelab.attempt"
TAG_REASON: Final = "moelab.reason"
TAG_COMMIT: Final = "moelab.commit"
TAG_CONFIG: Final = "moelab.config_id"
TAG_ROOT: Final = "moelab.study_root"
TAG_RUN: Final = "moelab.run"
TAG_FAILURE: Final = "moelab.failure"
"""Why a run failed, in a word; empty for one that did not."""
TAG_CHANGED: Final = "moelab.changed"
"""The names of the settings in which a run differs from the baseline, or `nothing`."""
TAG_PARAMETER: Final = "moelab.parameter."
"""Followed by the short name of a searched setting: its value, so that runs can be grouped by it."""
TAG_LEFT_OUT: Final = "moelab.metrics_left_out"
TAG_VERDICT: Final = "moelab.verdict"
"""Of the parent run: the report's verdict, one sentence of Markdown.  Whoever builds a report may write it; sweeps put it at the
head of the run's note (`mlflow.note.content`), keep it there whenever they write the note anew, and never change it."""
TAG_BEST_RUN: Final = "moelab.best_run"
TAG_BEST_MODEL: Final = "moelab.best_model"
"""Of the parent run, and of the run whose model it is: `models:/<id>`, as MLflow loads it."""
