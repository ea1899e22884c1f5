"""The parts of refshard: importable, with no command line, and nothing happens at import."""
