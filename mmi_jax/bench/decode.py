"""Figures of decoding: the time of a token, compared with reading weights and cache once on this device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmi_jax.bench.timing.measurements import measurement
from mmi_jax.bench.timing.wall_time import compile_lowered, compile_program, copy_bytes_per_s
from mmi_jax.engine.decoding import decode_step
from mmi_jax.engine.kv_cache import KVCache
from mmi_jax.engine.protocols import ModelConfig, VisionLanguageModel
from mmi_jax.layout import TokenLayout
from pallas_kernels.decode.api import Implementation, decode_attention
from pallas_kernels.notation import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSizes:
    """What is decoded from.

    Args:
      num_tokens: tokens of each prompt in the cache.
      batch: prompts.
      weight_bytes: of the weights that one token reads.
    """

    num_tokens: int
    batch: int
    weight_bytes: int

    def cache_bytes(self, config: ModelConfig, dtype) -> int:
        """Keys and values of all layers and prompts."""
        row = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
        return config.num_layers * self.batch * self.num_tokens * row


def bench_decode(
    model: VisionLanguageModel, name: str, sizes: DecodeSizes, *, with_baseline: bool, repeats: int
) -> dict[str, Any]:
    """Figures of a block of tokens after prompts of this length, from a random cache.

    Args:
      model: a `VisionLanguageModel`, weights in the dtype to be timed.
      name: of the case.
      sizes: of prompts and weights.
      with_baseline: also times the block with XLA's attention and products, and one layer's attention through cuDNN.
      repeats: measurements of each program.

    Raises:
      RuntimeError: our attention or our step is wrong; a wrong step is not timed.
    """
    cache = _random_cache(model, sizes)
    q = jax.random.normal(
        jax.random.key(3), (sizes.batch, model.config.num_heads, model.config.head_dim), cache.k.dtype
    )
    errors = _attention_errors(q, cache) | _step_error(model, cache)
    timing, num_tokens = _time_block(model, cache, None, repeats)
    bytes_per_token = sizes.weight_bytes + sizes.cache_bytes(model.config, cache.k.dtype)
    copy = copy_bytes_per_s()
    ms = timing.median_ms / num_tokens
    figures: dict[str, Any] = {
        "case": name,
        "tokens": sizes.num_tokens,
        "batch": sizes.batch,
        **errors,
        **timing.figures(),
        "tokens_per_block": num_tokens,
        "ms_per_token": round(ms, 4),
        "tokens_per_s": round(1e3 * sizes.batch / ms, 2),
        "gb_per_token": round(bytes_per_token / 1e9, 3),
        "tb_per_s": round(bytes_per_token / ms / 1e9, 3),
        "copy_tb_per_s": round(copy / 1e12, 3),
        "copy_fraction": round(bytes_per_token / ms * 1e3 / copy, 4),
    }
    others = [measurement("attention of one layer", lambda: _time_attention(q, cache, repeats))]
    if with_baseline:
        others.append(measurement("attention of one layer, cudnn", lambda: _time_cudnn(q, cache, repeats)))
        others.append(measurement("whole block, xla", lambda: _baseline(model, cache, repeats)))
    return figures | {"others": others}


def _random_cache(model: VisionLanguageModel, sizes: DecodeSizes) -> KVCache:
    """Keys and values of prompts of one length, padded to whole tiles."""
    config, dtype = model.config, model.layers.attention_norm.scale[...].dtype
    capacity = -(-sizes.num_tokens // 128) * 128
    shape = (config.num_layers, sizes.batch, capacity, config.num_kv_heads, config.head_dim)
    draw = jax.jit(functools.partial(jax.random.normal, shape=shape, dtype=dtype))
    k, v = map(draw, jax.random.split(jax.random.key(1)))
    lengths = jnp.full((sizes.batch,), sizes.num_tokens, jnp.int32)
    absent = jnp.zeros((sizes.batch, capacity), jnp.int32)
    layout = TokenLayout(modality=absent, video=absent, frame=absent, row=absent, column=absent, pos=absent)
    return KVCache(k=k, v=v, lengths=lengths, next_rope_pos=lengths, layout=layout)


def _attend(q: Array, cache: KVCache, implementation: Implementation | None, layer: Array | int = 0):
    nothing = jnp.zeros((*cache.k.shape[:2], decode_step.MIN_NEW_TOKENS, *cache.k.shape[3:]), cache.k.dtype)
    return decode_attention(
        q,
        cache.k,
        cache.v,
        layer=layer,
        lengths=cache.lengths,
        k_new=nothing,
        v_new=nothing,
        num_new=0,
        implementation=implementation,
    )


def _attention_errors(q: Array, cache: KVCache) -> dict[str, float]:
    """Relative errors of one layer's attention against float32: ours at most twice that of XLA in the same dtype."""
    layer = dataclasses.replace(cache, k=cache.k[-1:], v=cache.v[-1:])
    with jax.default_matmul_precision("highest"):
        exact = dataclasses.replace(layer, k=layer.k.astype(jnp.float32), v=layer.v.astype(jnp.float32))
        want = np.asarray(jax.jit(lambda q, cache: _attend(q, cache, "xla"))(q.astype(jnp.float32), exact))
    del exact
    ours, plain = (
        _relative(jax.jit(functools.partial(_attend, implementation=name))(q, layer), want) for name in (None, "xla")
    )
    limit = 2 * plain + float(jnp.finfo(q.dtype).eps)
    if not ours <= limit:
        raise RuntimeError(f"the attention's relative error must be at most {limit:.2e}, got {ours:.2e}")
    return {"relative_error": ours, "relative_error_xla": plain}


