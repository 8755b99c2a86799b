"""Where a replica's own log lines go: straight to its standard error, which Ray keeps in its log folder."""

import logging
import sys

FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def log_to_stderr(level: int = logging.INFO) -> None:
    """Call it inside a replica. Serve redirects sys.stderr to a log that holds 1,000 lines back."""
    logger = logging.getLogger("lserve")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)
