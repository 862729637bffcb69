"""The census: every architecture of timm and open_clip is converted and run, or refused with a reason.

    python -m tests.census --write docs/backbones.md

models.py builds each architecture twice (full size without numbers; small with random ones), checks.py says what must
hold, survey.py does it for all, page.py writes docs/backbones.md and reads it back for the tests.
"""
