"""The model against Hugging Face's DeepseekV2ForCausalLM: same weights, same logits, same gradients; and folders there and back."""

import dataclasses
import importlib
import inspect
import itertools
import json
import math
import re
import textwrap
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM, modeling_rope_utils

from research.config import AttentionConfig, BalanceConfig, DataConfig, ModelConfig, MoEConfig, RunConfig, TrainingConfig, YarnConfig
from research.data.tokenizer import train_tokenizer
from research.errors import CheckpointError, ConfigError, UserError
from research.exchange import export_run, import_run, run_tokenizer
from research.model.attention import softmax_scale
from research.model.cache import Cache
from research.model.generation import generate
from research.model.huggingface import config_from_hf, config_to_hf, load_hf_state_dict, to_hf_state_dict
from research.model.layers import rotary_frequencies, rotary_table
from research.model.transformer import Transformer, language_loss
from research.presets import preset
from research.training.checkpoint import Resumed, load_model, save

reference = importlib.import_module("transformers.models.deepseek_v2.modeling_deepseek_v2")
YARN = YarnConfig(factor=6.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.707)


def small(*, q=9, limit=None, dense=1, shared=1, scaling=1.0, yarn=None, tied=False, vocab=41, **sizes):
    """Three layers of sizes that are no powers of two; `sizes` overrides them.

    Unpatched, the reference views slices as complex numbers where they lie: nope width and latent must be even there.
    """
    s = {"heads": 3, "head": 7, "latent": 10, "nope": 6, "rope": 8, "value": 5, "experts": 9, "devices": 3, "chosen": 3, "width": 7} | sizes
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=s["heads"] * s["head"],
        num_hidden_layers=3,
        intermediate_size=17,
        tie_word_embeddings=tied,
        attention=AttentionConfig(
            num_attention_heads=s["heads"],
            q_lora_rank=q,
            kv_lora_rank=s["latent"],
            qk_nope_head_dim=s["nope"],
            qk_rope_head_dim=s["rope"],
            v_head_dim=s["value"],
            rope_theta=100.0,
            yarn=yarn,
        ),
        moe=MoEConfig(
            n_routed_experts=s["experts"],
            num_experts_per_tok=s["chosen"],
            moe_intermediate_size=s["width"],
            n_shared_experts=shared,
            first_k_dense_replace=dense,
            routed_scaling_factor=scaling,
            expert_devices=s["devices"],
            device_limit=limit,
            balance=BalanceConfig(expert=0.001, device=0.0, communication=0.0),
        ),
    )


def random_model(config, dtype=torch.float32, seed=0):
    """Activations of order one whatever the sizes, logits somewhat less; gains away from 1; gates wide enough that no two experts tie.

    The experts' outputs are smaller, as a routed_scaling_factor of 16 is meant for 160 of them: over 9 it would make
    a few tokens so ill-conditioned that either implementation is 1e-5 away from its own float64 values.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                width = {"gate": 2.0, "lm_head": 0.5, "embed_tokens": 0.5, "experts": 0.35}.get(name.split(".")[-2], 1.0)
                parameter.copy_(noise * width / math.sqrt(parameter.shape[-1]))
    return model.to(dtype)


def its_twin(model):
    """The reference with the same weights.  Its eager experts know odd widths, as its grouped product does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # n_shared_experts 0: it builds a shared MLP of width 0
        twin = DeepseekV2ForCausalLM(DeepseekV2Config(**config_to_hf(model.config), experts_implementation="eager"))
    twin = twin.to(model.lm_head.weight.dtype)
    twin.load_state_dict(to_hf_state_dict(model), strict=True)
    return twin.train()


def gradients_under_its_names(model):
    shadow = Transformer(model.config).to(model.lm_head.weight.dtype)
    with torch.no_grad():
        for (_, to), (_, parameter) in zip(shadow.named_parameters(), model.named_parameters(), strict=True):
            to.copy_(parameter.grad)
    return to_hf_state_dict(shadow)


def largest_differences(config, dtype=torch.float32, seed=0, length=23):
    """(logits, absolute; gradients, relative norm of the worst parameter) between the two, on a batch of two sequences."""
    model = random_model(config, dtype, seed)
    twin = its_twin(model)
    ids = torch.randint(0, config.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(seed + 1))
    ours, theirs = model(ids[:, :-1]).logits, twin(ids[:, :-1], use_cache=False).logits
    assert ours.dtype == theirs.dtype == dtype
    assert 0.2 < float(theirs.detach().std()) < 2
    for logits in (ours, theirs):
        language_loss(logits, ids[:, 1:]).backward()
    mine = gradients_under_its_names(model)
    worst = 0.0
    for name, parameter in twin.named_parameters():
        if parameter.numel():
            scale = float(parameter.grad.norm())
            error = float((mine[name] - parameter.grad).norm())
            worst = max(worst, error / scale if scale else error)
    return float((ours - theirs).detach().abs().max()), worst


