"""Reference data tests/models/golden: tiny random Qwen2.5-VL checkpoints with what transformers computes from them.

transformers is the oracle of the model tests. It needs torch, which the library does not, so this script runs in an
environment of its own and the tests read its files:

    python3.11 -m venv oracle
    oracle/bin/pip install torch==2.13.0 transformers==5.23.0 numpy pillow safetensors
    oracle/bin/python scripts/make_golden.py --out tests/models/golden

For every case it writes a directory that `save_pretrained` filled (config.json, safetensors) and `golden.safetensors`:

    tokens, mask         [b, t]      the batch as it was fed, padding included (mask 0)
    grids, seconds       [n, 3], [n] of every image and video, in order of appearance over the batch
    patches              [p, c]      of them all, in that order
    positions            [3, b, t]   rotary positions
    vision               [v, e]      output of the vision tower, one row per vision token, in that order
    q.L, k.L             [b, h, t, d] queries and keys of decoder layer L after rotation
    logits               [b, t, vocab]
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

IMAGE, VIDEO, START, END, PAD = 90, 91, 92, 93, 94

# One line per piece of a prompt: a number of text tokens, or ("image" | "video", grid in patches, seconds per frame).
CASES = {
    # Seven query heads on one kv head, untied, left padding, two shapes of frames, both ragged against 2 x 2 windows;
    # two images and two videos. Config of transformers 5, one file.
    "gqa7": dict(
        text=dict(hidden_size=56, num_attention_heads=7, num_key_value_heads=1, num_hidden_layers=3),
        sections=[1, 2, 1],
        head_dim=8,
        tied=False,
        padding="left",
        prompts=[
            [3, ("image", (1, 6, 10), 0.0), 2, ("video", (3, 4, 6), 0.5), 4],
            [1, ("video", (2, 6, 10), 2.0), 1, ("image", (1, 4, 4), 0.0), 3],
        ],
    ),
    # Heads wider than hidden / heads, tied, right padding, one prompt without vision, a video longer in time than wide
    # in space at a fractional interval. Config of the published checkpoints, sharded.
    "wide_heads": dict(
        text=dict(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2),
        sections=[2, 5, 1],
        head_dim=16,
        tied=True,
        padding="right",
        prompts=[
            [2, ("video", (7, 2, 4), 1.3), 5, ("video", (2, 6, 6), 1.0), 1],
            [9],
            [1, ("image", (1, 2, 6), 0.0), 1, ("image", (1, 10, 2), 0.0), 2],
        ],
    ),
}
SHARD_BYTES = {"gqa7": "1GB", "wide_heads": "60KB"}


def make_config(case: dict) -> Qwen2_5_VLConfig:
    """Three vision layers, the middle one whole-frame, windows of 2 x 2 tokens, and the case's decoder."""
    text = case["text"]
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=96,
            intermediate_size=40,
            rms_norm_eps=1e-6,
            max_position_embeddings=4096,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=case["sections"]),
            bos_token_id=None,
            eos_token_id=None,
            **text,
        ),
        vision_config=dict(
            depth=3,
            hidden_size=48,
            num_heads=3,
            intermediate_size=20,
            out_hidden_size=text["hidden_size"],
            patch_size=2,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=8,
            fullatt_block_indexes=[1],
            tokens_per_second=2,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=case["tied"],
    )


def widen_heads(model: Qwen2_5_VLForConditionalGeneration, head_dim: int) -> None:
    """Gives every decoder head `head_dim` dimensions, whatever hidden / heads is."""
    config = model.config.text_config
    config.head_dim = head_dim
    q_dim, kv_dim = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        attention.head_dim, attention.scaling = head_dim, head_dim**-0.5
        attention.q_proj = torch.nn.Linear(config.hidden_size, q_dim)
        attention.k_proj = torch.nn.Linear(config.hidden_size, kv_dim)
        attention.v_proj = torch.nn.Linear(config.hidden_size, kv_dim)
        attention.o_proj = torch.nn.Linear(q_dim, config.hidden_size, bias=False)
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq = rotary.compute_default_rope_parameters(config)[0]


