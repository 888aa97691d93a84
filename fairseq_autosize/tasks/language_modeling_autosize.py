"""fairseq's language modeling task with auto-sizing."""

from dataclasses import dataclass

from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from ..config import AutosizeConfig
from ._autosize import AutosizeMixin, register_autosize_task


@dataclass
class LanguageModelingAutosizeConfig(LanguageModelingConfig, AutosizeConfig):
    """The options of ``language_modeling``, and the `--prox*` block."""


@register_autosize_task("language_modeling", dataclass=LanguageModelingAutosizeConfig)
class LanguageModelingAutosizeTask(AutosizeMixin, LanguageModelingTask):
    """Train a language model, and auto-size it meanwhile (Murray and Chiang 2015)."""
