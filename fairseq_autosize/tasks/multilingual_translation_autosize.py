"""fairseq's multilingual translation task (a batch of each pair in turn) with auto-sizing."""

from argparse import ArgumentParser

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask

from ..config import AutosizeConfig
from ._autosize import AutosizeMixin, register_autosize_task


@register_autosize_task("multilingual_translation")
class MultilingualTranslationAutosizeTask(AutosizeMixin, MultilingualTranslationTask):
    """Train a model for each pair of languages, with shared layers or not, and auto-size all.

    One of fairseq's older tasks, whose options are no dataclass; `fairseq-hydra-train` has none.
    """

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        super().add_args(parser)
        gen_parser_from_dataclass(parser, AutosizeConfig(), delete_default=False)