def make_model(case: dict) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights of a size that lets every tensor matter: no zero bias, no norm of ones."""
    torch.manual_seed(7)
    model = Qwen2_5_VLForConditionalGeneration(make_config(case))
    if case["head_dim"] * case["text"]["num_attention_heads"] != case["text"]["hidden_size"]:
        widen_heads(model, case["head_dim"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter) + ("norm" in name or "ln_q" in name))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed_tokens" in name else fan_in**-0.5))
    model.set_attn_implementation("eager")
    return model.eval()


def make_prompt(pieces: list, rng: np.random.Generator) -> list[int]:
    """Token ids of one prompt, unpadded."""
    tokens: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += rng.integers(0, IMAGE, piece).tolist()
        else:
            kind, (frames, rows, columns), _ = piece
            placeholder = IMAGE if kind == "image" else VIDEO
            tokens += [START] + [placeholder] * (frames * rows * columns // 4) + [END]
    return tokens


def make_inputs(case: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The batch, its grids and its patches."""
    rows = [make_prompt(pieces, rng) for pieces in case["prompts"]]
    length = max(map(len, rows)) + 2
    tokens, mask = np.full((len(rows), length), PAD), np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if case["padding"] == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    media = [piece for pieces in case["prompts"] for piece in pieces if not isinstance(piece, int)]
    num_patches = sum(int(np.prod(grid)) for _, grid, _ in media)
    return dict(
        tokens=tokens,
        mask=mask,
        grids=np.array([grid for _, grid, _ in media]),
        seconds=np.array([seconds for _, _, seconds in media]),
        is_image=np.array([kind == "image" for kind, _, _ in media]),
        patches=rng.standard_normal((num_patches, 24)).astype(np.float32),
    )


def pick(inputs: dict, is_image: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grids of the images, or of the videos."""
    ends = np.cumsum(inputs["grids"].prod(axis=1))
    chosen = np.flatnonzero(inputs["is_image"] == is_image)
    pieces = np.split(inputs["patches"], ends[:-1])
    return torch.from_numpy(np.concatenate([pieces[i] for i in chosen])), torch.from_numpy(inputs["grids"][chosen])


def record(model: Qwen2_5_VLForConditionalGeneration, inputs: dict) -> dict[str, np.ndarray]:
    """One forward pass, with what the decoder's attention layers read and what the vision tower returned."""
    recorded: dict[str, torch.Tensor] = {}
    attend = modeling.eager_attention_forward

    def recording(module, query, key, *args, **kwargs):
        if isinstance(module, modeling.Qwen2_5_VLAttention):
            recorded[f"q.{module.layer_idx}"] = query
            recorded[f"k.{module.layer_idx}"] = key
        return attend(module, query, key, *args, **kwargs)

    towers: list[list[torch.Tensor]] = []
    hook = model.model.visual.register_forward_hook(
        lambda module, args, kwargs, output: towers.append(
            list(torch.split(output.pooler_output, (kwargs["grid_thw"].prod(-1) // 4).tolist()))
        ),
        with_kwargs=True,
    )
    tokens, mask = torch.from_numpy(inputs["tokens"]), torch.from_numpy(inputs["mask"])
    kinds = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    images, image_grids = pick(inputs, True)
    videos, video_grids = pick(inputs, False)
    seconds = torch.from_numpy(inputs["seconds"][~inputs["is_image"]]).float()
    grids = dict(image_grid_thw=image_grids, video_grid_thw=video_grids, second_per_grid_ts=seconds)
    positions, _ = model.model.get_rope_index(tokens, kinds, attention_mask=mask, **grids)
    modeling.eager_attention_forward = recording
    try:
        with torch.no_grad():
            logits = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                pixel_values=images,
                pixel_values_videos=videos,
                **grids,
            ).logits
    finally:
        modeling.eager_attention_forward = attend
        hook.remove()
    of_images, of_videos = map(iter, towers)
    vision = torch.cat([next(of_images if is_image else of_videos) for is_image in inputs["is_image"]])
    return {
        name: value.numpy()
        for name, value in (recorded | dict(positions=positions, vision=vision, logits=logits)).items()
    }


def flatten_config(path: Path) -> None:
    """Rewrites a config.json in the dialect of the published checkpoints."""
    fields = json.loads(path.read_text())
    text = fields.pop("text_config")
    rope = text.pop("rope_parameters")
    vision = fields["vision_config"]
    vision["in_chans"], vision["spatial_patch_size"] = vision.pop("in_channels"), vision["patch_size"]
    vision["model_type"] = "qwen2_5_vl"
    vision.pop("rope_parameters", None)
    text.pop("model_type")
    text |= dict(rope_theta=rope["rope_theta"], rope_scaling=dict(type="mrope", mrope_section=rope["mrope_section"]))
    path.write_text(json.dumps(text | fields, indent=2) + "\n")


def main() -> None:
    """Writes every case below `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    for name, case in CASES.items():
        shutil.rmtree(out / name, ignore_errors=True)
        model = make_model(case)
        inputs = make_inputs(case, np.random.default_rng(11))
        golden = {key: np.ascontiguousarray(value) for key, value in (inputs | record(model, inputs)).items()}
        model.save_pretrained(out / name, max_shard_size=SHARD_BYTES[name])
        (out / name / "generation_config.json").unlink(missing_ok=True)
        if case["head_dim"] * case["text"]["num_attention_heads"] != case["text"]["hidden_size"]:
            flatten_config(out / name / "config.json")
        save_file(golden, out / name / "golden.safetensors")
        total_bytes = sum(path.stat().st_size for path in (out / name).iterdir())
        print(f"{name}: {total_bytes} bytes, largest logit {np.abs(golden['logits']).max():.2f}")


if __name__ == "__main__":
    main()
