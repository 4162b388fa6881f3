"""Block lists: from runs of kv blocks to the lists of a `BlockIndex`; block_sizes, inputs, api, reference, xla."""