@contextmanager
def reference_in_float64():
    """The reference's own source with its casts to float32 lifted: they bound any comparison at 1e-7, and hide smaller mistakes.

    The parts that are turned are made contiguous besides, since the reference cannot view odd offsets as complex numbers.
    """
    rotary = reference.DeepseekV2RotaryEmbedding
    places = [(reference.DeepseekV2RMSNorm, "forward"), (reference.DeepseekV2TopkRouter, "forward"), (reference, "apply_rotary_emb")]
    places += [(rotary, "forward"), (rotary, "compute_default_rope_parameters")]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in places:
            patch.setattr(owner, name, lifted(inspect.getattr_static(owner, name), reference))
        patch.setitem(modeling_rope_utils.ROPE_INIT_FUNCTIONS, "yarn", lifted(modeling_rope_utils._compute_yarn_parameters, modeling_rope_utils))
        yield


def lifted(function, module):
    source = textwrap.dedent(inspect.getsource(function))
    source = re.sub(r"torch\.float(32)?\b", "torch.float64", source).replace(".float()", ".double().contiguous()")
    space = dict(vars(module))
    exec(source, space)
    return space[getattr(function, "__name__", None) or function.__func__.__name__]


GRID = list(itertools.product((None, 9), (None, 2), (0, 1, 2), (0, 1, 2), (1.0, 16.0), (None, YARN)))


@pytest.mark.parametrize("part", range(8))
def test_logits_and_gradients_are_the_reference_s(part):
    worst = []
    for q, limit, dense, shared, scaling, yarn in GRID[part::8]:
        logits, gradients = largest_differences(small(q=q, limit=limit, dense=dense, shared=shared, scaling=scaling, yarn=yarn), seed=part)
        assert logits <= 1e-5, (q, limit, dense, shared, scaling, yarn)
        assert gradients <= 1e-4, (q, limit, dense, shared, scaling, yarn)
        worst.append((logits, gradients))
    print("largest:", *(f"{max(column):.2e}" for column in zip(*worst, strict=True)))


@pytest.mark.parametrize("config", [small(tied=True), small(dense=3), small(tied=True, yarn=YARN, limit=1)])
def test_tied_and_dense_models_too(config):
    logits, gradients = largest_differences(config)
    assert logits <= 1e-5
    assert gradients <= 1e-4


@st.composite
def odd_models(draw):
    def whole(low, high):
        return draw(st.integers(low, high))

    devices, per_device = whole(1, 4), whole(1, 4)
    limit = draw(st.one_of(st.none(), st.integers(1, devices)))
    chosen = whole(1, per_device * (limit or devices))
    theirs = draw(st.booleans())
    yarn = YarnConfig(
        factor=draw(st.floats(1.0, 40.0)),
        original_max_position_embeddings=whole(8, 200),
        beta_fast=draw(st.floats(2.0, 32.0)),
        beta_slow=draw(st.floats(0.5, 2.0)),
        mscale=draw(st.floats(0.1, 2.0)),
        mscale_all_dim=draw(st.floats(0.1, 2.0)),
    )
    return small(
        q=draw(st.one_of(st.none(), st.integers(1, 11))),
        limit=limit,
        dense=whole(0, 2),
        shared=whole(0, 2),
        scaling=draw(st.sampled_from((1.0, 2.5, 16.0))),
        yarn=yarn if theirs else None,
        tied=draw(st.booleans()),
        heads=whole(1, 4),
        head=whole(3, 9),
        latent=whole(2, 13),
        nope=whole(0, 7),
        rope=2 * whole(1, 5),
        value=whole(1, 9),
        experts=devices * per_device,
        devices=devices,
        chosen=chosen,
        width=whole(1, 9),
    )


@settings(max_examples=30, deadline=None)
@given(config=odd_models(), seed=st.integers(0, 1000), length=st.integers(2, 37))
def test_with_the_casts_lifted_they_agree_to_float64(config, seed, length):
    assert config_from_hf(config_to_hf(config)) == config
    with reference_in_float64():
        logits, gradients = largest_differences(config, torch.float64, seed, length)
    assert logits <= 1e-10
    assert gradients <= 1e-9


