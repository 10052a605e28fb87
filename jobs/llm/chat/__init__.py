"""`python -m jobs.llm.chat --model LOCATION`: talk to a model on this machine, in a terminal, through a pipe or as JSON lines.

Only code that answers a person belongs here: opening a model that can talk, the conversation, and how it is shown. Which artifact of a job
is taken is decided by the command line (`cli/chat.py`), which starts this package as a process.

    command_line.py  options and exit codes
    opening.py       what is at a location, and whether it can talk
    bases.py         base models in the deployment's store
    model.py         what a conversation needs of a model
    gguf_model.py, huggingface_model.py  the two that run models: llama.cpp, transformers
    conversation.py  the messages so far
    output.py        answers as text, side by side, or as JSON lines
    terminal.py      banner, commands, history, Ctrl-C
"""
