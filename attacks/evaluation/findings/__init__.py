"""What reports are made of: accuracies, checks, one attack's summary, and the words for them.

Read in this order: ``accuracy``, ``flag``, ``summary``, ``idle``, ``radius_text``, ``verdict``,
``text``.
"""
