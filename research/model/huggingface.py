"""The same model under the names of Hugging Face `transformers` (DeepseekV2ForCausalLM, 5.23): configuration and weights.

Two spellings of the routed experts exist: published checkpoints hold one matrix per expert and
projection (`experts.K.gate_proj.weight`), a model in memory the two fused tensors that this project
has too.  Reading takes either, writing either on request.  Nothing here imports `transformers`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from research.errors import CheckpointError
from research.model.huggingface_config import config_from_hf, config_to_hf
from research.model.moe import MoE
from research.model.transformer import Transformer

__all__ = ["config_from_hf", "config_to_hf", "load_hf_state_dict", "to_hf_state_dict"]


def to_hf_state_dict(model: Transformer, per_expert: bool = False) -> dict[str, Tensor]:
    """The weights under the names of transformers; the tensors share the model's memory, as those of `state_dict` do.

    By default with fused experts, for `load_state_dict` of a DeepseekV2ForCausalLM; with `per_expert` as in
    published checkpoints, where a tied `lm_head.weight` is left out too.
    """
    names = _views(model, lambda layer: not per_expert)
    if per_expert and model.config.tie_word_embeddings:
        del names["lm_head.weight"]
    return names


def load_hf_state_dict(model: Transformer, state_dict: Mapping[str, Tensor]) -> None:
    """Fill `model` from weights under the names of transformers, with fused or per-expert routed experts.

    Values are converted to the model's precision.  CheckpointError lists every key that is missing, surplus or
    of another shape, and then nothing is loaded.  A tied `lm_head.weight` may be absent, but not differ from the
    embedding; so may the empty shared experts that transformers builds for n_shared_experts 0.
    """
    check_hf_state_dict(model, state_dict)
    with torch.no_grad():
        for key, view in _wanted(model, state_dict).items():
            if key in state_dict:
                view.copy_(state_dict[key])


def _wanted(model: Transformer, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _views(model, lambda layer: any(f"model.layers.{layer}.mlp.experts.{name}" in state_dict for name in ("gate_up_proj", "down_proj")))


def check_hf_state_dict(model: Transformer, state_dict: Mapping[str, Tensor]) -> None:
    """CheckpointError as `load_hf_state_dict`; `model` may be on the meta device, so that nothing is allocated for weights that do not fit."""
    wanted = _wanted(model, state_dict)
    tied = model.config.tie_word_embeddings
    optional = {key for key, view in wanted.items() if view.numel() == 0} | ({"lm_head.weight"} if tied else set())
    problems = [f"{key}: is missing, expected a tensor {tuple(wanted[key].shape)}" for key in wanted if key not in state_dict and key not in optional]
    problems += [f"{key}: is surplus, this model has no such tensor" for key in state_dict if key not in wanted]
    problems += [f"{key}: {why}" for key, view in wanted.items() if key in state_dict and (why := _not_loadable(state_dict[key], view.shape))]
    head, embedding = state_dict.get("lm_head.weight"), state_dict.get("model.embed_tokens.weight")
    if tied and not problems and head is not None and embedding is not None and not torch.equal(head, embedding):
        problems.append("lm_head.weight: differs from model.embed_tokens.weight, though tie_word_embeddings is true")
    if problems:
        raise CheckpointError(*problems)


def _not_loadable(value: object, shape: torch.Size) -> str | None:
    """Why a value cannot become a weight of `shape`, found out before any is written."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, expected a tensor"
    if value.shape != shape:
        return f"has shape {tuple(value.shape)}, expected {tuple(shape)}"
    if value.layout != torch.strided or value.device.type == "meta":
        return f"is a {'meta' if value.device.type == 'meta' else 'sparse'} tensor, which holds no such values"
    return None if value.is_floating_point() else f"is of {value.dtype}, expected floating-point numbers"


def _views(model: Transformer, fused: Callable[[int], bool]) -> dict[str, Tensor]:
    """Each name of transformers and the part of the model's memory that it names.

    `fused(layer)` chooses the spelling of that layer's routed experts.  For n_shared_experts 0 transformers has
    matrices without elements; they are made for its sake.
    """
    views = {key if key.startswith("lm_head.") else f"model.{key}": tensor.detach() for key, tensor in model.state_dict().items()}
    for index, block in enumerate(model.layers):
        if not isinstance(block.mlp, MoE):
            continue
        prefix, width = f"model.layers.{index}.mlp", block.mlp.config.moe_intermediate_size
        if not fused(index):
            gate_up, down = (views.pop(f"{prefix}.experts.{name}") for name in ("gate_up_proj", "down_proj"))
            for expert in range(gate_up.shape[0]):
                views[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate_up[expert, :width]
                views[f"{prefix}.experts.{expert}.up_proj.weight"] = gate_up[expert, width:]
                views[f"{prefix}.experts.{expert}.down_proj.weight"] = down[expert]
        if block.mlp.shared_experts is None:
            size = model.config.hidden_size
            for name, shape in (("gate_proj", (0, size)), ("up_proj", (0, size)), ("down_proj", (size, 0))):
                views[f"{prefix}.shared_experts.{name}.weight"] = model.norm.weight.new_empty(shape).detach()
    return views
