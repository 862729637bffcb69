"""What a certificate is made of: promises (guarantees.py), comparisons (evidence.py) and life (liveness.py)."""
