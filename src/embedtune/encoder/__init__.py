"""THE MODEL: open and save it, run it without padding, embed with it."""
