"""accelerate's names where scripts import them from: `table.py` says what each is, `modules.py` makes the modules."""
