"""The streams of training are what the processor makes of the same script with its pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_same_up_to_order, model_terms
from flax import nnx

from mmi_jax.layout import VISION
from models.qwen2_5_vl.model import Qwen2_5_VL
from models.small.bank import draw, make_bank, patches
from models.small.config import (
    GRID_TOKENS,
    VOCAB_SIZE,
    colour_tokens,
    small_config,
    small_measure,
    small_processor,
    small_tokenizer,
)
from models.small.curriculum import training_script
from models.small.forward import Compute, _spread, row_logits
from models.small.stream import CAPTION, SILENT, stack_streams, stream
from models.tasks import TASKS, GeneratedHaystack, question_rows
from models.tasks.digits import digit_labels
from models.tasks.pictures import COLOURS
from models.tasks.script import DIGIT, pixels
from models.tasks.text import MATCHING_QUESTION

HAYSTACK = GeneratedHaystack()


def scripts():
    arguments = dict(num_tokens=1024, depth=0.4, seed=5, haystack=HAYSTACK, measure=small_measure())
    scripts_of_tasks = {name: task(**arguments) for name, task in TASKS.items()}
    return scripts_of_tasks | {f"training {i}": training_script(700, np.random.default_rng([7, i])) for i in range(3)}


@pytest.fixture(scope="module")
def bank():
    return make_bank()


@pytest.mark.parametrize("name", scripts())
def test_a_stream_is_the_processors_prompt(name, bank):
    script = scripts()[name]
    arrays = stream(script, small_processor())
    sample = script.render(HAYSTACK)
    prompt = small_processor()(sample.parts)
    np.testing.assert_array_equal(arrays.row.tokens, prompt.tokens[0])
    np.testing.assert_array_equal(arrays.row.rope_pos, prompt.rope_pos[:, 0])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), arrays.row.layout, prompt.layout)
    painted = patches(bank, jnp.asarray(arrays.frames), jnp.float32)
    # Divided by 255, less the mean, over the deviation.
    assert_same_up_to_order(
        painted.reshape(prompt.patches.shape), prompt.patches, terms=3
    )  # / 255, - mean, / deviation
    rows = question_rows(sample, small_processor())
    np.testing.assert_array_equal(arrays.rows[: len(rows)], rows)
    assert set(arrays.kind[len(rows) :].tolist()) <= {CAPTION, SILENT}
    tokenizer = small_tokenizer()
    answers = [tokenizer.token_id(q.choices[q.answer]) for q in script.questions]
    assert arrays.labels[: len(rows)].tolist() == answers


def test_the_device_paints_the_pixels_of_the_haystack(bank, rng):
    frames = np.concatenate([HAYSTACK.shots(40, rng), np.full((40, 2), -1, np.int32)], axis=1)
    frames[::3, 5:] = np.stack([rng.integers(-1, n, len(frames[::3])) for n in (16, len(digit_labels()))], axis=1)
    np.testing.assert_array_equal(draw(bank, jnp.asarray(frames)), pixels(frames, HAYSTACK))


@pytest.mark.slow
def test_padding_changes_no_logits(bank):
    config = small_config(num_layers=2, embed_dim=128, mlp_dim=64, num_heads=2, vision_dim=32)
    model = Qwen2_5_VL(config, rngs=nnx.Rngs(0))
    streams = [stream(training_script(384, np.random.default_rng([1, i])), small_processor()) for i in range(2)]
    compute = Compute(dtype="float32", attention="xla", remats=True)
    batches = [stack_streams(streams, num_tokens=n, num_rows=16) for n in (384, 448)]
    exact, padded = (row_logits(model, b, bank, compute) for b in batches)
    is_label = batches[0].weights > 0
    terms = model_terms(config, num_keys=448)
    assert_same_up_to_order(exact[is_label], padded[is_label], terms=terms)
    # The library's forward pass over the same prompt.
    script = training_script(384, np.random.default_rng([1, 0]))
    whole = model(small_processor()(script.render(HAYSTACK).parts))[0]
    count = is_label[0].sum()
    assert_same_up_to_order(exact[0, :count], whole[batches[0].rows[0, :count]], terms=terms)


def test_every_colour_digit_and_letter_is_one_token():
    tokenizer = small_tokenizer()
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert len(set(colour_tokens())) == len(COLOURS)
    assert all(len(tokenizer.encode(text)) == 1 for text in "0123456789ABCD")


def test_the_derivative_of_spreading_is_that_of_a_gather(rng):
    is_vision = jnp.asarray(rng.random((2, 9)) < 0.6)
    vision, weights = (jnp.asarray(rng.normal(size=(2, n, 3)), jnp.float32) for n in (8, 9))

    def spread(vision):
        return jnp.sum(jnp.where(is_vision[..., None], _spread(vision, is_vision), 0) * weights)

    def gather(vision):
        rank = jnp.clip(jnp.cumsum(is_vision, axis=1) - 1, 0, 7)
        return jnp.sum(
            jnp.where(is_vision[..., None], jnp.take_along_axis(vision, rank[..., None], axis=1), 0) * weights
        )

    assert_same_up_to_order(jax.grad(spread)(vision), jax.grad(gather)(vision), terms=9)


def of_kind(arrays, kind):
    return dict(
        zip(arrays.rows[arrays.kind == kind].tolist(), arrays.labels[arrays.kind == kind].tolist(), strict=True)
    )


def test_labels_say_what_is_shown_and_what_was_there_before():
    tokenizer = small_tokenizer()
    script = TASKS["matching_frames"](num_tokens=1024, depth=0.4, seed=5, haystack=HAYSTACK, measure=small_measure())
    arrays = stream(script, small_processor())
    captions, silent = (of_kind(arrays, kind) for kind in (CAPTION, SILENT))
    assert len(captions) == 8 and len(silent) == 4  # 8 pictures, of which 4 come again
    for row, question in zip(arrays.rows[:4], script.questions, strict=True):
        # Before the question stand its other tokens and the end of the video.
        place = int(row) - len(tokenizer.encode(MATCHING_QUESTION)) - 1
        assert tokenizer.token_text(silent[place]) == question.choices[question.answer]


def test_pictures_come_again_within_the_videos_of_the_training():
    num_again = 0
    for seed in range(4):
        script = training_script(4096, np.random.default_rng([8, seed]))
        arrays = stream(script, small_processor())
        vision = np.flatnonzero(np.asarray(arrays.row.layout.modality) == VISION)
        place = {int(token): number // GRID_TOKENS for number, token in enumerate(vision)}
        pairs = arrays.frames.reshape(-1, 2, 7)
        for row, label in of_kind(arrays, SILENT).items():
            picture = pairs[place[row], 0]
            assert picture[DIGIT] == -1
            before = pairs[: place[row], 0]
            (same,) = {int(x) for x in before[(before[:, :5] == picture[:5]).all(axis=1), DIGIT]} - {-1}
            assert small_tokenizer().token_text(label) == str(digit_labels()[same])
        num_again += (arrays.kind == SILENT).sum() - sum(part == MATCHING_QUESTION for part in script.parts)
    assert num_again > 8


def test_captions_say_which_option_is_right():
    tokenizer, options = small_tokenizer(), []
    for seed in range(4):
        arrays = stream(training_script(1024, np.random.default_rng([7, seed])), small_processor())
        text = [tokenizer.token_text(int(token)) for token in arrays.row.tokens]
        labels = [tokenizer.token_text(int(label)) for label in arrays.labels]
        # The digit of an option stands three tokens after its letter.
        answers = [
            (text[row - 3], label) for row, label in zip(arrays.rows, labels, strict=True) if text[row].isdigit()
        ]
        options += [(letter[-1], label) for letter, label in answers if label in "ABCD,"]
    assert len(options) >= 8 and all(label in (letter, ",") for letter, label in options)
    assert sum(label != "," for _, label in options) == len(options) // 4
