"""What a video model is worth, and what time added to it. No training, no Lightning.

Read in this order: features.py (every video is decoded once), scores.py and metrics.py, zero_shot.py (the shortest
whole path), results.py (what a result file says), then honesty.py, retrieval.py and probe.py.
"""
