"""`python -m cogds`: see `cogds.cli`."""

import sys

from cogds.cli import main

if __name__ == "__main__":
    sys.exit(main())
