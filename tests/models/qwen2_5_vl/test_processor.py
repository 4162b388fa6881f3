import dataclasses

import numpy as np
import pytest

from mmi_jax.layout import PADDING, TEXT, VISION
from models.assets.demo import CHAT_TEMPLATE
from models.huggingface.chat import Message
from models.huggingface.tokenizer import Tokenizer, read_end_tokens
from models.huggingface.train_tokenizer import train_tokenizer
from models.media.image import Image
from models.media.video import Video
from models.qwen2_5_vl.processing.pixels import PixelPatches
from models.qwen2_5_vl.processing.positions import TRANSFORMERS_4_57, TRANSFORMERS_5_23
from models.qwen2_5_vl.processing.preprocess import Preprocess, patchify
from models.qwen2_5_vl.processing.processor import Processor, expand_placeholders
from models.testing.random_checkpoint import random_checkpoint_config

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LIMITS = Preprocess(min_pixels=28 * 28, max_pixels=28 * 28 * 12)


@pytest.fixture(scope="module")
def processor() -> Processor:
    backend = train_tokenizer("what is in the video and in the image, what happens before and after")
    tokenizer = Tokenizer(backend=backend, chat_template=CHAT_TEMPLATE.read_text())
    return Processor(config=random_checkpoint_config(backend), tokenizer=tokenizer, image=LIMITS, video=LIMITS)


@pytest.fixture
def image(rng) -> Image:
    return Image(pixels=rng.integers(0, 256, (56, 84, 3), dtype=np.uint8))


@pytest.fixture
def video(rng) -> Video:
    return Video(frames=rng.integers(0, 256, (6, 28, 56, 3), dtype=np.uint8), fps=2.0)


@pytest.fixture
def odd_video(rng) -> Video:
    return Video(frames=rng.integers(0, 256, (3, 56, 56, 3), dtype=np.uint8), fps=1.0)


def written(prompt, processor, row=0):
    """The text of the tokens that are not padding, runs of one placeholder shortened to `placeholder x count`."""
    is_real = prompt.layout.modality[row] != PADDING
    text = processor.tokenizer.decode(prompt.tokens[row][is_real], skip_special_tokens=False)
    for name in ("<|image_pad|>", "<|video_pad|>"):
        for count in range(40, 0, -1):
            text = text.replace(f"<|vision_start|>{name * count}<|vision_end|>", f"({name[2:7]} x {count})")
    return text


def test_text_only(processor):
    prompt = processor(["what happens"])
    assert written(prompt, processor) == SYSTEM + "<|im_start|>user\nwhat happens<|im_end|>\n<|im_start|>assistant\n"
    num_tokens = prompt.tokens.shape[1]
    assert prompt.grids == ()
    assert prompt.patches.shape == (0, 1176)
    assert (prompt.layout.modality == TEXT).all()
    np.testing.assert_array_equal(prompt.rope_pos, np.broadcast_to(np.arange(num_tokens), (3, 1, num_tokens)))


def test_videos_and_images_with_text_between(processor, image, video, odd_video):
    prompt = processor(["before", video, "then", image, image, "and", odd_video, "after"], add_generation_prompt=False)
    assert written(prompt, processor) == (
        SYSTEM + "<|im_start|>user\nbefore(video x 6)then(image x 6)(image x 6)and(video x 8)after<|im_end|>\n"
    )
    assert prompt.grids == ((3, 2, 4), (1, 4, 6), (1, 4, 6), (2, 4, 4))
    pixels = (video.frames, image.pixels[None], image.pixels[None], odd_video.frames)
    np.testing.assert_array_equal(prompt.patches, np.concatenate([patchify(p, LIMITS)[0] for p in pixels]))


