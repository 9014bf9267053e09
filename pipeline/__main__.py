"""`python -m pipeline` is `pilothouse`."""
from pipeline.cli.main import main

if __name__ == "__main__":
    main()
