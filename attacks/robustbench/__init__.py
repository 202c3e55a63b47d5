"""RobustBench's evaluation under its own call: ``benchmark`` is the call, ``cifar`` and
``imagenet`` know the data on disk, ``zoo`` asks RobustBench how it prepares them for a model of its
own, ``model_info`` knows the file that it writes."""