def test_layout_counts_videos_and_images_in_order(processor, image, video):
    layout = processor([image, "then", video]).layout
    is_vision = layout.modality[0] == VISION
    np.testing.assert_array_equal(layout.video[0][is_vision], [0] * 6 + [1] * 6)
    np.testing.assert_array_equal(layout.frame[0][is_vision], [0] * 6 + [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(layout.row[0][is_vision], [0, 0, 0, 1, 1, 1] + [0] * 6)
    np.testing.assert_array_equal(layout.column[0][is_vision], [0, 1, 2, 0, 1, 2] + [0, 1] * 3)


def time_steps(prompt):
    is_vision = prompt.layout.modality[0] == VISION
    time = prompt.rope_pos[0, 0][is_vision]
    return np.unique(time - time[0]).tolist()


@pytest.mark.parametrize(("fps", "expected"), [(2.0, [0, 2, 4]), (1.0, [0, 4, 8]), (4.0, [0, 1, 2]), (3.0, [0, 1, 2])])
def test_time_positions_follow_the_sampled_rate(processor, video, fps, expected):
    assert time_steps(processor([dataclasses.replace(video, fps=fps)])) == expected


def test_the_position_rule_is_passed_on(processor, video):
    fast = [dataclasses.replace(video, fps=4.0), "after"]
    old = dataclasses.replace(processor, rule=TRANSFORMERS_4_57)
    new = dataclasses.replace(processor, rule=TRANSFORMERS_5_23)
    assert time_steps(old(fast)) == [0]
    slow = [dataclasses.replace(video, fps=0.5), "after"]
    assert processor(slow).rope_pos.max() > new(slow).rope_pos.max()


def test_a_chat_of_several_turns(processor, image):
    chat = [
        Message(role="system", parts=("be brief",)),
        Message(parts=(image, "what")),
        Message(role="assistant", parts=("the image",)),
        Message(parts=("and before",)),
    ]
    assert written(processor(chat), processor) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n(image x 6)what<|im_end|>\n"
        "<|im_start|>assistant\nthe image<|im_end|>\n<|im_start|>user\nand before<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_batch_holds_each_prompt_padded_at_its_end(processor, image, video):
    prompts = (["what is in", video], ["happens"], [image, "what", video, "before and after the video"])
    batch = processor(*prompts)
    singles = [processor(prompt) for prompt in prompts]
    longest = max(single.tokens.shape[1] for single in singles)
    assert batch.tokens.shape == (3, longest)
    for row, single in enumerate(singles):
        end = single.tokens.shape[1]
        np.testing.assert_array_equal(batch.tokens[row, :end], single.tokens[0])
        np.testing.assert_array_equal(batch.rope_pos[:, row, :end], single.rope_pos[:, 0])
        for field in dataclasses.fields(batch.layout):
            ours = getattr(batch.layout, field.name)[row]
            np.testing.assert_array_equal(ours[:end], getattr(single.layout, field.name)[0])
            assert (ours[end:] == PADDING).all()
    np.testing.assert_array_equal(batch.patches, np.concatenate([single.patches for single in singles]))
    assert batch.grids == sum((single.grids for single in singles), ())


def test_frames_fitted_while_reading_give_the_same_prompt(processor, rng):
    large = Video(frames=rng.integers(0, 256, (4, 160, 200, 3), dtype=np.uint8), fps=2.0)
    fitted = dataclasses.replace(large, frames=np.stack([processor.fit_frame(f, 4) for f in large.frames]))
    assert fitted.frames.shape == (4, 84, 84, 3)
    np.testing.assert_array_equal(processor([fitted]).patches, processor([large]).patches)


def test_patches_cut_on_the_device_are_those_of_the_host(processor, image, odd_video):
    parts = ["first", image, "then", odd_video, "what happens?"]
    there, here = processor(parts, ["nothing"], cuts_on_device=True), processor(parts, ["nothing"])
    assert isinstance(there.patches, PixelPatches) and isinstance(here.patches, np.ndarray)
    np.testing.assert_array_equal(np.asarray(there.patches), here.patches)
    np.testing.assert_array_equal(there.tokens, here.tokens)
    assert processor(["what happens"], cuts_on_device=True).patches.shape == (0, 1176)


def test_pixels_are_capped_only_when_asked(processor, rng):
    wide = dataclasses.replace(processor, video=Preprocess(min_pixels=28 * 28, max_pixels=28 * 28 * 100_000))
    frame = rng.integers(0, 256, (280, 280, 3), dtype=np.uint8)
    assert wide.fit_frame(frame, 3200) is frame
    with pytest.warns(UserWarning, match="3200 frames have 115200 tokens in all"):
        assert dataclasses.replace(wide, cap_pixels_per_frame=True).fit_frame(frame, 3200).shape == (224, 224, 3)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
def test_placeholders_written_by_the_user(processor, video, token):
    with pytest.raises(ValueError, match="text must not contain the model's placeholders.*in 'what is "):
        processor([video, f"what is {token}?"])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "a batch must hold one prompt or more"),
        ([[]], "a prompt must hold text, an image or a video, got no part at all"),
        ([[" \n"]], r"a message must hold text, an image or a video, got \(' \\n',\) from 'user'"),
        (["what"], "a list of parts or messages, got the text 'what'"),
        ([["what", Message(parts=("is",))]], "parts or messages, not both: got 1 parts, 1 messages"),
    ],
)
def test_prompts_that_say_nothing(processor, prompts, message):
    with pytest.raises(ValueError, match=message):
        processor(*prompts)


