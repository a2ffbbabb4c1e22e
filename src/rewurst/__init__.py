"""rewurst: Lightning building blocks for training large models without wasting compute.

Continual pre-training of language models and the Würstchen cascade, as LightningModules, data modules and callbacks:
``rewurst.modules``, ``rewurst.datamodules``, ``rewurst.callbacks``. This package itself imports nothing heavy.
"""

__version__ = "0.1.0"

__all__ = ["UsageError", "__version__"]


class UsageError(ValueError):
    """Something a user can put right: the message is one line with the thing, its value and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """
