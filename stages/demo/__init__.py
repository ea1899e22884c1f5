"""`refshard demo`: prepare the embedded default, and summarize it."""
