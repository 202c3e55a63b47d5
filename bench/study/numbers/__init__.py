"""The numbers of a study as a file: written, read again, and put together from several machines."""
