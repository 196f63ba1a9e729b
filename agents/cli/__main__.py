"""`python -m agents.cli`: the same as `vmferry`, for places without the script."""

import sys

from agents.cli.main import main

sys.exit(main())
