"""What ``--help`` prints: its layout, the groups of options, and what follows from registers."""
