"""Transformers' Qwen2 with the same sizes and sdpa, as a user would run instead, in its own process.

JAX keeps the device memory it has taken, so torch runs in another process, before JAX opens the device. The layers are
those of Qwen2.5-VL; rotary positions with one axis cost the same.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

TIMEOUT_SECONDS = 300


def measure_transformers(config: Any, tokens: list[int]) -> list[dict[str, Any]]:
    """Figures of each length: seconds and peak memory of a prefill, or why there is none."""
    sizes = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
    )
    command = [sys.executable, "-m", "mmi_jax.bench.baselines.transformers_model", json.dumps([sizes, tokens])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        return _read_lines(str(error.stdout or "")) + [{"error": f"stopped after {TIMEOUT_SECONDS} s"}]
    figures = _read_lines(done.stdout)
    return figures if done.returncode == 0 else [*figures, {"error": f"status {done.returncode}: {done.stderr[-300:]}"}]


def _read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def main(sizes: dict[str, Any], tokens: list[int]) -> None:
    """Prints one JSON object for each length, as it is measured; stops at the first that does not fit."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Qwen2Config, Qwen2ForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_default_dtype(torch.bfloat16)
    config = Qwen2Config(**sizes, max_position_embeddings=2**20, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"), torch.no_grad():
        model = Qwen2ForCausalLM(config).eval()
        for num_tokens in tokens:
            figures = _measure(torch, model, num_tokens)
            print(json.dumps(figures), flush=True)
            if "error" in figures:
                break


def _measure(torch: ModuleType, model: Callable[..., object], num_tokens: int) -> dict[str, Any]:
    ids = torch.randint(0, 32000, (1, num_tokens))
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = model(ids, logits_to_keep=1, use_cache=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            del out
    except torch.cuda.OutOfMemoryError as error:
        return {"tokens": num_tokens, "error": str(error)[:200]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "tokens": num_tokens,
        "seconds": round(min(seconds), 4),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
