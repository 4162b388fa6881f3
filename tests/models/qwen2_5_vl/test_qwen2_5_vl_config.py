import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
import qwen2_5_vl_golden as oracle
from flax import nnx

from models.qwen2_5_vl import PRESETS
from models.qwen2_5_vl.checkpoints.dialects import from_huggingface, read_config, to_huggingface
from models.qwen2_5_vl.checkpoints.weights import abstract_model

# Half the bytes of the published bfloat16 checkpoints.
PUBLISHED_PARAMETERS = {"3b": 3_754_622_976, "7b": 8_292_166_656, "32b": 33_452_718_336, "72b": 73_410_777_344}

# The config.json published with the 7B checkpoint, the fields that say something about the model.
PUBLISHED_7B = dict(
    architectures=["Qwen2_5_VLForConditionalGeneration"],
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    image_token_id=151655,
    video_token_id=151656,
    hidden_act="silu",
    hidden_size=3584,
    intermediate_size=18944,
    max_position_embeddings=128000,
    model_type="qwen2_5_vl",
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    sliding_window=32768,
    use_sliding_window=False,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    vision_config=dict(
        depth=32,
        hidden_act="silu",
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        in_chans=3,
        out_hidden_size=3584,
        patch_size=14,
        spatial_merge_size=2,
        spatial_patch_size=14,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        tokens_per_second=2,
        temporal_patch_size=2,
    ),
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
    vocab_size=152064,
)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    state = nnx.state(abstract_model(PRESETS[name]))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state)) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_the_flat_dialect(name):
    assert from_huggingface(json.loads(json.dumps(to_huggingface(PRESETS[name])))) == PRESETS[name]


def test_published_config_is_the_preset():
    assert from_huggingface(PUBLISHED_7B) == PRESETS["7b"]


def nested_fields(dialect: str) -> dict:
    """The golden config, written by transformers 5, and the same as transformers 4 or the hub would write it."""
    fields = json.loads((oracle.GOLDEN / "gqa7" / "config.json").read_text())
    if dialect == "transformers 5":
        return fields
    text = fields.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = dict(type="default", rope_type="default", mrope_section=rope["mrope_section"])
    del fields["vision_config"]["rope_parameters"]
    if dialect == "transformers 4":
        del fields["tie_word_embeddings"]
        return fields | dict(text_config=text)
    fields["vision_config"]["in_chans"] = fields["vision_config"].pop("in_channels")
    return text | fields


@pytest.mark.parametrize("dialect", ["transformers 4", "transformers 5", "hub"])
def test_all_dialects_say_the_same(dialect):
    config = from_huggingface(nested_fields(dialect))
    assert config == read_config(oracle.GOLDEN / "gqa7")
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.mrope_section) == (7, 1, 8, (1, 2, 1))


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_tied_embeddings_are_found_outside_and_inside(place):
    fields = nested_fields("transformers 4")
    (fields if place == "outside" else fields["text_config"])["tie_word_embeddings"] = True
    assert from_huggingface(fields).tie_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(model_type="qwen3_vl"), "model_type must be 'qwen2_5_vl', got 'qwen3_vl'"),
        (
            lambda f: f.pop("rope_scaling"),
            "unknown config dialect: expected rope_parameters, or .* got .*'hidden_size'",
        ),
        (
            lambda f: f.pop("num_key_value_heads"),
            "unknown config dialect: config.json lacks 'num_key_value_heads', got",
        ),
        (lambda f: f["vision_config"].pop("in_chans"), "lacks 'in_channels' or 'in_chans', got"),
        (lambda f: f.update(use_sliding_window=True), "does not have what config.json asks for: use_sliding_window"),
        (lambda f: f.update(quantization_config={}), "does not have .* quantization_config"),
        (lambda f: f.update(hidden_act="gelu"), "text activation 'gelu'"),
        (lambda f: f["rope_scaling"].update(type="yarn"), "rotary positions of type 'yarn'"),
    ],
)
def test_unknown_dialects_are_refused(change, message):
    fields = copy.deepcopy(PUBLISHED_7B)
    change(fields)
    with pytest.raises(ValueError, match=message):
        from_huggingface(fields)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=27), "must be a multiple of self.num_kv_heads=4"),
        (dict(mrope_section=(16, 24, 23)), "must sum to half the head dim"),
        (dict(embed_dim=3585), "vision tokens must be as wide as text"),
        (dict(video_token=151655), "special ids must differ"),
        (dict(image_token=152064), r"lie in \[0, self.vocab_size=152064\)"),
        (dict(num_layers=0), "num_layers must be positive, got 0"),
    ],
)
def test_configs_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["7b"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=15), "head dim must be a multiple of 4"),
        (dict(window_size=100), "a window must hold whole merged blocks"),
        (dict(full_attention_layers=(7, 32)), r"must lie in \[0, 32\), got \[32\]"),
    ],
)
def test_vision_configs_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["7b"].vision, **change)
