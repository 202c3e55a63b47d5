"""The data that commands take by name: two sets that come with PyPI packages, files and folders,
streamed or held in memory."""
