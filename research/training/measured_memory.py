"""The peak memory of a real training step: what `research.memory` predicts."""

import json
import os
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from research.config import ModelConfig, OptimizerConfig
from research.model.balance import balance_losses
from research.model.kernels.native import usable
from research.model.loss import chunked_language_loss
from research.model.transformer import Transformer
from research.training.optimizer import build_optimizer


def measured_step_bytes(
    config: ModelConfig,
    batch_size: int,
    sequence_length: int,
    *,
    micro_batch_size: int | None = None,
    checkpointed: bool = False,
    device: str = "cpu",
) -> int:
    """Bytes of tensors at the peak of one optimizer step on random tokens, weights and optimizer state included.

    Counted are all of the allocator's bytes: on a CPU those that the profiler reports, on a GPU `max_memory_allocated`.  What
    Python and its libraries take themselves (some hundred MB) and what an allocator holds back are not in it.
    """
    place = torch.device(device)
    model = Transformer(config).to(place).initialise(0)
    optimizer = build_optimizer(model, OptimizerConfig(warmup_steps=0))
    _step(model, optimizer, torch.zeros(1, 3, dtype=torch.int64, device=place), 1, checkpointed=checkpointed)  # the optimizer's state is made here
    optimizer.zero_grad(set_to_none=True)
    ids = torch.randint(config.vocab_size, (batch_size, sequence_length + 1), generator=torch.Generator().manual_seed(0)).to(place)
    size = micro_batch_size or batch_size
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        _step(model, optimizer, ids, size, checkpointed=checkpointed)
        return torch.cuda.max_memory_allocated(place)
    states = [x for state in optimizer.state.values() for x in state.values()]
    before = sum(x.nbytes for x in (*model.parameters(), *model.buffers(), *states, ids))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _step(model, optimizer, ids, size, checkpointed=checkpointed)
    return before + _peak(profiler)


def kernels_in_use() -> bool:
    """Whether this process trains with the compiled CPU kernels."""
    return usable(torch.empty(1))


def _step(model: Transformer, optimizer: torch.optim.AdamW, ids: torch.Tensor, size: int, *, checkpointed: bool) -> None:
    """One optimizer step as the training loop does it, with dropping and balance losses where the model has them."""
    moe, place = model.config.moe, ids.device
    chance = torch.Generator(place).manual_seed(0)
    for rows in ids.split(size):
        with torch.autocast(place.type, dtype=torch.bfloat16, enabled=place.type == "cuda"):
            spared = torch.zeros(len(rows), dtype=torch.bool, device=place)
            hidden, routings = model.hidden(rows[:, :-1], protected_B=spared, chance=chance, checkpointed=checkpointed)
            loss = chunked_language_loss(hidden, model.lm_head.weight, rows[:, 1:])
        for routing in routings.values():
            assert moe is not None
            loss = loss + balance_losses(routing, moe, len(rows)).weighted(moe.balance)
        (loss * (len(rows) / len(ids))).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _peak(profiler: profile) -> int:
    """The largest sum of what was allocated and freed so far, in the order of the events."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event["args"] for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return max(accumulate((change["Bytes"] for change in sorted(changes, key=lambda change: change["Ev Idx"])), initial=0))
