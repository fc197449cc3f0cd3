"""The library: one file a verb of the command line. Each holds the verb's whole workflow."""
