"""TEXT IN: read, check, clean, tokenise, split."""
