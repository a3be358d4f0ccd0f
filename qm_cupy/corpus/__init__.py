"""Files of token arrays."""
