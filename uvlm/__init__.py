"""uvlm: a DeepSpeed trainer for one transformer that understands images and generates them as discrete codes."""

__version__ = "0.1.0"
