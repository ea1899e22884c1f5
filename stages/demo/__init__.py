"""`refshard demo`: prepare the embedded default, and sum it up."""
