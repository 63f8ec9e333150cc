"""Named variants: whole alternatives as one dimension of a study."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from research.configfile import load_run_config
from research.errors import ConfigError
from research.presets import preset
from sweeps.space import cells
from sweeps.study import label, load_study
from sweeps.variants import laid_over, sets

StudyWriter = Callable[..., Path]
LATENT = "model.attention.kv_lora_rank"
VARIANTS: dict[str, Any] = {
    "as it is": {},
    "plain": {"model": {"preset": "dense-nano"}},
    "top 1": {"model": {"preset": "switch-nano", "moe": {"n_routed_experts": 32}}, "training": {"batch_size": 4}},
}


def told(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    return list(caught.value.problems)


def test_every_variant_is_the_base_with_its_own_values(study: StudyWriter) -> None:
    found = load_study(study(variants=VARIANTS, space={}, baseline={}, search={"sampler": "grid"}))
    assert [cell["variant"] for cell in cells(found)] == list(VARIANTS)
    configs = {cell["variant"]: found.run_config(cell, 3) for cell in cells(found)}
    base = load_run_config({**found.base, "seed": 3})
    assert configs["as it is"] == base
    plain, top = configs["plain"], configs["top 1"]
    assert plain.model.moe is None
    assert plain.training == base.training
    assert plain.data == base.data
    assert plain.model.vocab_size == base.model.vocab_size != preset("dense-nano").vocab_size  # what the base says beside its preset stays
    assert top.model.moe is not None
    assert (top.model.moe.n_routed_experts, top.model.moe.num_experts_per_tok) == (32, 1)
    assert (top.training.batch_size, top.seed) == (4, 3)
    assert label({"variant": "plain"}, found.baseline) == "plain"
    assert label({"variant": "as it is"}, found.baseline) == "baseline"


def test_a_variant_beside_another_dimension(study: StudyWriter) -> None:
    found = load_study(
        study(
            variants={"narrow": {"model": {"hidden_size": 64}}, "wide": {}},
            space={LATENT: [8, 16]},
            baseline={"variant": "wide", LATENT: 16},
            search={"sampler": "grid"},
        )
    )
    widths = {(c["variant"], c[LATENT]): found.run_config(c, 0).model for c in cells(found)}
    assert len(widths) == 4
    assert {key: (m.hidden_size == 64, m.attention.kv_lora_rank) for key, m in widths.items()} == {
        (name, latent): (name == "narrow", latent) for name in ("narrow", "wide") for latent in (8, 16)
    }


def test_every_mistake_in_the_variants_has_its_sentence(study: StudyWriter) -> None:
    found = told(
        study(
            variants={"a": {"model": {"preset": "dense-nanoo"}}, "b": {"training": {"batch": 3}}, "c": None, "d": {"seed": 1}, "": {}, "e": {}},
            space={"variant": ["a", "e", "f"]},
            baseline={"variant": "g"},
            search={"sampler": "grid"},
        )
    )
    expected = {
        "variants.a: model.preset = 'dense-nanoo'": "did you mean 'dense-nano'",
        "variants.b: training.batch": "unknown key",
        "variants.c = None": "expected a mapping",
        "variants.d.seed = 1": "seeds are the study's own",
        "variants.:": "printable",
        "space.variant = 'f'": "no such variant",
        "baseline.variant = 'g'": "outside space.variant",
    }
    for start, words in expected.items():
        assert any(start in line and words in line for line in found), (start, found)


def test_variants_are_needed_and_not_doubled(study: StudyWriter) -> None:
    assert any("the study has no variants" in line for line in told(study(space={"variant": ["a"]}, baseline={"variant": "a"})))
    doubled = told(study(variants={"a": {}, "b": {"model": {"attention": {"kv_lora_rank": 8}}}}, space={LATENT: [8, 16]}, baseline={LATENT: 16}))
    assert any(f"space.{LATENT}: is searched and set by variants" in line for line in doubled)


def test_a_variant_that_cannot_be_on_the_cluster_is_told_of_by_name(study: StudyWriter) -> None:
    found = told(study(variants={"a": {}, "odd": {"model": {"moe": {"device_limit": 9}}}}, space={}, baseline={}, search={"sampler": "grid"}))
    assert any("odd" in line and "device_limit=9" in line for line in found), found


def test_what_variants_set_is_known_by_path() -> None:
    assert laid_over({"model": "deepseek-v2-nano"}, {"model": "dense-nano"})["model"] == {"preset": "dense-nano"}
    assert laid_over({"model": {"preset": "x", "vocab_size": 3}}, {"model": "dense-nano"})["model"] == {"preset": "dense-nano", "vocab_size": 3}
    given = {"a": {}, "b": {"model": {"attention": {"kind": "mha"}}}}
    assert sets(given, "model.attention.kind")
    assert not sets(given, "model.attention.kv_lora_rank")
    assert not sets(given, "training.batch_size")
    assert sets({"a": {"model": {"preset": "dense-nano"}}}, "model.attention.kv_lora_rank")
    assert sets({"a": {"model": {"moe": None}}}, "model.moe.n_routed_experts")
