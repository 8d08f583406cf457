"""transformers imports torchao where it is installed, and that writes notes about itself to stderr;
here both are imported without them. Import this before a model is loaded, and not earlier: it
takes seconds.
"""

from __future__ import annotations

import logging

_loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
_levels = [logger.level for logger in _loggers]
try:
    for _logger in _loggers:
        _logger.setLevel(logging.ERROR)
    import transformers.modeling_utils  # noqa: F401
finally:
    for _logger, _level in zip(_loggers, _levels, strict=True):
        _logger.setLevel(_level)
