"""Auto-sizing Transformers for fairseq: ``fairseq-train --user-dir fairseq_autosize --prox l21``.

Importing the package registers its tasks with fairseq. Without fairseq only the modules that need
nothing but torch can be used: `prox`, `proximal_gradient`, `groups`, `checkpoint`, `report`.
"""

from pathlib import Path

__version__ = "0.1.0"

from . import compat  # lets torch.load read fairseq's checkpoints weights-only

_fairseq = compat.find_fairseq()
if _fairseq is not None:
    # Once this package is in sys.modules, fairseq does not look for these any more.
    from . import models, tasks  # noqa: F401

    # `--user-dir fairseq_autosize` from another directory finds an installed package as
    # ".../fairseq/../fairseq_autosize", and fairseq then looks for just this spelling in
    # __path__ if the package is already imported.
    _spelled = _fairseq.parent / ".." / "fairseq_autosize"
    if _spelled.is_dir() and _spelled.samefile(Path(__file__).parent):
        __path__.append(str(_spelled))
