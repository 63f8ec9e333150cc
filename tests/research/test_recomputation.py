"""Activation checkpointing changes memory and nothing else: same losses, routings, gradients and draws, to the bit."""

import dataclasses
import json

import pytest
import torch
from odd_models import random_model, small

from research.config import AttentionConfig
from research.configfile import load_run_config
from research.errors import ConfigError
from research.model.balance import balance_losses
from research.model.loss import chunked_language_loss
from research.training import records
from research.training.loop import train
from research.training.records import JsonlRecorder

GQA = AttentionConfig(kind="gqa", num_attention_heads=4, num_key_value_heads=2, qk_nope_head_dim=4, qk_rope_head_dim=6, v_head_dim=5)


def grouped():
    return dataclasses.replace(small(heads=4), attention=GQA)


def with_moe(config, **changes):
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


def shares_of(config):
    balance = dataclasses.replace(config.moe.balance, expert=0.1, device=0.2, communication=0.3)
    return with_moe(config, balance=balance)


MODELS = {
    "MLA": small(),
    "MLA, no query compression, tied": small(q=None, tied=True),
    "MLA, devices drop": with_moe(small(limit=2), capacity_factor=0.7),
    "GQA": grouped(),
    "GQA, experts drop": with_moe(grouped(), capacity_factor=0.7, capacity_of="expert"),
    "second expert by chance": with_moe(small(chosen=2), second_expert="by_chance", norm_topk_prob=True),
    "second expert by chance, with capacity": with_moe(grouped(), num_experts_per_tok=2, second_expert="by_chance", capacity_factor=0.8),
    "hashed": with_moe(small(), selection="hash"),
    "dense": dataclasses.replace(grouped(), moe=None),
}


def two_micro_batches(config, checkpointed):
    """Losses, gradients, kept assignments and the generator's end of two micro-batches with one generator, as the loop has it."""
    model = random_model(config)
    chance = torch.Generator().manual_seed(5)
    ids = torch.randint(config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(1))
    losses, kept = [], []
    for rows in ids.split(2):
        spared = torch.tensor([True, False])
        hidden, routings = model.hidden(rows[:, :-1], protected_B=spared, chance=chance, checkpointed=checkpointed)
        loss = chunked_language_loss(hidden, model.lm_head.weight, rows[:, 1:])
        for routing in routings.values():
            loss = loss + balance_losses(routing, config.moe, 2).weighted(config.moe.balance)
        loss.backward()
        losses.append(loss.detach())
        kept += [routing.kept_MK for routing in routings.values()]
    return losses, {name: p.grad for name, p in model.named_parameters()}, kept, chance.get_state()


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_the_same_to_the_bit(name):
    config = MODELS[name] if MODELS[name].moe is None else shares_of(MODELS[name])
    plain, checkpointed = two_micro_batches(config, False), two_micro_batches(config, True)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
    if "chance" in name or "drop" in name:
        assert not all(bool(kept.all()) for kept in plain[2])


def test_a_second_backward_draws_alike_again():
    config = with_moe(small(chosen=2), second_expert="by_chance", norm_topk_prob=True)
    model, ids = random_model(config), torch.arange(40).view(2, 20) % 41
    hidden, _ = model.hidden(ids, protected_B=torch.zeros(2, dtype=torch.bool), chance=torch.Generator().manual_seed(0), checkpointed=True)
    weights = list(model.layers.parameters())
    first = torch.autograd.grad(hidden.square().sum(), weights, retain_graph=True)
    second = torch.autograd.grad(hidden.square().sum(), weights)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_of_a_block_only_its_input_is_kept():
    """Bytes saved by autograd's graph, each storage once, for the blocks of a model; the weights are kept anyway."""

    def saved_bytes(checkpointed):
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address is used twice
            return x

        model = random_model(grouped())
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.hidden(torch.zeros(2, 32, dtype=torch.int64), checkpointed=checkpointed)
        return sum(s.nbytes() for address, s in storages.items() if address not in weights)

    assert saved_bytes(True) < saved_bytes(False) / 5


def test_the_loop_takes_it_from_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "own.txt"
    text.write_text("".join(f"the quick brown fox number {i * 7919 % 10007} jumps over {i * i % 97} lazy dogs\n" for i in range(500)))
    seen = {}
    for choice in ("none", "blocks"):
        config = load_run_config(
            {
                "model": {"preset": "gshard-nano", "vocab_size": 270},
                "data": {"corpus": "files", "paths": [str(text)], "tokenizer_vocab_size": 270, "sequence_length": 32},
                "training": {"train_tokens": 1024, "batch_size": 8, "micro_batch_size": 4, "record_every": 1, "validation_tokens": 64}
                | {"activation_checkpointing": choice},
            }
        )
        train(config, tmp_path / choice, JsonlRecorder(tmp_path / choice / "m.jsonl"), lambda record: False)
        lines = map(json.loads, (tmp_path / choice / "m.jsonl").read_text().splitlines())
        seen[choice] = [{k: v for k, v in line.items() if k != records.TOKENS_PER_SECOND} for line in lines]
    assert len(seen["none"]) == 4
    assert seen["none"] == seen["blocks"]


def test_another_choice_is_refused_with_the_valid_ones():
    with pytest.raises(ConfigError, match=r"training\.activation_checkpointing = 'all': input should be 'none' or 'blocks'"):
        load_run_config({"model": "deepseek-v2-nano", "training": {"train_tokens": 10, "activation_checkpointing": "all"}})
