"""The commands of ``img2vid``, one module each: ``make_parser()`` says what can be asked, ``main(argv)`` does it.

Nothing heavy is imported before the arguments are understood, so ``--help`` and mistakes are answered at once.
"""
