"""accelerate's names where scripts import them from: `table.py` says what each is here, `modules.py` makes the modules of it."""
