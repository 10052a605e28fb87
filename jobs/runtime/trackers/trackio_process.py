"""`python -m jobs.runtime.trackers.trackio_process`: Trackio at work for one run. Reads a JSON object a line, and says `done` after each.

    {"init": {...}}                                          what `trackio.init` takes
    {"log": {name: number}, "step": n}                       a point
    {"table": name, "columns": [...], "rows": [...], "step": n}
    {"finish": true}                                         send what is left

Whatever the library prints goes to stderr.
"""

import contextlib
import json
import sys
from typing import Any


def main() -> None:
    """Obey until the other side hangs up; what the library raises ends the process, and is the last line of its stderr."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            handle_command(json.loads(line))
            answers.write("done\n")
            answers.flush()


def handle_command(message: dict[str, Any]) -> None:  # Any: JSON
    """Do what the message says. Raises whatever the library raises."""
    import trackio

    match message:
        case {"init": dict(told)}:
            trackio.init(**told, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
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
