"""Methods that a searched table is compared with: published tables, and families of patterns at equal cost."""
