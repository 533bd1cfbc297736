"""A workflow pipeline that teaches a vision-language model to think with images."""

__version__ = "0.1.0"
