"""The method: from patterns to plans, and from plans to attention."""
