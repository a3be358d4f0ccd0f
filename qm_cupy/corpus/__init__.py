"""Work on files of tokens: which arrays are used, the merge, and the result."""
