"""JUDGED: retrieval, similarity, paired comparisons, drift, the report, the model card."""
