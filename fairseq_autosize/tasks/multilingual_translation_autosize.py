"""fairseq's multilingual translation task (a batch of each pair in turn) with auto-sizing."""

from fairseq.tasks.multilingual_translation import MultilingualTranslationTask

from ._autosize import LegacyAutosizeMixin, register_autosize_task


@register_autosize_task("multilingual_translation")
class MultilingualTranslationAutosizeTask(LegacyAutosizeMixin, MultilingualTranslationTask):
    """Train a model for each pair of languages, with shared layers or not, and auto-size all.

    One of fairseq's older tasks, which `fairseq-hydra-train` does not have.
    """
