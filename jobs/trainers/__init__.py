"""One file per trainer type, read top to bottom. Trainers may resemble each other; they share no base class."""
