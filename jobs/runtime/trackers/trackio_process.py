"""`python -m jobs.runtime.trackers.trackio_process`: runs Trackio. Reads one JSON object per line and writes `done` after each.

    {"init": {...}, "guarded": bool}                         arguments of `trackio.init`; whether to check each connection
    {"log": {name: number}, "step": n}                       metrics of one step
    {"table": name, "columns": [...], "rows": [...], "step": n}
    {"finish": true}                                         send the remaining data

What the library prints goes to stderr. A run in a Space of the public Hub connects only where the egress policy allows: the Space is the
caller's, and may answer with a redirect to any address.
"""

import contextlib
import json
import sys
from typing import Any

from jobs.runtime.egress import guard_process
from jobs.runtime.settings import read_egress_policy


def main() -> None:
    """Handle commands until stdin is closed. An error of the library ends the process and is the last line of its stderr."""
    replies = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            handle_command(json.loads(line))
            replies.write("done\n")
            replies.flush()


def handle_command(message: dict[str, Any]) -> None:  # Any: JSON
    """Carry out one command. Raises what the library raises."""
    import trackio

    match message:
        case {"init": dict(arguments), "guarded": bool(guarded)}:
            if guarded:
                guard_process(read_egress_policy())
            trackio.init(**arguments, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
        case {"log": dict(values), "step": int(step)}:
            trackio.log(values, step=step)
        case {"table": str(name), "columns": list(columns), "rows": list(rows), "step": int(step)}:
            import pandas

            trackio.log({name: trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step)
        case {"finish": bool()}:
            trackio.finish()
        case _:
            raise ValueError(f"unknown message {sorted(message)}")


if __name__ == "__main__":
    main()
