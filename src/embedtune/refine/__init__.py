"""REFINED: statistics of embeddings, and what is done with them."""
