"""`refshard check`: rows, tokens and estimates, before a GPU is booked."""
