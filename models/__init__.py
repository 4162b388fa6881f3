"""Flax NNX vision-language models, their configs, weight maps and processors."""
