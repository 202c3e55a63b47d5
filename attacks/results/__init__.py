"""Reports as a paper needs them: rows of each image, tables, and two runs compared.

Read in this order:

- ``rows_file``: rows of plain values as CSV and as JSON lines, and back. It knows no report.
- ``image_rows``: a report as rows, one an image and attack; their columns are declared there.
- ``outcomes``: such rows as values in [0, 1]: how far an image is right at a radius.
- ``accuracies``: outcomes as accuracies with intervals, one row an attack and radius.
- ``layout``: such rows as the cells of a table; ``left_out``: the sentences below it; ``latex``: as
  a LaTeX table.
- ``paired``: a test and an interval for the difference of paired values. It knows no attack.
- ``better``: which of two runs is better, in a sentence.
- ``comparison``: two runs on the same images.
"""
