"""Bulk embedding, and search in what was embedded."""
