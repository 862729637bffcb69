"""Weights in files: reading them safely, and accounting for every key.

Read in this order: files.py (whatever is on disk becomes tensors by name), accounting.py (loaded, new, dropped on
purpose, unexpected), reloading.py (image weights into a video model).
"""
