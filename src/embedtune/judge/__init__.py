"""JUDGED: paired comparisons, and the model card."""
