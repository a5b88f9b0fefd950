"""`python -m ipt.export CHECKPOINT OUTPUT`: see ipt.export.huggingface."""

from ipt.console import setup_logging, use_utf8
from ipt.export.huggingface import main

if __name__ == "__main__":
    use_utf8()
    setup_logging()
    main()
