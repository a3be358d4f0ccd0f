"""Selection: the tokens that keep their own saliency as their weight."""
