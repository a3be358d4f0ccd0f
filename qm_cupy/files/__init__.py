"""Files of arrays: readers that read a few entries at a time, and writers."""