YARNS = [
    (YarnConfig(factor=40.0), 64, 10000.0),
    (YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0), 64, 10000.0),
    (YARN, 8, 100.0),
    (YarnConfig(factor=2.5, original_max_position_embeddings=7, beta_fast=3.0, beta_slow=0.1, mscale=0.3, mscale_all_dim=1.3), 6, 50.0),
    (YarnConfig(factor=1.0, original_max_position_embeddings=4, mscale=0.5), 10, 500000.0),
]


@pytest.mark.parametrize(("yarn", "width", "theta"), YARNS)
def test_yarn_is_the_reference_s(yarn, width, theta):
    config = small(yarn=yarn, rope=width)
    mapping = config_to_hf(config) | {"rope_theta": theta}
    inverse, length = modeling_rope_utils._compute_yarn_parameters(DeepseekV2Config(**mapping))
    torch.testing.assert_close(rotary_frequencies(width, theta, yarn).float(), inverse, rtol=2e-6, atol=0)
    assert float(rotary_table(torch.arange(3), width, theta, torch.float64, yarn).abs()[0, 0]) == pytest.approx(length, rel=1e-12)
    plain = config.attention.qk_head_dim**-0.5
    assert softmax_scale(config.attention) == pytest.approx(reference.yarn_apply_mscale(mapping["rope_scaling"] | {"rope_type": "yarn"}, plain))


