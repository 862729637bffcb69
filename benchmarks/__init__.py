"""Ratios measured in one run, interleaved, medians with their spread. No test asserts a time."""
