"""fairseq's translation task with auto-sizing."""

from dataclasses import dataclass

from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ..config import AutosizeConfig
from ._autosize import AutosizeMixin, register_autosize_task


@dataclass
class TranslationAutosizeConfig(TranslationConfig, AutosizeConfig):
    """The options of ``translation``, and the `--prox*` block."""


@register_autosize_task("translation", dataclass=TranslationAutosizeConfig)
class TranslationAutosizeTask(AutosizeMixin, TranslationTask):
    """Translate, and auto-size the model while it trains (Murray et al. 2019)."""
