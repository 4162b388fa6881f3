"""Pictures of masks, tables and head plans."""
