"""The entry point: `python -m jobs.llm.chat`."""

import sys

from jobs.llm.chat.command_line import main

if __name__ == "__main__":
    sys.exit(main())
