"""Hash tables at the command line: text and counts read, tables built, judged and exchanged. Needs no fairseq."""
