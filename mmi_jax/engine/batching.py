"""prefill_many: prompts of different lengths, none of them padded to the longest."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Unpack, runtime_checkable

import jax

from mmi_jax.engine.prefill import OnStage, PrefillResult, prefill
from mmi_jax.engine.prompts import lengths_of
from mmi_jax.engine.protocols import Prompt, VisionLanguageModel
from mmi_jax.engine.settings.buckets import Buckets
from mmi_jax.engine.settings.options import PrefillOptions, PrefillSettings, options_of
from mmi_jax.sharding import ONE_DEVICE

BATCH_TOKENS = 2**16
"""Padded tokens of a batch, at most: beyond it a GPU is full, and batching gains nothing."""

ONE_PROMPT_ONLY = ("cache", "logits_at")
"""Parameters of `prefill` that belong to one prompt, and are refused by name."""


@runtime_checkable
class BatchablePrompt(Prompt, Protocol):
    """A prompt whose type puts several together."""

    @staticmethod
    def batch(prompts: Any) -> Any:
        """Several prompts as one batch, each padded at its end to the longest."""
        ...


def prefill_many(
    model: VisionLanguageModel,
    prompts: Sequence[BatchablePrompt],
    *,
    batch_tokens: int = BATCH_TOKENS,
    options: PrefillOptions | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    on_stage: OnStage | None = None,
    **settings: Unpack[PrefillSettings],
) -> list[PrefillResult]:
    """The result of every prompt, in order, as `prefill` gives it for the prompt alone.

    Prompts of one bucket run together, up to `batch_tokens` padded tokens, in batches of 1, 2, 4, ... prompts: a bucket
    has few programs, however many prompts come. All others run alone. The caches of all results are held at once.

    Args:
      model: as for `prefill`.
      prompts: of one prompt each, with `type(prompt).batch(prompts)` to put several together.
      batch_tokens: padded tokens of a batch, at most; a longer prompt runs alone.
      options: the settings, as for `prefill`.
      on_batch: called with (prompts done, prompts in all) after every batch.
      on_stage: as for `prefill`.
      **settings: fields of `PrefillOptions` in place of those of `options`: the table, `max_new_tokens`, ...

    Raises:
      ValueError: no prompts, a batch in place of a prompt, a setting that belongs to one prompt, or as `prefill`.
    """
    keywords: dict[str, Any] = dict(settings)
    if not_allowed := [name for name in ONE_PROMPT_ONLY if keywords.pop(name, None) is not None]:
        raise ValueError(f"prefill_many runs independent prompts on one device: expected no {', '.join(not_allowed)}")
    options = options_of(options, PrefillSettings(**keywords))
    if options.mesh is not None:
        raise ValueError("prefill_many runs independent prompts on one device: expected no mesh")
    if not prompts or any(prompt.tokens.shape[0] != 1 for prompt in prompts):
        raise ValueError(f"expected one prompt or more, each a batch of 1: got {[p.tokens.shape[0] for p in prompts]}")
    buckets = options.buckets_on(ONE_DEVICE)
    results: dict[int, PrefillResult] = {}
    for members in batches([int(lengths_of(prompt)[0]) for prompt in prompts], batch_tokens, buckets):
        chosen = [prompts[n] for n in members]
        together = chosen[0] if len(chosen) == 1 else type(chosen[0]).batch(chosen)
        result = prefill(model, together, options=options, on_stage=on_stage)
        results |= zip(members, _single(result, len(members)), strict=True)
        if on_batch is not None:
            on_batch(len(results), len(prompts))
    return [results[n] for n in range(len(prompts))]


def batches(lengths: Sequence[int], batch_tokens: int, buckets: Buckets) -> Iterator[list[int]]:
    """Indices of the prompts of each batch: powers of two of one bucket, the longest buckets first.

    Lengths 60, 30, 61, 64, 10 in buckets of 32 and 64, at most 128 tokens a batch:

        [0, 2]  [3]  [1, 4]
    """
    of_bucket: dict[int, list[int]] = {}
    for n, length in enumerate(lengths):
        of_bucket.setdefault(buckets.length_for(length), []).append(n)
    for padded in sorted(of_bucket, reverse=True):
        waiting, max_size = of_bucket[padded], max(1, batch_tokens // padded)
        while waiting:
            size = 1 << (min(max_size, len(waiting)).bit_length() - 1)
            yield waiting[:size]
            waiting = waiting[size:]


def _single(result: PrefillResult, number: int) -> list[PrefillResult]:
    """The results of each prompt of a batch; all have its report."""
    if number == 1:
        return [result]
    cache = result.cache
    return [
        dataclasses.replace(
            result,
            logits=result.logits[n : n + 1],
            hidden=result.hidden[n : n + 1],
            cache=dataclasses.replace(
                cache,
                k=cache.k[:, n : n + 1],
                v=cache.v[:, n : n + 1],
                lengths=cache.lengths[n : n + 1],
                next_rope_pos=cache.next_rope_pos[n : n + 1],
                layout=jax.tree.map(lambda x, n=n: x[n : n + 1], cache.layout),
            ),
        )
        for n in range(number)
    ]
