"""JUDGED: retrieval, similarity, labels, scores, tags, paired comparisons, drift, the report, the model card."""
