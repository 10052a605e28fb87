"""How the API's answers look in a terminal. Everything here turns JSON into text; nothing here sends or prints, but for `print_job`."""
