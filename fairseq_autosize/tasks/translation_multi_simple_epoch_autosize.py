"""fairseq's multilingual translation task (sampling by epoch) with auto-sizing."""

from argparse import ArgumentParser
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from ..config import AutosizeConfig
from ._autosize import AutosizeMixin, register_autosize_task


@register_autosize_task("translation_multi_simple_epoch")
class TranslationMultiSimpleEpochAutosizeTask(AutosizeMixin, TranslationMultiSimpleEpochTask):
    """Translate between several languages, and auto-size the model while it trains.

    One of fairseq's older tasks, whose options are no dataclass; `fairseq-hydra-train` has none.
    """

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        super().add_args(parser)
        gen_parser_from_dataclass(parser, AutosizeConfig(), delete_default=False)

    def can_reuse_epoch_itr(self, dataset: Any) -> bool:
        """Never: each epoch samples anew, with a seed made of its number."""
        return False
