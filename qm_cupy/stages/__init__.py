"""The stages of QuickMerge++: a folder for each stage, a file for each operation."""
