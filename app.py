"""The playground alone: `python app.py`, then open http://127.0.0.1:8000.

The same page as `/playground` of the service (`python -m serve`), without the API. Settings and options are its own.
"""

import argparse

from diffusion_kd import errors
from serve import api, command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python app.py", description=__doc__)
    command.add_options(parser)
    command.run(command.settings(parser.parse_args()), api.create_playground)


if __name__ == "__main__":
    errors.run(main)
