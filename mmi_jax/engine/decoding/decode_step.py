"""Decoding on the device: a block of tokens as one program, which ends early once every prompt has ended."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from mmi_jax.engine.kv_cache import KVCache
from mmi_jax.engine.protocols import VisionLanguageModel
from pallas_kernels.decode.api import Implementation, decode_attention
from pallas_kernels.layer_matmul.api import layer_matmul
from pallas_kernels.notation import Array, Bool, Float, Int32
from pallas_kernels.pytree import pytree, static_field

BLOCK_TOKENS = 16
"""Tokens of one program run: the host looks at what was decoded once in so many tokens."""

MIN_NEW_TOKENS = 64
"""Rows for new keys are this many or a larger power of two: few programs, and whole tiles of the decode kernel."""


@pytree
class Choice:
    """The rule by which a token is chosen from logits, and the tokens that end a prompt; see `decode`.

    Args:
      temperature, top_p: read where `is_greedy` and `takes_all` say so, so that their values compile nothing anew.
      is_greedy: takes the most likely token.
      takes_all: samples from all tokens, whatever `top_p` is.
      end_tokens: as in `decode`.
    """

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    is_greedy: bool = static_field()
    takes_all: bool = static_field()
    end_tokens: tuple[int, ...] = static_field()


def choice_of(temperature: float, top_p: float, end_tokens: tuple[int, ...]) -> Choice:
    """The choice of these settings of `decode`."""
    return Choice(
        temperature=jnp.float32(temperature),
        top_p=jnp.float32(top_p),
        is_greedy=temperature == 0,
        takes_all=top_p >= 1,
        end_tokens=tuple(end_tokens),
    )


@pytree
class Decoding:
    """State on the device from one block of tokens to the next.

    Args:
      token: the last token of each prompt.
      is_done: whether an end token was chosen before or now.
      num_new: tokens chosen so far; the last one's key is not there yet.
      k_new, v_new: keys and values of the tokens after the prompt, rows `num_new - 1` and later not written.
    """

    token: Int32[Array, " b"]
    is_done: Bool[Array, " b"]
    num_new: Int32[Array, ""]
    k_new: Float[Array, "layers b n g d"]
    v_new: Float[Array, "layers b n g d"]


def new_rows(max_new_tokens: int) -> int:
    """Rows that the new tokens' keys get."""
    return max(MIN_NEW_TOKENS, 1 << max(0, math.ceil(math.log2(max(max_new_tokens, 1)))))


@functools.partial(jax.jit, static_argnames=("num_rows", "sharding"))
def start(
    logits: Float[Array, "b v"],
    cache: KVCache,
    rng: Array,
    *,
    choice: Choice,
    num_rows: int,
    sharding: NamedSharding | None,
) -> Decoding:
    """The first token, chosen from the prefill's logits, and zeroed rows for the keys of all that follow."""
    num_layers, b, _, num_kv_heads, head_dim = cache.k.shape
    token = _everywhere(sample(logits, jax.random.fold_in(rng, 0), choice), sharding)
    k_new, v_new = (jnp.zeros((num_layers, b, num_rows, num_kv_heads, head_dim), cache.k.dtype) for _ in range(2))
    return Decoding(token=token, is_done=_ends(token, choice), num_new=jnp.int32(1), k_new=k_new, v_new=v_new)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("implementation", "sharding"), donate_argnums=3)
