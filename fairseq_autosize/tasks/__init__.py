"""Tasks with auto-sizing. Importing the modules registers them with fairseq."""

from ..compat import require_fairseq

require_fairseq()

from . import language_modeling_autosize, translation_autosize  # noqa: E402, F401
