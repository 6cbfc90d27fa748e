"""DATA GROWN: pairs out of raw text, questions written by a model, hard negatives mined from a corpus."""