def run_block(
    graphdef: Any,
    state: PyTree,
    cache: KVCache,
    decoding: Decoding,
    rng: Array,
    limit: Int32[Array, ""],
    *,
    choice: Choice,
    implementation: Implementation | None,
    sharding: NamedSharding | None,
) -> tuple[Decoding, Int32[Array, "b n"], Int32[Array, ""]]:
    """Up to `BLOCK_TOKENS` more tokens of each prompt, and how many they are.

    Args:
      graphdef, state: of the model.
      cache: of the prompts; read only.
      decoding: donated.
      limit: tokens after which decoding ends, over all blocks.
      sharding: of a value that every device holds, where the cache is split over several.
    """
    from flax import nnx

    model: Any = nnx.merge(graphdef, state)

    def goes_on(carry):
        decoding, _, n = carry
        return (n < BLOCK_TOKENS) & (decoding.num_new < limit) & ~jnp.all(decoding.is_done)

    def one_token(carry):
        decoding, tokens, n = carry
        logits, k_new, v_new = step(model, cache, decoding, implementation)
        token = sample(logits, jax.random.fold_in(rng, decoding.num_new), choice)
        token = jnp.where(decoding.is_done, decoding.token, token)
        decoding = Decoding(
            token=token,
            is_done=decoding.is_done | _ends(token, choice),
            num_new=decoding.num_new + 1,
            k_new=k_new,
            v_new=v_new,
        )
        return decoding, tokens.at[:, n].set(token), n + 1

    empty = jnp.zeros((len(decoding.token), BLOCK_TOKENS), jnp.int32)
    decoding, tokens, n = jax.lax.while_loop(goes_on, one_token, (decoding, empty, jnp.int32(0)))
    return decoding, _everywhere(tokens, sharding), _everywhere(n, sharding)


def step(model: VisionLanguageModel, cache: KVCache, decoding: Decoding, implementation: Implementation | None):
    """Logits `[b, v]` after the last token of each prompt, and the new tokens' keys and values with this step's."""
    from flax import nnx

    layer_graphdef, layer_state = nnx.split(model.layers)
    place = decoding.num_new - 1
    rope_pos = jnp.broadcast_to((cache.next_rope_pos + place)[None, :, None], (3, len(decoding.token), 1))
    rotary = model.rotary(rope_pos)

    def layer(carry, n):
        x, k_new, v_new = carry

        def attend(q, k, v):
            written = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (n, 0, place, 0, 0))
                for old, new in ((k_new, k), (v_new, v))
            )
            out = decode_attention(
                q[:, 0].astype(cache.k.dtype),
                cache.k,
                cache.v,
                layer=n,
                lengths=cache.lengths,
                k_new=written[0],
                v_new=written[1],
                num_new=place + 1,
                implementation=implementation,
            )
            return out[:, None].astype(q.dtype), written

        x, written = layer_of_stack(layer_graphdef, layer_state, n, implementation)(x, rotary, attend)
        return (x, *written), None

    carry = model.embedding(decoding.token[:, None]), decoding.k_new, decoding.v_new
    (x, k_new, v_new), _ = jax.lax.scan(layer, carry, jnp.arange(cache.k.shape[0]))
    return model.unembed(x[:, 0]), k_new, v_new


def layer_of_stack(graphdef: Any, stacked: PyTree, n: Array, implementation: Implementation | None) -> Any:
    """Layer `n` of a stack, whose linear maps multiply by their matrix where it lies, without a copy of it.

    Args:
      graphdef, stacked: of a module whose parameters carry a leading layer axis.
      implementation: of the products, see `layer_matmul`.
    """
    from flax import nnx

    def product(x, w, *_, **__):
        rows = layer_matmul(x.reshape(-1, x.shape[-1]), w, n, implementation=implementation)
        return rows.reshape(*x.shape[:-1], -1)

    def weights(path, a):
        return a if jax.tree_util.keystr(path).count("kernel") and a.ndim == 3 else a[n]

    module = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(weights, stacked))
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Linear) and part.kernel.ndim == 3:
            part.dot_general = product
    return module


def sample(logits: Float[Array, "b v"], rng: Array, choice: Choice) -> Int32[Array, " b"]:
    """One token of each prompt."""
    if choice.is_greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / choice.temperature
    if choice.takes_all:
        return jax.random.categorical(rng, logits).astype(jnp.int32)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    min_logit = jnp.min(jnp.where(before < choice.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(rng, jnp.where(logits >= min_logit, logits, -jnp.inf)).astype(jnp.int32)


def _ends(token: Int32[Array, " b"], choice: Choice) -> Bool[Array, " b"]:
    return jnp.isin(token, jnp.asarray(choice.end_tokens, jnp.int32))


def _everywhere(x, sharding: NamedSharding | None):
    """The value on every device, where every host can read it."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def replicated(cache: KVCache) -> NamedSharding | None:
    """The sharding of a value that every device of the cache's mesh holds; None where the cache is not split."""
    sharding = cache.k.sharding
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return None
    return NamedSharding(sharding.mesh, P())
