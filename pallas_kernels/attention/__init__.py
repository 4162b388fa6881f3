"""Block-sparse attention: api, reference, xla."""
