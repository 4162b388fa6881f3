"""prepare: after it a prefill of a prepared length compiles nothing."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import numpy as np
import pytest

from mmi_jax import prefill, prepare
from mmi_jax.bench.soak import counted_compilations
from mmi_jax.engine.memory import memory_check
from mmi_jax.engine.memory.memory_check import DeviceMemory, DoesNotFitError
from mmi_jax.engine.programs import compilation
from mmi_jax.engine.programs.compilation import num_compiled_programs
from mmi_jax.engine.programs.program_cache import ProgramCache
from mmi_jax.engine.prompts import fit_prompt
from mmi_jax.engine.settings.options import PrefillOptions
from mmi_jax.engine.settings.request import request_for
from mmi_jax.engine.warmup import _of_bucket
from models.testing import BLOCKS, BUCKETS, STATIC, TINY_CONFIG, prompt, tiny_model

SIZES: dict[str, Any] = dict(buckets=BUCKETS, blocks=BLOCKS)


def test_a_prefill_of_a_prepared_length_compiles_nothing():
    short, long = prompt(0, 9, (3, 2, 5), 17), prompt(1, 70)
    for example, bucket in ((short, 64), (long, 80)):
        jax.block_until_ready(tiny_model().embed(fit_prompt(example, bucket)))
    before = num_compiled_programs()
    assert prepare(tiny_model(), [75, 50, 80], table=STATIC, measures_recall=False, **SIZES) == [64, 80]
    assert num_compiled_programs() == before + 2, "one program of a layer for each bucket"
    with counted_compilations() as compilations:
        results = [prefill(tiny_model(), p, table=STATIC, measures_recall=False, **SIZES) for p in (short, long, short)]
        assert compilations() == 0
    assert num_compiled_programs() == before + 2
    assert [result.report.padded_tokens for result in results] == [64, 80, 64]
    np.testing.assert_array_equal(results[0].logits, results[2].logits)


@pytest.mark.slow
def test_chunks_and_batches_are_prepared_too():
    settings: dict[str, Any] = dict(table=STATIC, chunk_tokens=32, measures_recall=False, **SIZES)
    prepare(tiny_model(), [58], batch=2, **settings)
    programs = num_compiled_programs()
    single = prompt(2, 58)
    prefill(tiny_model(), type(single).batch([single, prompt(3, 60)]), **settings)
    assert num_compiled_programs() == programs
    prefill(tiny_model(), single, **settings)
    assert num_compiled_programs() == programs + 1, "a prompt alone is another program"


@pytest.mark.parametrize(("max_new_tokens", "chunk_tokens"), [(0, None), (20, None), (16, 32), (150, None)])
def test_all_sizes_of_a_bucket_are_found(max_new_tokens, chunk_tokens):
    options = PrefillOptions(max_new_tokens=max_new_tokens, chunk_tokens=chunk_tokens, **SIZES)

    def request(num_tokens):
        return request_for(TINY_CONFIG, num_tokens, options)

    lengths = {each.lengths for each in _of_bucket(request(90))}
    assert lengths == {request(n).lengths for n in range(81, 97)}


def test_what_prefill_refuses_is_refused(monkeypatch):
    assert prepare(tiny_model(), [], **SIZES) == []
    with pytest.raises(ValueError, match="a prompt must have 1 to 256 tokens .the largest bucket., got 257"):
        prepare(tiny_model(), [64, 257], **SIZES)
    monkeypatch.setattr(memory_check, "memory_of", lambda device: DeviceMemory(limit=10_000))
    with pytest.raises(DoesNotFitError, match="1 x 80 tokens must fit the device"):
        prepare(tiny_model(), [64, 75], **SIZES)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        (64, {}, "lengths must be numbers of tokens, as in .64., got 64"),
        ("64", {}, "lengths must be numbers of tokens"),
        ([64, 80.0], {}, "num_tokens must be a whole number, got 80.0"),
        ([None], {}, "num_tokens must be a whole number, got None"),
        ([64], dict(batch=0), "batch must be at least 1, got 0"),
        ([64], dict(batch=1.5), "batch must be a whole number, got 1.5"),
        ([64], dict(max_new_tokens=3.5), "max_new_tokens must be a whole number, got 3.5"),
        ([64], dict(chunk_tokens="32"), "chunk_tokens must be a whole number, got '32'"),
        ([64], dict(table="mix"), "table must be a PatternTable, a pattern or None, got 'mix'"),
    ],
)
def test_what_is_no_length_or_setting_is_refused_before_anything_is_compiled(lengths, settings, message):
    programs = num_compiled_programs()
    with pytest.raises(ValueError, match=message):
        prepare(tiny_model(), lengths, **SIZES, **settings)
    assert num_compiled_programs() == programs


@pytest.mark.usefixtures("no_shape_checks")
def test_lengths_and_settings_may_be_of_numpy():
    settings: dict[str, Any] = dict(max_new_tokens=np.int64(3), chunk_tokens=np.int64(32))
    length, batch = cast(Any, (np.int64(90), np.int32(2)))
    ours = request_for(TINY_CONFIG, length, PrefillOptions(**SIZES, **settings), batch=batch)
    assert ours == request_for(TINY_CONFIG, 90, PrefillOptions(**SIZES, max_new_tokens=3, chunk_tokens=32), batch=2)
    assert type(ours.options.chunk_tokens) is type(ours.num_tokens) is type(ours.batch) is int


@pytest.mark.usefixtures("no_shape_checks")
def test_a_program_is_kept_although_another_fails(monkeypatch):
    programs = ProgramCache()
    monkeypatch.setattr(compilation, "PROGRAMS", programs)
    with ThreadPoolExecutor() as pool:
        compilations = compilation._Compilations(pool=pool)
        futures: Any = {"fails": pool.submit(divmod, 1, 0), "compiles": pool.submit(divmod, 7, 2)}
        compilations.futures = futures
        with pytest.raises(ZeroDivisionError):
            compilations.finish()
    assert programs["compiles"] == (3, 1) and "fails" not in programs
