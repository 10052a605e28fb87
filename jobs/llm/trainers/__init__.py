"""One file per trainer type, read top to bottom. Trainers may resemble each other; they share no base class.

What they share knows no library: `course` (when to save, when to end), `saving` (what a checkpoint holds of ours), `healing`.
"""
