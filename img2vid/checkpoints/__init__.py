"""Video models on disk: our own format (native.py), and one file for each foreign one."""
