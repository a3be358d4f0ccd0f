"""Language models whose caches of keys and values can be merged."""
