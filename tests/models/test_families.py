"""Families of models: one call loads any of them, and no other code names one."""

import json
import re
from pathlib import Path

import pytest

import models
from models.assets.demo import DEMO_MODEL
from models.families import FAMILIES, family
from models.interface import Model, ModelConfig, Processor, VisionTower

ROOT = Path(__file__).parents[2]
NAMED_IN = (
    "models/qwen2_5_vl/",
    "models/families.py",
    "models/testing",  # tiny models
    "models/small/config.py",  # the sizes of a model of that family
    "scripts/make_golden",
    "tests/",
)
"""Where a family may be named: its folder, the registry, and what defines a model of it."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_named_only_where_models_of_it_are_defined(name):
    code = [path for folder in ("pallas_kernels", "mmi_jax", "models", "scripts", "gpu_scripts", "tpu_scripts")
            for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    naming = [path.relative_to(ROOT).as_posix() for path in code if re.search(name, path.read_text(), re.IGNORECASE)]
    assert f"models/{name}/family.py" in naming
    assert not [path for path in naming if not path.startswith(NAMED_IN)]


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_know_their_family(name):
    assert family(name).model_type == name and family(name).presets
    for preset, config in family(name).presets.items():
        assert isinstance(config, ModelConfig) and models.family_of(config) is family(name)
        assert models.presets()[preset] is config


def test_a_checkpoint_gives_its_model_and_processor():
    model, processor = models.load(DEMO_MODEL, dtype="float32")
    assert isinstance(model, Model) and isinstance(model.vision, VisionTower) and isinstance(processor, Processor)
    assert model.config == models.open_checkpoint(DEMO_MODEL).config and model.dtype == "float32"
    assert processor(["Which digit?"]).tokens.max() < model.config.vocab_size and processor.end_tokens


def test_an_unknown_model_type_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "elephant"}))
    with pytest.raises(ValueError, match="model_type must be one of 'qwen2_5_vl', got 'elephant'"):
        models.load(tmp_path)
