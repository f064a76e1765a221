"""What relex logs, in the log of the process that runs a flow and, by Prefect, beside the flow run.

Prefect hands on what the loggers of PREFECT_LOGGING_EXTRA_LOGGERS write (see deploy.local.stack.environment), and
leaves their level at that of every library: warnings.
"""

import logging

LOGGERS = ("flows", "relex", "evaluation", "deploy")


def show_own_lines() -> None:
    """Let what relex itself says of its work be logged in this process; libraries stay at warnings."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