@pytest.mark.parametrize(("yarn", "width", "theta"), YARNS)
def test_yarn_is_its_formulas(yarn, width, theta):
    """Pair by pair: how far between `beta_fast` turns over the original length and `beta_slow` turns is it?"""

    def pair(turns):  # the i of turns = L theta^(-2i / R) / (2 pi)
        return math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta) * width / 2

    first, last = max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), width - 1)
    if first == last:
        last += 0.001
    wanted = []
    for i in range(width // 2):
        ramp = min(max((i - first) / (last - first), 0.0), 1.0)
        own = theta ** (-2 * i / width)
        wanted.append((1 - ramp) * own + ramp * own / yarn.factor)
    torch.testing.assert_close(rotary_frequencies(width, theta, yarn), torch.tensor(wanted, dtype=torch.float64), rtol=1e-13, atol=0)


def test_the_paper_s_numbers_of_yarn():
    """V2 section 3.1.4: sqrt(t) = 0.0707 ln s + 1, 1.2608 at s = 40."""
    assert round(YarnConfig(factor=40.0).logit_scale, 4) == 1.5896
    frequencies, plain = rotary_frequencies(64, 10000.0, YarnConfig(factor=40.0)), rotary_frequencies(64, 10000.0)
    assert torch.equal(frequencies[:11], plain[:11])
    torch.testing.assert_close(frequencies[23:] * 40, plain[23:], rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["mla", "mha", "gqa", "mqa"])
def test_with_yarn_prefill_then_decode_is_the_full_pass_in_every_kind(kind):
    base = small(yarn=YARN)
    a = AttentionConfig(
        kind=kind, num_attention_heads=4, num_key_value_heads=2, kv_lora_rank=7, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=5, yarn=YARN
    )
    config = ModelConfig(vocab_size=41, hidden_size=12, num_hidden_layers=2, intermediate_size=9, attention=a, moe=base.moe)
    model = random_model(config, torch.float64)
    ids = torch.randint(0, 41, (2, 19), generator=torch.Generator().manual_seed(1))
    cache = Cache.allocate(config, 2, 19, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        full = model(ids).logits
        pieces = torch.cat([model(piece, cache).logits for piece in ids.split((7, 1, 3, 8), 1)], 1)
    torch.testing.assert_close(pieces, full, atol=1e-12, rtol=1e-12)
    plain = AttentionConfig(kind=kind, num_attention_heads=4, num_key_value_heads=2, qk_nope_head_dim=3, qk_rope_head_dim=4)
    assert model.layers[0].self_attn.scale == pytest.approx(softmax_scale(plain) * (0.0707 * math.log(6) + 1) ** 2)


def test_decoding_is_the_reference_s_full_pass_with_yarn():
    model = random_model(small(yarn=YARN, limit=2))
    twin, prompt = its_twin(model).eval(), torch.tensor([[5, 3, 17, 29], [1, 2, 40, 0]])
    produced = torch.stack(list(generate(model, prompt, 9)), 1)
    said = twin.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False)
    assert torch.equal(said[:, 4:], produced)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("config", [small(), small(shared=0), small(tied=True), small(dense=3), small(q=None, shared=2)])
def test_weights_go_there_and_back(config, per_expert):
    model, again = random_model(config), random_model(config, seed=9)
    names = to_hf_state_dict(model, per_expert)
    assert any(".experts.0.gate_proj." in name for name in names) == (per_expert and config.moe.first_k_dense_replace < 3)
    load_hf_state_dict(again, names)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    # Published checkpoints hold nothing of what has no elements.
    load_hf_state_dict(random_model(config, seed=3), {name: tensor for name, tensor in names.items() if tensor.numel()})


def test_every_wrong_tensor_is_named_at_once_and_nothing_is_loaded():
    model, config = random_model(small()), small()
    names = dict(to_hf_state_dict(random_model(config, seed=5), per_expert=True))
    del names["model.layers.1.mlp.experts.4.up_proj.weight"]
    names["model.layers.2.mlp.experts.9.up_proj.weight"] = torch.zeros(7, 21)
    names["model.norm.weight"] = torch.zeros(20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_hf_state_dict(model, names)
    assert caught.value.problems == (
        "model.layers.1.mlp.experts.4.up_proj.weight: is missing, expected a tensor (7, 21)",
        "model.layers.2.mlp.experts.9.up_proj.weight: is surplus, this model has no such tensor",
        "model.norm.weight: has shape (20,), expected (21,)",
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tied = random_model(small(tied=True))
    with pytest.raises(CheckpointError, match=r"differs from model\.embed_tokens"):
        load_hf_state_dict(tied, to_hf_state_dict(random_model(small())))


PUBLISHED_ROPE = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v2-lite"])
def test_presets_are_what_the_published_files_say(name):
    config = preset(name)
    mapping = config_to_hf(config)
    assert (mapping["n_group"], mapping["topk_group"], mapping["topk_method"]) == (
        (8, 3, "group_limited_greedy") if name == "deepseek-v2" else (1, 1, "greedy")
    )
    read = config_from_hf(mapping | {"rope_scaling": PUBLISHED_ROPE})
    assert read.attention.yarn == YarnConfig(factor=40.0)
    saved = DeepseekV2Config(**(mapping | {"rope_scaling": PUBLISHED_ROPE})).to_diff_dict()
    assert "rope_scaling" not in saved
    assert config_from_hf(saved) == read
    assert read.moe.n_routed_experts == config.moe.n_routed_experts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc': expected 'greedy' or 'group_limited_greedy'"),
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid': expected 'softmax'"),
        ({"norm_topk_prob": True}, "norm_topk_prob = True: expected False"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': expected 'silu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2: expected 1"),
        ({"model_type": "deepseek_v3"}, "model_type = 'deepseek_v3': expected 'deepseek_v2'"),
        ({"n_group": 4}, "n_group = 4: expected a divisor of n_routed_experts (9)"),
        ({"topk_group": 4}, "topk_group = 4: expected an integer in 1..3"),
        ({"topk_group": None}, "topk_group = None: expected an integer in 1..3"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok = 7: expected at most 6"),
        ({"num_experts_per_tok": 10}, "num_experts_per_tok = 10: expected at most n_routed_experts (9)"),
        ({"hidden_size": 0}, "hidden_size = 0: expected an integer >= 1"),
        ({"vocab_size": "many"}, "vocab_size = 'many': expected an integer >= 1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7: expected an even width"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1: expected num_attention_heads (3)"),
        ({"aux_loss_alpha": -1}, "aux_loss_alpha = -1: expected a number >= 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': expected true or false"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type = 'linear': expected 'yarn' or 'default'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters: rope_type = 'llama3': expected 'yarn' or 'default'"),
        ({"rope_scaling": PUBLISHED_ROPE | {"factor": 0.5}}, "rope_scaling: factor = 0.5: expected a number >= 1"),
        ({"rope_scaling": PUBLISHED_ROPE | {"mscale_all_dim": 0}}, "mscale_all_dim both > 0, or neither"),
        ({"rope_scaling": PUBLISHED_ROPE | {"truncate": False}}, "rope_scaling: truncate = False: expected True"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn': expected a mapping or null"),
    ],
)
def test_what_the_model_cannot_be_is_named_with_key_value_and_what_is_valid(change, said):
    mapping = config_to_hf(small(limit=2))
    with pytest.raises(ConfigError) as caught:
        config_from_hf(mapping | change, "there/config.json")
    (problem,) = caught.value.problems
    assert problem.startswith("there/config.json: ")
    assert said in problem
    absent = {key: value for key, value in mapping.items() if key not in ("kv_lora_rank", "n_shared_experts")}
    with pytest.raises(ConfigError) as caught:
        config_from_hf(absent | change)
    assert len(caught.value.problems) == 3
    assert any("kv_lora_rank is missing" in problem for problem in caught.value.problems)


def test_what_the_architecture_cannot_say_is_refused():
    a = AttentionConfig(kind="mqa", num_attention_heads=4, yarn=YarnConfig(factor=4.0, mscale=0.5, mscale_all_dim=0.0))
    with pytest.raises(ConfigError) as caught:
        config_to_hf(ModelConfig(vocab_size=9, hidden_size=10, num_hidden_layers=1, intermediate_size=4, attention=a))
    assert [problem.split(" = ")[0] for problem in caught.value.problems] == ["attention.kind", "hidden_size", "attention.yarn: mscale"]


# --- folders ------------------------------------------------------------------------------------------------------

TEXT = "The quick brown fox, 1234 times.\n\ndef f(x):\n    return x\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer({"en": [TEXT * 3]}, 280, 1.0)


def saved_run(folder, tokenizer, model_config):
    config = RunConfig(model=model_config, data=DataConfig(tokenizer_vocab_size=280, sequence_length=48), training=TrainingConfig(train_tokens=1))
    model = random_model(config.model)
    save(folder / "checkpoint", model, torch.optim.AdamW(model.parameters()), config, Resumed(step=1, seconds=0.0, metrics={}, snapshots={}))
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize(
    "config", [small(vocab=283, yarn=YARN, limit=2), small(vocab=283, tied=True, shared=0, q=None), dataclasses.replace(small(vocab=283), moe=None)]
)
def test_export_is_loaded_by_transformers_and_imported_again(tmp_path, tokenizer, config):
    model = saved_run(tmp_path / "run", tokenizer, config)
    hf, again, ids = tmp_path / "hf", tmp_path / "again", torch.randint(0, 283, (2, 40), generator=torch.Generator().manual_seed(2))
    export_run(tmp_path / "run", hf)
    twin, info = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True, experts_implementation="eager")
    assert isinstance(twin, DeepseekV2ForCausalLM)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        wanted = model(ids).logits
        torch.testing.assert_close(twin(ids).logits, wanted, atol=1e-5, rtol=0)
    theirs = AutoTokenizer.from_pretrained(hf)
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT).ids
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert theirs.eos_token_id == twin.generation_config.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    import_run(hf, again)
    back, run = load_model(again)
    assert torch.equal(back(ids).logits, wanted)
    assert run_tokenizer(again, run).to_str() == run_tokenizer(again / "checkpoint", run).to_str() == tokenizer.to_str()
    export_run(again, tmp_path / "hf2")
    for file in hf.iterdir():
        assert file.read_bytes() == (tmp_path / "hf2" / file.name).read_bytes(), file.name
    twin.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    import_run(tmp_path / "shards", tmp_path / "third")
    assert torch.equal(load_model(tmp_path / "third")[0](ids).logits, wanted)
    with pytest.raises(CheckpointError, match=r"put the model's tokenizer\.json there"):
        run_tokenizer(tmp_path / "third", load_model(tmp_path / "third")[1])


def test_a_folder_is_made_whole_or_not_at_all(tmp_path, tokenizer):
    saved_run(tmp_path / "run", tokenizer, small(vocab=283))
    taken = tmp_path / "taken"
    taken.mkdir()
    export_run(tmp_path / "run", taken)  # an empty folder is as good as none
    for call in (lambda: export_run(tmp_path / "run", taken), lambda: import_run(taken, tmp_path / "run")):
        with pytest.raises(UserError, match="is there already and not an empty folder"):
            call()
    broken = json.loads((taken / "config.json").read_text())
    (taken / "config.json").write_text(json.dumps(broken | {"hidden_size": 24}))
    with pytest.raises(CheckpointError) as caught:
        import_run(taken, tmp_path / "new")
    assert len(caught.value.problems) > 10
    (taken / "config.json").write_text(json.dumps(broken | {"vocab_size": 100}))
    with pytest.raises(ConfigError, match=r"has 280 tokens, more than vocab_size \(100\)"):
        import_run(taken, tmp_path / "new")
    (taken / "config.json").write_text(json.dumps(broken))
    (taken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        import_run(taken, tmp_path / "new")
    (taken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        import_run(taken, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        import_run(tmp_path, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]
