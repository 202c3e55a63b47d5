"""What a number was measured with: processor, GPU, packages, commit and command line."""
