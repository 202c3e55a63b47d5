"""What several commands share: data, models, training, measuring, timing, folders, errors.

Nothing here knows a command or a report.
"""
