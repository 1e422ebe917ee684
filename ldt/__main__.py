"""`python -m ldt` and `deepspeed --module ldt`: the same program as the `ldt` command."""

import sys

from ldt.cli import main

sys.exit(main())
