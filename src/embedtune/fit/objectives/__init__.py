"""One objective a file: what a step computes and how it is scored."""
