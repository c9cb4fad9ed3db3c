"""Importing this keeps a warning of a library to itself that a user of the examples can do nothing about."""

from __future__ import annotations

import warnings

# peft asks for this property by its old name, and transformers 5.23 warns of it in each process; it does no harm.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