@pytest.mark.parametrize("template", ["no placeholder", "<|image_pad|><|video_pad|>", "<|video_pad|><|video_pad|>"])
def test_a_template_that_loses_adds_or_swaps_placeholders(processor, image, video, template):
    broken = dataclasses.replace(processor, tokenizer=dataclasses.replace(processor.tokenizer, chat_template=template))
    with pytest.raises(ValueError, match="must write one placeholder for each image .* in order: expected="):
        broken([video, image])


def test_placeholders_expand_by_hand(processor, image, video):
    config = processor.config
    i, v, start, end = config.image_token, config.video_token, config.vision_start_token, config.vision_end_token
    tokens = np.array([1, start, i, end, 2, start, v, end], np.int32)
    expanded = expand_placeholders(tokens, [image, video], [(1, 2, 4), (3, 2, 2)], config)
    assert expanded.tolist() == [1, start, i, i, end, 2, start, v, v, v, end]


def test_a_model_whose_placeholders_the_tokenizer_does_not_know(processor):
    with pytest.raises(ValueError, match="the tokenizer has no id 100000"):
        dataclasses.replace(
            processor, config=dataclasses.replace(processor.config, vocab_size=200_000, image_token=100_000)
        )


def test_stop_tokens(processor, tmp_path):
    named = dataclasses.replace(processor.tokenizer, special_tokens={"eos_token": "<|im_end|>"})
    assert read_end_tokens(tmp_path, processor.tokenizer) == ()
    assert read_end_tokens(tmp_path, named) == (named.token_id("<|im_end|>"),)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert read_end_tokens(tmp_path, named) == (3, 5)


def test_an_opening_and_its_continuations_are_one_prompt(processor, video, odd_video, image):
    """The same tokens, patches and grids, and positions that count on from piece to piece."""
    whole = processor([video, odd_video, "what happens", image, "after"])
    pieces = [
        processor.opening([video]),
        processor.continuation([odd_video], closes=False),
        processor.continuation(["what happens", image, "after"]),
    ]
    np.testing.assert_array_equal(np.concatenate([p.tokens for p in pieces], axis=1), whole.tokens)
    np.testing.assert_array_equal(np.concatenate([p.patches for p in pieces]), whole.patches)
    assert sum((p.grids for p in pieces), ()) == whole.grids
    begin = next_pos = 0
    for piece in pieces:
        end = begin + piece.tokens.shape[1]
        np.testing.assert_array_equal(piece.rope_pos + next_pos, whole.rope_pos[:, :, begin:end])
        begin, next_pos = end, int(piece.rope_pos.max()) + 1 + next_pos


def test_a_second_question_goes_on_in_the_same_turn(processor, video):
    opening = processor.opening([Message(role="system", parts=("be brief",)), Message(parts=(video, "look:"))])
    question = processor.continuation(["what happens"])
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n(video x 6)look:"
    assert written(opening, processor) == text
    assert written(question, processor) == "what happens<|im_end|>\n<|im_start|>assistant\n"


def test_what_does_not_go_on_in_a_turn_is_refused(processor, no_shape_checks):
    with pytest.raises(ValueError, match="goes on with parts of a turn, not with messages"):
        processor.continuation([Message(parts=("what",))])
    constant = dataclasses.replace(processor.tokenizer, chat_template="{{ 'nothing' }}")
    with pytest.raises(ValueError, match="must write every text once: expected 1 marks, got 0"):
        dataclasses.replace(processor, tokenizer=constant).continuation(["what happens"])
