"""The operators: one file each, the reference first."""
