"""`python -m uvlm`, which is what torchrun starts on every rank."""

from uvlm.cli import main

main()
