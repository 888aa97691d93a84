"""fairseq's multilingual translation task (sampling by epoch) with auto-sizing."""

from typing import Any

from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from ._autosize import LegacyAutosizeMixin, register_autosize_task


@register_autosize_task("translation_multi_simple_epoch")
class TranslationMultiSimpleEpochAutosizeTask(LegacyAutosizeMixin, TranslationMultiSimpleEpochTask):
    """Translate between several languages, and auto-size the model while it trains.

    One of fairseq's older tasks, which `fairseq-hydra-train` does not have.
    """

    def can_reuse_epoch_itr(self, dataset: Any) -> bool:
        """With RoundRobin. Otherwise each epoch samples anew, with a seed made of its number."""
        return self.args.sampling_method == "RoundRobin"
