"""What the command lines of this folder share."""

import argparse
import sys
from typing import NoReturn

EXIT_ERROR = 3
"""0, 1 and 2 are the verdicts of `eval.run`."""


class Parser(argparse.ArgumentParser):
    """Ends with `EXIT_ERROR`: argparse's own 2 is a verdict here."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_ERROR, f"error: {message}\n")
