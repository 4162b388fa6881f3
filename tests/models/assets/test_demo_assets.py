import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmi_jax.layout import VISION
from models.assets.demo import DEMO_ANSWERS, DEMO_FPS, DEMO_TEXT, DEMO_VIDEO
from models.huggingface.train_tokenizer import train_tokenizer
from models.media.video import read_video
from models.qwen2_5_vl.checkpoints.weights import load
from models.qwen2_5_vl.processing import processor_files
from models.qwen2_5_vl.processing.processor import Processor
from models.tasks.pictures import COLOURS
from models.testing.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "model"
    write_random_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def prompt(directory):
    processor = Processor.from_directory(directory)
    video = read_video(DEMO_VIDEO, fps=1.0, resize=processor.fit_frame)
    return processor(["Look at this.", video, "What happens in this video?"])


def test_the_video_fits_the_repository_and_the_model():
    video = read_video(DEMO_VIDEO, fps=float(DEMO_FPS))
    assert video.frames.shape == (288, 112, 112, 3)
    assert (video.fps, video.seconds) == (4.0, 72.0)
    assert DEMO_VIDEO.stat().st_size < 200_000


def test_the_video_shows_every_card_for_a_second():
    frames = read_video(DEMO_VIDEO, fps=float(DEMO_FPS)).frames[:, 2:10, 2:-2].astype(np.float32)
    spread, mean = frames.std(axis=(1, 2)).max(axis=1), frames.mean(axis=(1, 2))
    for colour in DEMO_ANSWERS:
        is_shown = (np.abs(mean - np.array(COLOURS[colour])).max(axis=1) < 12) & (spread < 12)
        assert is_shown.sum() == DEMO_FPS and np.flatnonzero(is_shown)[0] % 2 == 0


def test_the_video_moves_and_cuts():
    frames = read_video(DEMO_VIDEO, fps=float(DEMO_FPS)).frames.astype(np.float32)
    change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    # Six shots of 48 frames, and two cuts around each of four cards.
    cuts = [47, 95, 143, 191, 239, *(place + side for place in (22, 96, 170, 244) for side in (-1, 3))]
    assert sorted(np.argsort(change)[-len(set(cuts)) :]) == sorted(set(cuts))


def test_the_prompt_has_2000_vision_tokens_or_more(prompt):
    assert (prompt.layout.modality == VISION).sum() == 36 * 64
    assert prompt.grids == ((36, 16, 16),)
    assert prompt.patches.shape == (36 * 16 * 16, 1176)


def test_the_model_loads_and_attends_by_place_in_one_head_and_by_row_in_the_next(directory, prompt):
    model = load(directory, dtype=jnp.float32)
    layer = nnx.merge(*_first_layer(model))
    inputs = {}

    def attend(q, k, v):
        inputs["q"], inputs["k"] = q[0], k[0]
        return jnp.zeros_like(q), None

    layer(model.embed(prompt), model.rotary(prompt.rope_pos), attend)
    vision = np.flatnonzero(prompt.layout.modality[0] == VISION)
    q, k = np.asarray(inputs["q"])[vision[-64:]], np.asarray(inputs["k"])[vision]
    row, column = prompt.layout.row[0][vision], prompt.layout.column[0][vision]
    is_near_row = np.abs(row[-64:, None] - row) <= 1
    is_near = is_near_row & (np.abs(column[-64:, None] - column) <= 1)

    def attention_mass(head, where):
        scores = q[:, head] @ k[:, 0].T / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return float(((weights * where).sum(axis=1) / weights.sum(axis=1)).mean())

    # A uniform head gives 12 % and 34 %.
    assert attention_mass(1, is_near) > 0.9
    assert attention_mass(2, is_near_row) > 0.9
    assert attention_mass(2, is_near) < 0.6
    assert attention_mass(0, is_near_row) < 0.6


def _first_layer(model):
    graphdef, state = nnx.split(model.layers)
    return graphdef, nnx.map_state(lambda _, leaf: leaf[0], state)


def test_the_same_seed_gives_the_same_files_and_another_seed_other_weights(directory, tmp_path):
    write_random_checkpoint(tmp_path / "again")
    write_random_checkpoint(tmp_path / "other", seed=1)
    names = sorted(path.name for path in directory.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    same, other = (
        {n: (tmp_path / d / n).read_bytes() == (directory / n).read_bytes() for n in names} for d in ("again", "other")
    )
    assert all(same.values())
    assert [name for name, is_same in other.items() if not is_same] == ["model.safetensors"]


def test_the_tokenizer_keeps_digits_apart_and_uses_its_whole_vocabulary(directory):
    processor = Processor.from_directory(directory)
    assert len(processor.tokenizer.encode("2026")) == 4
    assert processor.tokenizer.vocab_size == processor.config.vocab_size == 640
    question = "What happens in this video?"
    assert len(processor.tokenizer.encode(question)) < len(question) / 2
    im_end, end = (processor.tokenizer.token_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert processor.end_tokens == tuple(sorted((im_end, end)))


def test_training_the_tokenizer_is_deterministic():
    text = DEMO_TEXT.read_text()
    assert train_tokenizer(text).to_str() == train_tokenizer(text).to_str()


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(processor):
        raise OSError("disk full")

    monkeypatch.setattr(processor_files, "_settings", fail)
    with pytest.raises(OSError, match="disk full"):
        write_random_checkpoint(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_settings_are_those_of_a_checkpoint(directory):
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl"
    assert config["video_token_id"] == Processor.from_directory(directory).tokenizer.token_id("<|video_pad|>")
