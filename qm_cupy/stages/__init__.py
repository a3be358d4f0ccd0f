"""The stages of QuickMerge++: each has a folder, with a file for each operation."""
