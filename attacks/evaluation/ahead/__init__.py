"""What is left to do: at most (``rest``, ``costs``), and as images fared so far (``likely``)."""
