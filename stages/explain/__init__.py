"""`refshard explain`: one pair as the models see it."""
