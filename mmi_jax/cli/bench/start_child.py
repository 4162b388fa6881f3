"""A process that compiles one prefill's programs and times it, for `mmi bench prefill --start`."""

import json
import sys
import time
from pathlib import Path


def warm_up(
    *, preset: str, layers: int | None, table: str, dtype: str, tokens: int, directory: str
) -> dict[str, float]:
    """Seconds until all programs for so many tokens are compiled or read back, those of all its threads together, and
    the number of different layers.
    """
    import jax

    from mmi_jax.bench.prefill import prefill_program
    from mmi_jax.cli import compile_cache
    from mmi_jax.cli.bench.presets import config_of, table_of
    from mmi_jax.engine.programs.compilation import compiled_chunk
    from models import family_of

    config = config_of(preset, layers)
    family = family_of(config)
    model = family.without_vision(family.abstract_model(config, dtype=jax.numpy.dtype(dtype)))
    with compile_cache.compilation_cache_in(Path(directory)):
        jax.block_until_ready(jax.numpy.zeros(1))  # the device is open
        start, cpu_start = time.perf_counter(), time.process_time()
        program, inputs = prefill_program(model, table_of(table, config), tokens)
        chunk = compiled_chunk(program, inputs)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 1), "programs": len(chunk.layers)}


if __name__ == "__main__":
    print(json.dumps(warm_up(**json.loads(sys.argv[1]))))
