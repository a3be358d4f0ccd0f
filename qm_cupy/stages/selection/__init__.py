"""Selection: which tokens keep their saliency as their weight in the merge."""
