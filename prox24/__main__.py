"""`python -m prox24`."""

import sys

from prox24.cli.main import main

sys.exit(main())
