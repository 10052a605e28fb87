"""One script per trainer that is measured, each run in its own environment: `python -m bench.peers_training.NAME PLAN.json`.

    rows             makes the base and the rows, once for all of them
    tunesmith        our trainer, through the code that an attempt runs
    trl_trainer      TRL's SFTTrainer, with its defaults or with our flags
    llama_factory    LLaMA-Factory, as its examples set it
    unsloth_trainer  Unsloth, on a GPU
    evaluate         the loss of a finished adapter on held-out rows, by plain transformers, the same for all

Each reads a plan and writes what it saw beside it (`plan.py`). What they share knows no library, so that any environment can read it.
"""
