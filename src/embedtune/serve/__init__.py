"""ANSWERED: an OpenAI-compatible server over one model, and over an index where one is given."""