def _step_error(model: VisionLanguageModel, cache: KVCache) -> dict[str, float]:
    """Relative difference of the logits after one token from those by XLA's attention and products."""
    from flax import nnx  # here, so that attention and its benchmarks need no flax

    graphdef, state = nnx.split(model)

    def logits(name, state, cache, decoding):
        return decode_step.step(nnx.merge(graphdef, state), cache, decoding, name)[0]

    decoding = _start(cache, model.config.vocab_size)
    ours, plain = (jax.jit(functools.partial(logits, name))(state, cache, decoding) for name in (None, "xla"))
    error = _relative(ours, np.asarray(plain))
    # About eight values of a layer are rounded, each by half an ulp at most, and the two sides round differently.
    limit = float(jnp.finfo(cache.k.dtype).eps) / 2 * (2 * 8 * cache.k.shape[0]) ** 0.5
    if not error <= limit:
        raise RuntimeError(f"the logits must equal XLA's within {limit:.2e}, got {error:.2e}")
    return {"logits_difference": error}


def _relative(got, want: np.ndarray) -> float:
    got = np.asarray(got, np.float32).astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _greedy() -> decode_step.Choice:
    return decode_step.choice_of(0.0, 1.0, ())


def _start(cache: KVCache, vocab_size: int) -> decode_step.Decoding:
    """After a first token."""
    logits = jnp.zeros((len(cache.lengths), vocab_size), jnp.float32)
    num_rows = decode_step.MIN_NEW_TOKENS
    return decode_step.start(logits, cache, jax.random.key(0), choice=_greedy(), num_rows=num_rows, sharding=None)


def _time_block(model: VisionLanguageModel, cache: KVCache, implementation: Implementation | None, repeats: int):
    """The timing of a whole block of tokens, and how many they are."""
    from flax import nnx

    graphdef, state = nnx.split(model)
    limit = jnp.int32(1 + decode_step.BLOCK_TOKENS)
    key = jax.random.key(0)
    lowered = decode_step.run_block.lower(
        graphdef,
        state,
        cache,
        _start(cache, model.config.vocab_size),
        key,
        limit,
        choice=_greedy(),
        implementation=implementation,
        sharding=None,
    )
    program = compile_lowered(lowered)

    def run():
        return program.call(state, cache, _start(cache, model.config.vocab_size), key, limit, choice=_greedy())

    num_tokens = int(run()[2])
    block = dataclasses.replace(program, call=run)
    return block.time(repeats=repeats), num_tokens


def _time_attention(q: Array, cache: KVCache, repeats: int) -> dict[str, Any]:
    """All layers one after another, each from the whole cache; the time of one."""

    def layers(q, cache):
        return jax.lax.scan(lambda q, n: (_attend(q, cache, None, n), None), q, jnp.arange(cache.k.shape[0]))[0]

    timing = compile_program(layers, q, cache).time(q, cache, repeats=repeats)
    return _attention_rate(timing.median_ms / cache.k.shape[0], cache)


def _time_cudnn(q: Array, cache: KVCache, repeats: int) -> dict[str, Any]:
    """`jax.nn.dot_product_attention` with lengths, on one layer that was copied out before; cuDNN or a reason."""
    k, v = cache.k[0], cache.v[0]
    q_lengths = jnp.ones(len(cache.lengths), jnp.int32)

    def attend(q, k, v, lengths):
        return jax.nn.dot_product_attention(
            q[:, None], k, v, query_seq_lengths=q_lengths, key_value_seq_lengths=lengths, implementation="cudnn"
        )

    timing = compile_program(attend, q, k, v, cache.lengths).time(q, k, v, cache.lengths, repeats=repeats)
    return _attention_rate(timing.median_ms, cache)


def _attention_rate(ms: float, cache: KVCache) -> dict[str, Any]:
    layers, _, capacity = cache.k.shape[:3]
    num_bytes = 2 * cache.k.nbytes // layers * int(cache.lengths[0]) / capacity
    return {"median_ms": round(ms, 4), "tb_per_s": round(num_bytes / ms / 1e9, 3)}


def _baseline(model: VisionLanguageModel, cache: KVCache, repeats: int) -> dict[str, Any]:
    timing, num_tokens = _time_block(model, cache, "xla", repeats)
    return timing.figures() | {"ms_per_token": round(timing.median_ms / num_tokens, 4)}
