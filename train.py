"""The command line: ``rewurst`` and ``python train.py`` are the same program."""
