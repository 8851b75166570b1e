"""Rows, templates, tokens and batches: from files or generators to what a step reads."""
