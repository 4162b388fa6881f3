"""A pattern for every layer and head: the table, its JSON, and what a pattern costs."""
