"""Study: comparisons that a person asks for and nothing is decided by."""
