"""The programs of refshard, one file per command."""
