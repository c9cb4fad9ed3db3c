"""What the example scripts share: their arguments, the messages, the PEFT configuration, the closing lines."""
