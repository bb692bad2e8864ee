"""distft: one fine-tuning recipe, any number of GPUs."""

__version__ = "0.1.0"
