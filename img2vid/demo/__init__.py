"""`img2vid demo`: the whole idea in a few minutes, on real weights and real video files, without a network."""
