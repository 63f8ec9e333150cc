"""The three balance losses of V2 section 2.2.3, per sequence or batch, as sums without their alphas.

Each is sum_i f_i P_i with f a frequency (no gradient) and P a mean affinity (the only way gradient
reaches the gate); under perfect balance each equals 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from research.config import BalanceConfig, MoEConfig
from research.model.router import Routing
from research.parallel.world import ALONE, World


class BalanceLosses(NamedTuple):
    """Means over the sequences of a batch; scalars."""

    expert: Tensor
    device: Tensor
    communication: Tensor

    def weighted(self, alphas: BalanceConfig) -> Tensor:
        """alpha_1 L_expert + alpha_2 L_device + alpha_3 L_communication."""
        return alphas.expert * self.expert + alphas.device * self.device + alphas.communication * self.communication


def balance_losses(routing: Routing, config: MoEConfig, sequences: int, world: World = ALONE) -> BalanceLosses:
    """Equations 23 to 31 for a batch of `sequences` equally long sequences whose tokens follow each other.

    With `balance.scope: batch` the whole batch is taken as one sequence: for K = 1 the loss of the Switch
    Transformer, and with `count_first_choice_only` GShard's.  Dropped assignments count: the losses act
    on what the gate asked for.  Without a device limit, M in the communication loss is D, the limit that
    restricts nothing.

    With several workers the mean of their losses is the loss of all tokens: frequencies of a batch are taken over all of them.
    """
    experts, devices = config.n_routed_experts, config.expert_devices
    if config.balance.scope == "batch":
        sequences = 1
    ids_BTK = routing.expert_ids_MK.unflatten(0, (sequences, -1))
    length, dtype = ids_BTK.shape[1], routing.scores_ME.dtype
    counted = ids_BTK[..., :1] if config.balance.count_first_choice_only else ids_BTK
    chosen = counted.shape[-1]
    counts_BE = torch.zeros(sequences, experts, dtype=dtype, device=ids_BTK.device).scatter_add_(
        1, counted.flatten(1), torch.ones((), dtype=dtype, device=ids_BTK.device).expand(sequences, length * chosen)
    )
    whole = config.balance.scope == "batch"
    f_BE = counts_BE * (experts / (chosen * length))
    f_BE = world.mean(f_BE, "the balance loss") if whole else f_BE
    p_BE = routing.scores_ME.unflatten(0, (sequences, length)).mean(1)
    p_BG = p_BE.unflatten(1, (devices, -1)).sum(-1)
    f_device_BG = f_BE.unflatten(1, (devices, -1)).mean(-1)
    limit = config.device_limit if config.device_limit is not None else devices
    sent_BG = devices_reached(ids_BTK, config).sum(1)
    f_sent_BG = sent_BG * (devices / (limit * length))
    f_sent_BG = world.mean(f_sent_BG, "the balance loss") if whole else f_sent_BG
    return BalanceLosses((f_BE * p_BE).sum(1).mean(), (f_device_BG * p_BG).sum(1).mean(), (f_sent_BG * p_BG).sum(1).mean())


def devices_reached(expert_ids: Tensor, config: MoEConfig) -> Tensor:
    """float32 (..., G): 1 where a token with experts (..., K) is sent to the device."""
    reached = torch.zeros(*expert_ids.shape[:-1], config.expert_devices, device=expert_ids.device)
    return reached.scatter_(-1, expert_ids // config.experts_per_device, 1.0)
