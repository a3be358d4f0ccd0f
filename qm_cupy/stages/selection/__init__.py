"""Selection: which tokens carry their own weight."""
