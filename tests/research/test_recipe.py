"""The recipe of V2 section 3.1.2: groups of the optimizer, clipping, precision, and a learning rate that transfers over width."""

import math

import pytest
import torch
from small_runs import config

from research.config import OptimizerConfig
from research.configfile import load_run_config
from research.data.prepare import prepare
from research.model.moe import Gate, MoE
from research.model.transformer import Transformer
from research.training import records
from research.training.health import Health
from research.training.loop import _make_batch, _optimizer_step, train
from research.training.optimizer import build_optimizer, set_learning_rate


def ids_of(data, settings, step):
    return torch.from_numpy(_make_batch(data, settings, torch.device("cpu"))(step))


def test_every_parameter_is_in_one_group_and_gains_are_not_decayed(text):
    settings = config(text, training={"optimizer": {"base_width": 8}})
    model = Transformer(settings.model)
    optimizer = build_optimizer(model, settings.training.optimizer)
    set_learning_rate(optimizer, settings, 4)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        assert (group["weight_decay"] == 0.0) == ("norm" in name), name
        scaled = not ("norm" in name or name == "embed_tokens.weight")
        assert group["lr"] == pytest.approx(0.01 * (8 / 32 if scaled else 1)), name


def test_one_step_is_adamw_of_clipped_gradients_as_written(text):
    """theta - rate (m / (1 - b1) / (sqrt(v / (1 - b2)) + eps) + decay theta), with gradients scaled to a norm of 1."""
    settings = config(text, training={"optimizer": {"learning_rate": 0.01, "warmup_steps": 0, "gradient_clip": 0.05}})
    data, o = prepare(settings.data), settings.training.optimizer
    before, after = (Transformer(settings.model).initialise(0) for _ in range(2))
    optimizer = build_optimizer(after, o)
    set_learning_rate(optimizer, settings, 1)
    found, _ = _optimizer_step(after, optimizer, settings, data, 1, ids_of(data, settings, 1), Health(), routing=False)
    assert found[records.GRADIENT_NORM] > 0.1, "clipping does something"
    gradients = {name: p.grad.double() for name, p in after.named_parameters()}
    assert math.sqrt(sum(float(g.square().sum()) for g in gradients.values())) == pytest.approx(0.05, rel=1e-4)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        g, theta = gradients[name], old.detach().double()
        mean, square = (1 - o.beta1) * g / (1 - o.beta1), (1 - o.beta2) * g.square() / (1 - o.beta2)
        decay = o.weight_decay * theta if theta.ndim > 1 else 0.0
        expected = theta - 0.01 * (mean / (square.sqrt() + o.epsilon) + decay)
        torch.testing.assert_close(new.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_bfloat16_keeps_weights_state_gate_and_softmax_in_float32(tmp_path, text):
    wide, narrow = (config(text, training={"precision": precision}) for precision in ("float32", "bfloat16"))
    seen = {"gate": set(), "scores": set(), "product": set()}

    def watch(settings):
        model = Transformer(settings.model).initialise(0)
        for module in model.modules():
            if isinstance(module, Gate):
                module.register_forward_hook(lambda _, __, out: seen["gate"].add(out.dtype))
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda _, __, out: seen["product"].add(out.dtype))
            if isinstance(module, MoE):
                module.register_forward_hook(lambda _, __, out: seen["scores"].add(out[1].scores_ME.dtype))
        optimizer = build_optimizer(model, settings.training.optimizer)
        set_learning_rate(optimizer, settings, 1)
        data = prepare(settings.data)
        found, _ = _optimizer_step(model, optimizer, settings, data, 1, ids_of(data, settings, 1), Health(), routing=True)
        state = {value.dtype for state in optimizer.state.values() for name, value in state.items() if name != "step"}
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == state == {torch.float32}
        return found

    exact, rounded = watch(wide), watch(narrow)
    assert seen == {"gate": {torch.float32}, "scores": {torch.float32}, "product": {torch.float32, torch.bfloat16}}
    assert 0 < abs(exact[records.LOSS] - rounded[records.LOSS]) < 0.02
    ends = [train(settings, tmp_path / settings.training.precision, Nothing(), lambda record: False).metrics for settings in (wide, narrow)]
    assert ends[0][records.BITS_PER_BYTE] == pytest.approx(ends[1][records.BITS_PER_BYTE], rel=0.02)


class Nothing:
    def record(self, record):
        pass


WIDTHS = (32, 96)
RATES = [0.03 * 10 ** (exponent / 2) for exponent in range(-3, 2)]
STEPS = 40


def family(width: int, optimizer: dict[str, float]):
    """One model at two widths: heads, latents and experts grow with the width; init is 0.006 sqrt(5120 / d)."""
    attention = {
        "num_attention_heads": width // 16,
        "q_lora_rank": width // 2,
        "kv_lora_rank": width // 2,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    moe = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": width // 2, "n_shared_experts": 1, "expert_devices": 4}
    sizes = {"vocab_size": 300, "hidden_size": width, "intermediate_size": 2 * width, "initializer_range": 0.006 * math.sqrt(5120 / width)}
    return load_run_config(
        {
            "model": {"preset": "deepseek-v2-nano", **sizes, "attention": attention, "moe": {**moe, "routed_scaling_factor": 1.0}},
            "data": {"corpus": "installed", "max_train_megabytes": 1, "tokenizer_vocab_size": 300, "sequence_length": 64},
            "training": {"train_tokens": STEPS * 8 * 64, "batch_size": 8, "optimizer": {"warmup_steps": 10, **optimizer}},
        }
    )


def loss_at_the_end(settings) -> float:
    """Mean loss of the last 20 steps, which see the same tokens whatever the model."""
    data, health, losses = prepare(settings.data), Health(), []
    model = Transformer(settings.model).initialise(settings.seed)
    optimizer = build_optimizer(model, settings.training.optimizer)
    for step in range(1, settings.steps + 1):
        set_learning_rate(optimizer, settings, step)
        losses.append(_optimizer_step(model, optimizer, settings, data, step, ids_of(data, settings, step), health, routing=False)[0][records.LOSS])
    return sum(losses[-20:]) / 20


@pytest.mark.slow
def test_the_best_rate_of_a_narrow_model_is_that_of_one_three_times_as_wide():
    torch.set_flush_denormal(True)
    found = {width: [loss_at_the_end(family(width, {"learning_rate": rate, "base_width": WIDTHS[0]})) for rate in RATES] for width in WIDTHS}
    best = {width: min(range(len(RATES)), key=losses.__getitem__) for width, losses in found.items()}
    assert abs(best[WIDTHS[0]] - best[WIDTHS[1]]) <= 1, found
    assert 0 < best[WIDTHS[0]] < len(RATES) - 1, f"the grid ends before the best: {found}"
    # Without the rule the narrow model's best rate costs the wide one more than the whole width gains.
    rate = RATES[best[WIDTHS[0]]]
    uniform = loss_at_the_end(family(WIDTHS[1], {"learning_rate": rate}))
    assert uniform > found[WIDTHS[1]][best[WIDTHS[0]]] + 0.1, (uniform, found)


def test_the_rule_changes_nothing_at_its_own_width(text):
    for base, scale in ((32, 1.0), (None, 1.0), (64, 2.0)):
        model = Transformer(config(text).model)
        assert build_optimizer(model, OptimizerConfig(base_width=base)).param_groups[0]["rate_scale"] == scale
