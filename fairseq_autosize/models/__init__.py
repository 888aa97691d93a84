"""Models with a width per layer. Importing the module registers them with fairseq."""

from ..compat import require_fairseq

require_fairseq()

from . import transformer_autosize  # noqa: E402, F401
