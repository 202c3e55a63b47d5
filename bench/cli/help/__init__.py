"""How the help of every command is laid out, and what it takes from registers."""
