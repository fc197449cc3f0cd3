"""The command line: one file a verb or family of verbs. Each parses, calls one function and shows what it gives."""
