"""What is measured of each model of the study: one measurement in one file, registered where it is
defined."""
