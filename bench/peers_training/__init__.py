"""One script per measured trainer, each run in its own environment: `python -m bench.peers_training.NAME PLAN.json`.

    rows             makes the base and the rows for all trainers
    tunesmith        our trainer, with the code that an attempt runs
    trl_trainer      TRL's SFTTrainer, with its defaults or with our flags
    llama_factory    LLaMA-Factory, as its examples configure it
    unsloth_trainer  Unsloth, on a GPU
    evaluate         the loss of the adapters on held-out rows, with plain transformers for all trainers

Each trainer's script reads a plan and writes a record next to it (`plan.py`). Modules that all scripts share import no library at the
top level, so that every environment can load them.
"""
