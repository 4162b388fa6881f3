"""Times the Hopper kernel's variants on named cases: `python bench/hopper_check.py time "random32 28/4 32K" ...`."""

import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import mosaic_gpu, reference
from pallas_kernels.attention.cases import CASES, mixed_inputs
from pallas_kernels.attention.gpu_config import choose_config, padded_head_dim


def median_ms(fun, *args, repeats=5, target_ms=150.0):
    """Median milliseconds of one call, several calls queued per measurement."""
    jax.block_until_ready(fun(*args))
    start = time.perf_counter()
    jax.block_until_ready(fun(*args))
    calls = max(1, int(target_ms / 1e3 / (time.perf_counter() - start)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = fun(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return float(np.median(times))


def kernel(config):
    """The kernel with this config, jitted."""
    return jax.jit(lambda inputs: mosaic_gpu.launch(inputs, config))


def variants(case):
    """The table's config first, then the same with one thing changed."""
    base = choose_config(case.head_dim, case.block)
    yield "table", base
    yield "2 K stages", dataclasses.replace(base, num_k_stages=2)
    yield "turns", dataclasses.replace(base, take_turns=True)


def time_case(name, all_variants=True):
    """Prints milliseconds and TFLOP/s of each variant."""
    case = CASES[name]
    inputs = case.inputs()
    flops = case.flops(inputs.index)
    for label, config in variants(case):
        try:
            ms = median_ms(kernel(config), inputs)
            print(f"{name:20s} {label:12s} {ms:8.3f} ms {flops / ms / 1e9:7.1f} TFLOP/s", flush=True)
        except Exception as error:  # a variant that cannot run must not end the sweep
            print(f"{name:20s} {label:12s} failed: {str(error)[:500]}", flush=True)
        if not all_variants:
            return


def sampled_rows(inputs, rows):
    """Float64 attention of some `(head, row)` pairs on the host: outputs [n, d] and log-sum-exp [n]."""
    index = jax.tree.map(np.asarray, inputs.index)
    q_pos, kv_pos = np.asarray(inputs.q_pos), np.asarray(inputs.kv_pos)
    keys, values = np.asarray(inputs.k), np.asarray(inputs.v)
    outs, lses = [], []
    for h, t in rows:
        i = t // index.block_q
        first, count, num_full = (int(x[h, i]) for x in (index.first, index.count, index.num_full))
        starts = index.start[h, first : first + count]
        columns = (starts[:, None] + np.arange(index.block_kv)).reshape(-1)
        distance = q_pos[h, t] - kv_pos[index.pos_row[h, i]][columns]
        low, high = index.intervals[h][index.interval[h, first : first + count]].repeat(index.block_kv, axis=0).T
        seen = (distance >= 0) & (distance >= low) & (distance < high)
        seen |= np.arange(count).repeat(index.block_kv) < num_full
        g = h // inputs.heads_per_kv_head
        k, v = (x[g][columns[seen]].astype(np.float64) for x in (keys, values))
        scores = k @ np.asarray(inputs.q[h, t].astype(jnp.float32), np.float64) * inputs.scale
        top = scores.max()
        weights = np.exp(scores - top)
        outs.append(weights @ v / weights.sum())
        lses.append(top + np.log(weights.sum()))
    return np.stack(outs), np.array(lses)


def check_case(name, num_rows=32):
    """Prints the relative error of sampled rows against float64, and whether two runs are bit-equal."""
    case = CASES[name]
    inputs = case.inputs(seed=1)
    run = kernel(choose_config(case.head_dim, case.block))
    out, lse = run(inputs)
    again = run(inputs)
    rng = np.random.default_rng(0)
    rows = [(int(rng.integers(case.num_q_heads)), int(rng.integers(case.num_tokens))) for _ in range(num_rows)]
    want, want_lse = sampled_rows(inputs, rows)
    got = np.stack([np.asarray(out[h, t].astype(jnp.float32)) for h, t in rows])
    got_lse = np.array([float(lse[h, t]) for h, t in rows])
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    same = bool(jnp.array_equal(out, again[0])) and bool(jnp.array_equal(lse, again[1]))
    print(f"{name:20s} error {error:.2e} lse error {np.abs(got_lse - want_lse).max():.2e} bit-equal {same} "
          f"finite {bool(jnp.isfinite(out).all())}", flush=True)  # fmt: skip


def time_dense(name):
    """Prints the rate of cuDNN's dense causal attention at a case's size, causal half counted, and of a matmul."""
    case = CASES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (case.num_q_heads, case.num_kv_heads, case.num_kv_heads)
    shapes = [(1, case.num_tokens, h, case.head_dim) for h in heads]
    q, k, v = (jax.random.normal(key, shape, case.dtype) for key, shape in zip(keys, shapes, strict=True))
    run = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"))
    ms = median_ms(run, q, k, v)
    flops = 2.0 * case.num_tokens**2 * case.head_dim * case.num_q_heads
    print(f"{name:20s} cudnn dense  {ms:8.3f} ms {flops / ms / 1e9:7.1f} TFLOP/s", flush=True)
    a, b = (jax.random.normal(key, (8192, 8192), case.dtype) for key in keys[:2])
    ms = median_ms(jax.jit(jnp.matmul), a, b)
    print(f"8192^3 matmul {ms:8.3f} ms {2 * 8192**3 / ms / 1e9:7.1f} TFLOP/s", flush=True)


SMALL = [
    dict(head_dim=128, dtype="float16", num_extra=0, num_q_heads=7, num_q_blocks=8, num_shared=2048),
    dict(head_dim=80, block_kv=64, num_q_heads=8, num_kv_heads=2, num_q_blocks=16, num_shared=1024),
    dict(head_dim=128, block_q=256, block_kv=256, num_shared=1024, num_extra=512),
    dict(head_dim=64, num_q_heads=28, num_kv_heads=4, num_q_blocks=32, num_shared=4096),
    dict(head_dim=256, num_q_heads=6, num_kv_heads=2, num_q_blocks=16, num_shared=2048),
]


def check_small():
    """Prints errors against the float32 reference on small problems that use every rule of the contract."""
    for case in SMALL:
        inputs = mixed_inputs(**case)
        try:
            out, lse = kernel(choose_config(padded_head_dim(inputs.q.shape[-1]), inputs.index.block_kv))(inputs)
            want, want_lse = reference.attend(inputs)
            out, want, lse, want_lse = (np.asarray(x.astype(jnp.float32)) for x in (out, want, lse, want_lse))
            finite = np.isfinite(want_lse)
            error = np.linalg.norm(out - want) / np.linalg.norm(want)
            lse_error = np.abs(lse[finite] - want_lse[finite]).max()
            empty = bool((out[~finite] == 0).all() and (np.isneginf(lse) == ~finite).all())
            print(f"error {error:.2e} lse {lse_error:.2e} empty rows exact {empty}  {case}", flush=True)
        except Exception as failure:  # one broken config must not hide the others
            print(f"FAILED {case}: {str(failure)[:600]}", flush=True)


def time_flex(name):
    """Prints the rate of torch's FlexAttention on the same lists, where torch is installed."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    case = CASES[name]
    index = case.lists.index(case.num_q_heads, case.num_tokens, case.block)
    num_blocks = index.num_q_blocks
    tables = np.zeros((2, 1, case.num_q_heads, num_blocks, num_blocks), np.int32)
    for h in range(case.num_q_heads):
        for i, (first, count, full) in enumerate(zip(index.first[h], index.count[h], index.num_full[h], strict=True)):
            blocks = index.start[h, first : first + count] // case.block
            tables[0, 0, h, i, : count - full], tables[1, 0, h, i, :full] = blocks[full:], blocks[:full]
    counts = [torch.from_numpy((x[None]).copy()).cuda() for x in (index.count - index.num_full, index.num_full)]
    partial, full = (torch.from_numpy(x).cuda() for x in tables)
    mask = BlockMask.from_kv_blocks(
        counts[0], partial, counts[1], full, BLOCK_SIZE=case.block, mask_mod=lambda b, h, q, k: q >= k
    )
    heads = (case.num_q_heads, case.num_kv_heads, case.num_kv_heads)
    q, k, v = (
        torch.randn(1, h, case.num_tokens, case.head_dim, device="cuda", dtype=getattr(torch, case.dtype))
        for h in heads
    )
    run = torch.compile(lambda: flex_attention(q, k, v, block_mask=mask, enable_gqa=True), dynamic=False)
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    for _ in range(20):
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    ms = float(np.median(times))
    print(f"{name:20s} flex         {ms:8.3f} ms {case.flops(index) / ms / 1e9:7.1f} TFLOP/s", flush=True)


def main(command, *names):
    """`small`; or `check`, `time` (variants), `table` (the table's config), `dense` or `flex` with names of cases."""
    if command == "small":
        return check_small()
    for name in names or CASES:
        {
            "check": check_case,
            "time": time_case,
            "dense": time_dense,
            "flex": time_flex,
            "table": lambda n: time_case(n, all_variants=False),
        }[command](name)


if __name__ == "__main__":
    main(*sys.argv[1:])
