"""The arguments and calls of the official attacks and of torchattacks, as attacks here take them:
``declared`` says what a class writes down, ``own`` which arguments are its own, ``translated``
turns a call, ``calls`` is what every attack inherits."""
