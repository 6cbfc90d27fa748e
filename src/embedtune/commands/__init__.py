"""THE COMMANDS: what each takes (a dataclass, its comments are the help) and what it does; cli.py parses and prints."""
