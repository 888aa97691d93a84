"""Tasks with auto-sizing. Importing the modules registers them with fairseq."""

from . import language_modeling_autosize, translation_autosize  # noqa: F401
