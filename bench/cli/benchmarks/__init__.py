"""The commands of ``ironmoe bench``, a file each."""
