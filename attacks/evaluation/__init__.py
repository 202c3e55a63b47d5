"""A data set in, a robustness report out: ``evaluate``.

``evaluate`` checks its ``arguments`` and starts an ``evaluation``, which takes chunks from its
``source``, hands them to the engine, and notes what comes back in records or in a ``journal``;
``summaries`` and ``report`` say what held. No file here knows an attack by name, except for Square
in ``outcome_checks``.
"""
