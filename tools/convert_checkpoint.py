#!/usr/bin/env python3
"""The same as `megatron-dtrpo convert`: import, export, roundtrip, inspect."""

import sys

from megatron_dtrpo.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
