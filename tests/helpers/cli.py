"""The command line, run in this process."""

import pytest

from flows.cli.main import main


def relex(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run `relex ARGUMENTS…`; returns exit status, stdout and stderr."""
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["relex", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err
