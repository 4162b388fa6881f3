"""As much of torch as the peers call, over NumPy, so that their code runs where torch is not installed."""

import functools
import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np

BFLOAT16 = np.dtype(jnp.bfloat16)


class Tensor:
    """A NumPy array under torch's names."""

    def __init__(self, array):
        self.array = array

    def cuda(self):
        return self

    def cpu(self):
        return self

    def numpy(self):
        return self.array

    def view(self, dtype):
        return Tensor(self.array.view(dtype))

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def repeat_interleave(self, times, dim):
        return Tensor(np.repeat(self.array, times, axis=dim))

    def __getitem__(self, key):
        plain = lambda x: x.array if isinstance(x, Tensor) else x  # noqa: E731
        return Tensor(self.array[tuple(map(plain, key)) if isinstance(key, tuple) else plain(key)])


class NoGrad:
    """A context that does nothing: `torch.no_grad()`, and `sdpa_kernel(...)`."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def attention(q, k, v, mask, scale):
    """Masked dense attention in float64 of `[1, h, t, d]`, in q's type."""
    q, k, v = (x.array.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.where(mask, np.einsum("bhtd,bhsd->bhts", q, k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhts,bhsd->bhtd", weights / weights.sum(axis=-1, keepdims=True), v)


class BlockMask(types.SimpleNamespace):
    """What FlexAttention is told to visit, as a mask of all pairs."""

    @classmethod
    def from_kv_blocks(cls, partial_count, partial, full_count, full, *, BLOCK_SIZE, mask_mod):
        num_blocks = partial.array.shape[2]
        rows = np.arange(num_blocks * BLOCK_SIZE)
        pairs = mask_mod(0, 0, rows[:, None], rows[None])
        mask = np.zeros((1, partial.array.shape[1], len(rows), len(rows)), bool)
        for (_, h, i), count in np.ndenumerate(partial_count.array):
            tile = lambda j, i=i: np.ix_(*(np.arange(n * BLOCK_SIZE, (n + 1) * BLOCK_SIZE) for n in (i, j)))  # noqa: E731
            for j in partial.array[0, h, i, :count]:
                mask[0, h][tile(j)] = pairs[tile(j)]
            for j in full.array[0, h, i, : full_count.array[0, h, i]]:
                mask[0, h][tile(j)] = True
        return cls(mask=mask)


def modules(*, error: float = 0.0, takes_gqa: bool = True) -> dict[str, Any]:
    """Modules to stand in `sys.modules`; outputs are wrong by the relative `error`."""

    def sdpa(q, k, v, *, is_causal, scale, enable_gqa=False):
        if enable_gqa and not takes_gqa:
            raise RuntimeError("No available kernel. Aborting execution.")
        assert is_causal and (enable_gqa or q.array.shape[1] == k.array.shape[1])
        t = q.array.shape[2]
        return Tensor(attention(q, k, v, np.tril(np.ones((t, t), bool)), scale) * (1 + error))

    def flex_attention(q, k, v, *, block_mask, scale, enable_gqa):
        assert enable_gqa
        return Tensor(attention(q, k, v, block_mask.mask, scale) * (1 + error))

    torch: Any = types.ModuleType("torch")
    torch.__version__ = "fake"
    torch.bfloat16, torch.float32 = BFLOAT16, np.dtype(np.float32)
    torch.from_numpy, torch.no_grad = Tensor, NoGrad
    nothing = lambda: None  # noqa: E731
    torch.cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=nothing, empty_cache=nothing)
    torch.compiler = types.SimpleNamespace(reset=nothing)
    torch.compile = lambda fun, dynamic: functools.wraps(fun)(fun)
    names = ("torch.nn", "torch.nn.attention", "torch.nn.attention.flex_attention", "torch.nn.functional")
    found: dict[str, Any] = {"torch": torch} | {name: types.ModuleType(name) for name in names}
    found["torch.nn.attention"].SDPBackend = types.SimpleNamespace(CUDNN_ATTENTION=1, FLASH_ATTENTION=2)
    found["torch.nn.attention"].sdpa_kernel = NoGrad
    found["torch.nn.functional"].scaled_dot_product_attention = sdpa
    found["torch.nn.attention.flex_attention"].flex_attention = flex_attention
    found["torch.nn.attention.flex_attention"].BlockMask = BlockMask
    return found


def install(monkeypatch, **kwargs) -> None:
    """The modules in `sys.modules` for the length of a test."""
    for name, module in modules(**kwargs).items():
        monkeypatch.setitem(sys.modules, name, module)
