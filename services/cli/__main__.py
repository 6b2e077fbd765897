"""`python -m services.cli`, for processes that `serve` starts with its own interpreter."""

from services.cli.main import main

main()
