"""RobustBench's evaluation under its own call: ``benchmark`` is the call, ``cifar`` and
``imagenet`` know the data on disk, ``model_info`` the file that it writes."""
