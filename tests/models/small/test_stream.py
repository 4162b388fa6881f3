"""The streams of training are what the processor makes of the same script with its pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.qwen2_5_vl.model import Qwen2_5_VL
from models.small.bank import draw, make_bank, patches
from models.small.config import VOCAB_SIZE, colour_tokens, small_config, small_measure, small_processor, small_tokenizer
from models.small.curriculum import training_script
from models.small.forward import Compute, row_logits
from models.small.stream import stack_streams, stream
from models.tasks import TASKS, GeneratedHaystack, question_rows
from models.tasks.pictures import COLOURS
from models.tasks.script import pixels

HAYSTACK = GeneratedHaystack()


def scripts():
    arguments = dict(num_tokens=1024, depth=0.4, seed=5, haystack=HAYSTACK, measure=small_measure())
    made = {name: task(**arguments) for name, task in TASKS.items()}
    return made | {f"training {i}": training_script(700, np.random.default_rng([7, i])) for i in range(3)}


@pytest.fixture(scope="module")
def bank():
    return make_bank()


@pytest.mark.parametrize("name", scripts())
def test_a_stream_is_the_processors_prompt(name, bank):
    script = scripts()[name]
    made = stream(script, small_processor())
    sample = script.render(HAYSTACK)
    prompt = small_processor()(sample.parts)
    np.testing.assert_array_equal(made.row.tokens, prompt.tokens[0])
    np.testing.assert_array_equal(made.row.rope_pos, prompt.rope_pos[:, 0])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), made.row.layout, prompt.layout)
    painted = patches(bank, jnp.asarray(made.frames), jnp.float32)
    np.testing.assert_allclose(painted.reshape(prompt.patches.shape), prompt.patches, atol=2e-6)
    rows = question_rows(sample, small_processor())
    np.testing.assert_array_equal(made.rows[made.is_question], rows)
    tokenizer = small_tokenizer()
    answers = [tokenizer.token_id(q.choices[q.answer]) for q in script.questions]
    assert made.labels[made.is_question].tolist() == answers


def test_the_device_paints_the_pixels_of_the_haystack(bank, rng):
    frames = np.concatenate([HAYSTACK.shots(40, rng), np.full((40, 3), -1, np.int32)], axis=1)
    frames[::3, 5:] = np.stack([rng.integers(-1, n, len(frames[::3])) for n in (10, 10, 1797)], axis=1)
    np.testing.assert_array_equal(draw(bank, jnp.asarray(frames)), pixels(frames, HAYSTACK))


def test_padding_changes_no_logits(bank):
    config = small_config(num_layers=2, embed_dim=128, mlp_dim=64, num_heads=2, vision_dim=32)
    model = Qwen2_5_VL(config, rngs=nnx.Rngs(0))
    streams = [stream(training_script(384, np.random.default_rng([1, i])), small_processor()) for i in range(2)]
    compute = Compute(dtype="float32", attention="xla", remats=True)
    batches = [stack_streams(streams, num_tokens=n, num_rows=16) for n in (384, 448)]
    exact, padded = (row_logits(model, b, bank, compute) for b in batches)
    is_label = batches[0].weights > 0
    np.testing.assert_allclose(exact[is_label], padded[is_label], atol=1e-4)
    # The library's own forward pass over the same prompt.
    script = training_script(384, np.random.default_rng([1, 0]))
    whole = model(small_processor()(script.render(HAYSTACK).parts))[0]
    count = is_label[0].sum()
    np.testing.assert_allclose(exact[0, :count], whole[batches[0].rows[0, :count]], atol=1e-4)


def test_every_colour_digit_and_letter_is_one_token():
    tokenizer = small_tokenizer()
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert len(set(colour_tokens())) == len(COLOURS)
    assert all(len(tokenizer.encode(text)) == 1 for text in "0123456789ABCD")
