# SPDX-License-Identifier: Apache-2.0
"""`python -m rankfall`, and `torchrun -m rankfall`, are the command line."""

from rankfall.cli import main

if __name__ == "__main__":
    main()
