"""`python -m flash_sparse_attention.cli` is `fsa`."""

from . import main

main()
