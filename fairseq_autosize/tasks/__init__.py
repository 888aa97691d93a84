"""Tasks with auto-sizing. Importing the modules registers them with fairseq."""

from ..compat import require_fairseq

require_fairseq()

from . import (  # noqa: E402
    language_modeling_autosize,  # noqa: F401
    multilingual_translation_autosize,  # noqa: F401
    translation_autosize,  # noqa: F401
    translation_multi_simple_epoch_autosize,  # noqa: F401
)
