"""Models of other libraries, made to run on ironmoe's experts."""
